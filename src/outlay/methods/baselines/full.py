"""Full fine-tuning, by name, so that an arm of a comparison can say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ...core.card import Card
from ...core.claims import Claim
from ...core.errors import NoEffect
from ...core.method import Context, OnModel
from ...nn.targets import blocks, head_modules


@dataclass(frozen=True, kw_only=True)
class Full(OnModel):
    """Full fine-tuning: every parameter trains, or every parameter of some layers.

    Attributes:
        layers_to_transform: Indices of the repeated blocks that train; None means everything.
    """

    card: ClassVar[Card] = Card(
        name="full",
        title="Full fine-tuning: every parameter trains",
        group="baselines",
        summary="Train every parameter, or every parameter of the named layers.",
        claims=("base.trained",),
        freezes_base=True,
    )
    layers_to_transform: tuple[int, ...] | None = None

    def adapt(self, model: nn.Module, context: Context | None = None) -> nn.Module:
        """Set what trains; nothing is added."""
        keep = set(self.trains(model))
        heads = head_modules(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in keep or name.split(".")[0] in heads)
        return model

    def claims(self, model: nn.Module | None) -> list[Claim]:
        """The parameters that train: others may be named beside them."""
        return [Claim("base.trained", frozenset(() if model is None else self.trains(model)))]

    def trains(self, model: nn.Module) -> tuple[str, ...]:
        """All parameters, or those of the named layers.

        Raises:
            NoEffect: If the model has no such layers.
        """
        names = [name for name, _ in model.named_parameters()]
        if self.layers_to_transform is None:
            return tuple(names)
        stack = blocks(model)
        depth = len(stack[1]) if stack else 0
        if stack is None or any(not -depth <= layer < depth for layer in self.layers_to_transform):
            raise NoEffect(
                f"full.layers_to_transform = {self.layers_to_transform}: "
                f"{type(model).__name__} has {depth} layers",
                "give indices that exist, or leave it out",
            )
        prefixes = tuple(f"{stack[0]}.{layer % depth}." for layer in self.layers_to_transform)
        return tuple(name for name in names if name.startswith(prefixes))
