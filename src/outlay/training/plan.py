"""Know beforehand: parameters, memory by part, FLOPs, and with `measure` also seconds.

Everything is worked out on fake tensors, which have shapes and no storage: the same model code,
the same methods and the same backward pass run, and the live bytes and the floating-point
operations are counted on the way. `measure` loads the real thing and takes steps at the
quantiles of the batch shapes that this run will draw.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..core.budget import Budget
from ..core.losses import Batch
from ..core.meter import FlopCounter, Meter
from ..core.method import OnModel, Step
from ..nn.placement import fakes_move
from ..nn.targets import head_modules
from .assemble import Assembly, assemble, expected_steps
from .backend import OneDevice, batch_key
from .frozen import frozen_prefix
from .materials import Materials, load_materials
from .memory import LiveBytes, free_bytes, measured_peak
from .recipe import Recipe
from .runs import stage_recipes

_LOOKED_AT = 200  # steps whose real batch shapes are drawn; longer runs are extrapolated
_SHAPES = 6  # shapes that are worked out one by one; others are interpolated by tokens


@dataclass
class Plan:
    """What a recipe will cost.

    Attributes:
        params: total, trainable (head included) and head.
        memory_bytes: weights, gradients, optimizer, activations and peak, at the widest batch.
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
    shapes = _drawn_shapes(recipe, materials)
    widest = max(shapes, key=lambda item: item.cells)
    hollow = materials.model(recipe, hollow=True)
    with FakeTensorMode(allow_non_fake_inputs=True), fakes_move():
        assembly = _assembled(recipe, materials, backend, _faked(hollow, backend.device))
        params = _parameters(assembly)
        memory = _memory(assembly, widest.batch, recipe)
        flops = {shape.key: _flops(assembly, shape.batch) for shape in _some(shapes)}
        chain = _chain(recipe, assembly)
    steps = expected_steps(recipe.budget, recipe.batch.size, assembly.live.pool)
    notes = []
    per_step = _spread(shapes, flops)
    if steps is None:
        steps = _steps_of(recipe.budget, per_step)
        if steps is None:
            notes.append("a budget in seconds: FLOPs are those of one step")
    drawn = sum(shape.count for shape in shapes)
    micro = recipe.batch.size // (recipe.batch.micro or recipe.batch.size)
    if steps is not None and steps * micro > drawn:
        notes.append(f"FLOPs extrapolated from the shapes of the first {drawn // micro} steps")
    scale = (steps or 1) * micro / drawn
    whole = sum(per_step[shape.key] * shape.count for shape in shapes) * scale
    free = free_bytes(backend)
    found = Plan(params, memory, whole, None, memory["peak"] <= free, chain, steps, notes)
    if measure:
        _measure(found, recipe, materials, backend, shapes, scale)
    if not found.fits:
        found.notes.append(_way_out(recipe, found, free))
    return found


# ---- shapes --------------------------------------------------------------------------------------


@dataclass
class _Shape:
    """One batch shape that the run will draw, and how often."""

    key: Any
    batch: Batch
    count: int
    cells: int


def _drawn_shapes(recipe: Recipe, materials: Materials) -> list[_Shape]:
    """Micro-batch shapes of the first steps, in the run's own order."""
    from ..core.method import Context, OnBatch
    from .data.batch import Drawer
    from .data.pool import Pool

    context = Context(budget=recipe.budget, seed=recipe.seed, tokenizer=materials.tokenizer)
    pool = Pool(materials.train, recipe.seed)
    context.total_steps = expected_steps(recipe.budget, recipe.batch.size, pool)
    spec = recipe.batch.model_copy(update={"prefetch": 0})
    methods = [m for m in recipe.methods if isinstance(m, OnBatch)]
    drawer = Drawer(pool, spec, methods, context)
    counts: Counter[Any] = Counter()
    seen: dict[Any, Batch] = {}
    for index in range(min(context.total_steps or _LOOKED_AT, _LOOKED_AT)):
        for batch in drawer.draw(Step(index, 0.0, recipe.seed)):
            key = batch_key(batch)
            counts[key] += 1
            seen.setdefault(key, batch)
    return [
        _Shape(key, seen[key], count, sum(v.numel() for v in seen[key].values() if _is(v)))
        for key, count in counts.items()
    ]


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def _some(shapes: list[_Shape]) -> list[_Shape]:
    """All shapes, or if there are many, ones spread over the sizes."""
    ordered = sorted(shapes, key=lambda shape: shape.cells)
    if len(ordered) <= _SHAPES:
        return ordered
    picks = {round(i * (len(ordered) - 1) / (_SHAPES - 1)) for i in range(_SHAPES)}
    return [ordered[index] for index in sorted(picks)]


