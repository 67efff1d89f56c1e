"""Parameter groups, the optimizer and the learning-rate schedule of a stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..core.errors import ConfigError, Conflict
from ..core.live import PREFIX
from ..core.losses import Objective
from ..core.method import Context, Method, OnOptimizer, OnSchedule, ParameterGroup, Step
from ..nn.targets import head_modules
from .specs import OptimizerSpec, ScheduleSpec

Schedule = Callable[[Step], float]


def parameter_groups(
    model: nn.Module, objective: Objective, spec: OptimizerSpec, methods: Sequence[Method]
) -> list[dict[str, Any]]:
    """Groups of trainable parameters: those that methods ask for, the head, the rest.

    Each group has `params`, `names` (parallel), `lr`, `base_lr`, `weight_decay` and `clip`.

    Raises:
        Conflict: If two methods want one parameter in different groups.
        ConfigError: If a method names a parameter that does not train.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    known = {id(p) for p in trainable.values()}
    trainable |= {
        PREFIX + n: p
        for n, p in objective.named_parameters()
        if p.requires_grad and id(p) not in known
    }
    heads = head_modules(model)
    owner: dict[str, Method] = {}
    wanted: list[ParameterGroup] = []
    for method in methods:
        for group in method.groups(model, objective):
            for name in group.names:
                if name not in trainable:
                    raise ConfigError(
                        f"{method.card.name!r} groups {name!r}, which does not train",
                        "name trainable parameters",
                    )
                if name in owner:
                    raise Conflict(
                        f"{owner[name].card.name!r} and {method.card.name!r} both group {name!r}",
                        "leave one of them out",
                    )
                owner[name] = method
            wanted.append(group)
    rest = [n for n in trainable if n not in owner]
    in_head = [n for n in rest if n.split(".")[0] in heads and spec.head_lr_factor != 1.0]
    wanted.append(ParameterGroup(tuple(n for n in rest if n not in in_head)))
    wanted.append(ParameterGroup(tuple(in_head), lr_factor=spec.head_lr_factor))
    return [
        {
            "params": [trainable[n] for n in group.names],
            "names": list(group.names),
            "lr": spec.lr * group.lr_factor,
            "base_lr": spec.lr * group.lr_factor,
            "weight_decay": spec.weight_decay if group.weight_decay is None else group.weight_decay,
            "clip": group.clip,
        }
        for group in wanted
        if group.names
    ]


def build_optimizers(
    groups: list[dict[str, Any]],
    spec: OptimizerSpec,
    methods: Sequence[Method],
    context: Context,
    inside: bool = False,
) -> list[torch.optim.Optimizer]:
    """One optimizer, or one a parameter where updates happen inside backward.

    Raises:
        Conflict: If two methods bring an optimizer, or one leaves parameters out.
    """
    owners = [m for m in methods if isinstance(m, OnOptimizer)]
    if len(owners) > 1:
        raise Conflict(
            f"{owners[0].card.name!r} and {owners[1].card.name!r} both bring the optimizer",
            "leave one of them out",
        )
    build = owners[-1].build if owners else _default

    def make(some: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizer = build([dict(group) for group in some], spec, context)
        _complete(optimizer, some, owners[0].card.name if owners else spec.name)
        return optimizer

    if not inside:
        return [make(groups)] if groups else []
    return [
        make([{**group, "params": [parameter], "names": [name]}])
        for group in groups
        for name, parameter in zip(group["names"], group["params"])
    ]


def _complete(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], owner: str) -> None:
    """Groups of a foreign optimizer get the names and base rates that the loop needs."""
    names = {id(p): n for group in groups for n, p in zip(group["names"], group["params"])}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != set(names):
        lost = [n for i, n in names.items() if i not in held]
        raise Conflict(
            f"the optimizer of {owner!r} leaves out {lost[0] if lost else 'nothing'!r} or holds "
            "parameters that do not train",
            "give it exactly the parameters of its groups",
        )
    for group in optimizer.param_groups:
        group["names"] = [names[id(p)] for p in group["params"]]
        group.setdefault("base_lr", group["lr"])
        group.setdefault("clip", None)


def _default(
    groups: Sequence[dict[str, Any]], spec: OptimizerSpec, context: Context
) -> torch.optim.Optimizer:
    if spec.name == "sgd":
        return torch.optim.SGD(list(groups), lr=spec.lr, momentum=spec.betas[0])
    if spec.name == "adagrad":
        return _Adagrad(list(groups), lr=spec.lr, eps=spec.eps)
    return torch.optim.AdamW(list(groups), lr=spec.lr, betas=spec.betas, eps=spec.eps)


class _Adagrad(torch.optim.Adagrad):
    """Torch's makes its state once, before the first step; here parameters may come later."""

    moments = 1

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "sum": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    }
        return super().step(closure)


def schedule_of(spec: ScheduleSpec, methods: Sequence[Method], context: Context) -> Schedule:
    """The recipe's schedule, changed by every `OnSchedule` method in turn.

    Warm-up rises linearly to 1 at `warmup`; the first step already moves. The fall ends at
    `floor` after the last step.
    """

    def base(step: Step) -> float:
        ahead = 1.0 / step.total if step.total else 0.0
        if spec.warmup > 0 and step.share < spec.warmup:
            return min(1.0, (step.share + ahead) / spec.warmup)
        if spec.name == "constant":
            return 1.0
        progress = min(1.0, (step.share - spec.warmup) / (1.0 - spec.warmup))
        fall = progress if spec.name == "linear" else 0.5 - 0.5 * math.cos(math.pi * progress)
        return 1.0 - (1.0 - spec.floor) * fall

    schedule: Schedule = base
    for method in methods:
        if isinstance(method, OnSchedule):
            schedule = method.schedule(schedule, context)
    return schedule


def set_rates(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> float:
    """Set every group's rate to its base rate times the factor; returns the largest."""
    largest = 0.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
            largest = max(largest, group["lr"])
    return largest
