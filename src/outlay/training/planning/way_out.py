"""What to change when a run does not fit: worked out, not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from ...core.errors import OutlayError
from ...nn.placement import fakes_move
from ..backend import OneDevice
from ..materials import Materials
from ..recipe import Recipe
from .fake import assembled, live_bytes
from .shapes import drawn_shapes


def way_out(
    recipe: Recipe,
    materials: Materials,
    backend: OneDevice,
    memory: dict[str, int],
    free: int,
    scale: float = 1.0,
) -> str:
    """The nearest setting that fits, or why none does.

    Only settings are tried that leave the result as it is but for rounding: smaller micro-batches
    first, as they cost least, then activations that are computed again.

    Args:
        recipe: What does not fit.
        materials: Its data and model.
        backend: Where.
        memory: Its planned bytes by part.
        free: Bytes that there are.
        scale: Measured peak over the planned one.
    """
    short = f"peak {memory['peak']:,} bytes, {free:,} free: "
    fixed = memory["peak"] - memory["activations"]
    if fixed > free:
        return (
            f"{short}weights, gradients and optimizer alone take {fixed:,}; train fewer parameters"
        )
    least = memory["peak"]
    for changes in _candidates(recipe):
        try:
            peak = scale * _peak(recipe.changed(changes), materials, backend)
        except (OutlayError, ValueError):  # not for this model or these methods
            continue
        if peak <= free:
            told = " ".join(f"--set {key}={str(value).lower()}" for key, value in changes.items())
            return f"{short}{told} fits, with a peak of {peak:,.0f}"
        least = min(least, int(peak))
    return f"{short}{least:,} is the least that smaller micro-batches reach; lower batch.length"


def _candidates(recipe: Recipe) -> Iterator[dict[str, Any]]:
    size = recipe.batch.size
    micro = recipe.batch.micro or size
    smaller = [m for m in range(micro - 1, 0, -1) if size % m == 0]
    for value in smaller:
        yield {"batch.micro": value}
    if not getattr(recipe.model, "gradient_checkpointing", True):
        yield {"model.gradient_checkpointing": True}
        for value in smaller:
            yield {"batch.micro": value, "model.gradient_checkpointing": True}


def _peak(recipe: Recipe, materials: Materials, backend: OneDevice) -> int:
    widest = max(drawn_shapes(recipe, materials), key=lambda shape: shape.cells)
    hollow = materials.model(recipe, hollow=True)
    with FakeTensorMode(allow_non_fake_inputs=True), fakes_move():
        assembly = assembled(recipe, materials, backend, hollow)
        return live_bytes(assembly, widest.batch, [])["peak"]
