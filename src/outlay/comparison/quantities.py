"""What a claim can be about besides the task's metric: parameters, updates, memory, time, a loss.

All of them are better when lower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ..training.recipe import Recipe
    from ..training.result import Result

Quantity = Callable[["Recipe", "Result"], float]


def early_loss(result: Result, share: float) -> float:
    """Mean training loss over the tenth of the steps that ends at a share of the budget.

    Args:
        result: A finished run.
        share: In (0, 1], as 0.1 for the first tenth.
    """
    losses = [line["loss"] for line in result.curves if "loss" in line]
    if not losses:
        raise ConfigError(
            f"run {result.run} logged no training loss", "log it at every step, every.log = 1"
        )
    end, width = max(1, round(share * len(losses))), max(1, round(len(losses) / 10))
    inside = losses[max(0, end - width) : end]
    return sum(inside) / len(inside)


def adapter_parameters(recipe: Recipe, result: Result) -> float:
    """Trainable parameters at the start, without the task's head, which every arm trains."""
    return result.meter["trainable_parameters"] - head_parameters(recipe)


def head_parameters(recipe: Recipe) -> int:
    """Parameters of the task's head."""
    from ..nn.targets import head_modules
    from ..training.materials import load_materials

    model = load_materials(recipe, hollow=True).model(recipe, hollow=True)
    modules = dict(model.named_children())
    return sum(p.numel() for name in head_modules(model) for p in modules[name].parameters())


def peak_memory_bytes(recipe: Recipe, result: Result) -> float:
    """What `plan` works out: weights, gradients, optimizer and activations at the widest batch.

    Frozen layers are counted as computed in every step, as they are without a cache of them.
    """
    from ..training.planning.plan import plan

    if getattr(recipe.model, "cache_frozen", False):
        recipe = recipe.changed({"model.cache_frozen": False})
    return float(plan(recipe, device="cpu").memory_bytes["peak"])


PLAIN: dict[str, Quantity] = {
    "adapter_parameters": adapter_parameters,
    "peak_memory_bytes": peak_memory_bytes,
}
"""Quantities that depend on the recipe alone, worked out once an arm."""


class Quantities:
    """Measures quantities by name, each one that depends on the recipe alone once an arm.

    Args:
        own: Further ones, of the replication itself.
    """

    def __init__(self, own: Mapping[str, Quantity] | None = None) -> None:
        self.plain = {**PLAIN, **(own or {})}
        self.kept: dict[tuple[str, str], float] = {}

    def measured(self, name: str, arm: str, recipe: Recipe, result: Result) -> float:
        """One quantity of one run.

        Args:
            name: A name of `PLAIN` or of the replication's own, `loss@SHARE`, or what the meter
                counts, as seconds or trainable_parameters.
            arm: The arm's name.
            recipe: The arm's recipe.
            result: Its run.

        Raises:
            ConfigError: If there is no such quantity.
        """
        if name in self.plain:
            if (arm, name) not in self.kept:
                self.kept[arm, name] = float(self.plain[name](recipe, result))
            return self.kept[arm, name]
        if name.startswith("loss@"):
            return early_loss(result, float(name.removeprefix("loss@")))
        if name in result.meter:
            return float(result.meter[name])
        known = [*self.plain, "loss@SHARE", *result.meter]
        raise ConfigError(
            f"quantity {name!r} is not measured",
            f"{nearest(name, known)}use one of {', '.join(known)}",
        )
