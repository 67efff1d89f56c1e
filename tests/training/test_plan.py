"""A plan against the run it speaks of, for recipes that the loop treats in a special way."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from outlay.methods.adapters.lamda import LaMDA
from outlay.training.materials import load_materials
from outlay.training.planning import plan as planning
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


def test_numbers_that_a_method_froze_are_no_updates(tmp_path):
    method = LaMDA(r=8, layers_to_transform=(-1,))
    chosen = recipe(methods=(method,))
    ran = run(chosen, out=tmp_path, device="cpu")
    materials = load_materials(chosen)
    adapted = method.adapt(materials.model(chosen))
    head = plan(chosen, device="cpu").params["head"]
    expected = method.parameter_updates(adapted, 20) + 20 * head
    assert ran.meter["parameter_updates"] == expected < 20 * ran.meter["trainable_parameters"]


@pytest.fixture(scope="module")
def error() -> Any:
    """The benchmark whose small version runs here."""
    path = Path(__file__).parents[2] / "benchmarks" / "plan_error.py"
    spec = importlib.util.spec_from_file_location("plan_error", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("architecture", "method"),
    [("bert", "full"), ("gpt2", "adalora"), ("llama", "bone"), ("t5", "peft(type='LORA', r=4)")],
)
def test_a_plan_is_right_by_other_counts(error, architecture, method):
    """Torch's own counter on plain attention, parameters one by one, the profiler's bytes."""
    found = error.cell(architecture, method, 32, steps=2, repeats=0)
    assert error.out_of_bounds(found) == [], found["ratios"]


LONG = {"batch.length": 256, "batch.pad_to": 0, "methods": ("full",)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_does_not_fit_is_told_the_nearest_setting_that_does(monkeypatch, checkpointing):
    size, layers = (2, 3) if checkpointing else (6, 1)
    chosen = recipe(**LONG, **{"batch.size": size, "model.layers": layers})
    # Just short of what one setting takes, so that the next one is the nearest.
    micro = 1 if checkpointing else 3
    near = plan(chosen.changed({"batch.micro": micro}), device="cpu")
    free = near.memory_bytes["peak"] - 1
    monkeypatch.setattr(planning, "free_bytes", lambda backend: free)
    found = plan(chosen, device="cpu")
    assert not found.fits
    told = dict(re.findall(r"--set (\S+)=(\S+)", found.notes[-1]))
    changes = {k: int(v) if v.isdigit() else v == "true" for k, v in told.items()}
    assert changes.pop("model.gradient_checkpointing", False) is checkpointing
    assert checkpointing or changes == {"batch.micro": 2}
    settings = changes | {"model.gradient_checkpointing": checkpointing}
    assert plan(chosen.changed(settings), device="cpu").fits


def test_what_cannot_fit_is_told_why(monkeypatch):
    chosen = recipe(methods=("full",))
    monkeypatch.setattr(planning, "free_bytes", lambda backend: 1000)
    assert "weights, gradients and optimizer alone" in plan(chosen, device="cpu").notes[-1]
