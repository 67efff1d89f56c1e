"""One replication on one task: noise, tuning, seeds in stages, and what is found."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..training.evaluate import main_metric
from . import statistics as st
from .compare import Arm, Comparison, compare
from .quantities import Quantities
from .verdicts import (
    OPEN,
    POWER,
    Claim,
    Finding,
    Level,
    judge_claim,
    look_alpha,
    task_verdict,
    unresolved,
)

if TYPE_CHECKING:
    from .replicate import Replication, Size, Task

TUNED_BEFORE = "Learning rates were tuned with the first seeds, on validation and equally."
NOISE_SEED = 1000
"""First seed of the runs that measure noise: no verdict uses them."""


class Clock:
    """Passes a comparison on to whatever shows it, and keeps on disk what the task took.

    On a CPU that others use too, time spent waiting for it is not the task's: what counts is the
    smaller of the wall clock and the process's own CPU time.

    Args:
        path: A JSON file with seconds and stages; stages are [arms, seeds] as they were decided,
            so that a task that goes on does not decide anew.
        shown: What shows the comparison; None shows nothing.
        on_cpu: The work is done by this process; False takes the wall clock.
    """

    def __init__(self, path: Path, shown: Any = None, on_cpu: bool = True) -> None:
        self.path, self.shown, self.on_cpu = path, shown, on_cpu
        self.state: dict[str, Any] = {"seconds": 0.0, "wall": 0.0, "stages": []}
        if path.exists():
            self.state = json.loads(path.read_text(encoding="utf-8"))
        self.before = (float(self.state["seconds"]), float(self.state["wall"]))
        self.began = (time.monotonic(), time.process_time())

    @property
    def wall(self) -> float:
        """Wall-clock seconds of all sittings."""
        return self.before[1] + time.monotonic() - self.began[0]

    @property
    def seconds(self) -> float:
        """Seconds that count, of all sittings."""
        wall = time.monotonic() - self.began[0]
        own = time.process_time() - self.began[1]
        return self.before[0] + (min(wall, own) if self.on_cpu else wall)

    def save(self) -> None:
        """Write what was spent and decided so far."""
        self.state |= {"seconds": self.seconds, "wall": self.wall}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.state), encoding="utf-8")
        partial.replace(self.path)

    def run_of(self, arm: str, seed: int, index: int, total: int) -> None:
        """A run begins."""
        if self.shown is not None:
            self.shown.run_of(arm, seed, index, total)

    def stage(self, name: str, budget: Any, meter: Any) -> None:
        """A stage of a run begins or goes on; trials of a tuning too."""
        self.save()
        if self.shown is not None:
            self.shown.stage(name, budget, meter)

    def step(self, step: Any, values: dict[str, Any], meter: Any) -> None:
        """A step was taken."""
        if self.shown is not None:
            self.shown.step(step, values, meter)

    def note(self, text: str) -> None:
        """Something the user should know."""
        if self.shown is not None:
            self.shown.note(text)


def _on_cpu(options: Mapping[str, Any]) -> bool:
    """True if the runs take place on the CPU."""
    from ..training.backend import OneDevice

    return OneDevice(str(options.get("device", "auto")), "float32").device.type == "cpu"


class TaskRun:
    """Runs one task of a replication.

    Args:
        replication: The paper's claims.
        task: One of its tasks.
        size: How much is spent.
        folder: Where the task's comparisons go.
        store: Where run folders go, shared with others.
        minutes: Minutes (see `Clock`) after which no more seeds are begun.
        options: device, threads and command of `compare`.
        progress: Shows it.
    """

    def __init__(
        self,
        replication: Replication,
        task: Task,
        size: Size,
        folder: Path,
        store: Path,
        minutes: float,
        options: Mapping[str, Any],
        progress: Any = None,
    ) -> None:
        self.replication, self.task, self.size = replication, task, size
        self.folder, self.store, self.minutes = folder, store, minutes
        self.options = dict(options)
        self.clock = Clock(folder / "clock.json", progress, on_cpu=_on_cpu(self.options))
        self.recipe = task.recipe_at(size.name)
        self.arms = {arm.name: arm for arm in task.arms_at(size.name)}
        self.claims = replication.claims_on(task.name)
        self.quantities = Quantities(replication.quantities)
        self.results: dict[str, dict[int, Any]] = {name: {} for name in self.arms}
        self.tuned: dict[str, dict[str, Any]] = {}
        self.findings: dict[str, Finding] = {}
        self.metric, self.higher = main_metric(self.recipe.task)
        self.report = ""

    def judged(self) -> dict[str, Any]:
        """Run what is missing; everything about the task, as the ledger keeps it."""
        noise = self.noise() if self.size.noise_seeds else {}
        if noise.get("passed", True):
            self.raise_seeds(self.first_look())
        found, verdict = list(self.findings.values()), None
        if self.size.verdict:
            verdict = task_verdict(found) if found else "not resolved"
        return {
            "task": self.task.name, "verdict": verdict, "metric": f"test/{self.metric}",
            "higher_is_better": self.higher, "recipe": self.recipe.written(), "noise": noise,
            "claims": [finding.to_json() for finding in found] if self.size.verdict else [],
            "arms": [self.arm(name) for name in self.arms],
            "tuning": {"grid": {k: list(v) for k, v in self.replication.grid.items()},
                       "seeds": self.size.tuning_seeds, "chosen": self.tuned},
            "minutes": round(self.clock.seconds / 60, 2), "minutes_allowed": self.minutes,
            "minutes_on_the_wall": round(self.clock.wall / 60, 2),
            "note": self.task.note, "report": self.report,
        }  # fmt: skip

    # ---- stages ----------------------------------------------------------------------------------

    def noise(self) -> dict[str, Any]:
        """Seed noise of the baseline and of its difference to the method, on validation.

        The baseline's known answer is checked on the same runs: it has to beat the task's floor
        with every seed.
        """
        names = [self.replication.baseline, self.replication.method]
        seeds = list(range(NOISE_SEED, NOISE_SEED + self.size.noise_seeds))
        metric = f"validation/{self.metric}"
        found = self._compared(names, seeds, metric=metric)
        base, other = (
            [r.metrics[metric] for r in found.results[name].values() if r] for name in names
        )
        floor = self.task.floor
        facts: dict[str, Any] = {
            "baseline": names[0], "settings": dict(self.arms[names[0]].settings),
            "metric": metric, "seeds": len(base),
            "mean": float(np.mean(base)) if base else None,
            "spread": float(np.std(base, ddof=1)) if len(base) > 1 else None,
            "floor": floor, "floor_source": self.task.floor_source,
            "passed": len(base) == len(seeds)
            and all(v > floor if self.higher else v < floor for v in base),
        }  # fmt: skip
        if len(base) == len(other) > 1:
            spread = float(np.std(np.subtract(base, other), ddof=1))
            facts["paired_spread"] = spread
            facts["detectable"] = {
                str(count): st.detectable_difference(
                    spread, count, look_alpha(self.size.seeds, look), self._family("main"), POWER
                )
                for look, count in enumerate(self.size.seeds)
                if spread > 0
            }
        return facts

    def first_look(self) -> Comparison:
        """Every arm, its learning rate tuned, with the first number of seeds."""
        tuning: dict[str, Any] = {}
        if self.size.tuning_seeds:
            tuning = {"tune": dict(self.replication.grid), "tuning_seeds": self.size.tuning_seeds}
        found = self._compared(list(self.arms), self.size.seeds[0], **tuning)
        self.tuned = {arm: dict(values) for arm, values in found.tuned.items()}
        return found

    def raise_seeds(self, found: Comparison) -> None:
        """Judge, and give more seeds to what is open as long as there is time."""
        looks, stages = self.size.seeds, self.clock.state["stages"]
        self._take(found, last=len(looks) == 1)
        for look in range(1, len(looks)):
            planned = self.planned(look, stages[look - 1] if len(stages) >= look else None)
            if planned is None:
                break
            stages[look - 1 : look] = [planned]
            names, seeds = planned
            cut = seeds < looks[look]
            found = self._compared(names, seeds, notes=[TUNED_BEFORE] if self.tuned else [])
            self._take(found, last=cut or look == len(looks) - 1)
            if cut:
                break
        self._judge(last=True)

    def planned(self, look: int, before: Any = None) -> tuple[list[str], int] | None:
        """Arms and seeds of the next look, None if nothing is open or no time is left.

        All open claims are raised if the time allows, else those that decide, to as many seeds
        as fit.

        Args:
            look: Index of the look.
            before: What an earlier sitting decided; it is kept, or raised where time cut it.
        """
        target = self.size.seeds[look]
        if before is not None and before[1] == target:
            return list(before[0]), target
        opened = unresolved(list(self.findings.values()))
        deciding = [f for f in opened if f.claim.role != "secondary"]
        best: tuple[list[str], int] | None = None
        for wanted in (opened, deciding):
            names = [n for n in self.arms if any(n in f.claim.arms for f in wanted)]
            if not names:
                continue
            missing = sum(target - len(self.results[name]) for name in names)
            have = min(len(self.results[name]) for name in names)
            runs = max(0.0, self.minutes * 60 - self.clock.seconds) / self.seconds_a_run(names)
            if runs >= missing:
                return names, target
            best = (names, min(target, have + math.floor(runs / len(names))))
            if best[1] <= have:
                best = None
        if before is not None and (best is None or best[1] < before[1]):
            return list(before[0]), int(before[1])
        return best

    def seconds_a_run(self, names: Sequence[str]) -> float:
        """Mean of the runs that there are of these arms, in seconds that count."""
        seconds = [r.seconds for n in names for r in self.results[n].values() if r is not None]
        share = self.clock.seconds / max(self.clock.wall, 1e-3)
        return max(1e-3, share * float(np.mean(seconds))) if seconds else 1.0

    def _compared(self, names: Sequence[str], seeds: Any, **settings: Any) -> Comparison:
        """A comparison of some of the arms, with the learning rates that were tuned."""
        arms = [
            Arm(arm.name, arm.methods, {**arm.settings, **self.tuned.get(arm.name, {})}, arm.note)
            for arm in (self.arms[name] for name in names)
        ]
        found = compare(
            self.recipe, arms, seeds=seeds, out=self.folder, store=self.store,
            progress=self.clock, **self.options, **settings,
        )  # fmt: skip
        self.clock.save()
        self.report = str(found.report)
        return found

    # ---- findings --------------------------------------------------------------------------------

    def _take(self, found: Comparison, last: bool) -> None:
        for name, by_seed in found.results.items():
            self.results[name] |= by_seed
        self._judge(last)

    def _judge(self, last: bool) -> None:
        """Judge what is open; a claim that was decided at an earlier look stays decided."""
        for claim in self.claims:
            before = self.findings.get(claim.name)
            if before is None or before.verdict in OPEN:
                self.findings[claim.name] = self._finding(claim, last)

    def _finding(self, claim: Claim, last: bool) -> Finding:
        seeds = min(len(self.results[name]) for name in claim.arms)
        looks = self.size.seeds
        look = next((i for i, count in enumerate(looks) if count >= seeds), len(looks) - 1)
        level = Level(look_alpha(looks, look), self._family(claim.role), last)
        amounts = {n: self._amounts(n, claim.quantity) for n in claim.arms if claim.quantity}
        if claim.quantity and claim.kind == "better":
            return judge_claim(claim, self.task.name, amounts, metric=claim.quantity,
                               higher=False, level=level)  # fmt: skip
        values = {
            name: {s: r and r.metrics.get(f"test/{self.metric}") for s, r in by_seed.items()}
            for name, by_seed in self.results.items()
        }
        return judge_claim(claim, self.task.name, values, metric=self.metric, higher=self.higher,
                           amounts=amounts, level=level)  # fmt: skip

    def _family(self, role: str) -> int:
        """Claims that share alpha: those that decide, or the secondary ones."""
        secondary = role == "secondary"
        return max(1, sum((claim.role == "secondary") == secondary for claim in self.claims))

    def _recipe_of(self, name: str) -> Any:
        arm = self.arms[name]
        settings = {"methods": (*self.recipe.methods, *arm.parts()), **arm.settings}
        return self.recipe.changed({**settings, **self.tuned.get(name, {})})

    def _amounts(self, name: str, quantity: str) -> dict[int, float | None]:
        recipe = self._recipe_of(name)
        return {
            seed: None if r is None else self.quantities.measured(quantity, name, recipe, r)
            for seed, r in self.results[name].items()
        }

    def arm(self, name: str) -> dict[str, Any]:
        """One arm, as the ledger keeps it."""
        runs = self.results[name]
        done = [r for r in runs.values() if r is not None]
        values = [r.metrics[f"test/{self.metric}"] for r in done]
        recipe = self._recipe_of(name)
        return {
            "name": name, "methods": [method.spec() for method in recipe.methods],
            "settings": {**self.arms[name].settings, **self.tuned.get(name, {})},
            "trainable_parameters": done[0].meter["trainable_parameters"] if done else None,
            "seeds": len(runs), "failed": len(runs) - len(done),
            "mean": float(np.mean(values)) if values else None,
            "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "values": {str(s): r.metrics[f"test/{self.metric}"] for s, r in runs.items() if r},
            "seconds_a_run": round(float(np.mean([r.seconds for r in done])), 2) if done else None,
        }  # fmt: skip
