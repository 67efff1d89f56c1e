"""`compare` itself, on tiny real runs: every outcome, tuning, resuming, shared runs, budgets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outlay import recipes
from outlay.comparison.compare import Comparison, compare
from outlay.comparison.running import Quiet
from outlay.core.errors import ConfigError, Conflict, DoesNotFit
from outlay.training.recipe import Recipe

STEEP = "wild=full @ optimizer.lr=1e30, optimizer.clip=null"


class Watching(Quiet):
    """Counts what is really trained; stops at a given run."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.begun: list[str] = []
        self.trained: list[str] = []
        self.notes: list[str] = []
        self.stop_at = stop_at

    def run_of(self, arm: str, seed: int, index: int, total: int) -> None:
        self.begun.append(f"{arm} {seed}")
        if len(self.begun) == self.stop_at:
            raise KeyboardInterrupt

    def stage(self, name: str, budget: Any, meter: Any) -> None:
        self.trained.append(self.begun[-1])

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def recipe() -> Recipe:
    return recipes.get("digits-cnn").changed(
        {"name": "tiny", "model.width": 8, "model.layers": 1, "batch.size": 16,
         "budget": "6steps", "every.evaluate": None, "optimizer.lr": 1e-2}
    )  # fmt: skip


@pytest.fixture
def comparing(recipe: Recipe, tmp_path: Path) -> Callable[..., Comparison]:
    def call(*arms: str, **settings: Any) -> Comparison:
        chosen = settings.pop("recipe", recipe)
        settings = {"out": tmp_path / "out", "metric": "test/loss", "seeds": 3, **settings}
        return compare(chosen, arms, device="cpu", threads=1, **settings)

    return call


def only_pair(found: Comparison) -> dict[str, Any]:
    (pair,) = found.verdict["pairs"]
    return pair


# ---- outcomes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, [4], [4, 4]])
def test_one_seed_is_refused_before_anything_is_made(comparing, tmp_path, seeds):
    with pytest.raises(ConfigError, match="one seed cannot tell a difference from chance"):
        comparing("a=full", "b=probe", seeds=seeds)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [({"metric": "test/beauty"}, "is not measured"), ({"margin": -1.0}, "is not positive"),
     ({"detect": 0.0}, "is not positive")],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused_before_anything_is_made(
    comparing, tmp_path, settings, complaint
):
    with pytest.raises(ConfigError, match=complaint):
        comparing("a=full", "b=probe", **settings)
    assert not (tmp_path / "out").exists()


def test_a_clear_difference_is_ranked_in_the_metrics_own_direction(comparing, recipe):
    longer = recipe.changed({"budget": "30steps"})
    found = comparing("all=full", "head=probe", recipe=longer, seeds=4)
    assert not found.verdict["higher_is_better"]
    pair = only_pair(found)
    assert pair["outcome"] == "separated" and "all is better than head" in pair["sentence"]
    assert found.verdict["verdicts"][0]["better"] == "all" and pair["difference"] < 0


def test_unequal_budgets_are_never_ranked(comparing):
    found = comparing("long=full", "short=full @ budget=3steps")
    pair = only_pair(found)
    assert pair["outcome"] == "unequal_budget" and pair["p_holm"] is None
    assert found.verdict["sentence"] == "Budgets differ, so nothing is ranked."
    assert "budgets differ (3 and 6 steps)" in pair["sentence"]
    text = (found.folder / "report.md").read_text()
    assert "budgets differ (3 and 6 steps)" in text


def test_equal_steps_of_other_size_are_unequal_tokens_or_examples(comparing):
    found = comparing("a=full", "b=full @ batch.size=8")
    assert only_pair(found)["outcome"] == "unequal_budget"


def test_a_failed_run_is_said_kept_and_not_repeated(comparing):
    watch = Watching()
    found = comparing("good=full", STEEP, "head=probe", progress=watch)
    by_name = {arm["name"]: arm for arm in found.verdict["arms"]}
    assert by_name["wild"]["outcome"] == "failed_run"
    assert "3 of 3 runs of wild failed (seeds 0, 1 and 2)" in by_name["wild"]["sentence"]
    outcomes = {(p["a"], p["b"]): p["outcome"] for p in found.verdict["pairs"]}
    assert outcomes["good", "wild"] == outcomes["wild", "head"] == "failed_run"
    assert outcomes["good", "head"] in ("separated", "not_separated")
    assert any("wild, seed 0 failed" in note for note in watch.notes)
    twin = json.loads((found.folder / "report.json").read_text())
    failed = [run for run in twin["runs"] if run["status"] == "failed"]
    assert len(failed) == 3 and all("loss" in run["failure"] for run in failed)
    again = Watching()
    assert comparing("good=full", STEEP, "head=probe", progress=again).verdict == found.verdict
    assert again.trained == []


