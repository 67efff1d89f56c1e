"""Killed and started again gives the bits, metrics and meter of the run that was left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conformance import kit, settings

import outlay
from outlay.training import checkpoint, runs
from outlay.training.keeper import Keeper, Silent
from outlay.training.recipe import Recipe
from outlay.training.result import Result

STEPS = 7
SPECS = settings.specs()
REPRESENTATIVES = settings.representatives()
# A tokenizer from scratch has no mode token; no stage before this one can be the teacher.
pytestmark = pytest.mark.filterwarnings("ignore:mode_token", "ignore:feature_distillation")


class Killed(BaseException):
    """Ends a run the way nothing else does: no handler of the run knows it."""


class KilledAt(Silent):
    """Kills when a step is shown, counted over all stages, before anything is saved after it."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step(self, step: Any, values: Any, meter: Any) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1


def recipe(methods: Any, **more: Any) -> Recipe:
    """Seven steps with dropout, a checkpoint every two and an evaluation every three."""
    fields = {"budget": f"{STEPS}steps", "every": {"save": 2, "evaluate": 3}} | more
    fields["model"] = {"dropout": 0.1} | (more.get("model") or {})
    return kit.recipe(methods=methods, **fields)


def told(result: Result) -> dict[str, Any]:
    """What must not depend on how often a run was killed."""
    lines = [
        {k: v for k, v in line.items() if not k.endswith("seconds")} for line in _lines(result)
    ]
    meter = {k: v for k, v in result.meter.items() if not k.endswith("seconds")}
    return {
        "status": result.status,
        "weights": result.weights_sha256,
        "metrics": result.metrics,
        "meter": meter,
        "lines": lines,
    }


def _lines(result: Result) -> list[dict[str, Any]]:
    names = sorted(Path(result.folder).glob("metrics*.jsonl"))
    found = [json.loads(line) for name in names for line in name.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in found]


def trained_weights(result: Result) -> str:
    folder = Path(result.folder) / "trained"
    tensors = {
        f"{stage.name}/{n}": t
        for stage in sorted(folder.iterdir())
        for n, t in checkpoint.read_folder(stage)["parameters"].items()
    }
    return checkpoint.tensors_sha256(tensors)


def alone(of: Recipe, out: Path) -> Result:
    shared = None if of.stages else kit.materials(of)
    return outlay.run(of, out=out, materials=shared)


def killed(of: Recipe, out: Path, *steps: int) -> Result:
    """Start, kill at the first step, start again, kill at the second, and so on to the end."""
    shared = None if of.stages else kit.materials(of)
    for step in steps:
        with pytest.raises(Killed):
            outlay.run(of, out=out, materials=shared, progress=KilledAt(step))
    return outlay.run(of, out=out, materials=shared)


def check(of: Recipe, tmp_path: Path, *chains: tuple[int, ...]) -> Result:
    whole = alone(of, tmp_path / "whole")
    assert whole.status == "done"
    for chain in chains:
        out = tmp_path / "-".join(map(str, chain))
        again = killed(of, out, *chain)
        assert told(again) == told(whole), f"killed after {chain} more steps"
        assert trained_weights(again) == trained_weights(whole)
    return whole


