"""Tasks in sequence: their rows together, and a pool that draws from one task after the other."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, Conflict, DataError, NoEffect
from ...core.method import Example
from ..specs import DataSpec, TaskSpec
from .columns import CLASSES
from .labels import Labels, sorted_names
from .pool import Pool

_TEXTS = ("causal-language-modeling", "sequence-to-sequence")


def load_tasks(
    spec: DataSpec, task: str, load: Callable[..., Any], base: Path | None = None
) -> dict[str, Any]:
    """What all tasks of a sequence hold together, as the fields of `Splits`.

    Ids are led by the task's name, rows say the index of their task, and the label space is that
    of all tasks.

    Args:
        spec: Has `tasks`.
        task: What is learned in each of them.
        load: Reads the data of one task.
        base: Folder that relative paths start from.

    Raises:
        DataError: If the tasks do not fit each other.
    """
    members = spec.in_sequence()
    parts = [load(member, task, base=base) for member in members]
    found = {
        split: [
            {**row, "id": f"{member.name}:{row['id']}", "task": index}
            for index, (member, part) in enumerate(zip(members, parts, strict=True))
            for row in part[split]
        ]
        for split in ("train", "validation", "test")
    }
    labels = _common_labels(members, [part.labels for part in parts], task)
    counts: dict[str, Any] = {"read": sum(part.counts["read"] for part in parts)}
    counts |= {split: len(rows) for split, rows in found.items()}
    if task in CLASSES:
        counts["classes"] = dict(sorted(Counter(row["label"] for row in found["train"]).items()))
    counts["tasks"] = {m.name: part.counts for m, part in zip(members, parts, strict=True)}
    known = hashlib.sha256()
    for member, part in zip(members, parts, strict=True):
        known.update(f"{member.name}\x1f{part.fingerprint}\x1e".encode())
    return {
        **found, "labels": labels, "fingerprint": known.hexdigest(), "counts": counts,
        "sources": {f"{m.name}/{k}": v for m, part in zip(members, parts) for k, v in
                    part.sources.items()},
        "columns": parts[0].columns,
    }  # fmt: skip


def _common_labels(members: Sequence[TaskSpec], labels: Sequence[Labels], task: str) -> Labels:
    """One label space: the classes of all tasks, in order."""
    first = labels[0]
    for member, other in zip(members, labels, strict=True):
        if other.image != first.image:
            raise DataError(
                f"task {member.name!r} has images of {_size(other)}, {members[0].name!r} of "
                f"{_size(first)}",
                "give images of one size",
            )
    if task in _TEXTS:
        return first
    if task == "regression":
        raise ConfigError("data.tasks does not go with regression", "scales differ between tasks")
    return Labels(sorted_names({n for each in labels for n in each.names}), image=first.image)


def _size(labels: Labels) -> str:
    return "x".join(map(str, labels.image))


def first_steps(weights: Sequence[float], steps: int) -> tuple[int, ...]:
    """The step at which each task begins, and the number of all steps.

    Args:
        weights: Part of each task, in any unit.
        steps: Steps of the whole run.

    Raises:
        ConfigError: If a task would get no step.
    """
    total = sum(weights)
    ends = [round(steps * part / total) for part in itertools.accumulate(weights)]
    starts = (0, *ends)
    if any(end <= start for start, end in itertools.pairwise(starts)):
        raise ConfigError(
            f"{steps} steps leave one of {len(weights)} tasks without a step",
            "raise the budget, or the task's weight",
        )
    return starts


class TaskPool(Pool):
    """Examples of one task after the other, each task in a seeded order of its own.

    Where a task begins is fixed in steps, so the whole state is that of any pool: a cursor.

    Args:
        examples: Each says its `task`, counted from 0.
        seed: Seed of the orders.
        starts: First step of each task, and the number of all steps.
        step_size: Examples of a step.
        rows: The rows behind the examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        seed: int,
        starts: Sequence[int],
        step_size: int,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(examples, seed, rows=rows)
        self.starts, self.step_size = tuple(starts), step_size
        self.rehearsal: Callable[[TaskPool, int], Sequence[int]] | None = None
        self.rehearsed_share = 0.0
        self._memories: dict[int, Sequence[int]] = {}
        self._of_task: list[list[int]] = [[] for _ in self.starts[:-1]]
        for index, example in enumerate(examples):
            self._of_task[example["task"]].append(index)
        for task, members in enumerate(self._of_task):
            if not members:
                raise DataError(
                    f"task {task} has no training example left", "check the data and the selectors"
                )

    @property
    def num_tasks(self) -> int:
        """Tasks of the sequence."""
        return len(self._of_task)

    def task_of_step(self, step: int) -> int:
        """The task that a step draws from; the last one for later steps."""
        return min(bisect.bisect_right(self.starts, step), self.num_tasks) - 1

    def members_of(self, task: int) -> list[int]:
        """Indices of a task's examples."""
        return list(self._of_task[task])

    def seen_of(self, task: int) -> list[int]:
        """Indices of the examples that a task's own draws meet, in the order of first sight."""
        members = self._of_task[task]
        steps = range(self.starts[task] * self.step_size, self.starts[task + 1] * self.step_size)
        drawn = sum(not self._rehearses(place) for place in steps) if task else len(steps)
        order = self._order(f"task:{task}", 0, len(members))
        return [members[place] for place in order[:drawn]]

    def rehearse(self, memory: Callable[[TaskPool, int], Sequence[int]], share: float) -> TaskPool:
        """A pool that draws a share of each later task's examples from a memory.

        Args:
            memory: From (pool, task) to the indices of earlier examples that are kept while that
                task is learned; called once a task.
            share: Of the examples of every task but the first.
        """
        first, last = (self.starts[at] * self.step_size for at in (1, -1))
        if int(last * share) == int(first * share):
            raise NoEffect(
                f"a share of {share} of {last - first} examples is none", "raise the share"
            )
        pool = self._like(self.examples)
        pool.rehearsal, pool.rehearsed_share = memory, share
        return pool

    def _like(self, examples: Sequence[Example]) -> TaskPool:
        pool = TaskPool(examples, self.seed, self.starts, self.step_size, self.rows)
        pool.rehearsal, pool.rehearsed_share = self.rehearsal, self.rehearsed_share
        return pool

    def set_weights(self, by_domain: Mapping[str, float]) -> None:
        """Refused: tasks come in their order."""
        raise Conflict(
            "weights of domains do not go with data.tasks", "leave out what sets them, or the tasks"
        )

    def _take(self, count: int) -> list[Example]:
        drawn = []
        for _ in range(count):
            task = self.task_of_step(self.position // self.step_size)
            if task and self._rehearses(self.position):
                first = self.starts[task] * self.step_size
                # No earlier visit of a kept example can have had as high a number.
                example = self._next_of(f"memory:{task}", self._memory(task))
                drawn.append({**example, "visit": example["visit"] + first})
            else:
                drawn.append(self._next_of(f"task:{task}", self._of_task[task]))
            self.position += 1
        return drawn

    def _rehearses(self, place: int) -> bool:
        """True at evenly spread places, whose share is the rehearsed one."""
        share = self.rehearsed_share
        return self.rehearsal is not None and int((place + 1) * share) > int(place * share)

    def _memory(self, task: int) -> Sequence[int]:
        if task not in self._memories:
            assert self.rehearsal is not None
            self._memories[task] = self.rehearsal(self, task)
        return self._memories[task]