def test_the_same_value_at_every_seed_is_identical(comparing):
    found = comparing("one=full", "two=full")
    assert only_pair(found)["outcome"] == "identical"
    assert "one and two give the same test/loss at each of 3 seeds" in only_pair(found)["sentence"]
    assert found.verdict["ties"] == [["one", "two"]] and not found.verdict["verdicts"]


def test_a_metric_without_spread_is_not_tested(tmp_path):
    from cli.conftest import write_material

    write_material(tmp_path)
    found = compare(
        Recipe.read(tmp_path / "mine.yaml").changed({"methods": ()}),
        ["words=tfidf_logistic_regression", "features=feature_probe"],
        out=tmp_path / "out", seeds=3, metric="validation/accuracy",
    )  # fmt: skip
    pair, arms = only_pair(found), found.verdict["arms"]
    assert pair["outcome"] in ("constant_difference", "identical") and pair["p"] == 1.0
    assert all(arm["spread"] == 0.0 and arm["interval"] is None for arm in arms)
    assert "words gives" in found.verdict["sentences"][2]
    assert any("words tunes itself on the validation" in s for s in found.verdict["sentences"])
    assert arms[0]["tuning"] is None and arms[0]["total"]["seconds"] > 0


def test_ties_are_equal_only_inside_a_margin_stated_beforehand(comparing):
    arms = ("a=full", "b=full @ model.width=9")
    outside = comparing(*arms)
    assert only_pair(outside)["outcome"] == "not_separated"
    assert "would have been found with probability 0.8" in only_pair(outside)["sentence"]
    assert outside.verdict["ties"] == [["a", "b"]]
    narrow = comparing(*arms, margin=1e-6)
    assert only_pair(narrow)["outcome"] == "not_separated"
    assert any("margin was not stated when these runs began" in s
               for s in narrow.verdict["sentences"])  # fmt: skip


def test_a_margin_stated_beforehand_is_reported_without_reproach(comparing):
    arms = ("a=full", "b=full @ model.width=9")
    found = comparing(*arms, margin=5.0)
    assert only_pair(found)["outcome"] == "equal_within_margin"
    assert "a and b are equal within 5.00" in only_pair(found)["sentence"]
    assert found.verdict["sentences"] == []


def test_a_split_without_rows_is_refused_before_any_run(comparing, recipe, tmp_path):
    empty = recipe.changed({"data.test_share": 0})
    with pytest.raises(ConfigError, match="no test rows to measure on"):
        comparing("a=full", "b=probe", recipe=empty)
    with pytest.raises(ConfigError, match="no validation rows to measure on"):
        comparing("a=full", "b=probe", recipe=recipe.changed({"data.validation_share": 0}),
                  tune={"optimizer.lr": [1e-3, 1e-2]})  # fmt: skip
    assert not (tmp_path / "out").exists()


# ---- budgets -------------------------------------------------------------------------------------


def test_flops_can_be_the_budget(comparing, recipe):
    probe = compare_flops(comparing, "6steps")
    budget = f"{40 * probe:.0f}flops"
    found = comparing("all=full", "head=probe", recipe=recipe.changed({"budget": budget}))
    assert only_pair(found)["outcome"] != "unequal_budget"
    steps = {arm: by[0].meter["steps"] for arm, by in found.results.items()}
    assert steps["head"] > steps["all"] == 40
    twin = json.loads((found.folder / "report.json").read_text())
    assert "FLOP" in twin["budget"]
    assert any("as many FLOPs for every arm, to within 2" in note for note in twin["notes"])
    page = found.report.read_text()
    assert 'data-cost="steps"' in page and 'data-cost="tokens"' in page


def compare_flops(comparing, budget) -> float:
    found = comparing("all=full", "head=probe", seeds=2)
    return found.results["all"][0].meter["flops"] / found.results["all"][0].meter["steps"]


def test_seconds_can_be_the_budget(comparing, recipe):
    found = comparing("all=full", "head=probe", recipe=recipe.changed({"budget": "1s"}), seeds=2)
    assert only_pair(found)["outcome"] in ("separated", "not_separated", "unequal_budget")
    spent = [by[0].meter["seconds"] for by in found.results.values()]
    assert all(1 <= s < 1.3 for s in spent)
    notes = json.loads((found.folder / "report.json").read_text())["notes"]
    assert any("as many seconds of training for every arm" in note for note in notes)


