"""Know beforehand: parameters, memory by part, FLOPs, and with `measure` also seconds.

Everything is worked out on fake tensors, which have shapes and no storage: the same model code,
the same methods and the same backward pass run, and the live bytes and the floating-point
operations are counted on the way. `measure` loads the real thing and takes steps at the
quantiles of the batch shapes that this run will draw.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from ...core.budget import Budget
from ...nn.placement import fakes_move
from ..assemble import Assembly
from ..backend import OneDevice
from ..materials import Materials, load_materials
from ..recipe import Recipe
from ..stages import stage_recipes
from .fake import assembled, live_bytes, parameter_counts, step_flops
from .measure import measure_steps
from .memory import free_bytes
from .shapes import drawn_shapes, share_of_new_rows, some_of, spread
from .way_out import way_out


@dataclass
class Plan:
    """What a recipe will cost.

    Attributes:
        params: total, trainable (head included) and head.
        memory_bytes: weights, gradients, optimizer (its moments, and what methods keep from step
            to step), activations and peak, at the widest batch.
        flops: Forward and backward of the whole run, multiply-add as two.
        seconds: Predicted training time; None unless measured.
        fits: True if the peak fits the memory that is free now.
        chain: The resolved methods in the order they act, with place and claims.
        steps: Optimizer steps expected.
        notes: Bounds, assumptions, and what to change if it does not fit.
        measured: Peak and step times that were measured, if any.
    """

    params: dict[str, int]
    memory_bytes: dict[str, int]
    flops: float
    seconds: float | None
    fits: bool
    chain: list[dict[str, Any]]
    steps: int | None
    notes: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def plan(
    recipe: Recipe,
    *,
    measure: bool = False,
    device: str = "auto",
    materials: Materials | None = None,
) -> Plan:
    """Work out what a recipe costs, before anything is loaded.

    Args:
        recipe: What would run.
        measure: Load it, take three steps, and predict time and peak from them.
        device: Where it would run.
        materials: Data already loaded for this recipe.

    Raises:
        OutlayError: Whatever would refuse the run itself.
    """
    plans = [
        _plan_stage(stage_recipe, measure, device, materials if not recipe.stages else None)
        for _, stage_recipe in stage_recipes(recipe)
    ]
    whole = max(plans, key=lambda p: p.memory_bytes["peak"])
    timed = [p.seconds for p in plans]
    return dataclasses.replace(
        whole,
        flops=sum(p.flops for p in plans),
        seconds=None if None in timed else sum(t for t in timed if t is not None),
        steps=None if any(p.steps is None for p in plans) else sum(p.steps or 0 for p in plans),
        fits=all(p.fits for p in plans),
    )


def _plan_stage(recipe: Recipe, measure: bool, device: str, materials: Materials | None) -> Plan:
    materials = materials or load_materials(recipe, hollow=True)
    backend = OneDevice(device, recipe.precision)
    shapes = drawn_shapes(recipe, materials)
    widest = max(shapes, key=lambda item: item.cells)
    hollow = materials.model(recipe, hollow=True)
    with FakeTensorMode(allow_non_fake_inputs=True), fakes_move():
        assembly = assembled(recipe, materials, backend, hollow)
        params = parameter_counts(assembly)
        counted = {shape.key: step_flops(assembly, shape.batch) for shape in some_of(shapes)}
        chain = _chain(recipe, assembly)
        notes: list[str] = []
        memory = live_bytes(assembly, widest.batch, notes)
    steps = assembly.context.total_steps
    micro = recipe.batch.size // (recipe.batch.micro or recipe.batch.size)
    per_batch = spread(shapes, {key: both[0] for key, both in counted.items()})
    once = spread(shapes, {key: both[1] for key, both in counted.items()})
    if steps is None:
        steps = _steps_of(recipe.budget, per_batch, micro)
        if steps is None:
            notes.append("a budget in seconds: FLOPs are those of one step")
    drawn = sum(shape.count for shape in shapes)
    if steps is not None and steps * micro > drawn:
        notes.append(f"FLOPs extrapolated from the shapes of the first {drawn // micro} steps")
    scale = (steps or 1) * micro / drawn
    newly = share_of_new_rows(recipe, materials, shapes, steps or 1)
    whole = sum(per_batch[shape.key] * shape.count for shape in shapes) * scale
    whole += sum(once[shape.key] * shape.fresh for shape in shapes) * newly
    free = free_bytes(backend)
    found = Plan(params, memory, whole, None, memory["peak"] <= free, chain, steps, notes)
    if measure:
        taken = measure_steps(recipe, materials, backend, shapes, steps, scale, newly)
        found.seconds, found.measured = taken.seconds, dataclasses.asdict(taken)
        fixed = sum(memory[part] for part in ("weights", "gradients", "optimizer"))
        found.memory_bytes = {
            **memory, "peak": taken.peak, "activations": max(0, taken.peak - fixed)
        }  # fmt: skip
        found.fits = taken.peak <= free
    if not found.fits:
        scale = found.memory_bytes["peak"] / memory["peak"]
        told = way_out(recipe, materials, backend, found.memory_bytes, free, scale)
        found.notes.append(told)
    return found


def _chain(recipe: Recipe, assembly: Assembly) -> list[dict[str, Any]]:
    rows = []
    for method in recipe.methods:
        claims = sorted({claim.word for claim in method.claims(None)})
        rows.append(
            {
                "method": method.spec(),
                "places": list(method.places()),
                "claims": claims,
                "scope": method.card.scope,
            }
        )
    rows.append({"method": assembly.recipe.optimizer.name, "places": ["optimizer"], "claims": []})
    return rows


def _steps_of(budget: Budget, flops: dict[Any, float], micro: int) -> int | None:
    if budget.unit != "flops" or not flops:
        return None
    mean = sum(flops.values()) / len(flops) * micro
    return max(1, round(budget.amount / mean)) if mean else None
