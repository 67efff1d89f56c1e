"""Spend a budget over units: an exact choice (`allocate`), soft shares (`share`), schedules."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .errors import ConfigError


def allocate(
    scores: Float[Tensor, " units"],
    costs: Float[Tensor, " units"] | None = None,
    budget: float = math.inf,
) -> Bool[Tensor, " units"]:
    """Keep the best units that the budget pays for.

    With equal costs this is exact top-k, ties broken by the lower index. With unequal costs
    units are taken in order of score per cost, and one that no longer fits is passed over
    (greedy knapsack: within one unit's cost of the relaxed optimum).

    Args:
        scores: Value of each unit; NaN counts as the worst.
        costs: Price of each unit, > 0; one each by default.
        budget: Largest total price.

    Returns:
        True where a unit is kept.

    Raises:
        ConfigError: If a cost is missing or not positive, or the budget is NaN.
    """
    count = scores.numel()
    if costs is not None and costs.shape != scores.shape:
        raise ConfigError(
            f"{count} scores and {costs.numel()} costs", "give each unit one score and one cost"
        )
    values = torch.nan_to_num(scores.detach().double().cpu(), nan=-math.inf)
    prices = torch.ones(count, dtype=torch.float64) if costs is None else costs.double().cpu()
    if math.isnan(budget) or not bool(((prices > 0) & prices.isfinite()).all()):
        raise ConfigError("a price is not positive or the budget is NaN", "give prices > 0")
    keep = torch.zeros(count, dtype=torch.bool)
    if budget <= 0:
        return keep.to(scores.device)
    if count and bool((prices == prices[0]).all()):
        affordable = count if math.isinf(budget) else int(budget / float(prices[0]) + 1e-9)
        order = torch.argsort(values, descending=True, stable=True)
        keep[order[: max(0, min(count, affordable))]] = True
        return keep.to(scores.device)
    remaining = budget
    order = torch.argsort(values / prices, descending=True, stable=True)
    for index in order.tolist():
        if prices[index] <= remaining + 1e-9:
            keep[index] = True
            remaining -= float(prices[index])
    return keep.to(scores.device)


def share(
    scores: Float[Tensor, " units"], temperature: float = 1.0, floor: float = 0.0
) -> Float[Tensor, " units"]:
    """Turn scores into shares that sum to one: softmax(scores / temperature), mixed with a floor.

    Args:
        scores: Value of each unit.
        temperature: > 0; small means the best takes all.
        floor: Smallest share of any unit, between 0 and 1 / units.

    Raises:
        ConfigError: If the temperature is not positive, the floors sum to more than one, or a
            score is NaN.
    """
    count = scores.numel()
    if bool(scores.isnan().any()):
        raise ConfigError("a score is NaN", "give a number for every unit")
    if not (temperature > 0 and floor >= 0 and floor * count <= 1 + 1e-12):
        raise ConfigError(
            f"temperature={temperature}, floor={floor} over {count} units",
            "give temperature > 0 and 0 <= floor <= 1/units",
        )
    return floor + (1 - floor * count) * torch.softmax(scores.double() / temperature, 0)


def cubic(progress: float, start: float, end: float) -> float:
    """Cubic decay from `start` to `end`: end + (start - end) * (1 - progress)^3.

    Args:
        progress: Clipped to [0, 1].
        start: Value at progress 0.
        end: Value at progress 1.
    """
    clipped = min(1.0, max(0.0, progress))
    return end + (start - end) * (1.0 - clipped) ** 3


def one_shot(progress: float, start: float, end: float, at: float = 0.5) -> float:
    """`start` before `at`, `end` from then on; all three in shares of the budget."""
    return end if progress >= at else start