def _spread(shapes: list[_Shape], known: dict[Any, float]) -> dict[Any, float]:
    """A value for every shape: known ones, and a quadratic in size between them."""
    import numpy as np

    if len(known) == len(shapes):
        return known
    points = [(shape.cells, known[shape.key]) for shape in shapes if shape.key in known]
    x, y = np.array(points, dtype=float).T
    curve = np.polyfit(x, y, 2)
    return {
        shape.key: known.get(shape.key, float(np.polyval(curve, shape.cells))) for shape in shapes
    }


# ---- the fake run --------------------------------------------------------------------------------


def _faked(model: nn.Module, device: torch.device) -> nn.Module:
    """Fake tensors in place of the model's own, ties kept; call under fake mode."""
    made: dict[int, Tensor] = {}

    def fake(value: Tensor) -> Tensor:
        if id(value) not in made:
            blank = torch.empty(value.shape, dtype=value.dtype, device=device)
            is_parameter = isinstance(value, nn.Parameter)
            made[id(value)] = nn.Parameter(blank, value.requires_grad) if is_parameter else blank
        return made[id(value)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, value in held.items():
                if value is not None:
                    held[key] = fake(value)  # type: ignore[assignment]
    return model


def _assembled(
    recipe: Recipe, materials: Materials, backend: OneDevice, model: nn.Module
) -> Assembly:
    return assemble(
        recipe,
        model=model,
        tokenizer=materials.tokenizer,
        objective=lambda requests: materials.objective(recipe, requests),
        train=materials.train,
        splits={},
        meter=Meter(),
        backend=backend,
        new_tokens=materials.new_tokens,
        prefix=False,
    )


def _parameters(assembly: Assembly) -> dict[str, int]:
    heads = head_modules(assembly.model)
    named = list(assembly.live.named_parameters())
    return {
        "total": sum(p.numel() for _, p in named),
        "trainable": sum(p.numel() for _, p in named if p.requires_grad),
        "head": sum(p.numel() for n, p in named if n.split(".")[0] in heads and p.requires_grad),
    }


def _pass(assembly: Assembly, batch: Batch) -> None:
    """Forward and backward of one micro-batch, as the loop does them."""
    model, objective = assembly.model, assembly.objective
    step = Step(0, 0.0, assembly.recipe.seed)
    with contextlib.ExitStack() as stack:
        for method in assembly.recipe.methods:
            if isinstance(method, OnModel):
                stack.enter_context(method.bind(model, batch))
        stack.enter_context(assembly.loop.backend.autocast())
        losses = objective(model, batch, step)
    value: Any = 0.0
    for term in losses.terms.values():
        value = value + term.row_sums().sum() * term.coefficient
    for penalty in objective.penalties(model, step).values():
        value = value + penalty
    if isinstance(value, Tensor) and value.requires_grad:
        value.backward()


def _on_device(assembly: Assembly, batch: Batch) -> Batch:
    return {
        key: torch.empty_like(value, device=assembly.loop.backend.device) if _is(value) else value
        for key, value in batch.items()
    }


def _flops(assembly: Assembly, batch: Batch) -> float:
    assembly.model.train()
    with FlopCounter() as counter, _prefix_of(assembly, batch):
        _pass(assembly, _on_device(assembly, batch))
    for parameter in assembly.model.parameters():
        parameter.grad = None
    return float(counter.total)


@contextlib.contextmanager
def _prefix_of(assembly: Assembly, batch: Batch) -> Iterator[None]:
    """The frozen lower layers answer from their cache, as in the run."""
    if not getattr(assembly.recipe.model, "cache_frozen", False):
        yield
        return
    prefix = frozen_prefix(assembly.model, assembly.recipe.methods)
    if prefix is None:
        yield
        return
    prefix.pretend(_on_device(assembly, batch))
    with prefix.bind(batch):
        yield


def _memory(assembly: Assembly, batch: Batch, recipe: Recipe) -> dict[str, int]:
    """Live bytes through one step at a shape, the optimizer's moments already there."""
    named = list(assembly.live.named_parameters())
    trainable = [p for _, p in named if p.requires_grad]
    state = _state_bytes(assembly)
    assembly.model.train()
    with _prefix_of(assembly, batch), LiveBytes() as tracker:
        tracker.hold(*(p for _, p in named), *assembly.model.buffers())
        weights = tracker.now
        _pass(assembly, _on_device(assembly, batch))
        del batch
        gradients = sum(p.numel() * p.element_size() for p in trainable)
    # The update needs a temporary or two of the largest parameter (all of them with foreach).
    largest = max((p.numel() * p.element_size() for p in trainable), default=0)
    foreach = assembly.loop.backend.device.type == "cuda"
    update = weights + gradients + (gradients if foreach else 2 * largest)
    peak = max(tracker.peak, update) + state
    for parameter in trainable:
        parameter.grad = None
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": state,
        "activations": max(0, peak - weights - gradients - state),
        "peak": peak,
    }


