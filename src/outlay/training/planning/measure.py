"""A few real steps: how long they take, and the peak as it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.losses import Batch
from ...core.meter import Counted, Meter
from ...core.method import Step
from ..assemble import Assembly, assemble
from ..backend import OneDevice
from ..materials import Materials
from ..recipe import Recipe
from .fake import kept_by
from .memory import measured_peak
from .shapes import Shape, spread


@dataclass
class Measured:
    """What a few real steps took.

    Attributes:
        peak: Bytes at the widest shape.
        seconds: Predicted for the whole run.
        step_seconds: Of the shapes that were timed.
    """

    peak: int
    seconds: float
    step_seconds: list[float]


def measure_steps(
    recipe: Recipe,
    materials: Materials,
    backend: OneDevice,
    shapes: list[Shape],
    steps: int | None,
    scale: float,
    newly: float,
) -> Measured:
    """Take steps at the smallest, the middle and the largest shape.

    Args:
        recipe: What would run.
        materials: Its data and model.
        backend: Where.
        shapes: What the run will draw.
        steps: Steps expected.
        scale: Micro-batches of the whole run over those in `shapes`.
        newly: The same of micro-batches with rows that come for the first time.
    """
    assembly = assemble(
        recipe,
        model=materials.model(recipe),
        tokenizer=materials.tokenizer,
        objective=lambda requests: materials.objective(recipe, requests),
        train=materials.train,
        rows=materials.rows["train"],
        splits={},
        meter=Meter(),
        backend=backend,
        new_tokens=materials.new_tokens,
        loader=lambda _: backend.place(materials.model(recipe)),
    )
    assembly.loop.gradients.flops.known = _AnyShape()
    assembly.live.engine = assembly.loop
    assembly.model.train()
    prefix = assembly.loop.gradients.prefix

    def work_at(shape: Shape) -> Callable[[], None]:
        step = Step(0, 0.0, recipe.seed, total=steps or 0)
        return lambda: _one_step(assembly, step, [backend.place(shape.batch)])

    def lower_layers(shape: Shape) -> float:
        if prefix is None:
            return 0.0
        prefix.seen.clear()
        prefix.store.rows.clear()
        fill = prefix.fill
        return _timed(lambda: fill(backend.place(shape.batch)), backend)

    ordered = sorted(shapes, key=lambda shape: shape.cells)
    times: dict[Any, float] = {}
    once: dict[Any, float] = {}
    for index in sorted({0, len(ordered) // 2, len(ordered) - 1}):
        shape = ordered[index]
        once[shape.key] = min(lower_layers(shape) for _ in range(2))
        work = work_at(shape)
        work()
        times[shape.key] = min(_timed(work, backend) for _ in range(3))
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
        *(tensor for watcher in assembly.watchers for tensor in kept_by(watcher)),
    ]
    peak = measured_peak(work_at(ordered[-1]), backend, held)
    seconds, lower = spread(shapes, times), spread(shapes, once)
    total = sum(seconds[shape.key] * shape.count for shape in shapes) * scale
    total += sum(lower[shape.key] * shape.fresh for shape in shapes) * newly
    return Measured(peak, total, sorted(times.values()))


class _AnyShape(dict[Any, Counted]):
    """A FLOP table that knows every shape: measuring counts nothing."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: Any) -> Counted:
        return Counted()


def _one_step(assembly: Assembly, step: Step, batches: list[Batch]) -> None:
    """What the loop does in a first step; a watcher's schedule stays where it is."""
    assembly.live.open = False
    seen, _ = assembly.loop.gradients.accumulate(step, batches)
    assembly.loop.clip_gradients()
    for watcher in assembly.watchers:
        watcher.after_backward(step, seen)
    for optimizer in assembly.live.optimizers:
        optimizer.step()
    assembly.live.open = True
    for watcher in assembly.watchers:
        watcher.after_update(step)
    for optimizer in assembly.live.optimizers:
        optimizer.zero_grad(set_to_none=True)


def _timed(work: Callable[[], object], backend: OneDevice) -> float:
    started = time.perf_counter()
    work()
    if backend.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
