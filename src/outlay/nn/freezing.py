"""Columns of a parameter that stop training one after the other, for good."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..core.errors import CheckpointError, ConfigError, NoEffect
from ..core.live import Live
from ..core.method import Step, Watcher

Order = Literal["largest_first", "smallest_first"]


@dataclass(frozen=True)
class ColumnFreezeSchedule:
    r"""How many of r columns are frozen: $k(t) = \min(r, \lfloor r\,t / (\eta T) \rfloor)$.

    t / T is the share of the budget that is spent. This is the gradual freezing of LaMDA (arXiv
    2406.12832, caption of figure 1); the released code leaves out the factor r and so never
    freezes more than 1 / eta columns.

    Attributes:
        fraction: eta, the share of the budget after which all columns are frozen; 0 freezes them
            from the start, None never.
    """

    fraction: float | None = 0.3

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise ConfigError(
                f"freeze fraction {self.fraction} is not allowed", "give 0 to 1, or None for never"
            )

    def frozen(self, columns: int, share: float) -> int:
        """Columns that are frozen during the step that starts at this share of the budget."""
        if self.fraction is None:
            return 0
        if self.fraction == 0:
            return columns
        # A share such as 15/100 must not fall short of its column by a rounding error.
        return min(columns, math.floor(columns * share / self.fraction + 1e-9))


class ColumnFreezer(Watcher):
    """Freezes columns of parameters on a schedule: update, momentum and weight decay.

    Columns that are frozen keep their values through the loop's masks. When all are, the
    parameter leaves the optimizer and its state is dropped.

    Args:
        live: The run.
        names: Parameters with one direction a column, ordered by decreasing singular value.
        schedule: How many columns are frozen when.
        order: Which go first.
        owner: Name of the method, for errors.

    Attributes:
        frozen: Columns frozen so far, by name.
    """

    def __init__(
        self,
        live: Live,
        names: tuple[str, ...],
        schedule: ColumnFreezeSchedule,
        order: Order = "largest_first",
        owner: str = "the freezing schedule",
    ) -> None:
        self.live, self.names, self.schedule, self.order = live, names, schedule, order
        self.owner, self.asked = owner, False
        self.frozen = dict.fromkeys(names, 0)

    def before_step(self, step: Step) -> None:
        """Freeze the columns that are due."""
        self.asked = True
        gone = []
        for name in self.names:
            columns = self.live.parameter(name).shape[1]
            due = self.schedule.frozen(columns, step.share)
            if due <= self.frozen[name]:
                continue
            self.frozen[name] = due
            if due == columns:
                gone.append(name)
                continue
            keep = torch.ones_like(self.live.parameter(name), dtype=torch.bool)
            keep[:, : due if self.order == "largest_first" else None] = False
            if self.order == "smallest_first":
                keep[:, : columns - due] = True
            self.live.mask(name, keep, "held")
        if gone:
            for name in gone:
                self.live.mask(name, None)
            self.live.freeze(gone)

    def close(self) -> None:
        """Refuse to end a run that never asked.

        Raises:
            NoEffect: If the schedule had columns to freeze and no step was announced.
        """
        if self.names and not self.asked:
            raise NoEffect(
                f"{self.owner} was to freeze columns and was never told of a step",
                "call the watcher's before_step before every optimizer step, or train with run()",
            )

    def state_dict(self) -> dict[str, Any]:
        """Columns frozen so far."""
        return {"frozen": dict(self.frozen), "asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; the masks themselves come back with the run.

        Raises:
            CheckpointError: If the state is about other parameters.
        """
        frozen: Mapping[str, int] = state["frozen"]
        if set(frozen) != set(self.names):
            raise CheckpointError(
                f"the state of {self.owner} is about {len(frozen)} parameters, the model has "
                f"{len(self.names)} of them",
                "resume with the same method and model",
            )
        self.frozen = {name: int(frozen[name]) for name in self.names}
        self.asked = bool(state["asked"])
