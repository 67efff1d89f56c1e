"""L2 distance to earlier weights: to those at the last change of task, or to the initial ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt
from torch import nn

from ...core.card import Card
from ...core.live import Live
from ...core.losses import Objective
from ...core.method import Context, OnObjective, OnStep, Watcher
from ...nn.anchoring import Anchored, TaskEnds, trained_values
from ...nn.targets import head_modules


@dataclass(frozen=True, kw_only=True)
class L2Anchor(OnObjective, OnStep):
    """Add strength / 2 * |w - w0|^2 over the parameters that train, in nats.

    With `anchor="initial"` this is L2-SP (arXiv 1802.01483) without its second term: the
    task's head has no pre-trained values and is left alone; `weight_decay` is that term.

    Attributes:
        strength: Weight of the penalty. L2-SP tries 1e-3 to 1e-1.
        anchor: "task" pulls towards the weights at the last change of task (nothing happens in the
            first task), "initial" towards those that training started from.
    """

    card: ClassVar[Card] = Card(
        name="l2_anchor",
        title="Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
        arxiv="1802.01483",
        group="objectives",
        summary="L2 distance to the weights of the last task, or to the initial ones (L2-SP).",
        authors="Xuhong Li, Yves Grandvalet, Franck Davoine",
        year=2018,
    )
    strength: Annotated[float, Gt(0)] = 0.01
    anchor: Literal["task", "initial"] = "task"

    def shape(self, objective: Objective, model: nn.Module, context: Context) -> Objective:
        """The objective with the penalty."""
        anchored = Anchored(objective, self, self.strength)
        if self.anchor == "initial":
            heads = head_modules(model)
            anchored.anchors = {
                name: value
                for name, value in trained_values(model).items()
                if name.split(".")[0] not in heads
            }
        return anchored

    def watch(self, live: Live) -> Watcher:
        """Takes new anchors when a task ends; the initial weights stay."""
        if self.anchor == "initial":
            return Watcher()

        def ended(anchored: Anchored, task: int) -> None:
            anchored.anchors = trained_values(live.model)

        return TaskEnds(live, self, ended)
