"""compare and report: shapes, tables, and one page about many runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from outlay.cli import compare as verb
from outlay.cli.compare import _grid
from outlay.cli.reporting import arm_names, load
from outlay.core.errors import ConfigError

ARMS = ("--arm", "small=bone(r=2)", "--arm", "big=bone(r=4) @ optimizer.lr=3e-3")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two arms over two seeds; its JSON lies beside it."""
    import contextlib
    import io

    from cli.conftest import write_material

    from outlay.cli.app import run_app

    folder = tmp_path_factory.mktemp("compared")
    write_material(folder)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = run_app(
            ["compare", str(folder / "mine.yaml"), "--set", "methods=[]", *ARMS, "--seeds", "2",
             "--budget", "3steps", "--out", str(folder / "runs"), "--json", "--quiet"]
        )  # fmt: skip
    assert code == 0
    (folder / "compared.json").write_text(text.getvalue())
    return folder


def test_compare_has_the_promised_shape(compared):
    found = json.loads((compared / "compared.json").read_text())
    assert set(found) >= {"folder", "report", "arms", "pairs", "verdicts", "ties"}
    arm = {"name", "trainable", "seeds", "metric", "mean", "interval"}
    assert all(set(a) >= arm for a in found["arms"]) and len(found["arms"]) == 2
    pair = {"a", "b", "difference", "interval", "p_holm", "p_sign_flip", "detectable"}
    assert all(set(p) >= pair for p in found["pairs"]) and len(found["pairs"]) == 1
    assert Path(found["report"]).is_file()
    twin = json.loads((Path(found["folder"]) / "report.json").read_text())
    assert twin["command"].startswith("outlay compare ") and "small=bone(r=2)" in twin["command"]


def test_people_see_arms_pairs_and_groups(compared, capfd):
    found = json.loads((compared / "compared.json").read_text())
    capfd.readouterr()
    verb.show(found)
    out = capfd.readouterr().out
    assert "small - big" in out and "report.html" in out and "Paired differences" in out


def test_an_order_to_read_in_follows_the_metric():
    found = {"higher_is_better": False, "arms": [
        {"name": "a", "mean": 2.0}, {"name": "b", "mean": None}, {"name": "c", "mean": 1.0}
    ]}  # fmt: skip
    assert [a["name"] for a in verb._best_first(found)] == ["c", "a", "b"]


def test_an_interrupted_comparison_says_how_to_go_on(outlay, work, monkeypatch):
    from outlay.comparison import compare as comparison

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "compare", stopped)
    answer = outlay("compare", "mine.yaml", *ARMS)
    assert answer.code == 130
    assert answer.err.rstrip().endswith(
        "to go on: outlay compare mine.yaml --arm 'small=bone(r=2)' "
        "--arm 'big=bone(r=4) @ optimizer.lr=3e-3'"
    )


def test_report_judges_the_runs_of_a_comparison(outlay, compared, work):
    folder = json.loads((compared / "compared.json").read_text())["folder"]
    answer = outlay("report", folder, "--out", "page", "--json")
    found, before = answer.json, json.loads((compared / "compared.json").read_text())
    assert {a["name"]: a["mean"] for a in found["arms"]} == {
        a["name"]: a["mean"] for a in before["arms"]
    }
    assert abs(found["pairs"][0]["difference"]) == abs(before["pairs"][0]["difference"])
    assert (work / "page" / "report.html").is_file()
    assert outlay("report", folder, "--out", "page").code == 3
    assert outlay("report", folder, "--out", "page", "--force").code == 0


def test_report_of_runs_of_different_seeds_is_one_arm(outlay, work):
    folders = [
        outlay("run", "mine.yaml", "--json", "--quiet", "--seed", seed).last["folder"]
        for seed in (0, 1)
    ]
    assert set(arm_names([load(Path(f)) for f in folders]).values()) == {"mine"}
    found = outlay("report", *folders, "--out", "page", "--json").json
    assert [(a["name"], a["seeds"]) for a in found["arms"]] == [("mine", 2)]
    twice = outlay("report", folders[0], folders[0], "--out", "other", "--json").json
    assert twice["arms"][0]["seeds"] == 1
    wrong = outlay("report", *folders, "--out", "third", "--metric", "test/beauty")
    assert wrong.code == 2 and "test/accuracy" in wrong.err


def test_grids_are_read():
    assert _grid("optimizer.lr=1e-3,3e-3") == ("optimizer.lr", [1e-3, 3e-3])
    assert _grid("batch.size=[8, 16]") == ("batch.size", [8, 16])
    with pytest.raises(ConfigError, match=re.escape("a grid of at least two")):
        _grid("optimizer.lr=1e-3")