@pytest.mark.parametrize("spec", SPECS)
def test_every_method_goes_on(tmp_path, spec):
    """Killed before the first save, in the middle of a step after one, and at the last step."""
    check(recipe([spec]), tmp_path, (1, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_every_method_goes_on_from_every_step(tmp_path, spec):
    check(recipe([spec]), tmp_path, *[(step,) for step in range(STEPS)])


STAGED = {
    "previous": [
        {"name": "first", "budget": "3steps", "methods": ["bone(r=4)"]},
        {"name": "second", "methods": ["adalora(init_r=4, target_r=2)"], "budget": "5steps"},
    ],
    "original": [
        {"name": "first", "budget": "3steps"},
        {"name": "second", "start": "original", "methods": ["lamda(r=4)"], "budget": "5steps"},
    ],
    "carry": [
        {"name": "first", "budget": "4steps", "methods": ["full"]},
        {"name": "second", "optimizer_state": "carry", "methods": ["full"], "budget": "3steps"},
    ],
}


@pytest.mark.parametrize("kind", list(STAGED))
def test_stages(tmp_path, kind):
    """Killed in the first stage, at the start of the second, and late in it."""
    whole = check(recipe(["bone(r=4)"], stages=STAGED[kind]), tmp_path, (1, 3, 3), (5,))
    assert whole.meter["steps"] == sum(int(s["budget"][0]) for s in STAGED[kind])


def test_a_kill_between_the_stages(tmp_path, monkeypatch):
    of = recipe(["bone(r=4)"], stages=STAGED["carry"])
    whole = alone(of, tmp_path / "whole")
    real = checkpoint.write_folder
    for place in ("trained", "stages"):
        for late in (False, True):

            def write(folder: Path, tree: Any, place: str = place, late: bool = late) -> None:
                if late:
                    real(folder, tree)
                if folder.parent.name == place:
                    raise Killed
                if not late:
                    real(folder, tree)

            out = tmp_path / f"{place}{late}"
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "write_folder", write)
                with pytest.raises(Killed):
                    alone(of, out)
            assert told(alone(of, out)) == told(whole), (place, late)


@pytest.mark.parametrize("save", [1, 2])
def test_early_stop_with_the_best_weights(tmp_path, save, monkeypatch):
    of = recipe(
        ["bone(r=4)"], budget="30steps", every={"save": save, "evaluate": 1},
        evaluate={"patience": 2, "keep_best": True}, optimizer={"lr": 0.5},
    )  # fmt: skip
    whole = check(of, tmp_path, (1, 1))
    assert 2 < whole.meter["steps"] < 30
    # Killed after the decision to stop was saved: not one step more is taken.
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "finish", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            alone(of, tmp_path / "late")
    assert told(alone(of, tmp_path / "late")) == told(whole)


def test_gradient_checkpointing_and_accumulation(tmp_path):
    of = recipe(
        ["bone(r=4, dropout=0.1)"], model={"gradient_checkpointing": True},
        batch={"size": 8, "micro": 4, "length": 48, "prefetch": 3},
    )  # fmt: skip
    check(of, tmp_path, (0, 3, 4))


@pytest.mark.parametrize("unit", ["tokens", "examples"])
def test_other_budgets(tmp_path, unit):
    budget = {"tokens": "900tokens", "examples": "50examples"}[unit]
    check(recipe(["lamda(r=4)"], budget=budget), tmp_path, (3,))


@pytest.mark.parametrize("save", [2, None])
def test_a_longer_budget_goes_on(tmp_path, save):
    every = {"save": save} if save else {}
    fields: dict[str, Any] = {"schedule": {"name": "constant", "warmup": 0.0}, "every": every}
    short = recipe(["bone(r=4)"], budget="5steps", **fields)
    long = recipe(["bone(r=4)"], budget="9steps", **fields)
    whole = alone(long, tmp_path / "whole")
    first = alone(short, tmp_path / "short")
    seen = KilledAt(100)
    shared = kit.materials(long)
    more = outlay.run(long, out=tmp_path, resume=first.folder, materials=shared, progress=seen)
    assert told(more) == told(whole)
    assert runs.run(long, resume=first.folder, materials=shared).seconds == more.seconds


# ---- real kills ----------------------------------------------------------------------------------


def campaign(of: Recipe, out: Path, kills: list[dict[str, Any]]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("campaign.py"))],
        input=json.dumps({"recipe": of.to_yaml(), "out": str(out), "kills": kills}),
        text=True, capture_output=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    answer["result"] = Result(**answer["result"])
    return answer


@pytest.mark.parametrize("spec", ["adalora(init_r=4, target_r=2)", "lamda(r=4)"])
def test_killed_inside_saves(tmp_path, spec):
    """SIGKILL at chosen syncs of a save: while it is written, renamed, and between two."""
    of = recipe([spec], every={"save": 1})
    whole = alone(of, tmp_path / "whole")
    kills = [{"sync": count} for count in (1, 3, 4, 7, 9)]
    found = campaign(of, tmp_path / "killed", kills)
    assert found["killed"] == [True] * len(kills)
    assert told(found["result"]) == told(whole)


@pytest.mark.slow
@pytest.mark.parametrize("spec", REPRESENTATIVES)
def test_killed_at_random_moments(tmp_path, spec):
    import random

    of = recipe([spec], every={"save": 1}, budget="20steps")
    whole = alone(of, tmp_path / "whole")
    draw = random.Random(spec)
    kills = [{"share": draw.uniform(0.05, 0.6)} for _ in range(12)]
    found = campaign(of, tmp_path / "killed", kills)
    assert sum(found["killed"]) >= 3
    assert told(found["result"]) == told(whole)
