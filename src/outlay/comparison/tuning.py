"""Tuning as a part of a method: the same grid, trials and budget for every arm, and charged.

Successive halving in two rungs: every point of the grid gets a run of a quarter of the budget,
and the best of them (one in `halving`, rounded up, at least two) a run of the whole budget; the
best of those is taken. A short rung is a short run of its own, not the start of a long one:
schedules follow the share of the budget, so a long run that is cut at a quarter has not warmed
down, and its settings would be judged at a learning rate that no finished run ends with. What it
cannot see is a setting that wins only in long runs; `halving=1` gives every point the whole
budget.

Scores are of the validation split alone, under seeds that no reported run has. A best value on
the edge of its grid extends that grid by one value for every arm alike, a few times at most. A
trial that diverges is the worst and its cost is charged too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ..core.budget import Budget
from ..core.errors import ConfigError, OutlayError
from ..training.checkpoint import write_json
from ..training.recipe import Recipe
from .budgets import amount_text
from .formats import counted, listed
from .running import Runs

FIRST_SHARE = 0.25
"""Share of the budget that a run of the first rung gets."""
LEAST_KEPT = 2
"""Points of each round that at least get the whole budget."""
EXTENSIONS = 3
"""How often grids are extended at most."""
FIRST_SEED = 100_000
"""Tuning seeds start here, or above the reported seeds."""
CHARGED = ("steps", "tokens", "flops", "seconds")
_LADDER = (0.1, 0.3, 1.0, 3.0, 10.0)

Grid = dict[str, list[Any]]
Point = tuple[Any, ...]


@dataclass(frozen=True)
class Question:
    """What is tuned.

    Attributes:
        grid: Dotted setting to its values; several settings are tried in all combinations.
        metric: `validation/metric` that decides.
        higher: True if more of it is better.
        seeds: Runs of each point, under these seeds.
        halving: One point in so many reaches the whole budget; 1 for all.
    """

    grid: Grid
    metric: str
    higher: bool
    seeds: tuple[int, ...]
    halving: int


@dataclass
class Tuned:
    """What tuning found for one arm.

    Attributes:
        chosen: Value by dotted setting.
        cost: `trials` (runs), and their `steps`, `tokens`, `flops` and `seconds` together.
        trials: One entry a point and rung, in the order tried: `settings`, `budget`, `score`
            (None if it diverged) and `failure`.
    """

    chosen: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("trials", *CHARGED), 0))
    trials: list[dict[str, Any]] = field(default_factory=list)


def checked_grid(grid: Mapping[str, Sequence[Any]]) -> Grid:
    """The grid with each setting's values once, in ascending order where they are numbers.

    Raises:
        ConfigError: If a setting has no value.
    """
    checked: Grid = {}
    for key, given in grid.items():
        values = [tuple(v) if isinstance(v, list) else v for v in given]
        different = [v for i, v in enumerate(values) if v not in values[:i]]
        if not different:
            raise ConfigError(f"tune {key!r} has no value", f'write "{key}=A,B,C"')
        checked[key] = sorted(different) if all(map(_is_number, different)) else different
    return checked


def ladder(recipe: Recipe, key: str) -> tuple[float, ...]:
    """Values for a setting that comes without: its own times 0.1, 0.3, 1, 3 and 10.

    Raises:
        ConfigError: If the recipe has no such setting, or it is no positive number.
    """
    place: Any = recipe.resolved()
    for part in key.split("."):
        place = place.get(part) if isinstance(place, dict) else None
    if not (_is_number(place) and place > 0):
        raise ConfigError(
            f"tune {key!r}: its value here is {place!r}, from which no grid follows",
            f'give the values, as "{key}=A,B,C"',
        )
    values = [float(f"{place * factor:.3g}") for factor in _LADDER]
    if isinstance(place, int):
        values = sorted({max(1, round(value)) for value in values})
    return tuple(values)


def tune(
    runs: Runs, recipes: Mapping[str, Recipe], question: Question, record: Path
) -> tuple[dict[str, Tuned], list[str]]:
    """Tune every arm alike.

    Trials are runs in the store, so a killed tuning goes on where it was.

    Args:
        runs: Makes them.
        recipes: Arm to its recipe.
        question: What is tried, and what decides.
        record: JSON file for every trial, its score and what was chosen.

    Returns:
        What was found by arm, and sentences for the report.

    Raises:
        ConfigError: If a setting is unknown or a value not allowed.
    """
    grid, tuned = dict(question.grid), {arm: Tuned() for arm in recipes}
    scores: dict[str, dict[Point, float]] = {arm: {} for arm in recipes}
    notes: list[str] = []
    if question.halving > 1 and any(recipe.stages for recipe in recipes.values()):
        question = Question(question.grid, question.metric, question.higher, question.seeds, 1)
        notes.append("A recipe with stages is tuned with whole runs, without a shorter rung.")
    tried: set[Point] = set()
    for extension in range(EXTENSIONS + 1):
        fresh = [point for point in product(*grid.values()) if point not in tried]
        tried.update(fresh)
        for arm, recipe in recipes.items():
            scores[arm] |= _halve(runs, arm, recipe, list(grid), fresh, question, tuned[arm])
        best = {arm: _best(scores[arm], grid, question.higher) for arm in recipes}
        wider = _extended(grid, best, recipes) if extension < EXTENSIONS else grid
        if wider == grid:
            break
        grid = wider
    notes.insert(0, _summary(grid, question, recipes, tuned))
    extended = {k: [v for v in grid[k] if v not in question.grid[k]] for k in grid}
    notes += [
        f"The grid of {key} was extended by {listed([f'{value:g}' for value in values])} for every "
        "arm, because a best value lay on its edge."
        for key, values in extended.items()
        if values
    ]
    for arm, point in best.items():
        tuned[arm].chosen = dict(zip(grid, point))
        notes += _edge_notes(arm, grid, point, scores[arm][point])
    write_json(
        record,
        {
            "metric": question.metric, "seeds": list(question.seeds), "halving": question.halving,
            "first_share": FIRST_SHARE, "grid": grid,
            "arms": {arm: vars(found) for arm, found in tuned.items()},
        },
    )  # fmt: skip
    return tuned, notes


def _halve(
    runs: Runs,
    arm: str,
    recipe: Recipe,
    keys: Sequence[str],
    points: list[Point],
    question: Question,
    tuned: Tuned,
) -> dict[Point, float]:
    """Scores, at the whole budget, of the points that get there."""
    kept = max(LEAST_KEPT, math.ceil(len(points) / question.halving))
    short = _shortened(recipe.budget)
    if kept < len(points) and short != recipe.budget:
        first = {p: _score(runs, arm, recipe, keys, p, question, tuned, short) for p in points}
        sign = -1 if question.higher else 1
        points = sorted(points, key=lambda p: sign * first[p])[:kept]
    return {p: _score(runs, arm, recipe, keys, p, question, tuned, None) for p in points}


def _score(
    runs: Runs,
    arm: str,
    recipe: Recipe,
    keys: Sequence[str],
    point: Point,
    question: Question,
    tuned: Tuned,
    budget: Budget | None,
) -> float:
    """Mean over the tuning seeds; the worst there is if a run diverges."""
    settings = dict(zip(keys, point))
    recipe = recipe.changed({**settings, "evaluate.splits": ("validation",)})
    recipe = recipe if budget is None else recipe.changed({"budget": budget})
    values, failure = [], ""
    point_text = ", ".join(f"{key}={value}" for key, value in settings.items())
    for seed in question.seeds:
        runs.progress.run_of(f"tuning {arm} at {point_text} ({recipe.budget})", seed, 0, 0)
        try:
            attempt = runs.one(arm, recipe, seed, "tuning")
        except OutlayError as error:
            if budget is None:
                raise
            raise type(error)(
                f"{error.problem} (in a tuning run of {budget})",
                f"{error.remedy}; if the run is too short for it, tune with halving 1",
            ) from error
        tuned.cost["trials"] += 1
        for unit in CHARGED:
            tuned.cost[unit] += attempt.meter.get(unit, 0)
        value = attempt.result.metrics[question.metric] if attempt.result else math.nan
        if not math.isfinite(value):
            failure = failure or attempt.failure or f"{question.metric} is {value}"
        values.append(value)
    worst = -math.inf if question.higher else math.inf
    score = worst if failure else sum(values) / len(values)
    tuned.trials.append(
        {"settings": settings, "budget": str(recipe.budget), "failure": failure,
         "score": score if math.isfinite(score) else None}
    )  # fmt: skip
    return score


def _best(scores: Mapping[Point, float], grid: Grid, higher: bool) -> Point:
    """The best point; of equal ones the first that lies on no edge, so chance extends nothing."""
    sign = -1 if higher else 1
    return min(scores, key=lambda point: (sign * scores[point], len(_edges(grid, point))))


def _edges(grid: Grid, point: Point) -> list[tuple[str, int]]:
    """(setting, 0 or -1) for each setting whose value is its grid's first or last."""
    return [
        (key, end)
        for (key, values), value in zip(grid.items(), point)
        for end in (0, -1)
        if len(values) > 1 and all(map(_is_number, values)) and value == values[end]
    ]