def test_a_budget_of_too_few_steps_to_be_equal_is_refused_as_unequal(comparing, recipe):
    flops = compare_flops(comparing, "6steps")
    short = recipe.changed({"budget": f"{2.5 * flops:.0f}flops"})
    assert only_pair(comparing("all=full", "head=probe", recipe=short))["outcome"] == (
        "unequal_budget"
    )


def test_a_cap_is_no_budget(comparing, recipe):
    with pytest.raises(DoesNotFit, match="exceed the cap"):
        comparing("a=full", "b=probe", recipe=recipe.changed({"cap": "100parameters"}))


def test_extra_passes_stand_in_the_table_under_their_own_names(tmp_path):
    from cli.conftest import write_material

    write_material(tmp_path)
    found = compare(
        Recipe.read(tmp_path / "mine.yaml").changed({"methods": (), "budget": "3steps"}),
        ["svfit=svfit(rank=4)", "bone=bone(r=4)"],
        out=tmp_path / "out", seeds=2, device="cpu", threads=1,
    )  # fmt: skip
    assert found.results["svfit"][0].meter["svd/flops"] > 0
    assert 'data-cost="svd/flops"' in found.report.read_text()
    assert "Svd: FLOPs" in (found.folder / "report.md").read_text()


# ---- tuning --------------------------------------------------------------------------------------

GRID = {"optimizer.lr": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]}


def test_every_arm_is_tuned_equally_and_charged(comparing, tmp_path):
    found = comparing("all=full", "head=probe", tune=GRID, store=tmp_path / "store")
    record = json.loads((found.folder / "tuning.json").read_text())
    assert record["metric"] == "validation/loss" and min(record["seeds"]) >= 100_000
    trials = {arm: [(t["settings"]["optimizer.lr"], t["budget"]) for t in a["trials"]]
              for arm, a in record["arms"].items()}  # fmt: skip
    short, whole = "2steps", "6steps"
    for tried in trials.values():
        assert [v for v, budget in tried if budget == short] == GRID["optimizer.lr"]
        assert len([v for v, budget in tried[:7] if budget == whole]) == 2
    assert len(trials["all"]) == len(trials["head"])
    assert found.tuned["all"]["optimizer.lr"] in record["grid"]["optimizer.lr"]
    results = [json.loads(p.read_text()) for p in tmp_path.glob("store/tuning/*/result.json")]
    assert all(key.startswith("validation/") for r in results for key in r["metrics"])
    for arm in found.verdict["arms"]:
        own = [r["meter"] for r in results if r["run"].startswith(arm["name"])]
        assert arm["tuning"]["trials"] == len(own) == len(trials[arm["name"]])
        for unit in ("steps", "tokens", "flops", "seconds"):
            assert arm["tuning"][unit] == pytest.approx(sum(m[unit] for m in own))
        mean = sum(r.meter["flops"] for r in found.results[arm["name"]].values()) / 3
        assert arm["total"]["flops"] == pytest.approx(mean + arm["tuning"]["flops"])
    assert json.loads((found.folder / "comparison.json").read_text())["arms"][0]["tuning"]
    page, text = found.report.read_text(), (found.folder / "report.md").read_text()
    assert 'data-cost="total/flops"' in page and "FLOPs with tuning" in text
    assert "Tuned on validation/loss over optimizer.lr = " in text


def test_without_halving_every_point_gets_the_whole_budget(comparing):
    found = comparing("all=full", "head=probe", tune=GRID, halving=1)
    record = json.loads((found.folder / "tuning.json").read_text())
    assert {t["budget"] for a in record["arms"].values() for t in a["trials"]} == {"6steps"}


def test_an_edge_extends_the_grid_for_all_arms_alike(comparing):
    found = comparing("all=full", "head=probe", tune={"optimizer.lr": [1e-6, 1e-5]})
    record = json.loads((found.folder / "tuning.json").read_text())
    assert record["grid"]["optimizer.lr"] == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    counts = {arm: len(a["trials"]) for arm, a in record["arms"].items()}
    assert counts == {"all": 5, "head": 5}
    notes = json.loads((found.folder / "report.json").read_text())["notes"]
    assert sum("extended by 0.0001, 0.001 and 0.01 for every arm" in note for note in notes) == 1
    assert any("still lies on the grid's edge" in note for note in notes)


def test_several_settings_are_tried_in_all_combinations(comparing):
    grid = {"optimizer.lr": [3e-3, 1e-2, 3e-2], "optimizer.weight_decay": [0.0, 0.1]}
    found = comparing("all=full", "head=probe", tune=grid, halving=1)
    record = json.loads((found.folder / "tuning.json").read_text())
    tried = [tuple(t["settings"].values()) for t in record["arms"]["all"]["trials"]]
    assert len(tried) == len(set(tried)) >= 6
    assert set(found.tuned["head"]) == set(grid)


