"""Verdicts on made-up tables for every outcome, and replications whose runs are made up too."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from outlay import recipes
from outlay.comparison import replicate_task
from outlay.comparison.compare import Comparison
from outlay.comparison.quantities import Quantities, early_loss
from outlay.comparison.replicate import SIZES, Replication, Size, Task, replicate
from outlay.comparison.verdicts import (
    Claim,
    Finding,
    Level,
    combined,
    judge_claim,
    look_alpha,
    task_verdict,
)
from outlay.core.errors import ConfigError
from outlay.training.result import Result

TASK = "t"


def claim(kind: str = "better", size: float = 0.1, **more: Any) -> Claim:
    made = {"name": "c", "text": "new beats old", "arm": "new", "than": "old", **more}
    return Claim(kind=kind, size={TASK: size}, **made)  # pyright: ignore[reportArgumentType]


def table(gain: float, spread: float, seeds: int = 12, **others: float) -> dict[str, Any]:
    """Old is 0.5 and some noise; new is `gain` above it, give or take exactly `spread`."""
    noise = np.random.default_rng(0).normal(size=seeds)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    base = 0.5 + 0.05 * np.random.default_rng(1).normal(size=seeds)
    arms = {"old": base, "new": base + gain + spread * noise}
    arms |= {name: base + shift for name, shift in others.items()}
    return {name: dict(enumerate(map(float, values))) for name, values in arms.items()}


def judged(made: Claim, values: Any, higher: bool = True, **more: Any) -> Finding:
    return judge_claim(made, TASK, values, metric="accuracy", higher=higher, **more)


@pytest.mark.parametrize(
    ("kind", "gain", "spread", "size", "verdict"),
    [
        ("better", 0.10, 0.02, 0.10, "supported"),
        ("better", 0.30, 0.02, 0.10, "supported"),
        ("better", 0.03, 0.02, 0.10, "partly"),
        ("better", 0.00, 0.02, 0.10, "refuted"),
        ("better", -0.10, 0.02, 0.10, "refuted"),
        ("better", 0.05, 0.50, 0.10, "underpowered"),
        ("better", 0.05, 0.10, 0.10, "not resolved"),
        ("not_worse", 0.00, 0.02, 0.10, "supported"),
        ("not_worse", -0.05, 0.02, 0.10, "supported"),
        ("not_worse", -0.20, 0.02, 0.10, "refuted"),
        ("not_worse", 0.00, 0.50, 0.10, "underpowered"),
        ("not_worse", -0.09, 0.10, 0.10, "not resolved"),
        ("equal", 0.01, 0.02, 0.10, "supported"),
        ("equal", 0.30, 0.02, 0.10, "refuted"),
        ("equal", -0.30, 0.02, 0.10, "refuted"),
        ("equal", 0.05, 0.50, 0.10, "underpowered"),
        ("equal", 0.10, 0.08, 0.10, "not resolved"),
    ],
)
def test_each_outcome_of_a_claim(kind, gain, spread, size, verdict):
    found = judged(claim(kind, size), table(gain, spread))
    assert found.verdict == verdict, found.sentence
    assert verdict in found.sentence and found.figures["seeds"] == 12
    # The same with a metric that is better when lower: the gain keeps its sign.
    turned = {a: {s: -v for s, v in by.items()} for a, by in table(gain, spread).items()}
    again = judged(claim(kind, size), turned, higher=False)
    assert again.verdict == verdict
    assert again.figures["gain"] == pytest.approx(found.figures["gain"])


def test_underpowered_is_said_only_when_no_seeds_are_to_come():
    wide = table(0.05, 0.5)
    assert judged(claim(), wide, level=Level(last=False)).verdict == "not resolved"
    assert judged(claim(), wide, level=Level(last=True)).verdict == "underpowered"


def test_more_claims_and_earlier_looks_widen_the_interval():
    values = table(0.03, 0.04)
    alone = judged(claim(size=0.02), values).figures["interval"]
    among = judged(claim(size=0.02), values, level=Level(comparisons=5)).figures["interval"]
    early = judged(claim(size=0.02), values, level=Level(alpha=0.01)).figures["interval"]
    assert among[0] < alone[0] < alone[1] < among[1] and early[0] < alone[0]
    assert sum(look_alpha((6, 12, 30), look) for look in range(3)) == pytest.approx(0.05)


def test_a_failed_run_and_a_missing_seed_decide_nothing():
    values = table(0.3, 0.02)
    values["new"][3] = None
    found = judged(claim(), values)
    assert found.verdict == "not resolved" and "failed" in found.sentence
    lone = {"new": {0: 0.9}, "old": {0: 0.5, 1: 0.5}}
    assert judged(claim(), lone).verdict == "not resolved"


def test_equal_differences_have_no_spread_and_still_an_answer():
    assert judged(claim(), table(0.0, 0.0)).verdict == "refuted"
    assert judged(claim(), table(0.2, 0.0)).verdict == "supported"


def test_a_gain_beyond_another_pair():
    values = table(0.10, 0.02, wide=0.09, narrow=0.0)
    assert judged(claim(size=0.05, beyond=("wide", "narrow")), values).verdict == "refuted"
    values = table(0.10, 0.02, wide=0.0, narrow=0.0)
    assert judged(claim(size=0.05, beyond=("wide", "narrow")), values).verdict == "supported"


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.04, "supported"), (0.5, "partly"), (1.5, "refuted")]
)
def test_a_ratio_of_a_quantity(share, verdict):
    amounts = {"old": {0: 1600.0, 1: 1600.0}, "new": {0: 1600 * share, 1: 1600 * share}}
    found = judged(claim("at_most", 0.1, quantity="n"), {}, amounts=amounts)
    assert found.verdict == verdict and found.figures["ratio"] == pytest.approx(share)


def test_fewer_parameters_at_equal_quality_needs_both():
    made = claim("not_worse", 0.1, quantity="n", at_most=1 / 16)
    few = {"old": dict.fromkeys(range(12), 1600.0), "new": dict.fromkeys(range(12), 100.0)}
    many = {**few, "new": dict.fromkeys(range(12), 200.0)}
    assert judged(made, table(0.0, 0.02), amounts=few).verdict == "supported"
    assert judged(made, table(0.0, 0.02), amounts=many).verdict == "partly"
    assert judged(made, table(-0.3, 0.02), amounts=few).verdict == "refuted"


def test_a_time_that_varies_is_open_until_its_interval_is_narrow():
    draw = np.random.default_rng(2).normal(size=(2, 12))
    noisy = {a: dict(enumerate(np.exp(0.5 * draw[i]))) for i, a in enumerate(("old", "new"))}
    made = claim("at_most", 0.94, quantity="seconds")
    assert judged(made, {}, amounts=noisy).verdict == "underpowered"
    assert judged(claim("at_most", 0.3, quantity="seconds"), {}, amounts=noisy).verdict == "refuted"


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        (["supported", "supported"], "supported"),
        (["supported", "refuted"], "partly"),
        (["supported", "underpowered"], "partly"),
        (["partly", "not resolved"], "partly"),
        (["refuted", "refuted"], "refuted"),
        (["refuted", "not resolved"], "refuted"),
        (["underpowered", "underpowered"], "underpowered"),
        (["underpowered", "not resolved"], "not resolved"),
    ],
)
def test_many_verdicts_in_one(verdicts, whole):
    assert combined(verdicts) == whole


@pytest.mark.parametrize(
    ("main", "role", "other", "whole"),
    [
        ("supported", "control", "supported", "supported"),
        ("supported", "control", "refuted", "refuted"),
        ("supported", "control", "underpowered", "partly"),
        ("supported", "secondary", "refuted", "partly"),
        ("supported", "secondary", "underpowered", "supported"),
        ("refuted", "secondary", "supported", "refuted"),
        ("refuted", "control", "supported", "refuted"),
        ("underpowered", "secondary", "refuted", "underpowered"),
    ],
)
def test_controls_and_secondary_claims_take_away_and_never_give(main, role, other, whole):
    findings = [Finding(claim(), TASK, main), Finding(claim(role=role), TASK, other)]
    assert task_verdict(findings) == whole


def test_claims_that_could_not_be_judged_are_refused():
    for bad in (
        lambda: claim(size=0.0),
        lambda: claim("at_most", 0.5),
        lambda: claim("not_worse", 0.1, at_most=0.5),
        lambda: claim("not_worse", 0.1, quantity="n", at_most=-1.0),
    ):
        with pytest.raises(ConfigError, match="'c'"):
            bad()


# ---- whole replications on made-up runs ----------------------------------------------------------


class World:
    """Stands for `compare`: draws what every run would have given, and remembers what was asked."""

    def __init__(self, gain: float, spread: float, seconds: float = 0.0) -> None:
        self.gain, self.spread, self.seconds = gain, spread, seconds
        self.asked: list[tuple[tuple[str, ...], int, bool]] = []
        self.rates: list[Any] = []

    def value(self, arm: str, seed: int) -> float:
        base = 0.7 + 0.02 * np.random.default_rng(seed).normal()
        if arm == "old":
            return float(base)
        noise = np.random.default_rng(seed + 10_000).normal()
        return float(base + (self.gain + self.spread * noise) * (arm == "new"))

    def __call__(self, recipe: Any, arms: Any, *, seeds: Any, out: Any, **rest: Any) -> Comparison:
        which = range(seeds) if isinstance(seeds, int) else seeds
        self.asked.append((tuple(a.name for a in arms), len(which), "tune" in rest))
        self.rates.append([a.settings.get("optimizer.lr") for a in arms])
        rest["progress"].run_of(arms[0].name, 0, 1, 1)
        rest["progress"].stage("main", None, None)
        results: dict[str, dict[int, Result | None]] = {
            a.name: {
                seed: Result(
                    "made", "up",
                    {f"{split}/accuracy": self.value(a.name, seed)
                     for split in ("validation", "test")},
                    {"seconds": 1.0, "trainable_parameters": 10, "steps": 1},
                    "", self.seconds, "done", seed,
                )
                for seed in which
            }
            for a in arms
        }  # fmt: skip
        tuned = {a.name: {"optimizer.lr": 0.5} for a in arms} if "tune" in rest else {}
        return Comparison(Path(out), Path(out) / "report.html", {}, results, tuned)


def small(**changes: Any) -> Replication:
    task = Task(
        name="digits-vit", recipe="digits-vit", floor=changes.pop("floor", 0.3),
        floor_source="a constant class",
        arms=lambda size: ("old=probe", "new=full", "third=full(layers_to_transform=(-1,))"),
        changes={size: {"budget": "2steps"} for size in SIZES},
    )  # fmt: skip
    facts: dict[str, Any] = {
        "paper": 99, "slug": "made_up", "title": "Made up", "arxiv": "0000.00000",
        "claim": "new is better than old.", "baseline": "old", "method": "new", "tasks": (task,),
        "claims": (
            Claim(name="main", text="new beats old", arm="new", than="old", kind="better",
                  size={"digits-vit": 0.01}),
        ),
        "grid": {"optimizer.lr": (0.1, 0.5)},
    }  # fmt: skip
    return Replication(**{**facts, **changes})


@pytest.fixture
def world(monkeypatch):
    def make(gain: float, spread: float, **more: Any) -> World:
        made = World(gain, spread, **more)
        monkeypatch.setattr(replicate_task, "compare", made)
        return made

    return make


def test_seen_at_the_first_look_so_no_seed_is_added(world, tmp_path):
    made = world(0.05, 0.003)
    found = replicate(small(), "cpu", out=tmp_path)
    assert found.ledger["verdict"] == "supported"
    assert made.asked == [
        (("old", "new"), 5, False), (("old", "new", "third"), 6, True)
    ]  # fmt: skip
    noise = found.ledger["tasks"]["digits-vit"]["noise"]
    assert noise["passed"] and noise["spread"] > 0
    seen = noise["detectable"]
    assert seen["6"] > seen["12"] > seen["30"] > 0


def test_seeds_are_raised_to_thirty_for_the_open_claim_alone(world, tmp_path):
    made = world(0.005, 0.05)
    found = replicate(small(), "cpu", out=tmp_path)
    assert [asked[:2] for asked in made.asked[1:]] == [
        (("old", "new", "third"), 6), (("old", "new"), 12), (("old", "new"), 30)
    ]  # fmt: skip
    assert found.ledger["verdict"] == "underpowered"
    [only] = found.ledger["tasks"]["digits-vit"]["claims"]
    assert only["seeds"] == 30 and only["detectable"] > only["size"]
    # What was tuned at the first look serves at the others.
    assert made.rates[-1] == [0.5, 0.5]


def test_no_effect_is_refuted_and_a_real_one_of_the_wrong_sign_too(world, tmp_path):
    world(0.0, 0.003)
    assert replicate(small(), "cpu", out=tmp_path / "a").ledger["verdict"] == "refuted"
    world(-0.05, 0.003)
    assert replicate(small(), "cpu", out=tmp_path / "b").ledger["verdict"] == "refuted"


def test_without_time_no_seed_is_added_and_more_minutes_go_further(world, tmp_path):
    made = world(0.005, 0.05, seconds=1e6)
    first = replicate(small(), "cpu", out=tmp_path, minutes=0.001)
    assert first.ledger["verdict"] == "underpowered" and made.asked[-1][1] == 6
    again = world(0.005, 0.05, seconds=0.0)
    replicate(small(), "cpu", out=tmp_path, minutes=60)
    assert again.asked[-1][1] == 30


def test_a_decision_to_raise_is_kept_when_the_task_goes_on(world, tmp_path):
    world(0.005, 0.05)
    whole = replicate(small(), "cpu", out=tmp_path).ledger
    made = world(0.005, 0.05, seconds=1e6)
    again = replicate(small(), "cpu", out=tmp_path, minutes=0.001).ledger
    assert [asked[1] for asked in made.asked] == [5, 6, 12, 30]
    assert again["verdict"] == whole["verdict"]


def test_a_baseline_that_fails_its_known_answer_ends_it(world, tmp_path):
    made = world(0.05, 0.003)
    found = replicate(small(floor=0.99), "cpu", out=tmp_path)
    assert found.ledger["verdict"] == "not resolved" and len(made.asked) == 1
    assert "a constant class" in " ".join(found.ledger["sentences"])


def test_smoke_concludes_nothing_and_refuses_to_record(world, tmp_path):
    world(0.05, 0.003)
    found = replicate(small(), "smoke", out=tmp_path)
    assert found.ledger["verdict"] is None
    assert found.ledger["tasks"]["digits-vit"]["claims"] == []
    with pytest.raises(ConfigError, match="no verdict"):
        replicate(small(), "smoke", out=tmp_path, record=tmp_path)
    with pytest.raises(ConfigError, match="cpu"):
        replicate(small(), "cpuu", out=tmp_path)


def test_the_ledger_holds_what_a_reader_needs_to_doubt_it(world, tmp_path):
    world(0.05, 0.003)
    found = replicate(
        small(), "cpu", out=tmp_path, record=tmp_path / "ledger", command="outlay replicate 99"
    )
    written = json.loads((tmp_path / "ledger" / "99_made_up.json").read_text())
    assert written == json.loads(found.path.read_text())
    assert {"verdict", "sentence", "date", "hardware", "versions", "command", "minutes", "looks",
            "limits"} <= set(written)  # fmt: skip
    task = written["tasks"]["digits-vit"]
    assert task["tuning"]["chosen"]["new"] == {"optimizer.lr": 0.5}
    assert task["arms"][1]["seeds"] == 6 and len(task["arms"][1]["values"]) == 6
    assert task["recipe"]["budget"] == "2steps"
    [only] = task["claims"]
    assert {"gain", "interval", "spread", "detectable", "size", "seeds", "level"} <= set(only)


def test_the_first_look_over_all_sizes_is_the_smallest():
    for size in SIZES.values():
        assert isinstance(size, Size) and list(size.seeds) == sorted(size.seeds)
        assert size.seeds[-1] == 30 if size.verdict else True


# ---- quantities ----------------------------------------------------------------------------------


def test_the_early_loss_is_the_mean_of_a_tenth():
    lines = [{"step": s, "loss": float(s)} for s in range(100)] + [{"step": 99, "validation": 1}]
    result: Any = SimpleNamespace(run="r", curves=lines)
    assert early_loss(result, 0.1) == pytest.approx(4.5)
    assert early_loss(result, 1.0) == pytest.approx(94.5)
    result.curves = [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}]
    assert early_loss(result, 0.1) == 2.0


def test_quantities_by_name():
    result: Any = SimpleNamespace(run="r", curves=[], meter={"seconds": 3.0})
    calls = []
    own = Quantities({"mine": lambda recipe, found: float(len(calls) or calls.append(1) or 1)})
    recipe: Any = None
    assert own.measured("mine", "a", recipe, result) == own.measured("mine", "a", recipe, result)
    assert own.measured("seconds", "a", recipe, result) == 3.0
    with pytest.raises(ConfigError, match="second"):
        own.measured("second", "a", recipe, result)


def test_parameters_without_the_head_and_planned_memory():
    recipe = recipes.get("digits-vit").changed({"methods": ("probe",), "data.limit": 40})
    head = 10 * 64 + 10
    result: Any = SimpleNamespace(run="r", curves=[], meter={"trainable_parameters": head})
    measure = Quantities()
    assert measure.measured("adapter_parameters", "probe", recipe, result) == 0
    held = measure.measured("peak_memory_bytes", "probe", recipe, result)
    every = recipe.changed({"methods": ("full",)})
    assert 0 < held < measure.measured("peak_memory_bytes", "full", every, result)
