"""What a run over tasks in sequence is worth: the whole matrix R[t, j] of each split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.method import Example
from .continual import TaskMatrix

Values = dict[str, list[list[float]]]


class TaskRecord:
    """The deciding metric of every task after each task.

    Attributes:
        names: Tasks in order.
        metric: What is measured.
        rows: Rows of each task, by split; splits in which a task has none are left out.
        values: By split: a list a task that ended, with the value on each task.

    Args:
        names: Tasks in order.
        metric: What is measured.
        higher: True if more of it is better.
        splits: Encoded examples, each with its `task`.
    """

    def __init__(
        self,
        names: Sequence[str],
        metric: str,
        higher: bool,
        splits: Mapping[str, Sequence[Example]],
    ) -> None:
        self.names, self.metric, self.higher = tuple(names), metric, higher
        self.examples: dict[str, list[list[Example]]] = {}
        for split, examples in splits.items():
            parts: list[list[Example]] = [[] for _ in names]
            for example in examples:
                parts[example["task"]].append(example)
            if all(parts):
                self.examples[split] = parts
        self.values: Values = {split: [] for split in self.examples}

    def add(self, split: str, values: Sequence[float]) -> dict[str, float]:
        """Take what was measured after one more task; returns it under names for the log."""
        ended = self.names[len(self.values[split])]
        self.values[split].append(list(values))
        return {
            f"{split}/{self.metric} after {ended} on {name}": value
            for name, value in zip(self.names, values, strict=True)
        }

    def metrics(self) -> dict[str, float]:
        """Every entry of the matrix, and what `continual.FORMULAS` makes of them, by split."""
        found: dict[str, float] = {}
        for split, rows in self.values.items():
            for ended, values in zip(self.names, rows):
                for name, value in zip(self.names, values):
                    found[f"{split}/{self.metric} after {ended} on {name}"] = value
            if len(rows) == len(self.names):
                sizes = np.array([len(part) for part in self.examples[split]])
                matrix = TaskMatrix(self.names, np.array(rows), sizes, self.higher)
                found |= {f"{split}/{k}": float(v) for k, v in matrix.metrics().items()
                          if v is not None}  # fmt: skip
        return found

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue."""
        self.values = {split: [list(row) for row in rows] for split, rows in
                       state["values"].items()}  # fmt: skip
