"""Several arms under one budget, paired by seed, judged, and written as one report."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..core.errors import ConfigError, nearest
from ..training.checkpoint import write_json
from ..training.evaluate import METRICS, main_metric
from ..training.recipe import Recipe
from ..training.result import Result
from . import machine, spreads, tuning
from . import statistics as st
from .arms import Arm, arms_of
from .budgets import budget_sentence, budget_text, spent, tolerance
from .judge import judge
from .report import write_report
from .running import Attempt, ComparisonProgress, Quiet, Runs

_CURVES = ("loss", "gradient_norm", "objective")


@dataclass
class Comparison:
    """What a comparison found.

    Attributes:
        folder: Where everything lies.
        report: Path of report.html.
        verdict: What `judge` returned; each arm has `tuning` (what tuning cost it, None if it was
            not tuned here) and `total` (`flops` and `seconds` of one run, tuning added) besides.
        results: Results by arm and seed; None for a failed run.
        tuned: Chosen settings by arm, if they were tuned.
        plan: What the seeds could show, said beforehand; see `spreads.foresee`.
        facts: `recipe` (its name), `budget` and `seeds`.
    """

    folder: Path
    report: Path
    verdict: dict[str, Any]
    results: dict[str, dict[int, Result | None]]
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The command's JSON: folder, report, arms, pairs, verdicts, ties, plan and more."""
        places = {"folder": str(self.folder), "report": str(self.report)}
        return {**places, **self.verdict, **self.facts, "tuned": self.tuned, "plan": self.plan}


