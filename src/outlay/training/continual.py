"""Tasks in sequence: streams of classes or domains, and the matrix of accuracies R[t, j].

Nothing here knows what learns: heads on frozen features and trained models share these protocols.
T tasks; R[t, j] is the accuracy on task j's held-out rows after learning task t.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import ConfigError, DataError
from ..core.method import seed_of

FORMULAS = {
    "final": "accuracy on the rows of all tasks after the last one",
    "average_incremental": "mean over t of the accuracy after task t on the rows of tasks up to t",
    "backward_transfer": "mean over j < T of R[T, j] - R[j, j]",
    "forgetting": "mean over j < T of max over j <= t < T of R[t, j], less R[T, j]; of a loss, the "
    "rise from its minimum",
}


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        name: What it is called.
        train: Rows to learn from. Shape (rows,).
        test: Held-out rows that belong to it. Shape (rows,).
    """

    name: str
    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class TaskMatrix:
    """Accuracies R[t, j] of a stream.

    Attributes:
        names: Tasks, in order.
        values: NaN where task j has no meaning yet. Shape (T, T).
        rows: Held-out rows of each task. Shape (T,).
        higher: False if R is a loss, of which less is better.
    """

    names: tuple[str, ...]
    values: np.ndarray
    rows: np.ndarray
    higher: bool = True

    @property
    def after_each_task(self) -> np.ndarray:
        """Accuracy after task t on the rows of tasks up to t. Shape (T,)."""
        return np.array([
            np.average(self.values[t, : t + 1], weights=self.rows[: t + 1])
            for t in range(len(self.names))
        ])  # fmt: skip

    @property
    def final(self) -> float:
        """Accuracy on the rows of all tasks after the last one."""
        return float(self.after_each_task[-1])

    @property
    def average_incremental(self) -> float:
        """Mean of `after_each_task`: at least `final` where that falls from task to task."""
        return float(self.after_each_task.mean())

    @property
    def backward_transfer(self) -> float | None:
        """Mean change of a task's accuracy from when it was learned to the end; None for T = 1."""
        if len(self.names) < 2:
            return None
        return float(np.mean(self.values[-1, :-1] - np.diag(self.values)[:-1]))

    @property
    def forgetting(self) -> float | None:
        """Mean loss of a task's worth from its best before the end; None for T = 1."""
        if len(self.names) < 2:
            return None
        last = len(self.names) - 1
        worth = self.values if self.higher else -self.values
        best = [worth[j:last, j].max() for j in range(last)]
        return float(np.mean(np.array(best) - worth[-1, :-1]))

    def metrics(self) -> dict[str, float | None]:
        """All of them by name; `FORMULAS` says what each is."""
        return {name: getattr(self, name) for name in FORMULAS}


def class_incremental(
    train: Any, test: Any, tasks: int, seed: int = 0, order: Sequence[Any] | None = None
) -> list[Task]:
    """Classes parted among tasks; all rows of a class come in one task.

    Args:
        train: Label of each row to learn from. Shape (rows,).
        test: Label of each held-out row. Shape (rows,).
        tasks: How many; the first ones get one class more where they do not divide.
        seed: Decides the order of classes.
        order: Classes in order, in place of a seed.

    Raises:
        ConfigError: If there are fewer classes than tasks, or `order` lacks a class.
        DataError: If a task would have no held-out row.
    """
    train, test = np.asarray(train), np.asarray(test)
    classes = np.unique(train)
    if not 1 <= tasks <= len(classes):
        raise ConfigError(
            f"{len(classes)} classes cannot be parted into {tasks} tasks",
            f"ask for 1 to {len(classes)} tasks",
        )
    if order is None:
        keys = [seed_of(seed, "class order", str(label)) for label in classes.tolist()]
        ordered = classes[np.argsort(keys, kind="stable")]
    else:
        ordered = np.asarray(order)
        if sorted(ordered.tolist(), key=str) != sorted(classes.tolist(), key=str):
            raise ConfigError("the order of classes does not name each once", "name each once")
    return [
        _task(", ".join(map(str, part.tolist())), np.isin(train, part), np.isin(test, part))
        for part in np.array_split(ordered, tasks)
    ]


def domain_incremental(
    train: Any, test: Any, seed: int = 0, order: Sequence[Any] | None = None
) -> list[Task]:
    """One task a domain; its classes may come back in every one.

    Args:
        train: Domain of each row to learn from. Shape (rows,).
        test: Domain of each held-out row. Shape (rows,).
        seed: Decides the order of domains.
        order: Domains in order, in place of a seed.

    Raises:
        ConfigError: If there is one domain only.
        DataError: If a domain has no held-out row.
    """
    train, test = np.asarray(train), np.asarray(test)
    domains = np.unique(train).tolist()
    if len(domains) < 2:
        raise ConfigError(
            "rows of one domain are no sequence of domains", "name a column of domains"
        )
    if order is None:
        order = sorted(domains, key=lambda name: seed_of(seed, "domain order", str(name)))
    return [_task(str(name), train == name, test == name) for name in order]


def _task(name: str, train: np.ndarray, test: np.ndarray) -> Task:
    if not train.any() or not test.any():
        raise DataError(
            f"task {name!r} has {train.sum()} rows to learn from and {test.sum()} held out",
            "give each task rows of both kinds",
        )
    return Task(name, np.flatnonzero(train), np.flatnonzero(test))


@dataclass(frozen=True)
class StreamResult:
    """What one learner did on one stream.

    Attributes:
        matrix: Its accuracies.
        seconds: Seconds of learning each task. Shape (T,).
        bytes: Bytes that the learner keeps after each task; None where it does not say. Shape (T,).
    """

    matrix: TaskMatrix
    seconds: tuple[float, ...]
    bytes: tuple[int | None, ...]


def run_stream(
    learner: Any, tasks: Sequence[Task], train: tuple[Any, Any], test: tuple[Any, Any],
    future: bool = False,
) -> StreamResult:  # fmt: skip
    """Learn task after task, and measure every task so far after each.

    Args:
        learner: Has `partial_fit(features, labels)` and `predict(features)`; one that says
            `num_bytes()` has its memory counted.
        tasks: In order.
        train: Features and labels to learn from.
        test: Held-out features and labels.
        future: Measure tasks that are still to come too, where their classes are known.
    """
    values = np.full((len(tasks), len(tasks)), np.nan)
    seconds, sizes = [], []
    for t, task in enumerate(tasks):
        started = time.perf_counter()
        learner.partial_fit(train[0][task.train], train[1][task.train])
        seconds.append(time.perf_counter() - started)
        sizes.append(learner.num_bytes() if hasattr(learner, "num_bytes") else None)
        for j, other in enumerate(tasks if future else tasks[: t + 1]):
            found = learner.predict(test[0][other.test])
            values[t, j] = np.mean(found == test[1][other.test])
    rows = np.array([len(task.test) for task in tasks])
    matrix = TaskMatrix(tuple(task.name for task in tasks), values, rows)
    return StreamResult(matrix, tuple(seconds), tuple(sizes))
