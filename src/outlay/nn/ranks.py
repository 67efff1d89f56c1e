"""Ranks for many matrices from their spectra alone, under one budget: no data, no training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import ConfigError
from .svd import energies, hollow

Policy = Literal["uniform", "energy_threshold", "greedy_energy"]
Cost = Callable[[str, int], float]


def linear_cost(name: str, rank: int) -> float:
    """One number a direction: AdaLoRA's triplets, SVFit's values."""
    return float(rank)


def square_cost(name: str, rank: int) -> float:
    """An r x r matrix: LaMDA's core."""
    return float(rank * rank)


def factor_cost(shapes: Mapping[str, tuple[int, int]]) -> Cost:
    """LoRA's two factors: r (out + in) numbers.

    Args:
        shapes: (out, in) of each matrix.
    """
    return lambda name, rank: float(rank * sum(shapes[name]))


def allocate_ranks(
    spectra: Mapping[str, Float[Tensor, "_"]],
    budget: float,
    r_min: int = 1,
    r_max: int | None = None,
    multiple_of: int = 1,
    policy: str = "greedy_energy",
    cost: Cost = linear_cost,
) -> dict[str, int]:
    r"""Give each matrix a rank so that all together cost at most the budget.

    Every policy is one order in which directions are handed out after each matrix has `r_min`,
    so a larger budget never takes a direction away:

    - "greedy_energy": the next direction of largest $\sigma^2 / \lVert W \rVert_F^2$ first.
    - "energy_threshold": by the share E(k) that a matrix holds already, least first. That is
      r(tau) = min{k : E(k) >= tau} at the largest tau that the budget pays for, and what is left
      goes to the next matrices in line.
    - "uniform": round after round to all matrices.

    A matrix whose energy sits in few directions gets few under "energy_threshold" and, once those
    are had, under "greedy_energy". The rule of LaMDA++ (arXiv 2406.12832, "normalized spectrum
    analysis") is not established; these are this package's choices.

    Args:
        spectra: Singular values of each matrix, decreasing, all of them.
        budget: Largest total cost.
        r_min: Rank that every matrix gets.
        r_max: Largest rank of any matrix; the number of its singular values by default.
        multiple_of: Ranks are multiples of this.
        policy: The order.
        cost: Price of a rank, by name and rank, rising by at least as much with each direction.

    Returns:
        Ranks by name. Equal spectra differ by at most `multiple_of`, earlier names first.

    Raises:
        ConfigError: If there is no spectrum, a value is not finite, the bounds contradict each
            other, or the budget does not pay for `r_min` everywhere.
    """
    _check(spectra, r_min, r_max, multiple_of, policy)
    tops = {
        name: max(r_min, min(len(s), r_max or len(s)) // multiple_of * multiple_of)
        for name, s in spectra.items()
    }
    least = sum(cost(name, r_min) for name in spectra)
    if math.isnan(budget) or least > budget * (1 + 1e-12):
        raise ConfigError(
            f"rank budget {budget:g} does not pay for rank {r_min} in {len(spectra)} matrices, "
            f"which costs {least:g}",
            f"give a budget of at least {least:g}, a smaller r_min or fewer target_modules",
        )
    units: list[tuple[float, int, str]] = []
    for name, s in spectra.items():
        order = "uniform" if hollow(s) else policy  # a plan knows no spectra
        urgency = _urgencies(s, order, multiple_of)
        units += [(urgency(rank), rank, name) for rank in range(r_min, tops[name], multiple_of)]
    # Of equally urgent directions those of lower index come first, so that equal spectra stay even.
    units.sort(key=lambda unit: unit[1])
    prices = [cost(name, rank + multiple_of) - cost(name, rank) for _, rank, name in units]
    ranks = dict.fromkeys(spectra, r_min)
    for (_, _, name), kept in zip(units, _afford([u for u, _, _ in units], prices, budget - least)):
        ranks[name] += multiple_of * kept
    return ranks


def _urgencies(s: Tensor, policy: str, multiple_of: int) -> Callable[[int], float]:
    """How urgent the directions behind a rank are."""
    if policy == "uniform":
        return lambda rank: -float(rank)
    if policy == "energy_threshold":
        held = energies(s).tolist()
        return lambda rank: -held[rank - 1]
    squares = s.double().square()
    whole = float(squares.sum()) or 1.0
    # The squares themselves and not differences of sums, so that equal values stay equal.
    gains = (squares / whole).tolist()
    return lambda rank: sum(gains[rank : rank + multiple_of])


def _afford(urgency: list[float], prices: list[float], budget: float) -> list[bool]:
    """The most urgent units up to the first that the budget does not pay for.

    At equal prices this is `core.allocate`. At unequal ones that would pass over a dear unit and
    take a cheap one behind it, and a larger budget could take a direction away from a matrix.
    Plain Python, because a plan calls it where tensors have no values.
    """
    keep, left = [False] * len(urgency), budget
    for index in sorted(range(len(urgency)), key=lambda i: -urgency[i]):
        left -= prices[index]
        if left < -1e-9:
            break
        keep[index] = True
    return keep


def _check(
    spectra: Mapping[str, Tensor], r_min: int, r_max: int | None, multiple_of: int, policy: str
) -> None:
    policies = ("uniform", "energy_threshold", "greedy_energy")
    if policy not in policies:
        raise ConfigError(f"rank policy {policy!r} is not known", f"use {', '.join(policies)}")
    if not spectra:
        raise ConfigError("no spectrum to allocate ranks over", "give at least one matrix")
    if multiple_of < 1 or r_min < 1 or r_min % multiple_of:
        raise ConfigError(
            f"r_min = {r_min}, multiple_of = {multiple_of}",
            "give both at least 1, and r_min a multiple of multiple_of",
        )
    if r_max is not None and r_max < r_min:
        raise ConfigError(f"r_max = {r_max} is below r_min = {r_min}", "give r_max >= r_min")
    for name, s in spectra.items():
        if len(s) < r_min:
            raise ConfigError(
                f"r_min = {r_min} is above the {len(s)} directions of {name!r}",
                f"give r_min up to {len(s)}, or leave the layer out of target_modules",
            )
        if not hollow(s) and not bool(torch.isfinite(s).all()):
            raise ConfigError(
                f"the spectrum of {name!r} holds NaN or infinity", "repair the weight it is from"
            )