def compare(
    recipe: Recipe,
    arms: Mapping[str, Any] | Sequence[Arm | str],
    *,
    seeds: int | Sequence[int] = 6,
    out: str | Path = "runs",
    metric: str | None = None,
    margin: float | None = None,
    detect: float | None = None,
    tune: Mapping[str, Sequence[Any]] | None = None,
    tuning_seeds: int = 1,
    halving: int = 3,
    device: str = "auto",
    threads: int | None = None,
    progress: ComparisonProgress | None = None,
    store: str | Path | None = None,
    command: str = "",
    notes: Sequence[str] = (),
) -> Comparison:
    """Run every arm with every seed and judge the pairs.

    Arms share data, budget and seeds; each adds its methods to the recipe's. What must be equal
    is what the budget counts: steps and tokens for a budget in steps, otherwise its own unit. Runs
    that are done are not done again, so an interrupted comparison, or tuning, goes on at the run
    it was in.

    Args:
        recipe: What all arms share.
        arms: Arms, `"NAME=bone(r=16)"` strings, or a mapping of names to methods.
        seeds: How many seeds, or which.
        out: Where the comparison's folder goes.
        metric: `split/metric` that decides; the task's own on the test split by default.
        margin: Differences inside it are called equal; stated beforehand.
        detect: Difference that one wants to see, in the metric's unit: the seeds that it takes
            are said before the first run, from a recorded seed spread. Sets nothing.
        tune: Dotted setting to a grid of values, several settings in all combinations: each arm
            takes its best on validation, equally tried and charged for it; see `tuning`.
        tuning_seeds: Runs of each point.
        halving: One point in so many gets the whole budget in tuning, the others a quarter of
            it; 1 gives it to all.
        device: As for `run`.
        threads: As for `run`.
        progress: Shows it.
        store: Where the run folders go; the comparison's own folder by default. Comparisons that
            share a store do not repeat runs that are equal in everything.
        command: What to type to get it again.
        notes: Sentences for the reader.

    Raises:
        ConfigError: With fewer than two arms or seeds, an unknown metric, or tuning on the split
            that is reported.
    """
    chosen = arms_of(arms)
    which = list(range(recipe.seed, recipe.seed + seeds)) if isinstance(seeds, int) else list(seeds)
    if len(which) < 2 or len(set(which)) != len(which):
        raise ConfigError(
            f"seeds = {seeds}: one seed cannot tell a difference from chance",
            "give at least two different seeds, better five",
        )
    metric, higher = _metric(recipe, metric)
    if margin is not None:
        st.inside_margin((0.0, 0.0), margin)
    question = _tuning_question(tune, metric, higher, which, tuning_seeds, halving)
    recipes = {arm.name: arm.recipe(recipe) for arm in chosen if arm.estimator() is None}
    identity = _identity(recipe, chosen, which, question)
    folder = Path(out) / f"comparison-{recipe.name}-{identity}"
    progress = progress or Quiet()
    runs = Runs(folder, Path(store or folder), recipe, device, threads, progress)
    measured = [metric.split("/")[-2], *(["validation"] if question else [])]
    runs.check_rows(next(iter(recipes.values()), recipe), measured)
    plan = spreads.foresee(
        spreads.recorded(recipe.name, metric, str(recipe.budget), Path(out), without=folder),
        recipe=recipe.name, metric=metric, arms=len(chosen), seeds=len(which), detect=detect,
    )  # fmt: skip
    plan, changed = _stated(folder, metric, margin, detect, plan)
    for sentence in plan["sentences"]:
        progress.note(sentence)
    tuned: dict[str, tuning.Tuned] = {}
    # The warning repeats what the second sentence says.
    said = [*notes, *(plan["sentences"][:1] if plan["warning"] else plan["sentences"])]
    if question:
        tuned, found = tuning.tune(runs, recipes, question, folder / "tuning.json")
        recipes = {arm: r.changed(tuned[arm].chosen) for arm, r in recipes.items()}
        said += found
    attempts = runs.all(chosen, recipes, which)
    results = {arm: {s: a.result for s, a in by.items()} for arm, by in attempts.items()}
    _check_measured(results, metric)
    outside = [arm.name for arm in chosen if arm.name not in recipes]
    within = {arm: results[arm] for arm in recipes}
    verdict = judge(
        {
            arm: {s: None if r is None else r.metrics.get(metric) for s, r in by_seed.items()}
            for arm, by_seed in results.items()
        },
        metric=metric,
        higher_is_better=higher,
        trainable={arm: _trainable(by_seed) for arm, by_seed in results.items()},
        spent=spent(recipe, within),
        margin=margin,
        budget_tolerance=tolerance(recipe, within),
        outside=outside,
    )
    verdict["sentences"] += [s for s in (plan["warning"], *changed) if s]
    verdict["sentences"] += [
        f"{arm} tunes itself on the validation split while it is fitted; its time includes that."
        for arm in outside
    ]
    said += [budget_sentence(recipe, within), *([recipe.note] if recipe.note else [])]
    meters = _charge(verdict["arms"], results, tuned)
    report = write_report(
        {
            **verdict,
            "title": f"{recipe.name}: {len(chosen)} arms, {len(which)} seeds",
            "budget": budget_text(recipe),
            "runs": [
                _run_data(arm, seed, attempt)
                for arm, by_seed in attempts.items()
                for seed, attempt in by_seed.items()
            ],
            "recipes": {arm: r.to_yaml() for arm, r in recipes.items()},
            "versions": machine.versions(),
            "hardware": machine.hardware(),
            "command": command,
            "notes": said,
            "arm_notes": {arm.name: arm.note for arm in chosen if arm.note},
            "arm_meters": meters,
        },
        folder,
    )
    comparison = Comparison(
        folder, report, verdict, results, {arm: t.chosen for arm, t in tuned.items()}, plan,
        {"recipe": recipe.name, "budget": str(recipe.budget), "seeds": which},
    )  # fmt: skip
    write_json(folder / "comparison.json", comparison.to_json())
    return comparison


# ---- before the first run ------------------------------------------------------------------------


def _metric(recipe: Recipe, metric: str | None) -> tuple[str, bool]:
    """The metric that decides, and whether more of it is better; refused before any run."""
    if metric is None:
        name, higher = main_metric(recipe.task)
        return f"test/{name}", higher
    split, _, name = metric.rpartition("/")
    last, known = split.rpartition("/")[2], METRICS[recipe.task]
    if last not in recipe.evaluate.splits or name not in known:
        usable = [f"{split}/{name}" for split in recipe.evaluate.splits for name in known]
        raise ConfigError(
            f"metric {metric!r} is not measured",
            f"{nearest(metric, usable)}use one of {', '.join(usable)}",
        )
    return metric, main_metric(recipe.task, name)[1]


