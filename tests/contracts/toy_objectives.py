"""Made-up objectives: weights, couplings, teachers, penalties."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from outlay.core.card import Card
from outlay.core.losses import Losses, Objective, Rows, Shaped, Term, model_inputs
from outlay.core.method import (
    OnObjective,
)
from outlay.core.still import still

F64 = torch.float64


@dataclass(frozen=True, kw_only=True)
class Reweight(OnObjective):
    """Weights known from the batch alone."""

    card: ClassVar[Card] = Card(name="reweight", title="toy", claims=("objective.weights",))
    factor: float = 3.0

    def shape(self, objective: Objective, model: nn.Module, context: Any) -> Objective:
        factor = self.factor

        class Weighted(Shaped):
            def factors(self, batch: Any) -> Tensor:
                return torch.where(batch["labels"] == 1, factor, 1.0)

            def forward(self, model: nn.Module, batch: Any, step: Any) -> Losses:
                losses = self.inner(model, batch, step)
                term = losses.terms[losses.primary]
                scaled = term.weights * self.factors(batch).to(term.weights)
                return losses.with_term(losses.primary, Term(term.values, scaled, term.coefficient))

            def weight_sums(self, batch: Any) -> dict[str, float]:
                sums = dict(self.inner.weight_sums(batch))
                known = batch["labels"] != -100
                sums["task"] = float((self.factors(batch) * known).sum())
                return sums

        return Weighted(objective)


@dataclass(frozen=True, kw_only=True)
class Focus(OnObjective):
    """Weights from the losses of the whole step (a coupling)."""

    card: ClassVar[Card] = Card(name="focus", title="toy", claims=("objective.weights",))
    detach: bool = False

    def shape(self, objective: Objective, model: nn.Module, context: Any) -> Objective:
        detach = self.detach

        class Focused(Shaped):
            def couple(self, rows: Rows, step: Any) -> Rows:
                weights = rows.weights[rows.primary]
                means = rows.sums[rows.primary] / weights.clamp(min=1e-12)
                means = means.detach() if detach else means
                return rows.scaled(torch.softmax(means, 0) * len(means))

        return Focused(objective)


@dataclass(frozen=True, kw_only=True)
class Neighbour(OnObjective):
    """Each example is drawn to its nearest neighbour in the step, through its features."""

    card: ClassVar[Card] = Card(name="neighbour", title="toy")

    def shape(self, objective: Objective, model: nn.Module, context: Any) -> Objective:
        class Near(Shaped):
            rows = ("features",)

            def couple(self, rows: Rows, step: Any) -> Rows:
                found = rows.outputs["features"]
                apart = (found[:, None] - found[None]).square().sum(-1)
                apart = apart + torch.eye(len(found), dtype=found.dtype) * 1e9
                return rows.with_term("near", apart.min(1).values, apart.new_ones(len(found)), 0.5)

        return Near(objective)


@dataclass(frozen=True, kw_only=True)
class Distil(OnObjective):
    """An extra term against a frozen teacher."""

    card: ClassVar[Card] = Card(name="distil", title="toy")
    teacher: str = "original"

    def shape(self, objective: Objective, model: nn.Module, context: Any) -> Objective:
        class Distilled(Shaped):
            def __init__(self, inner: Objective, teacher: nn.Module) -> None:
                super().__init__(inner)
                self.teacher = teacher

            def forward(self, model: nn.Module, batch: Any, step: Any) -> Losses:
                losses = self.inner(model, batch, step)
                with torch.no_grad(), context.meter.under("teacher"):
                    aim = self.teacher(**model_inputs(batch))
                    aim = getattr(aim, "logits", aim)
                gap = (losses.outputs["logits"] - aim).square().sum(-1)
                return losses.with_term("distil", Term(gap, torch.ones_like(gap), 0.3))

            def weight_sums(self, batch: Any) -> dict[str, float]:
                return {**self.inner.weight_sums(batch), "distil": float(len(batch["labels"]))}

        return Distilled(objective, context.load(self.teacher))


@dataclass(frozen=True, kw_only=True)
class MeanTeacher(OnObjective):
    """A moving average of the model that follows surgery and is what is exported."""

    card: ClassVar[Card] = Card(name="mean_teacher", title="toy", claims=("export.source",))
    rate: float = 0.2

    def shape(self, objective: Objective, model: nn.Module, context: Any) -> Objective:
        rate = self.rate

        class Averaged(Shaped):
            def __init__(self, inner: Objective, model: nn.Module) -> None:
                super().__init__(inner)
                self.teacher = still(copy.deepcopy(model))
                self.student = [model]

            def after_update(self, model: nn.Module, step: Any) -> None:
                for mine, theirs in zip(self.teacher.parameters(), model.parameters(), strict=True):
                    mine.lerp_(theirs.to(mine.dtype), rate)
                super().after_update(model, step)

            def replaced(self, old: nn.Parameter, new: nn.Parameter) -> None:
                for name, parameter in self.student[0].named_parameters():
                    if parameter is new:
                        path, _, leaf = name.rpartition(".")
                        module = self.teacher.get_submodule(path)
                        module._parameters[leaf] = nn.Parameter(
                            new.detach().clone(), requires_grad=False
                        )
                super().replaced(old, new)

            def edited(self, module: str, function: Any) -> None:
                function(self.teacher.get_submodule(module))
                still(self.teacher)
                super().edited(module, function)

            def export_source(self, model: nn.Module) -> nn.Module:
                return self.teacher

        return Averaged(objective, model)


@dataclass(frozen=True, kw_only=True)
class Anchor(OnObjective):
    """A penalty on parameters alone."""

    card: ClassVar[Card] = Card(name="anchor", title="toy")
    strength: float = 0.05

    def shape(self, objective: Objective, model: nn.Module, context: Any) -> Objective:
        strength = self.strength

        class Anchored(Shaped):
            def penalties(self, model: nn.Module, step: Any) -> dict[str, Tensor]:
                size = sum(p.square().sum() for p in model.parameters())
                return {**self.inner.penalties(model, step), "anchor": strength * size}

        return Anchored(objective)
