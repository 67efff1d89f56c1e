"""Several arms under one budget, paired by seed, judged, and written as one report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .._version import __version__
from ..core import callspec, registry
from ..core.errors import ConfigError
from ..core.meter import FlopTable
from ..training.checkpoint import write_json
from ..training.evaluate import main_metric
from ..training.materials import Materials, load_materials
from ..training.recipe import Recipe
from ..training.runs import Progress, Result, Silent, run
from . import machine
from .judge import judge
from .report import write_report

_TUNING_SEED = 100_000  # tuning runs share no seed with reported ones
_CURVES = ("loss", "gradient_norm", "objective")


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison.

    Attributes:
        name: How the report calls it.
        methods: Call strings joined by "+", method objects, or the name of an estimator.
        settings: Dotted recipe settings of this arm alone, as {"optimizer.lr": 3e-3}.
        note: A remark beside the name, as "lr from the validation grid".
    """

    name: str
    methods: str | tuple[Any, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read `NAME=bone(r=16)+loss_weights @ optimizer.lr=3e-3, batch.size=8`.

        Raises:
            ConfigError: If there is no name.
        """
        import yaml

        body, _, tail = text.partition("@")
        name, equals, methods = body.partition("=")
        if not equals or "(" in name:
            name, methods = body.strip(), body.strip()
        settings = {}
        for part in filter(None, (p.strip() for p in tail.split(","))):
            key, found, value = part.partition("=")
            if not found:
                raise ConfigError(f"arm setting {part!r} has no value", "write key=value")
            settings[key.strip()] = yaml.safe_load(value)
        if not name.strip():
            raise ConfigError(f"arm {text!r} has no name", 'write "NAME=bone(r=16)"')
        return cls(name.strip(), methods.strip(), settings)

    def parts(self) -> tuple[Any, ...]:
        """The methods, built."""
        if isinstance(self.methods, str):
            return tuple(registry.build(part) for part in callspec.split_sum(self.methods))
        return tuple(registry.build(part) for part in self.methods)

    def estimator(self) -> Any | None:
        """The estimator that this arm fits instead of training, or None."""
        if isinstance(self.methods, str) and self.methods and "+" not in self.methods:
            name, settings = callspec.parse(self.methods)
            entry = registry.entries().get(name.replace("-", "_"))
            if entry is not None and entry.kind == "estimator":
                return registry.construct(entry.load(), settings)
        return None


@runtime_checkable
class ComparisonProgress(Progress, Protocol):
    """What shows a comparison while it goes."""

    def run_of(self, arm: str, seed: int, index: int, total: int) -> None:
        """A run begins."""
        ...


class _Silent(Silent):
    def run_of(self, arm: str, seed: int, index: int, total: int) -> None:
        """Nothing."""


@dataclass
class Comparison:
    """What a comparison found.

    Attributes:
        folder: Where everything lies.
        report: Path of report.html.
        verdict: What `judge` returned.
        results: Results by arm and seed; None for a failed run.
        tuned: Chosen settings by arm, if they were tuned.
    """

    folder: Path
    report: Path
    verdict: dict[str, Any]
    results: dict[str, dict[int, Result | None]]
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The command's JSON: folder, report, arms, pairs, verdicts, ties and more."""
        return {"folder": str(self.folder), "report": str(self.report), **self.verdict}


def compare(
    recipe: Recipe,
    arms: Mapping[str, Any] | Sequence[Arm | str],
    *,
    seeds: int | Sequence[int] = 6,
    out: str | Path = "runs",
    metric: str | None = None,
    margin: float | None = None,
    tune: Mapping[str, Sequence[Any]] | None = None,
    tuning_seeds: int = 1,
    device: str = "auto",
    threads: int | None = None,
    progress: ComparisonProgress | None = None,
    store: str | Path | None = None,
    command: str = "",
    notes: Sequence[str] = (),
) -> Comparison:
    """Run every arm with every seed and judge the pairs.

    Arms share data, steps, tokens and seeds; each adds its methods to the recipe's. Runs that
    are done are not done again, so an interrupted comparison goes on at the run it was in.

    Args:
        recipe: What all arms share.
        arms: Arms, `"NAME=bone(r=16)"` strings, or a mapping of names to methods.
        seeds: How many seeds, or which.
        out: Where the comparison's folder goes.
        metric: `split/metric` that decides; the task's own on the test split by default.
        margin: Differences inside it are called equal; stated beforehand.
        tune: Dotted setting to a grid of values: each arm takes its best on validation. A best
            on the grid's edge extends the grid equally for all arms.
        tuning_seeds: Runs of each grid point.
        device: As for `run`.
        threads: As for `run`.
        progress: Shows it.
        store: Where the run folders go; the comparison's own folder by default. Comparisons that
            share a store do not repeat runs that are equal in everything.
        command: What to type to get it again.
        notes: Sentences for the reader.

    Raises:
        ConfigError: With fewer than two arms or seeds, or an unknown metric.
    """
    chosen = _arms(arms)
    which = list(range(recipe.seed, recipe.seed + seeds)) if isinstance(seeds, int) else list(seeds)
    if len(which) < 2 or len(set(which)) != len(which):
        raise ConfigError(
            f"seeds = {seeds}: one seed cannot tell a difference from chance",
            "give at least two different seeds, better five",
        )
    name, higher = main_metric(recipe.task)
    metric = metric or f"test/{name}"
    progress = progress or _Silent()
    recipes = {arm.name: _recipe_of(recipe, arm) for arm in chosen if arm.estimator() is None}
    folder = Path(out) / f"comparison-{recipe.name}-{_identity(recipe, chosen, which, tune)}"
    worker = _Worker(folder, Path(store or folder), recipe, device, threads, progress)
    tuned, tuning_notes = {}, []
    if tune:
        tuned, tuning_notes = worker.tune(recipes, tune, tuning_seeds, metric, higher)
        recipes = {arm: r.changed(tuned[arm]) for arm, r in recipes.items()}
    results = worker.all_runs(chosen, recipes, which)
    _check_metric(results, metric)
    verdict = judge(
        {
            arm: {s: None if r is None else r.metrics.get(metric) for s, r in by_seed.items()}
            for arm, by_seed in results.items()
        },
        metric=metric,
        higher_is_better=higher,
        trainable={arm: _trainable(by_seed) for arm, by_seed in results.items()},
        spent={arm: _spent(results[arm]) for arm in recipes},
        margin=margin,
        outside=[arm.name for arm in chosen if arm.name not in recipes],
    )
    notes = [*notes, *tuning_notes, *([recipe.note] if recipe.note else [])]
    report = write_report(
        {
            **verdict,
            "title": f"{recipe.name}: {len(chosen)} arms, {len(which)} seeds",
            "budget": f"{recipe.budget} of {recipe.batch.size} examples each",
            "runs": [
                _run_data(arm, seed, result, worker.failures.get((arm, seed), ""))
                for arm, by_seed in results.items()
                for seed, result in by_seed.items()
            ],
            "recipes": {arm: r.to_yaml() for arm, r in recipes.items()},
            "versions": machine.versions(),
            "hardware": machine.hardware(),
            "command": command,
            "notes": notes,
            "arm_notes": {arm.name: arm.note for arm in chosen if arm.note},
        },
        folder,
    )
    comparison = Comparison(folder, report, verdict, results, tuned)
    write_json(folder / "comparison.json", {**comparison.to_json(), "tuned": tuned})
    return comparison


# ---- arms ----------------------------------------------------------------------------------------


def _arms(arms: Mapping[str, Any] | Sequence[Arm | str]) -> list[Arm]:
    if isinstance(arms, Mapping):
        chosen = [
            value
            if isinstance(value, Arm)
            else Arm(name, value if isinstance(value, (str, tuple)) else tuple(value))
            for name, value in arms.items()
        ]
    else:
        chosen = [arm if isinstance(arm, Arm) else Arm.parse(arm) for arm in arms]
    names = [arm.name for arm in chosen]
    if len(chosen) < 2 or len(set(names)) != len(names):
        raise ConfigError(
            f"arms {names}: a comparison needs two arms of different names",
            'give --arm "NAME=bone(r=16)" twice or more',
        )
    return chosen


def _recipe_of(recipe: Recipe, arm: Arm) -> Recipe:
    settings: dict[str, Any] = {"methods": (*recipe.methods, *arm.parts()), **arm.settings}
    return recipe.changed(settings)


def _identity(
    recipe: Recipe, arms: Sequence[Arm], seeds: Sequence[int], tune: Mapping[str, Any] | None
) -> str:
    facts = [
        recipe.resolved(),
        [[a.name, [getattr(p, "spec", lambda p=p: repr(p))() for p in a.parts()]
          if a.estimator() is None else a.methods, dict(a.settings)] for a in arms],
        list(seeds),
        {key: list(values) for key, values in (tune or {}).items()},
        __version__,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:10]


def _check_metric(results: Mapping[str, Mapping[int, Result | None]], metric: str) -> None:
    measured = {m for runs in results.values() for r in runs.values() if r for m in r.metrics}
    if measured and metric not in measured:
        raise ConfigError(
            f"metric {metric!r} is not measured", f"use one of {', '.join(sorted(measured))}"
        )


def _trainable(by_seed: Mapping[int, Result | None]) -> int | None:
    counts = [r.meter.get("trainable_parameters") for r in by_seed.values() if r is not None]
    return int(counts[0]) if counts and counts[0] is not None else None


def _spent(by_seed: Mapping[int, Result | None]) -> dict[str, dict[int, float]]:
    return {
        unit: {seed: r.meter[unit] for seed, r in by_seed.items() if r is not None}
        for unit in ("steps", "tokens")
    }


def _run_data(arm: str, seed: int, result: Result | None, failure: str) -> dict[str, Any]:
    if result is None:
        return {"arm": arm, "seed": seed, "status": "failed", "metrics": {}, "meter": {},
                "failure": failure}  # fmt: skip
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


# ---- running -------------------------------------------------------------------------------------


class _Worker:
    """Runs arms one after the other, sharing what they agree on."""

    def __init__(
        self,
        folder: Path,
        store: Path,
        recipe: Recipe,
        device: str,
        threads: int | None,
        progress: ComparisonProgress,
    ) -> None:
        self.folder, self.store, self.recipe = folder, store, recipe
        self.device, self.threads, self.progress = device, threads, progress
        self.materials: dict[str, Materials] = {}
        self.flops: dict[str, FlopTable] = {}
        self.failures: dict[tuple[str, int], str] = {}

    def all_runs(
        self, arms: Sequence[Arm], recipes: Mapping[str, Recipe], seeds: Sequence[int]
    ) -> dict[str, dict[int, Result | None]]:
        """Seed by seed, every arm: an early stop leaves whole pairs."""
        results: dict[str, dict[int, Result | None]] = {arm.name: {} for arm in arms}
        total = len(arms) * len(seeds)
        for row, seed in enumerate(seeds):
            for column, arm in enumerate(arms):
                self.progress.run_of(arm.name, seed, row * len(arms) + column + 1, total)
                try:
                    if arm.name in recipes:
                        results[arm.name][seed] = self.one(arm.name, recipes[arm.name], seed)
                    else:
                        results[arm.name][seed] = self.fitted(arm, seed)
                except FloatingPointError as error:
                    self.failures[arm.name, seed] = str(error)
                    results[arm.name][seed] = None
                if (got := results[arm.name][seed]) is not None and got.status == "stopped":
                    raise KeyboardInterrupt
        return results

    def one(self, arm: str, recipe: Recipe, seed: int, where: str = "runs") -> Result:
        """One training run; an earlier result is taken as it is."""
        recipe = recipe.changed({"seed": seed, "name": f"{_file_name(arm)}-seed{seed}"})
        return run(
            recipe,
            out=self.store / where,
            device=self.device,
            threads=self.threads,
            progress=self.progress,
            materials=self.shared(recipe),
            flops=self.flops.setdefault(arm, FlopTable()),
        )

    def shared(self, recipe: Recipe) -> Materials | None:
        """Materials of all recipes with this model, data, task and tokens."""
        if recipe.stages:
            return None
        parts = recipe.resolved()
        tokens = [m.spec() for m in recipe.methods if "OnBatch" in m.places()]
        key = json.dumps([parts["model"], parts["data"], parts["task"], parts["batch"], tokens])
        if key not in self.materials:
            self.materials[key] = load_materials(recipe)
        return self.materials[key]

    def fitted(self, arm: Arm, seed: int) -> Result:
        """Fit an estimator on the same rows; it spends no steps and is the same for every seed."""
        from .estimator_arm import fit_arm

        materials = self.shared(self.recipe)
        assert materials is not None
        target = self.folder / "runs" / f"{_file_name(arm.name)}-fitted"
        recorded = target / "result.json"
        if not recorded.exists():
            target.mkdir(parents=True, exist_ok=True)
            write_json(recorded, asdict(fit_arm(arm.estimator(), materials, self.recipe, target)))
        result = Result(**json.loads(recorded.read_text()))
        result.seed = seed
        return result

    def tune(
        self,
        recipes: Mapping[str, Recipe],
        grid: Mapping[str, Sequence[Any]],
        seeds: int,
        metric: str,
        higher: bool,
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """The same grid for every arm on the validation split, extended for all if an edge wins."""
        notes, chosen = [], {arm: {} for arm in recipes}
        on_validation = f"validation/{metric.partition('/')[2]}"
        for key, values in grid.items():
            points, scores = sorted(values), {arm: {} for arm in recipes}
            for _ in range(3):
                for arm, recipe in recipes.items():
                    for value in points:
                        if value not in scores[arm]:
                            scores[arm][value] = self._score(
                                arm, recipe.changed({**chosen[arm], key: value}), seeds,
                                on_validation, higher,
                            )  # fmt: skip
                best = {arm: _best(scores[arm], higher) for arm in recipes}
                wider = _extended(points, set(best.values()))
                if wider == points:
                    break
                points = wider
            for arm, value in best.items():
                chosen[arm][key] = value
                if value in (points[0], points[-1]):
                    notes.append(f"{arm}: the best {key} = {value} lies on the grid's edge.")
            notes.append(f"{key} tuned on validation over {points}, {seeds} runs a point and arm.")
            write_json(
                self.folder / f"tuning-{key}.json",
                {arm: {str(v): s for v, s in sorted(by.items())} for arm, by in scores.items()},
            )
        return chosen, notes

    def _score(self, arm: str, recipe: Recipe, seeds: int, metric: str, higher: bool) -> float:
        recipe = recipe.changed({"evaluate.splits": ("validation",)})
        values = []
        for seed in range(_TUNING_SEED, _TUNING_SEED + seeds):
            self.progress.run_of(f"tuning {arm}", seed, 0, 0)
            try:
                values.append(self.one(arm, recipe, seed, "tuning").metrics[metric])
            except FloatingPointError:
                return float("-inf") if higher else float("inf")
        return sum(values) / len(values)


def _best(scores: Mapping[Any, float], higher: bool) -> Any:
    return max(scores, key=lambda v: scores[v] if higher else -scores[v])


def _extended(points: list[Any], best: set[Any]) -> list[Any]:
    """One more point beyond an edge that some arm chose, by the grid's own ratio."""
    if len(points) < 2 or points[0] <= 0:
        return points
    wider = list(points)
    if points[0] in best:
        wider.insert(0, float(f"{points[0] ** 2 / points[1]:.3g}"))
    if points[-1] in best:
        wider.append(float(f"{points[-1] ** 2 / points[-2]:.3g}"))
    return wider


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text) or "arm"


__all__ = ["Arm", "Comparison", "compare"]
