"""A plan against the run it speaks of, for recipes that the loop treats in a special way."""

from __future__ import annotations

from typing import Any

import pytest

from outlay.training.planning.plan import plan
from outlay.training.recipe import Recipe
from outlay.training.runs import run

ROWS = [{"text": f"{word} and {word} {i}", "label": word} for i in range(20) for word in "abc"]


def recipe(**changes: Any) -> Recipe:
    return Recipe(
        name="planned", model={"config": "bert", "layers": 3, "width": 32, "dropout": 0.0},
        data=ROWS, id="rows", methods=("bone(r=4, layers_to_transform=(-1,))",),
        batch={"size": 8, "length": 16}, budget="20steps",
    ).changed(changes)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"model.cache_frozen": True},
        {"model.gradient_checkpointing": True},
        {"batch.micro": 2},
        {"batch.pad_to": 1},
        {"methods": ("probe",), "model.cache_frozen": True},
    ],
    ids=str,
)
def test_a_plan_counts_what_the_run_counts(tmp_path, changes):
    chosen = recipe(**changes)
    planned = plan(chosen, device="cpu")
    meter = run(chosen, out=tmp_path, device="cpu").meter
    assert planned.params["trainable"] == meter["trainable_parameters"]
    assert planned.flops == pytest.approx(meter["flops"], rel=0.01)
    assert planned.steps == meter["steps"]
