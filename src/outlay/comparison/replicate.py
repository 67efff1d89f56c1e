"""A replication: a paper's claims as arms, tasks and controls, and the experiment that judges them.

The order is fixed: seed noise of the baseline first (and its known answer), then learning rates
of all arms tuned equally on validation, then seeds, raised in stages while something that they
could settle is open and the size's time is not used up. Each look at more seeds spends its own
share of alpha (`verdicts.look_alpha`). Everything goes on where it was stopped.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, nearest
from . import machine
from .quantities import Quantity
from .verdicts import ALPHA, POWER, Claim, combined

if TYPE_CHECKING:
    from ..training.recipe import Recipe
    from .compare import Arm


@dataclass(frozen=True)
class Size:
    """How much is spent.

    Attributes:
        name: "smoke", "cpu" or "gpu".
        seeds: Seeds of every arm at each look.
        minutes: Minutes a task, after which no more seeds are begun; on a CPU shared with others
            only the process's own time counts.
        noise_seeds: Runs of the baseline that measure its seed noise; 0 measures none.
        tuning_seeds: Runs of each point of the grid; 0 tunes nothing.
        verdict: False if nothing may be concluded at this size.
    """

    name: str
    seeds: tuple[int, ...]
    minutes: float
    noise_seeds: int
    tuning_seeds: int
    verdict: bool = True


SIZES = {
    size.name: size
    for size in (
        Size("smoke", (2,), 2.0, 0, 0, verdict=False),
        Size("cpu", (6, 12, 30), 60.0, 5, 1),
        Size("gpu", (10, 30), 60.0, 10, 3),
    )
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task that a paper's claims are put to.

    Attributes:
        name: As claims name it.
        recipe: Name of a packaged recipe.
        arms: Arms as `Arm.parse` reads them, for the name of a size. A learning rate written
            there serves until it is tuned.
        changes: Recipe settings by name of the size.
        floor: What a predictor without any learning reaches on validation, in the metric's unit:
            the baseline has to beat it with every seed, or nothing is concluded.
        floor_source: What the floor is.
        note: What a reader has to know about the task.
    """

    name: str
    recipe: str
    arms: Callable[[str], tuple[str, ...]]
    changes: Mapping[str, Mapping[str, Any]]
    floor: float
    floor_source: str
    note: str = ""

    def recipe_at(self, size: str) -> Recipe:
        """The recipe that all arms share at a size."""
        from .. import recipes

        return recipes.get(self.recipe).changed({"name": self.name, **self.changes[size]})

    def arms_at(self, size: str) -> list[Arm]:
        """The arms at a size, read."""
        from .compare import Arm

        return [Arm.parse(text) for text in self.arms(size)]


@dataclass(frozen=True, kw_only=True)
class Replication:
    """A paper's claims, ready to be judged.

    Attributes:
        paper: Number of the paper.
        slug: Ends the names of script and ledger, `NN_slug`.
        title: The paper's.
        arxiv: The paper's id.
        claim: What it claims, in one sentence.
        baseline: Arm whose seed noise is measured first.
        method: The paper's own arm, run beside the baseline then.
        tasks: Two tasks or more.
        claims: What is judged.
        grid: Dotted setting to the values that every arm is tuned over.
        limits: What the specification's experiment asks for and this one cannot give.
        quantities: Quantities of its own, by name (see `quantities`).
    """

    paper: int
    slug: str
    title: str
    arxiv: str
    claim: str
    baseline: str
    method: str
    tasks: tuple[Task, ...]
    claims: tuple[Claim, ...]
    grid: Mapping[str, tuple[Any, ...]]
    limits: tuple[str, ...] = ()
    quantities: Mapping[str, Quantity] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """`34_bone`."""
        return f"{self.paper:02d}_{self.slug}"

    def claims_on(self, task: str) -> list[Claim]:
        """The claims that are made on a task."""
        return [claim for claim in self.claims if task in claim.size]