def test_a_trial_that_diverges_is_the_worst_and_is_charged(comparing, recipe):
    loose = recipe.changed({"optimizer.clip": None})
    found = comparing(
        "all=full", "head=probe", recipe=loose, tune={"optimizer.lr": [1e-3, 1e-2, 1e30]}
    )
    record = json.loads((found.folder / "tuning.json").read_text())
    for arm in record["arms"].values():
        wild = [t for t in arm["trials"] if t["settings"]["optimizer.lr"] == 1e30]
        assert wild and all(t["score"] is None and "loss" in t["failure"] for t in wild)
        assert arm["chosen"]["optimizer.lr"] < 1
        assert arm["cost"]["trials"] == len(arm["trials"])
    assert all(r is not None for by in found.results.values() for r in by.values())


def test_a_killed_tuning_goes_on_where_it_was(comparing, tmp_path):
    whole = Watching()
    there = comparing("all=full", "head=probe", tune=GRID, out=tmp_path / "whole", progress=whole)
    first = Watching(stop_at=9)
    with pytest.raises(KeyboardInterrupt):
        comparing("all=full", "head=probe", tune=GRID, progress=first)
    second = Watching()
    here = comparing("all=full", "head=probe", tune=GRID, progress=second)
    assert len(first.trained) == 8 and len(first.trained + second.trained) == len(whole.trained)
    assert here.tuned == there.tuned
    assert [a["mean"] for a in here.verdict["arms"]] == [a["mean"] for a in there.verdict["arms"]]


def test_a_method_that_a_short_rung_is_too_short_for_says_how_to_go_on(comparing, monkeypatch):
    from outlay.comparison.running import Runs

    whole = Runs.one

    def short_refused(self, arm, recipe, seed, where="runs"):
        if recipe.budget.amount < 6:
            raise Conflict("it needs 6 steps", "raise the budget")
        return whole(self, arm, recipe, seed, where)

    monkeypatch.setattr(Runs, "one", short_refused)
    with pytest.raises(Conflict, match=r"(?s)in a tuning run of 2steps.*tune with halving 1"):
        comparing("all=full", "head=probe", tune=GRID)


def test_tuning_on_the_reported_split_is_refused(comparing):
    with pytest.raises(ConfigError, match="of the split that tuning uses"):
        comparing("a=full", "b=probe", metric="validation/loss", tune=GRID)


def test_tuning_seeds_stay_apart_from_reported_ones(comparing):
    found = comparing("a=full", "b=probe", seeds=[100_000, 100_001], tune=GRID, tuning_seeds=2)
    record = json.loads((found.folder / "tuning.json").read_text())
    assert record["seeds"] == [100_002, 100_003]


# ---- runs are shared and found again -------------------------------------------------------------


def test_comparisons_with_one_store_do_not_repeat_runs(comparing, tmp_path):
    first, second = Watching(), Watching()
    one = comparing("all=full", "head=probe", store=tmp_path / "store", progress=first)
    two = comparing(
        "all=full", "head=probe", "slow=full @ optimizer.lr=1e-3", seeds=4,
        store=tmp_path / "store", progress=second,
    )  # fmt: skip
    assert len(first.trained) == 6
    assert sorted(second.trained) == ["all 3", "head 3", *(f"slow {seed}" for seed in range(4))]
    assert one.folder != two.folder and not (one.folder / "runs").exists()
    for seed in range(3):
        assert one.results["all"][seed].metrics == two.results["all"][seed].metrics


def test_it_says_beforehand_what_the_seeds_can_show(comparing, tmp_path):
    watch = Watching()
    first = comparing("all=full", "head=probe", detect=0.01, progress=watch)
    assert watch.notes[0].startswith("No seed spread of test/loss is recorded for tiny")
    assert first.plan["detectable"] is None and first.verdict["sentences"] == []
    watch = Watching()
    second = comparing("all=full", "slow=full @ optimizer.lr=1e-3", detect=1e-4, progress=watch)
    plan = second.to_json()["plan"]
    assert plan["spread"] == pytest.approx(only_pair(first)["spread"])
    assert "from 1 earlier comparison in" in plan["source"] and plan["seeds_needed"] > 3
    assert watch.notes[:2] == plan["sentences"] and "3 are given" in watch.notes[1]
    assert any("may still differ by that much" in s for s in second.verdict["sentences"])
    again = comparing("all=full", "slow=full @ optimizer.lr=1e-3", detect=1e-4)
    assert again.plan == plan
