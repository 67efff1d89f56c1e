"""`outlay select` through the command: output, engines, exit codes, and the page."""

from __future__ import annotations

import json

import pytest

NASTY = "<script>alert('x')</script> & salt"


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pool"
    folder.mkdir()
    for shard in range(3):
        rows = [{"body": f"{NASTY} {n}" if n % 2 else f"saw and file {n}", "when": 1990 + n,
                 "from": "<b>web</b>" if n % 3 else "books", "size": n + 1, "key": f"{shard}-{n}"}
                for n in range(30)]  # fmt: skip
        lines = [json.dumps(row) for row in rows] + ["{broken"]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))
    return folder


COLUMNS = ("--text-column", "body", "--id-column", "key", "--date-column", "when",
           "--domain-column", "from", "--tokens-column", "size")  # fmt: skip


def test_it_selects_and_counts(outlay, pool):
    call = "quality_filters(after='2000')"
    answer = outlay("select", pool, "--method", call, "--method", "random_selection(keep=0.5)",
                    "--out", "kept", *COLUMNS, "--keep-dropped", "--json")  # fmt: skip
    assert answer.code == 0, answer.err
    counts = answer.json["counts"]
    assert answer.json == json.loads((pool.parent / "kept" / "manifest.json").read_text())
    assert counts["read"] == 93 and counts["quarantined"] == 3
    assert counts["dropped"]["quality_filters: date"] == 30
    assert answer.json["tokens"]["read"] == 3 * sum(range(1, 31))
    assert answer.json["settings"]["methods"] == [call, "random_selection(keep=0.5)"]
    shown = outlay("select", pool, "--method", call, "--method", "random_selection(keep=0.5)",
                   "--out", "kept", *COLUMNS, "--keep-dropped")  # fmt: skip
    assert shown.code == 0 and "quality_filters: date" in shown.out and "report.html" in shown.out


def test_its_page_is_whole_and_escapes_everything(outlay, pool):
    call = "quality_filters(words=('file',))"
    answer = outlay("select", pool, "--method", call, "--out", "kept", *COLUMNS)
    assert answer.code == 0, answer.err
    page = (pool.parent / "kept" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>web" not in page
    assert "&lt;b&gt;web" in page and "Kept by year" in page and "listed_words" in page
    assert page.count("<article>") == 40 and "http://" not in page and "https://" not in page


def test_parts_and_join(outlay, pool):
    words = ("select", pool, "--method", "random_selection(keep=0.5)", "--out", "kept", *COLUMNS,
             "--engine", "array")  # fmt: skip
    assert outlay(*words).code == 2
    for part in ("0/2", "1/2"):
        answer = outlay(*words, "--shard", part)
        assert answer.code == 0 and "--join" in answer.err, answer.err
        assert not (pool.parent / "kept" / "manifest.json").exists()
    answer = outlay(*words, "--join", "--json")
    assert answer.code == 0 and answer.json["counts"]["read"] == 93
    assert outlay(*words, "--join", "--shard", "0/2").code == 2
    assert outlay(*words, "--shard", "2/2").code == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "bone(r=4)"), "'bone' does not choose documents"),
        (("--method", "random_selection(keep=2.0)"), "keep = 2.0 is not allowed"),
        (("--method", "random_selection", "--engine", "spark"), "'spark' is unknown"),
        (("--method", "random_selection", "--text-column", "none"), "no field 'none'"),
        (("--method", "linear_selection(target='no.jsonl')"), "'no.jsonl' does not exist"),
    ],
)
def test_refusals(outlay, pool, more, message):
    answer = outlay("select", pool, "--out", "kept", *more)
    assert answer.code == 2, answer
    assert message in answer.err and len(answer.err.strip().splitlines()) == 2


def test_a_missing_input_is_named(outlay, pool):
    answer = outlay("select", "poool", "--out", "kept", "--method", "random_selection")
    assert answer.code == 2 and "did you mean 'pool'?" in answer.err
