"""A quadratic pull of the weights towards earlier ones, and the moments when those are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import Conflict
from ..core.live import Live
from ..core.losses import Objective, Shaped
from ..core.method import Method, Step, Watcher
from .tasks import task_of_step


class Anchored(Shaped):
    """Adds strength / 2 * (sum_i importance_i * (w_i - anchor_i)^2 + constant), in nats.

    Attributes:
        owner: The method that it belongs to.
        anchors: Earlier values by parameter name; none yet if empty.
        importance: Weight of each entry, by parameter name; 1 where a name is missing.
        constant: What several quadratics leave over when they are written as one.
    """

    def __init__(self, inner: Objective, owner: Method, strength: float) -> None:
        super().__init__(inner)
        self.owner, self.strength, self.watched = owner, strength, False
        self.anchors: dict[str, Tensor] = {}
        self.importance: dict[str, Tensor] = {}
        self.constant = 0.0

    def penalties(self, model: nn.Module, step: Step) -> Mapping[str, Tensor]:
        """The inner penalties and this one.

        Raises:
            Conflict: If an anchored parameter is gone or has another shape.
        """
        found = dict(self.inner.penalties(model, step))
        if not self.anchors:
            return found
        named = dict(model.named_parameters())
        total: Any = self.constant
        for name, anchor in self.anchors.items():
            if name not in named or named[name].shape != anchor.shape:
                raise Conflict(
                    f"{self.owner.card.name!r} holds {name!r} near an earlier value of shape "
                    f"{tuple(anchor.shape)}, and another method changed the parameter",
                    "leave one of them out",
                )
            squares = (named[name] - anchor).square()
            weight = self.importance.get(name)
            total = total + (squares if weight is None else squares * weight).sum()
        key = self.owner.card.name
        while key in found:
            key += "+"
        return {**found, key: self.strength / 2 * total}

    def state_dict_of_anchors(self) -> dict[str, Any]:
        """Tensors and numbers, for a checkpoint."""
        return {
            "anchors": self.anchors, "importance": self.importance, "constant": self.constant
        }  # fmt: skip

    def load_anchors(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Continue from `state_dict_of_anchors()`."""
        device = next(model.parameters()).device
        for kind in ("anchors", "importance"):
            setattr(self, kind, {n: value.to(device) for n, value in state[kind].items()})
        self.constant = float(state["constant"])


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter that trains, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class TaskEnds(Watcher):
    """Calls a function at each change of task, and keeps the anchors in checkpoints.

    Args:
        live: The run.
        owner: The method; its `Anchored` is looked up in the objective.
        ended: Called with the anchors and the task that ended, before the next one's first step.

    Raises:
        Conflict: If the run has no tasks in sequence.
    """

    def __init__(self, live: Live, owner: Method, ended: Callable[[Anchored, int], None]) -> None:
        self.live, self.owner, self.ended = live, owner, ended
        self.anchored = _of(live.objective, owner)
        self.task = task_of_step(live.pool, 0, owner.card.name)

    def before_step(self, step: Step) -> None:
        """The first step of a new task is to come."""
        task = task_of_step(self.live.pool, step.index, self.owner.card.name)
        if task != self.task:
            self.ended(self.anchored, self.task)
            self.task = task

    def state_dict(self) -> dict[str, Any]:
        """Task and anchors."""
        return {"task": self.task, **self.anchored.state_dict_of_anchors()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self.task = int(state["task"])
        self.anchored.load_anchors(state, self.live.model)


def _of(objective: Any, owner: Method) -> Anchored:
    """The next `Anchored` of a method that no watcher has taken yet."""
    while not (
        isinstance(objective, Anchored) and objective.owner is owner and not objective.watched
    ):
        objective = objective.inner
    objective.watched = True
    return objective


@torch.no_grad()
def add_quadratic(
    anchored: Anchored, values: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    """Add sum_i weights_i * (w_i - values_i)^2 exactly: a sum of quadratics is one and a constant.

    Args:
        anchored: Takes it.
        values: Where the new quadratic has its minimum, by parameter name.
        weights: Its weight of each entry, >= 0.
    """
    for name, value in values.items():
        old, new = anchored.importance.get(name), weights[name]
        if old is None:
            anchored.anchors[name], anchored.importance[name] = value, new
            continue
        total, anchor = old + new, anchored.anchors[name]
        part = torch.where(total > 0, new / total, 1.0)
        anchored.constant += float((old * part * (anchor - value).square()).sum())
        anchored.anchors[name] = anchor + part * (value - anchor)
        anchored.importance[name] = total
