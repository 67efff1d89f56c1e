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


def test_a_key_alone_is_tuned_over_a_grid_of_its_own(work):
    from outlay.training.recipe import Recipe

    recipe = Recipe.read("mine.yaml")
    own = {"optimizer.lr": (1e-4, 1e-3)}
    assert verb.grids(["optimizer.lr"], recipe, own) == {"optimizer.lr": [1e-4, 1e-3]}
    assert verb.grids(["recipe"], recipe, own) == {"optimizer.lr": [1e-4, 1e-3]}
    assert verb.grids(["optimizer.lr"], recipe, {}) == {
        "optimizer.lr": [0.001, 0.003, 0.01, 0.03, 0.1]
    }
    assert verb.grids(["batch.size"], recipe, {}) == {"batch.size": [1, 2, 8, 24, 80]}
    assert verb.grids(["optimizer.lr=1,2", "batch.size=4,8"], recipe, {}) == {
        "optimizer.lr": [1, 2], "batch.size": [4, 8],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="has no grid of its own"):
        verb.grids(["recipe"], recipe, {})
    with pytest.raises(ConfigError, match="from which no grid follows"):
        verb.grids(["optimizer.rate"], recipe, {})


def test_tuning_and_what_the_seeds_can_show_are_printed(outlay, work):
    arms = ("--set", "methods=[]", "--arm", "small=bone(r=2)", "--arm", "head=probe")
    answer = outlay(
        "compare", "mine.yaml", *arms, "--seeds", "2", "--budget", "4steps", "--metric",
        "test/loss", "--tune", "optimizer.lr=1e-3,1e-2,3e-2", "--detect", "0.1",
    )  # fmt: skip
    assert answer.code == 0
    assert "No seed spread of test/loss is recorded for mine" in answer.err
    assert "FLOPs with tuning" in answer.out and "tuning runs" in answer.out
    again = outlay(
        "compare", "mine.yaml", *arms, "--seeds", "2", "--budget", "4steps", "--metric",
        "test/loss", "--detect", "1e-4", "--json",
    )  # fmt: skip
    assert "A difference of 0.000100 test/loss takes" in again.err
    assert again.json["plan"]["seeds_needed"] > 2
    refused = outlay("compare", "mine.yaml", *arms, "--seeds", "1")
    assert refused.code == 2 and "one seed cannot tell" in refused.err
    split = outlay("compare", "mine.yaml", *arms, "--metric", "validation/loss",
                   "--tune", "optimizer.lr=1e-3,1e-2")  # fmt: skip
    assert split.code == 2 and "report test/loss" in split.err


def test_seeds_that_one_arm_lacks_are_said(outlay, work):
    arms = ("--set", "methods=[]", "--arm", "small=bone(r=2)", "--arm", "head=probe")
    answer = outlay("compare", "mine.yaml", *arms, "--seeds", "3", "--budget", "3steps", "--json",
                    "--quiet")  # fmt: skip
    folders = sorted(Path(answer.json["folder"]).glob("runs/*"))
    left = [f for f in folders if not f.name.startswith("head-seed1")]
    assert len(left) == 5
    found = outlay("report", *left, "--out", "page", "--metric", "test/loss", "--json").json
    by_name = {arm["name"]: arm for arm in found["arms"]}
    assert by_name["head"]["outcome"] == "missing_seeds" and found["pairs"][0]["seeds"] == 2
    assert "head was not run with seed 1" in (work / "page" / "report.md").read_text()


def test_report_does_not_rank_runs_of_unequal_budgets(outlay, work):
    folders = [
        outlay("run", "mine.yaml", "--json", "--quiet", "--set", "methods=[]", "--seed", seed,
               "--budget", budget, "--method", method).last["folder"]
        for seed in (0, 1)
        for budget, method in (("3steps", "probe"), ("5steps", "full"))
    ]  # fmt: skip
    found = outlay("report", *folders, "--out", "page", "--json").json
    assert [pair["outcome"] for pair in found["pairs"]] == ["unequal_budget"]
