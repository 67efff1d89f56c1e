"""Train the task's head on a frozen model: what any adapter has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ...core.card import Card
from ...core.method import Context, OnModel
from ...nn.adapter import freeze_base


@dataclass(frozen=True, kw_only=True)
class Probe(OnModel):
    """Linear probe: the pre-trained body is frozen, normalization statistics too.

    Attributes:
        modules_to_save: Modules that train beside the head.
    """

    card: ClassVar[Card] = Card(
        name="probe",
        title="Linear probe: the task's head alone trains",
        group="baselines",
        summary="Train only the task's head on the frozen model.",
        claims=("base.trained", "base.frozen"),
        saves=("trainable parameters", "memory"),
        freezes_base=True,
    )
    modules_to_save: tuple[str, ...] = ()

    def adapt(self, model: nn.Module, context: Context | None = None) -> nn.Module:
        """Freeze the body; nothing is added."""
        if context is None or not context.freezes:
            freeze_base(model, keep=self.trains(model))
        return model

    def trains(self, model: nn.Module) -> tuple[str, ...]:
        """Parameters of `modules_to_save`."""
        return tuple(
            name
            for name, _ in model.named_parameters()
            if any(f".{name}.".find(f".{wanted}.") >= 0 for wanted in self.modules_to_save)
        )