def _extended(grid: Grid, best: Mapping[str, Point], recipes: Mapping[str, Recipe]) -> Grid:
    """One more value beyond every edge that some arm chose, by the grid's own ratio."""
    wider = {key: list(values) for key, values in grid.items()}
    for key, end in dict.fromkeys(e for point in best.values() for e in _edges(grid, point)):
        edge, inner = (grid[key][0], grid[key][1]) if end == 0 else grid[key][-1:-3:-1]
        if min(edge, inner) <= 0:
            continue
        value: Any = float(f"{edge * edge / inner:.3g}")
        if all(isinstance(v, int) for v in grid[key]):
            value = round(value)
        try:
            for recipe in recipes.values():
                recipe.changed({key: value})
        except ConfigError:
            continue
        if value not in wider[key]:
            wider[key].insert(0 if end == 0 else len(wider[key]), value)
    return wider


def _edge_notes(arm: str, grid: Grid, point: Point, score: float) -> list[str]:
    if not math.isfinite(score):
        return [f"{arm}: every tuning run diverged, so nothing was chosen for it."]
    chosen = dict(zip(grid, point))
    return [
        f"{arm}: the best {key} = {chosen[key]:g} still lies on the grid's edge; a better one may "
        "lie beyond."
        for key, _ in _edges(grid, point)
    ]


def _summary(
    grid: Grid, question: Question, recipes: Mapping[str, Recipe], tuned: Mapping[str, Tuned]
) -> str:
    tried = listed([f"{key} = {', '.join(map(str, values))}" for key, values in grid.items()])
    some = next(iter(tuned))
    rungs: dict[str, int] = {}
    for trial in tuned[some].trials:
        rungs[trial["budget"]] = rungs.get(trial["budget"], 0) + len(question.seeds)
    lengths = listed(
        [f"{counted(n, 'run')} of {amount_text(Budget.parse(b))}" for b, n in rungs.items()]
    )
    own = {str(recipe.budget) for recipe in recipes.values()}
    each = f"for each arm {lengths}" if len(own) == 1 else "by the same rules for each arm"
    return (
        f"Tuned on {question.metric} over {tried}: {each}, under seeds that are not reported; "
        "charged to the arm as tuning."
    )


def _shortened(budget: Budget) -> Budget:
    amount = budget.amount * FIRST_SHARE
    whole = budget.unit in ("steps", "examples")
    return Budget(max(1, round(amount)) if whole else amount, budget.unit)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
