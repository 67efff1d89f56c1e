"""Whole selections: counts that add up, the same bytes however the work is cut or killed."""

from __future__ import annotations

import errno
import gzip
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import outlay
from outlay.core import registry
from outlay.core.errors import ConfigError, DataError, OutlayError
from outlay.shards import job, tables, tasks
from outlay.shards.engines import part_of
from outlay.shards.scorers import WordList
from outlay.shards.sets import Fields

SEA = ["wave", "salt", "fish", "tide", "shore", "boat", "net", "gull"]
TOOL = ["saw", "file", "drill", "axe", "hammer", "plane", "nail", "vice"]


def documents(count, seed=0):
    draw = random.Random(seed)
    for number in range(count):
        domain = draw.choice(["sea", "tool"])
        words = SEA if domain == "sea" else TOOL
        text = " ".join(draw.choice(words) for _ in range(draw.randint(5, 50)))
        yield {"id": f"d{number}", "text": text, "domain": domain, "date": draw.randint(1990, 2020),
               "extra": {"n": number}}  # fmt: skip


def lay_out(folder, rows, count=5):
    """The rows dealt to shards of several kinds."""
    folder.mkdir(parents=True)
    for number in range(count):
        part = rows[number::count]
        lines = "".join(json.dumps(row) + "\n" for row in part).encode()
        if number % 3 == 0:
            (folder / f"s{number}.jsonl").write_bytes(lines)
        elif number % 3 == 1:
            (folder / f"s{number}.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        else:
            pq.write_table(pa.Table.from_pylist(part), folder / f"s{number}.parquet")
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    base = tmp_path_factory.mktemp("corpus")
    lay_out(base / "pool", list(documents(600)))
    target = "".join(json.dumps({"text": d["text"]}) + "\n" for d in documents(90, 1)
                     if d["domain"] == "sea")  # fmt: skip
    (base / "task.jsonl").write_text(target)
    return base


def methods(base, *more):
    target = str(base / "task.jsonl")
    calls = [
        "quality_filters(after='2000')",
        f"linear_selection(target={target!r}, keep=0.25, bits=12)",
        *more,
    ]
    return [registry.build(call) for call in calls]


def content(folder, *parts):
    """Bytes of every file that a selection promises."""
    names = [p for part in (*parts, "data") for p in sorted((folder / part).rglob("*"))]
    names += [folder / "manifest.json", folder / "quarantine.jsonl"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in names if p.is_file()}


def kept_ids(folder):
    return set(pq.read_table(folder / "data", columns=["id"])["id"].to_pylist())


def test_the_most_fitting_documents_are_kept_with_scores_and_metadata(pool, tmp_path):
    found = job.select(pool / "pool", methods(pool), tmp_path / "out", keep_dropped=True)
    counts = found.manifest["counts"]
    assert counts["read"] == 600 == counts["kept"] + sum(counts["dropped"].values())
    table = pq.read_table(tmp_path / "out" / "data").to_pylist()
    others = pq.read_table(tmp_path / "out" / "dropped").to_pylist()
    assert len(table) == counts["kept"] and len(table) + len(others) == 600
    assert {row["domain"] for row in table} == {"sea"} and min(r["date"] for r in table) >= "2000"
    assert json.loads(table[0]["metadata"])["extra"]["n"] >= 0
    cut = min(row["target_likeness"] for row in table)
    beyond = [r["target_likeness"] for r in others if r["reason"].endswith("beyond the share")]
    assert beyond and max(beyond) <= cut
    assert Counter(row["reason"] for row in others) == counts["dropped"]
    recent = sum(row["tokens"] for row in [*table, *others] if row["date"] >= "2000")
    tokens = found.manifest["tokens"]
    assert 0 <= 0.25 * recent - tokens["kept"] < 100
    assert [len(found.examples[side]) for side in ("kept", "dropped")] == [20, 20]


def test_what_is_kept_is_data_for_a_run(pool, tmp_path):
    from outlay.training.data.readers import read_splits

    job.select(pool / "pool", methods(pool), tmp_path / "out")
    rows = read_splits(tmp_path / "out")["train"].rows
    assert {row["id"] for row in rows} == kept_ids(tmp_path / "out")
    again = job.select(tmp_path / "out", [registry.build("random_selection(keep=0.5)")],
                       tmp_path / "half", fields=Fields(id="id"))  # fmt: skip
    assert again.manifest["counts"]["read"] == len(rows)


def test_workers_change_nothing(pool, tmp_path):
    for workers in (1, 3):
        job.select(pool / "pool", methods(pool), tmp_path / str(workers), workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "3")


def test_neither_order_nor_cutting_of_the_shards_changes_the_choice(tmp_path, pool):
    rows = list(documents(600))
    random.Random(5).shuffle(rows)
    lay_out(tmp_path / "other", rows, count=9)
    chosen = []
    for name, folder in (("one", pool / "pool"), ("two", tmp_path / "other")):
        found = job.select(folder, methods(pool), tmp_path / name, fields=Fields(id="id"))
        chosen.append((kept_ids(found.folder), found.manifest["thresholds"]))
    assert chosen[0] == chosen[1]


def test_parts_joined_equal_the_whole(pool, tmp_path):
    job.select(pool / "pool", methods(pool), tmp_path / "whole")
    for part in ("2/3", "0/3", "1/3"):
        assert job.select(pool / "pool", methods(pool), tmp_path / "parts", part=part) is None
        assert not (tmp_path / "parts" / "manifest.json").exists()
    scored = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts" / "scores").iterdir()}
    job.select(pool / "pool", methods(pool), tmp_path / "parts")
    assert {p: p.stat().st_mtime_ns for p in scored} == scored, "a shard was scored twice"
    assert content(tmp_path / "whole") == content(tmp_path / "parts")
    for text in ("3/3", "x", "1/", "-1/2"):
        with pytest.raises(ConfigError, match="is not allowed"):
            part_of(text)


# ---- kills ---------------------------------------------------------------------------------------


def child(work, *, at_sync=None, after=None):
    """Run `work` in a process that is killed at its n-th sync or after some seconds."""

    def run():
        if at_sync is not None:
            real, seen = os.fsync, Counter()

            def fsync(file):
                seen["n"] += 1
                if seen["n"] == at_sync:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(file)

            os.fsync = fsync
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    if after is not None:
        time.sleep(after)
        process.kill()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("how", ["at syncs", "at random moments"])
def test_killed_at_any_moment_it_ends_at_the_same_bytes(pool, tmp_path, how):
    # Dropped documents are written too: two files of one shard must not part.
    whole, out = tmp_path / "whole", tmp_path / "out"

    def work(folder=out):
        job.select(pool / "pool", methods(pool), folder, keep_dropped=True)

    began = time.perf_counter()
    work(whole)
    long = time.perf_counter() - began
    draw, codes = random.Random(3), []
    for number in range(40):
        if how == "at syncs":
            codes.append(child(work, at_sync=2 + number % 4))
        else:
            codes.append(child(work, after=draw.uniform(0.05, 1.1) * long))
        if codes[-1] == 0 and how == "at syncs":
            break
    assert -signal.SIGKILL in codes
    seen = {p: p.stat().st_mtime_ns for p in (out / "scores").glob("*.parquet")}
    work()
    assert {p: p.stat().st_mtime_ns for p in seen} == seen, "a finished shard was done again"
    assert content(out, "dropped") == content(whole, "dropped")
    assert not list(out.rglob("*.part"))


def test_a_killed_worker_is_named_and_the_rest_goes_on(pool, tmp_path):
    def fail(_):
        raise AssertionError("the pool was not used")

    script = (
        "import sys; from outlay.shards.engines import run_tasks; import os\n"
        "if __name__ == '__main__':\n"
        "    try: list(run_tasks(os._exit, [3, 3], workers=2))\n"
        "    except Exception as error: print(error)\n"
    )
    (tmp_path / "script.py").write_text(script)
    import subprocess
    import sys

    found = subprocess.run([sys.executable, str(tmp_path / "script.py")], text=True,
                           capture_output=True, timeout=100)  # fmt: skip
    assert "a worker process died" in found.stdout and "goes on" in found.stdout, found.stderr


# ---- bad rows ------------------------------------------------------------------------------------


def test_every_row_is_counted_once_whatever_is_wrong_with_it(tmp_path):
    pool = tmp_path / "pool"
    pool.mkdir()
    good = [{"id": f"a{n}", "text": f"some words number {n}"} for n in range(20)]
    lines = [json.dumps(row).encode() for row in good]
    (pool / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    bad = [b'{"text": "cut', b'{"id": "b1"}', b'{"id": "b2", "text": 5}',
           b'{"id": "b3", "text": "\xff"}', b'{"id": "b4", "text": "a\x00"}',
           lines[3], lines[3], b'{"text": "no id"}']  # fmt: skip
    (pool / "b.jsonl").write_bytes(b"\n".join(bad))
    packed = gzip.compress(os.urandom(4) + b"\n".join(lines[:1]) + os.urandom(3000), mtime=0)
    (pool / "c.jsonl.gz").write_bytes(packed[:-200])
    (pool / "d.jsonl").write_bytes(b"")
    pq.write_table(pa.table({"id": ["e1", "e2"], "other": [1, 2]}), pool / "e.parquet")
    pq.write_table(pa.table({"id": ["f1"], "text": ["some words more"]}), pool / "f.parquet")
    found = job.select(pool, [registry.build("random_selection(keep=0.5, unit='documents')")],
                       tmp_path / "out", fields=Fields(id="id"), workers=1)  # fmt: skip
    counts = found.manifest["counts"]
    text = (tmp_path / "out" / "quarantine.jsonl").read_text()
    aside = [json.loads(line) for line in text.splitlines()]
    assert counts["kept"] == 10 and sum(counts["dropped"].values()) == 11
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values()) + len(aside)
    assert counts["quarantined"] == len(aside)
    named = Counter((row["file"], row["reason"]) for row in aside)
    assert named[("b.jsonl", "id seen before")] == 2
    assert named[("b.jsonl", "no field 'id'")] == 1
    assert named[("c.jsonl.gz", "the compressed file ends early")] == 1
    assert named[("e.parquet", "no field 'text'")] == 2
    assert sum(entry["rows"] for entry in found.manifest["inputs"]) == counts["read"]


def test_a_document_that_a_scorer_fails_on_is_set_aside_alone(pool, tmp_path, monkeypatch):
    real = WordList.score

    def score(self, texts):
        if any("poison" in text for text in texts):
            raise ValueError("cannot read this")
        return real(self, texts)

    monkeypatch.setattr(WordList, "score", score)
    rows = [{"text": f"salt {n}"} for n in range(2000)] + [{"text": "poison"}] * 2
    lay_out(tmp_path / "pool", rows, count=1)
    method = registry.build("quality_filters(words=('fish',))")
    found = job.select(tmp_path / "pool", [method], tmp_path / "out")
    assert found.manifest["counts"] == {"read": 2002, "kept": 2000, "dropped": {}, "quarantined": 2}
    aside = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert "listed_words: ValueError: cannot read this" in aside
    lay_out(tmp_path / "worse", rows + [{"text": "poison"}] * 10, count=1)
    with pytest.raises(DataError, match="scorers failed on 12 of 2,012 documents"):
        job.select(tmp_path / "worse", [method], tmp_path / "out2")


def test_a_full_disk_is_said_and_the_work_goes_on(pool, tmp_path, monkeypatch):
    real, seen = pq.ParquetWriter.write_batch, Counter()

    def write(self, *given, **more):
        seen["n"] += 1
        if seen["n"] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_batch", write)
        with pytest.raises(OutlayError, match=r"No space left(.|\n)*free some space"):
            job.select(pool / "pool", methods(pool), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.part"))
    job.select(pool / "pool", methods(pool), tmp_path / "out")
    job.select(pool / "pool", methods(pool), tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# ---- refusals ------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_selection(pool, tmp_path):
    half = [registry.build("random_selection(keep=0.5)")]
    job.select(pool / "pool", half, tmp_path / "out")
    before = content(tmp_path / "out")
    job.select(pool / "pool", half, tmp_path / "out")
    assert content(tmp_path / "out") == before
    with pytest.raises(ConfigError, match="from other files or settings"):
        job.select(pool / "pool", half, tmp_path / "out", seed=1)
    with pytest.raises(ConfigError, match="not empty and holds no selection"):
        job.select(pool / "pool", half, pool)


def test_a_result_among_its_inputs_is_no_input(tmp_path):
    lay_out(tmp_path / "pool", list(documents(40)))
    half = [registry.build("random_selection(keep=0.5)")]
    first = job.select(tmp_path / "pool", half, tmp_path / "pool" / "kept").manifest
    again = job.select(tmp_path / "pool", half, tmp_path / "pool" / "kept").manifest
    assert first == again and first["counts"]["read"] == 40


def test_a_target_that_changes_is_another_selection(pool, tmp_path):
    target = tmp_path / "goal.jsonl"
    target.write_text('{"text": "salt fish"}\n')
    method = registry.build(f"linear_selection(target={str(target)!r}, bits=10)")
    job.select(pool / "pool", [method], tmp_path / "out")
    target.write_text('{"text": "saw drill"}\n')
    with pytest.raises(ConfigError, match="from other files or settings"):
        job.select(pool / "pool", [method], tmp_path / "out")


def test_methods_that_choose_nothing_are_refused(pool, tmp_path):
    with pytest.raises(ConfigError, match="no method"):
        job.select(pool / "pool", [], tmp_path / "out")
    with pytest.raises(ConfigError, match="'bone' does not choose documents"):
        job.select(pool / "pool", [outlay.Bone()], tmp_path / "out")
    with pytest.raises(DataError, match="keeps none of"):
        job.select(pool / "pool", [registry.build("quality_filters(after='2500')")],
                   tmp_path / "none")  # fmt: skip
    (tmp_path / "bad.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(DataError, match="none of 1 rows can be used: no field 'text'"):
        job.select(tmp_path / "bad.jsonl", methods(pool)[:1], tmp_path / "bad")


def test_a_shard_that_changes_between_scoring_and_writing_is_refused(pool, tmp_path):
    rows = [{"text": f"words {n}", "id": n} for n in range(4)]
    path = lay_out(tmp_path / "pool", rows, count=1) / "s0.jsonl"
    half = [registry.build("random_selection(keep=0.5)")]
    real = tasks._export

    def export(*given):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
        return real(*given)

    tasks._export = export
    try:
        with pytest.raises(DataError, match="changed since it was scored"):
            job.select(tmp_path / "pool", half, tmp_path / "out", fields=Fields(id="id"))
    finally:
        tasks._export = real


def test_a_damaged_side_table_is_named(pool, tmp_path):
    half = [registry.build("random_selection(keep=0.5)")]
    job.select(pool / "pool", half, tmp_path / "out")
    path = next((tmp_path / "out" / "scores").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="is damaged"):
        job.select(pool / "pool", half, tmp_path / "out")


def test_scores_lie_in_row_order_with_their_fingerprint(pool, tmp_path):
    job.select(pool / "pool", methods(pool), tmp_path / "out")
    for path in sorted((tmp_path / "out" / "scores").glob("*.parquet")):
        (rows,) = tables.chunks(path)
        assert np.all(np.diff(rows["row"]) > 0)
        facts = json.loads(pq.read_metadata(path).metadata[b"outlay"])
        assert tables.footer(path, facts["fingerprint"])["counts"]["usable"] == len(rows["row"])
        assert tables.footer(path, "another") is None
        assert rows["target_likeness"].dtype == np.float32 and "text" not in rows


def test_ray_gives_the_same_bytes(pool, tmp_path):
    ray = pytest.importorskip("ray", reason='pip install "outlay[ray]"')
    job.select(pool / "pool", methods(pool), tmp_path / "local")
    job.select(pool / "pool", methods(pool), tmp_path / "ray", engine="ray", workers=2)
    ray.shutdown()
    assert content(tmp_path / "local") == content(tmp_path / "ray")


def test_no_file_of_another_kind_is_left(pool, tmp_path):
    found = job.select(pool / "pool", methods(pool), tmp_path / "out")
    names = {p.name for p in Path(found.folder).iterdir()}
    assert names == {"data", "scores", "selectors", "run.json", "manifest.json", "quarantine.jsonl"}