def _tuning_question(
    grid: Mapping[str, Sequence[Any]] | None,
    metric: str,
    higher: bool,
    seeds: Sequence[int],
    tuning_seeds: int,
    halving: int,
) -> tuning.Question | None:
    if not grid:
        return None
    split, _, name = metric.rpartition("/")
    if split.endswith("validation"):
        raise ConfigError(
            f"metric {metric!r} is of the split that tuning uses", f"report test/{name}"
        )
    if tuning_seeds < 1 or halving < 1:
        raise ConfigError(
            f"tuning_seeds {tuning_seeds} and halving {halving} must be at least 1",
            "one run a point and halving 3 are usual",
        )
    first = max(tuning.FIRST_SEED, max(seeds) + 1)
    return tuning.Question(
        tuning.checked_grid(grid), f"validation/{name}", higher,
        tuple(range(first, first + tuning_seeds)), halving,
    )  # fmt: skip


def _identity(
    recipe: Recipe, arms: Sequence[Arm], seeds: Sequence[int], question: tuning.Question | None
) -> str:
    facts = [
        recipe.resolved(), [arm.facts() for arm in arms], list(seeds),
        vars(question) if question else {}, __version__,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:10]


def _stated(
    folder: Path, metric: str, margin: float | None, detect: float | None, plan: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What was stated when these runs began, kept; and sentences about what changed since."""
    path = folder / "stated.json"
    now = {"metric": metric, "margin": margin, "detect": detect}
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {**now, "plan": plan})
        return plan, []
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"The {name} was {before[name] or 'not stated'} when these runs began and is "
        f"{now[name] or 'not stated'} now: it was not stated beforehand."
        for name in ("metric", "margin")
        if before[name] != now[name]
    ]
    same = (before["metric"], before["detect"]) == (metric, detect)
    return (before["plan"] if same else plan), changed


# ---- after the last run --------------------------------------------------------------------------


def _check_measured(results: Mapping[str, Mapping[int, Result | None]], metric: str) -> None:
    measured = {m for runs in results.values() for r in runs.values() if r for m in r.metrics}
    if measured and metric not in measured:
        raise ConfigError(
            f"metric {metric!r} is not measured", f"use one of {', '.join(sorted(measured))}"
        )


def _trainable(by_seed: Mapping[int, Result | None]) -> int | None:
    counts = [r.meter.get("trainable_parameters") for r in by_seed.values() if r is not None]
    return int(counts[0]) if counts and counts[0] is not None else None


def _charge(
    arms: list[dict[str, Any]],
    results: Mapping[str, Mapping[int, Result | None]],
    tuned: Mapping[str, tuning.Tuned],
) -> dict[str, dict[str, float]]:
    """Put tuning and total cost on each arm; returns them as meters of the report.

    The total is what it costs to get one tuned model: one run, mean over the seeds, and tuning.
    """
    meters: dict[str, dict[str, float]] = {}
    for arm in arms:
        cost = tuned[arm["name"]].cost if arm["name"] in tuned else None
        done = [r.meter for r in results[arm["name"]].values() if r is not None]
        arm["tuning"], arm["total"] = cost, None
        if done:
            arm["total"] = {
                unit: math.fsum(meter[unit] for meter in done) / len(done)
                + (cost or {unit: 0})[unit]
                for unit in ("flops", "seconds")
            }
        if tuned:
            totals = {f"total/{unit}": value for unit, value in (arm["total"] or {}).items()}
            charged = {f"tuning/{unit}": value for unit, value in (cost or {}).items()}
            meters[arm["name"]] = {**totals, **charged}
    return meters


def _run_data(arm: str, seed: int, attempt: Attempt) -> dict[str, Any]:
    result = attempt.result
    if result is None:
        return {"arm": arm, "seed": seed, "status": "failed", "metrics": {},
                "meter": attempt.meter, "failure": attempt.failure}  # fmt: skip
    curves: dict[str, list[list[float]]] = {}
    last: list[float] = [0.0, 0.0, 0.0]
    for line in result.curves:
        if all(key in line for key in ("tokens", "flops", "seconds")):
            last = [line[key] for key in ("tokens", "flops", "seconds")]
        for key, value in line.items():
            if key in _CURVES or "/" in key:
                curves.setdefault(key, []).append([line["step"], *last, value])
    return {"arm": arm, "seed": seed, "status": result.status, "metrics": result.metrics,
            "meter": result.meter, "curves": curves}  # fmt: skip


__all__ = ["Arm", "Comparison", "compare"]
