"""The run on fake tensors: its parameters, floating-point operations and live bytes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from ...core.losses import Batch
from ...core.meter import FlopCounter, Meter
from ...core.method import OnModel, Seen, Step, Watcher
from ...nn.targets import head_modules
from ..assemble import Assembly, assemble
from ..backend import OneDevice
from ..frozen import frozen_prefix
from ..materials import Materials
from ..recipe import Recipe
from .memory import LiveBytes


def faked(model: nn.Module, device: torch.device) -> nn.Module:
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


def assembled(
    recipe: Recipe, materials: Materials, backend: OneDevice, hollow: nn.Module
) -> Assembly:
    """The run put together around a model without storage, its teachers of the same shape."""

    def fresh(_: str = "") -> nn.Module:
        with unset_fake_temporarily():
            spare = copy.deepcopy(hollow)
        return faked(spare, backend.device)

    return assemble(
        recipe,
        model=fresh(),
        tokenizer=materials.tokenizer,
        objective=lambda requests: materials.objective(recipe, requests),
        train=materials.train,
        rows=materials.rows["train"],
        splits={},
        meter=Meter(),
        backend=backend,
        new_tokens=materials.new_tokens,
        loader=fresh,
        prefix=False,
    )


def parameter_counts(assembly: Assembly) -> dict[str, int]:
    """Parameters in all, those that train, and those of them in the task's head."""
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


def _on_device(assembly: Assembly, batch: Batch) -> dict[str, Any]:
    device = assembly.loop.backend.device

    def empty(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: empty(inner) for key, inner in value.items()}
        return torch.empty_like(value, device=device) if isinstance(value, Tensor) else value

    return {key: empty(value) for key, value in batch.items()}


def step_flops(assembly: Assembly, batch: Batch) -> tuple[float, float]:
    """FLOPs of one micro-batch: of its step, and of frozen lower layers when its rows are new."""
    assembly.model.train()
    with FlopCounter() as lower, _prefix_of(assembly, batch):
        below = lower.total
        with FlopCounter() as counter:
            _pass(assembly, _on_device(assembly, batch))
    for parameter in assembly.model.parameters():
        parameter.grad = None
    return float(counter.total), float(below)


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


def live_bytes(assembly: Assembly, batch: Batch, notes: list[str]) -> dict[str, int]:
    """Live bytes through one step at a shape, what outlives a step already there.

    Watchers see the step and may change the assembly: ask for nothing else afterwards.

    Args:
        assembly: The run on fake tensors.
        batch: The shape.
        notes: Where it says what could not be counted.

    Returns:
        weights, gradients, optimizer (what watchers keep included), activations and peak.
    """
    named = list(assembly.live.named_parameters())
    trainable = [p for _, p in named if p.requires_grad]
    state = _state_bytes(assembly)
    assembly.model.train()
    with _prefix_of(assembly, batch), LiveBytes() as tracker:
        tracker.hold(*(p for _, p in named), *assembly.model.buffers())
        weights = tracker.now
        with _spent_inside(assembly, trainable):
            _pass(assembly, _on_device(assembly, batch))
        sizes = [p.numel() * p.element_size() for p in trainable]
        gradients = max(sizes, default=0) if _lets_go(assembly) else sum(sizes)
    # The update needs a temporary or two of the largest parameter (all of them with foreach).
    largest = max((p.numel() * p.element_size() for p in trainable), default=0)
    foreach = assembly.loop.backend.device.type == "cuda"
    update = weights + gradients + (gradients if foreach else 2 * largest)
    state += _watched_bytes(assembly, batch, notes)
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


def _lets_go(assembly: Assembly) -> bool:
    """True if each gradient goes once it is used: updates inside backward, one micro-batch."""
    spec = assembly.recipe.batch
    return assembly.loop.inside and spec.micro in (None, spec.size)


@contextlib.contextmanager
def _spent_inside(assembly: Assembly, trainable: list[nn.Parameter]) -> Iterator[None]:
    """Updates inside backward: each gradient goes as soon as it is there."""
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for parameter in (trainable if _lets_go(assembly) else ())
    ]
    yield
    for hook in hooks:
        hook.remove()


def _watched_bytes(assembly: Assembly, batch: Batch, notes: list[str]) -> int:
    """Bytes of the tensors that watchers keep from a first step on."""
    step = Step(0, 0.0, assembly.recipe.seed, total=assembly.context.total_steps or 0)
    rows = torch.empty(len(batch["ids"]), device=assembly.loop.backend.device)
    seen = Seen(rows, rows, tuple(batch["ids"]), (), 0.0)
    total = 0
    for watcher in assembly.watchers:
        try:
            watcher.after_backward(step, seen)
            watcher.after_update(step)
            total += sum(t.numel() * t.element_size() for t in kept_by(watcher))
        except Exception:  # what reads values has none here
            notes.append(f"memory that {type(watcher).__name__} keeps is not counted")
    return total


def kept_by(watcher: Watcher) -> list[Tensor]:
    """Tensors that a watcher keeps from step to step."""
    return [leaf for leaf in tree_leaves(watcher.state_dict()) if isinstance(leaf, Tensor)]


def _state_bytes(assembly: Assembly) -> int:
    """Bytes of the optimizer's moments; those with `state_bytes()` know their own."""
    total = 0
    for optimizer in assembly.live.optimizers:
        known: Any = getattr(optimizer, "state_bytes", None)
        if known is not None:
            total += known()
            continue
        for group in optimizer.param_groups:
            if isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adam)):
                moments = 2
            elif isinstance(optimizer, torch.optim.SGD):
                moments = 1 if group.get("momentum") else 0
            else:
                moments = getattr(optimizer, "moments", 2)
            total += sum(p.numel() * p.element_size() for p in group["params"]) * moments
    return total
