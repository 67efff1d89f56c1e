"""Stages through the run itself: from original, from a stage, killed and gone on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from contracts import toys

from outlay.core.card import Card
from outlay.core.method import OnStep, Watcher
from outlay.training import checkpoint
from outlay.training.recipe import Recipe
from outlay.training.runs import run

STARTS: dict[str, dict[str, torch.Tensor]] = {}
TEACHERS: dict[str, dict[str, torch.Tensor]] = {}


class Look(Watcher):
    def __init__(self, live: Any, name: str, die: int | None) -> None:
        self.live, self.name, self.die = live, name, die

    def before_step(self, step: Any) -> None:
        if step.index == 0:
            STARTS[self.name] = {n: p.detach().clone() for n, p in self.live.named_parameters()}
        if step.index == self.die and DYING:
            DYING.clear()
            raise KeyboardInterrupt


DYING: list[bool] = []


@dataclass(frozen=True, kw_only=True)
class Starts(OnStep):
    card: ClassVar[Card] = Card(name="starts", title="toy")
    name: str = ""
    die: int | None = None

    def watch(self, live: Any) -> Watcher:
        return Look(live, self.name, self.die)


def rows() -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    return [
        {"image": (generator.random((8, 8)) + (i % 2) * 0.5).tolist(), "label": "ab"[i % 2]}
        for i in range(60)
    ]


@dataclass(frozen=True, kw_only=True)
class Taught(toys.Distil):
    """Remembers which teacher it got."""

    card: ClassVar[Card] = Card(name="taught", title="toy")

    def shape(self, objective: Any, model: Any, context: Any) -> Any:
        shaped = super().shape(objective, model, context)
        named = shaped.teacher.named_parameters()  # type: ignore[union-attr]
        TEACHERS[self.teacher] = {n: p.detach().clone() for n, p in named}
        return shaped


def recipe(die: int | None = None) -> Recipe:
    """Original -> teacher; original again -> student taught by it; then fine-tuned."""
    return Recipe(
        name="stages", model={"config": "cnn", "layers": 1, "width": 8}, data=rows(), id="images",
        task="image-classification", batch={"size": 8}, every={"save": 1}, precision="float64",
        optimizer={"lr": 0.05},
        stages=[
            {"name": "teacher", "budget": "3steps", "methods": [Starts(name="teacher")]},
            {"name": "student", "start": "original", "budget": "3steps",
             "methods": [Taught(teacher="stage:teacher"), Starts(name="student", die=die)]},
            {"name": "tune", "start": "stage:student", "budget": "2steps",
             "methods": [Taught(teacher="original"), Starts(name="tune")]},
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(recipe(), out=tmp_path_factory.mktemp("whole"), device="cpu", threads=1)


def test_a_stage_starts_from_the_model_as_loaded(whole):
    first, second, third = STARTS["teacher"], STARTS["student"], STARTS["tune"]
    body = {n: p for n, p in first.items() if not n.startswith("objective")}
    for name, value in body.items():
        assert torch.equal(value, second[name]), name
    assert any(not torch.equal(value, third[name]) for name, value in body.items())


def test_references_resolve_to_what_stages_exported(whole):
    folder = checkpoint.Path(whole.folder) / "stages"
    exported = checkpoint.read_folder(folder / "teacher")["model"]
    for name, value in TEACHERS["stage:teacher"].items():
        assert torch.equal(value, exported[name].to(value.dtype)), name
        assert torch.equal(TEACHERS["original"][name], STARTS["teacher"][name])
    student = checkpoint.read_folder(folder / "student")["model"]
    assert all(torch.equal(STARTS["tune"][n], student[n].to(toys.F64)) for n in exported if n in
               STARTS["tune"])  # fmt: skip


def test_one_meter_for_all_stages(whole):
    assert whole.meter["steps"] == 8 and whole.status == "done"
    assert whole.meter["student/teacher/flops"] > 0 and whole.meter["tune/teacher/flops"] > 0
    # The student's step costs more than the teacher's, though shapes are the same.
    assert whole.meter["flops"] > 8 * whole.meter["student/teacher/flops"] / 3


def test_a_run_killed_in_its_second_stage_goes_on_to_the_same_bits(whole, tmp_path):
    DYING.append(True)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(die=2), out=tmp_path / "a", device="cpu", threads=1)
    again = run(recipe(die=2), out=tmp_path / "a", device="cpu", threads=1)
    assert again.weights_sha256 == whole.weights_sha256
    plain = {k: v for k, v in whole.meter.items() if "seconds" not in k}
    assert {k: v for k, v in again.meter.items() if "seconds" not in k} == plain
