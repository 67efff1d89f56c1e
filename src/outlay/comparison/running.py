"""The runs of a comparison: made once, found again, and a failed one kept as what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..core.budget import Budget
from ..core.errors import ConfigError
from ..core.meter import FlopTable, Meter
from ..core.method import Step
from ..training.checkpoint import write_json
from ..training.keeper import Progress, Silent
from ..training.materials import Materials, load_materials
from ..training.recipe import Recipe
from ..training.result import Result
from ..training.runs import identity, run
from .arms import Arm

_FAILED = "failed.json"
# Settings that change neither the model nor the shape of what it is called with.
_SHAPELESS = ("seed", "name", "note", "optimizer", "every", "evaluate")


@runtime_checkable
class ComparisonProgress(Progress, Protocol):
    """What shows a comparison while it goes."""

    def run_of(self, arm: str, seed: int, index: int, total: int) -> None:
        """A run begins."""
        ...


class Quiet(Silent):
    """Shows nothing."""

    def run_of(self, arm: str, seed: int, index: int, total: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Attempt:
    """A run that was done or failed.

    Attributes:
        result: None if it failed.
        meter: What it spent, up to the failure.
        failure: Why it failed, empty if it did not.
    """

    result: Result | None
    meter: Mapping[str, Any]
    failure: str = ""


class _Metered:
    """Hands everything on and keeps the meter, which a failed run does not return."""

    def __init__(self, progress: ComparisonProgress) -> None:
        self.progress, self.meter = progress, Meter()

    def stage(self, name: str, budget: Budget, meter: Meter) -> None:
        self.meter = meter
        self.progress.stage(name, budget, meter)

    def step(self, step: Step, values: dict[str, Any], meter: Meter) -> None:
        self.progress.step(step, values, meter)

    def note(self, text: str) -> None:
        self.progress.note(text)


class Runs:
    """Runs arms one after the other, sharing what they agree on.

    Args:
        folder: The comparison's own, for what is fitted.
        store: Where run folders go; several comparisons may share one.
        recipe: What all arms share.
        device: As for `run`.
        threads: As for `run`.
        progress: Shows it.
    """

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

    def check_rows(self, recipe: Recipe, splits: Sequence[str]) -> None:
        """Refuse, before any run, to measure on splits without rows.

        Raises:
            ConfigError: If one of them is empty.
        """
        materials = self.shared(recipe)
        for split in splits:
            if materials is not None and not materials.splits[split]:
                raise ConfigError(
                    f"there are no {split} rows to measure on",
                    f"give data.{split}_share, or a file as data.{split}",
                )

    def all(
        self, arms: Sequence[Arm], recipes: Mapping[str, Recipe], seeds: Sequence[int]
    ) -> dict[str, dict[int, Attempt]]:
        """Seed by seed, every arm: an early stop leaves whole pairs."""
        attempts: dict[str, dict[int, Attempt]] = {arm.name: {} for arm in arms}
        total = len(arms) * len(seeds)
        for row, seed in enumerate(seeds):
            for column, arm in enumerate(arms):
                self.progress.run_of(arm.name, seed, row * len(arms) + column + 1, total)
                if arm.name in recipes:
                    attempts[arm.name][seed] = self.one(arm.name, recipes[arm.name], seed)
                else:
                    result = self.fitted(arm, seed)
                    attempts[arm.name][seed] = Attempt(result, result.meter)
        return attempts

    def one(self, arm: str, recipe: Recipe, seed: int, where: str = "runs") -> Attempt:
        """One training run; what an earlier one left is taken as it is, a failure too.

        Raises:
            KeyboardInterrupt: If the user stopped it; it is saved.
        """
        recipe = recipe.changed({"seed": seed, "name": f"{_file_name(arm)}-seed{seed}"})
        materials, out = self.shared(recipe), self.store / where
        failed = None
        if materials is not None:
            failed = out / f"{recipe.name}-{identity(recipe, materials)}" / _FAILED
            if failed.exists():
                kept = json.loads(failed.read_text(encoding="utf-8"))
                return Attempt(None, kept["meter"], kept["failure"])
        watched = _Metered(self.progress)
        try:
            result = run(
                recipe,
                out=out,
                device=self.device,
                threads=self.threads,
                progress=watched,
                materials=materials,
                flops=self.flops.setdefault(_shape(recipe), FlopTable()),
            )
        except FloatingPointError as error:
            attempt = Attempt(None, watched.meter.summary(), str(error))
            if failed is not None:
                write_json(failed, {"failure": attempt.failure, "meter": attempt.meter})
            self.progress.note(f"{arm}, seed {seed} failed: {attempt.failure.splitlines()[0]}")
            return attempt
        if result.status == "stopped":
            raise KeyboardInterrupt
        return Attempt(result, result.meter)

    def shared(self, recipe: Recipe) -> Materials | None:
        """Materials of all recipes with this model, data, task and tokens; None with stages."""
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


def _shape(recipe: Recipe) -> str:
    parts = recipe.resolved()
    return json.dumps({k: v for k, v in parts.items() if k not in _SHAPELESS}, sort_keys=True)


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text) or "arm"