@dataclass
class Replicated:
    """What a replication found.

    Attributes:
        folder: Where its comparisons lie.
        ledger: What the ledger records.
        path: The ledger file.
        reports: The comparisons' report pages.
    """

    folder: Path
    ledger: dict[str, Any]
    path: Path
    reports: list[Path]


def replicate(
    replication: Replication,
    size: str = "cpu",
    *,
    out: str | Path = "runs",
    record: str | Path | None = None,
    minutes: float | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Any = None,
    command: str = "",
) -> Replicated:
    """Run a replication, or go on with it, and judge its claims.

    Args:
        replication: What to run.
        size: Name of one of `SIZES`.
        out: Folder of everything; run folders lie in its `store`, which replications share, so
            that equal runs are not repeated.
        record: A second folder that the ledger file is written to, if there is a verdict.
        minutes: Minutes a task, in place of the size's.
        device: As for `run`.
        threads: As for `run`.
        progress: As for `compare`.
        command: What to type to get it again.

    Raises:
        ConfigError: If there is no such size, or `record` is given for one without a verdict.
    """
    if size not in SIZES:
        raise ConfigError(
            f"there is no size {size!r}", f"{nearest(size, SIZES)}sizes are {', '.join(SIZES)}"
        )
    chosen = SIZES[size]
    if record is not None and not chosen.verdict:
        raise ConfigError(
            f"size {size!r} gives no verdict to record", "use --size cpu or gpu, or leave --record"
        )
    from .replicate_task import TaskRun

    folder = Path(out) / f"replication-{replication.stem}-{size}"
    found = [
        TaskRun(
            replication, task, chosen, folder / task.name, Path(out) / "store",
            minutes or chosen.minutes, {"device": device, "threads": threads, "command": command},
            progress,
        ).judged()
        for task in replication.tasks
    ]  # fmt: skip
    ledger = _ledger(replication, chosen, found, command)
    path = folder / f"{replication.stem}.json"
    for place in [path, *([Path(record) / path.name] if record is not None else [])]:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(ledger, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Replicated(folder, ledger, path, [Path(task["report"]) for task in found])


def _ledger(
    replication: Replication, size: Size, tasks: Sequence[dict[str, Any]], command: str
) -> dict[str, Any]:
    """What `list`, `show` and the documentation read, and what a reader needs to doubt it."""
    verdict = combined([task["verdict"] for task in tasks]) if size.verdict else None
    return {
        "paper": replication.paper, "slug": replication.slug, "title": replication.title,
        "arxiv": replication.arxiv, "claim": replication.claim, "size": size.name,
        "verdict": verdict, "sentence": _sentence(replication, verdict, tasks),
        "sentences": _sentences(replication, verdict, tasks),
        "date": datetime.date.today().isoformat(), "command": command,
        "minutes": round(sum(task["minutes"] for task in tasks), 2),
        "hardware": machine.hardware(), "versions": machine.versions(),
        "alpha": ALPHA, "power": POWER, "looks": list(size.seeds),
        "limits": list(replication.limits),
        "tasks": {task["task"]: {k: v for k, v in task.items() if k not in ("task", "report")}
                  for task in tasks},
    }  # fmt: skip


def _sentence(
    replication: Replication, verdict: str | None, tasks: Sequence[dict[str, Any]]
) -> str:
    if verdict is None:
        return "This size only shows that everything runs; nothing is concluded."
    each = ", ".join(f"{task['verdict']} on {task['task']}" for task in tasks)
    return f"{verdict.capitalize()} ({each}): {replication.claim}"


def _sentences(
    replication: Replication, verdict: str | None, tasks: Sequence[dict[str, Any]]
) -> list[str]:
    """The headline, what decided, and what took something away."""
    said = [_sentence(replication, verdict, tasks)]
    for task in tasks:
        if not task["noise"].get("passed", True):
            said.append(
                f"On {task['task']} the baseline did not beat {task['noise']['floor_source']} with "
                "every seed, so nothing was concluded."
            )
        said += [
            claim["sentence"]
            for claim in task["claims"]
            if claim["role"] == "main" or claim["verdict"] not in ("supported", "partly")
        ]
    return said
