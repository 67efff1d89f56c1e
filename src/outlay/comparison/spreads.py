"""What given seeds can show, said before a comparison starts, from recorded seed spreads.

A spread is the standard deviation between seeds of the paired differences of two arms. It is taken
from earlier comparisons of the same recipe, metric and budget beside the new one, otherwise from
`spreads.json`, which holds what was measured for the packaged recipes. Neither is a promise: other
arms can spread more or less, and the report says what this comparison's own seeds showed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from . import statistics as st
from .formats import counted, significant


@dataclass(frozen=True)
class Spread:
    """A recorded seed spread.

    Attributes:
        value: Standard deviation of paired differences between seeds, in the metric's unit, > 0.
        source: Where it comes from, in words.
    """

    value: float
    source: str


def pooled(pairs: Iterable[tuple[int, float | None]]) -> float | None:
    """One spread from several pairs: sqrt(sum (n - 1) s**2 / sum (n - 1)).

    Args:
        pairs: Seeds n and spread s of each pair; pairs without spread are left out.

    Returns:
        None if no pair has a spread.
    """
    known = [(n - 1, s) for n, s in pairs if s and n > 1]
    degrees = sum(d for d, _ in known)
    return (sum(d * s * s for d, s in known) / degrees) ** 0.5 if degrees else None


def recorded(
    recipe: str, metric: str, budget: str, out: Path, without: Path | None = None
) -> Spread | None:
    """The spread to plan with: earlier comparisons in `out` first, then what is packaged.

    Args:
        recipe: Name of the recipe.
        metric: `split/metric`.
        budget: As `str(recipe.budget)`.
        out: Folder of comparisons.
        without: A comparison's folder that is left out, as the one that is about to go on.
    """
    pairs: list[tuple[int, float | None]] = []
    comparisons = 0
    own = re.compile(rf"comparison-{re.escape(recipe)}-[0-9a-f]{{10}}")
    for folder in sorted(out.glob("comparison-*")):
        if not own.fullmatch(folder.name) or folder == without:
            continue
        try:
            found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if (found.get("metric"), found.get("budget")) != (metric, budget):
            continue
        measured = [(pair["seeds"], pair["spread"]) for pair in found["pairs"] if pair["spread"]]
        pairs += measured
        comparisons += bool(measured)
    value = pooled(pairs)
    if value is not None:
        return Spread(value, f"from {counted(comparisons, 'earlier comparison')} in {out}")
    entry = packaged().get(recipe, {})
    if metric not in entry.get("spreads", {}):
        return None
    source = f"recorded for {recipe} with {counted(entry['seeds'], 'seed')}"
    if entry["budget"] != budget:
        source += f" at {entry['budget']}, not at {budget}"
    return Spread(entry["spreads"][metric], source)


@lru_cache(maxsize=1)
def packaged() -> dict[str, dict[str, Any]]:
    """Recipe to `{spreads: {metric: spread}, budget, seeds, arms, hardware}`."""
    text = (resources.files("outlay.comparison") / "spreads.json").read_text(encoding="utf-8")
    return json.loads(text)["recipes"]


def foresee(
    spread: Spread | None,
    *,
    recipe: str,
    metric: str,
    arms: int,
    seeds: int,
    detect: float | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
) -> dict[str, Any]:
    """What the seeds can show, and how many a difference would take.

    Args:
        spread: Recorded; None if there is none.
        recipe: Its name.
        metric: `split/metric`.
        arms: How many are compared; every two make a pair.
        seeds: Of every arm.
        detect: Difference that one wants to see, in the metric's unit, > 0.
        alpha: As for `judge`.
        power: As for `judge`.

    Returns:
        JSON-able: `spread`, `source`, `comparisons` (pairs), `detectable` (smallest difference
        that the seeds find with the given power), `detect`, `seeds_needed`, `sentences`, and
        `warning`: what the report must repeat, empty if the seeds suffice.

    Raises:
        ConfigError: If `detect` is not a positive number.
    """
    if detect is not None and not 0 < detect < float("inf"):
        raise ConfigError(
            f"detect = {detect} is not positive",
            f"give the difference in {metric} that matters to you, as 0.01",
        )
    comparisons = arms * (arms - 1) // 2
    plan: dict[str, Any] = {
        "spread": None, "source": "", "comparisons": comparisons, "detectable": None,
        "detect": detect, "seeds_needed": None, "sentences": [], "warning": "",
    }  # fmt: skip
    if spread is None:
        unknown = f"what {counted(seeds, 'seed')} can show"
        if detect is not None:
            unknown += f", or how many seeds a difference of {significant(detect)} takes"
        sentence = (
            f"No seed spread of {metric} is recorded for {recipe}: it cannot be said beforehand "
            f"{unknown}. The report will say it."
        )
        return plan | {"sentences": [sentence]}
    smallest = st.detectable_difference(spread.value, seeds, alpha, comparisons, power)
    plan |= {"spread": spread.value, "source": spread.source, "detectable": smallest}
    sentence = (
        f"{counted(seeds, 'seed')} and {counted(comparisons, 'pair')} of arms can show a "
        f"difference of {significant(smallest)} {metric} or more (with probability {power:g}; "
        f"seed spread {significant(spread.value)}, {spread.source})."
    )
    plan["sentences"] = [sentence]
    if detect is not None:
        needed = st.seeds_needed(detect, spread.value, alpha, comparisons, power)
        plan["seeds_needed"] = needed
        takes = f"A difference of {significant(detect)} {metric} takes {counted(needed, 'seed')}"
        plan["sentences"].append(f"{takes}; {seeds} are given.")
        if needed > seeds:
            plan["warning"] = (
                f"{takes} by the seed spread recorded beforehand and {seeds} were given: a pair "
                "that is not separated may still differ by that much."
            )
    return plan
