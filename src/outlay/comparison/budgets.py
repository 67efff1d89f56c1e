"""Budgets of a comparison: what must be equal for which unit, how nearly, and in what words."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.budget import Budget
from ..training.recipe import Recipe
from ..training.result import Result
from .formats import duration, listed, prefixed

Results = Mapping[str, Mapping[int, Result | None]]

EXACT = 0.01
"""Budgets are equal if they differ by no more than this share."""
COARSE = 0.05
"""The most that is allowed where a run can only end after a whole step."""
_CHECKED = {
    "steps": ("steps", "tokens"),
    "tokens": ("tokens",),
    "examples": ("examples",),
    "flops": ("flops",),
    "effective_flops": ("effective_flops",),
    "seconds": ("seconds",),
}
_WORDS = {
    "flops": "FLOPs",
    "effective_flops": "effective FLOPs",
    "seconds": "seconds of training",
}


def checked_units(recipe: Recipe) -> tuple[str, ...]:
    """Meters in which all arms must be equal.

    A budget in steps means steps and tokens, any other unit itself alone; stages whose units
    differ are checked in steps and tokens.
    """
    units = {(stage.budget or recipe.budget).unit for stage in recipe.stages}
    units = units or {recipe.budget.unit}
    return _CHECKED[units.pop()] if len(units) == 1 else _CHECKED["steps"]


def spent(recipe: Recipe, results: Results) -> dict[str, dict[str, dict[int, float]]]:
    """Arm to unit to seed to amount, as `judge` takes it; failed runs left out."""
    return {
        arm: {
            unit: {seed: r.meter[unit] for seed, r in by_seed.items() if r is not None}
            for unit in checked_units(recipe)
        }
        for arm, by_seed in results.items()
    }


def tolerance(recipe: Recipe, results: Results) -> float:
    """Share by which budgets may differ: 1 %, or one step where that is more, at most 5 %.

    A run ends after the first whole step that reaches the budget, so that it may go over by up
    to one step, and arms differ in what a step costs. Seconds get two steps, whose length varies.
    """
    unit = checked_units(recipe)[0]
    if unit == "steps":
        return EXACT
    largest = EXACT
    for by_seed in results.values():
        for result in by_seed.values():
            if result is not None and result.meter[unit] and result.meter["steps"]:
                step = 1 / result.meter["steps"]
                largest = max(largest, 2 * step if unit == "seconds" else step)
    return min(largest, COARSE)


def budget_text(recipe: Recipe) -> str:
    """What every run may spend, as "150 steps of 16 examples each"."""
    if recipe.stages:
        parts = [f"{amount_text(s.budget or recipe.budget)} ({s.name})" for s in recipe.stages]
        return f"{listed(parts)}, {recipe.batch.size} examples a step"
    if recipe.budget.unit == "steps":
        return f"{amount_text(recipe.budget)} of {recipe.batch.size} examples each"
    return f"{amount_text(recipe.budget)}, in steps of {recipe.batch.size} examples"


def budget_sentence(recipe: Recipe, results: Results) -> str:
    """In which unit budgets are equal, and how nearly."""
    units = checked_units(recipe)
    words = listed([_WORDS.get(unit, unit) for unit in units])
    allowed = f"{100 * tolerance(recipe, results):.2g} %"
    text = f"Equal means: as many {words} for every arm, to within {allowed}."
    if units[0] in ("flops", "effective_flops", "seconds"):
        text += " Arms whose steps cost less take more steps and see more tokens."
    if units[0] == "seconds":
        text += " Seconds hold for this machine and what else ran on it."
    return text


def amount_text(budget: Budget) -> str:
    """`150 steps`, `2.00 TFLOP`, `30.0 s`."""
    if budget.unit == "seconds":
        return duration(budget.amount)
    if budget.unit == "flops":
        return prefixed(budget.amount, "FLOP")
    if budget.unit == "effective_flops":
        return f"{prefixed(budget.amount, 'FLOP')} (effective)"
    amount = int(budget.amount)
    return f"{amount:,} {budget.unit.rstrip('s') if amount == 1 else budget.unit}"