def _state_bytes(assembly: Assembly) -> int:
    """Bytes of the optimizer's moments: from a real step on one element where it can be known."""
    total = 0
    for optimizer in assembly.live.optimizers:
        for group in optimizer.param_groups:
            if isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adam)):
                moments = 2
            elif isinstance(optimizer, torch.optim.SGD):
                moments = 1 if group.get("momentum") else 0
            else:
                moments = getattr(optimizer, "moments", 2)
            total += sum(p.numel() * p.element_size() for p in group["params"]) * moments
    return total


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


# ---- measuring -----------------------------------------------------------------------------------


def _measure(
    found: Plan,
    recipe: Recipe,
    materials: Materials,
    backend: OneDevice,
    shapes: list[_Shape],
    scale: float,
) -> None:
    """Take steps at the quantile shapes; predict seconds and correct the peak."""
    assembly = assemble(
        recipe,
        model=materials.model(recipe),
        tokenizer=materials.tokenizer,
        objective=lambda requests: materials.objective(recipe, requests),
        train=materials.train,
        splits={},
        meter=Meter(),
        backend=backend,
        new_tokens=materials.new_tokens,
    )
    assembly.loop.gradients.flops.known = _AnyShape()
    assembly.model.train()

    def work_at(rank: int, shape: _Shape) -> Callable[[], None]:
        step = Step(rank, 0.0, recipe.seed, total=found.steps or 0)
        return lambda: _one_step(assembly, step, [backend.place(shape.batch)])

    ordered = sorted(shapes, key=lambda shape: shape.cells)
    times: dict[Any, float] = {}
    for rank, index in enumerate(sorted({0, len(ordered) // 2, len(ordered) - 1})):
        work = work_at(rank, ordered[index])
        work()
        times[ordered[index].key] = min(_timed(work, backend) for _ in range(3))
    held = [
        *(p for _, p in assembly.live.named_parameters()),
        *assembly.model.buffers(),
        *(
            value
            for optimizer in assembly.live.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ),
    ]
    peak = measured_peak(work_at(9, ordered[-1]), backend, held)
    seconds = _spread(shapes, times)
    total = sum(seconds[shape.key] * shape.count for shape in shapes) * scale
    found.seconds = total
    found.measured = {"peak": peak, "step_seconds": sorted(times.values())}
    found.memory_bytes = {**found.memory_bytes, "peak": peak}
    parts = ("weights", "gradients", "optimizer")
    found.memory_bytes["activations"] = max(0, peak - sum(found.memory_bytes[k] for k in parts))
    found.fits = peak <= free_bytes(backend)


class _AnyShape(dict[Any, dict[str, int]]):
    """A FLOP table that knows every shape: measuring counts nothing."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: Any) -> dict[str, int]:
        return {"": 0}


def _one_step(assembly: Assembly, step: Step, batches: list[Batch]) -> None:
    """What the loop does in a step, watchers left out."""
    assembly.loop.gradients.accumulate(step, batches)
    assembly.loop.clip_gradients()
    for optimizer in assembly.live.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _timed(work: Callable[[], None], backend: OneDevice) -> float:
    started = time.perf_counter()
    work()
    if backend.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _steps_of(budget: Budget, flops: dict[Any, float]) -> int | None:
    if budget.unit != "flops" or not flops:
        return None
    mean = sum(flops.values()) / len(flops)
    return max(1, round(budget.amount / mean)) if mean else None


def _way_out(recipe: Recipe, found: Plan, free: int) -> str:
    """The nearest setting that fits: activations shrink with the micro-batch."""
    fixed = found.memory_bytes["peak"] - found.memory_bytes["activations"]
    micro = recipe.batch.micro or recipe.batch.size
    share = (free - fixed) / max(1, found.memory_bytes["activations"])
    fitting = [m for m in range(1, micro) if recipe.batch.size % m == 0 and m <= share * micro]
    short = f"peak {found.memory_bytes['peak']:,} bytes, {free:,} free: "
    if fitting:
        return f"{short}--set batch.micro={fitting[-1]} fits"
    if not getattr(recipe.model, "gradient_checkpointing", True):
        return f"{short}try --set model.gradient_checkpointing=true and batch.micro=1"
    return f"{short}weights, gradients and optimizer alone take {fixed:,}; train fewer parameters"
