"""The method base that puts low-rank layers in the place of linear ones, and plain ones back."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Len
from torch import nn

from ..core.claims import Claim
from ..core.errors import Conflict
from ..core.method import Context, Method, seed_of
from .adapted import leave_fast_path, swap
from .sparse_low_rank import LowRankLinear
from .targets import ATTENTION_AND_MLP, is_conv1d, match_modules, weight_of


@dataclass(frozen=True, kw_only=True)
class ReplacingMethod(Method):
    """What methods share that train other parameters in the place of weights, from scratch.

    A subclass also inherits `OnModel`, and writes `make`. Nothing is frozen; what the replaced
    weights had learned is lost, which a warning says where the model was loaded.

    Attributes:
        target_modules: As in `nn.targets.match_modules`. By default every linear layer with
            attn, attention or mlp in its path: embeddings, norms and the head stay.
    """

    target_modules: str | Annotated[tuple[str, ...], Len(1)] | list[str] = ATTENTION_AND_MLP

    @abstractmethod
    def make(self, name: str, layer: nn.Module, **about: Any) -> LowRankLinear:
        """The layer that stands for a plain one.

        Args:
            name: Path of the plain layer.
            layer: The plain layer.
            about: in_features, out_features, bias, seed, device and dtype, for the constructor.
        """

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """Plain layers that are replaced, by path."""
        return match_modules(model, self.target_modules)

    def claims(self, model: nn.Module | None) -> list[Claim]:
        """The card's words, on the weights of the matched layers."""
        if model is None:
            return [Claim(word) for word in self.card.claims]
        names = frozenset(f"{name}.weight" for name in self.targets(model))
        return [Claim(word, names) for word in self.card.claims]

    def adapt(self, model: nn.Module, context: Context | None = None) -> nn.Module:
        """Replace the matched layers in place; each is drawn from (seed, path).

        Raises:
            NoEffect: If no module matches.
            Conflict: If a matched weight is tied to another layer's.
        """
        targets, name = self.targets(model), self.card.name
        _refuse_ties(name, model, targets)
        _say_what_is_lost(name, model)
        seed = 0 if context is None else context.seed
        small = dense = 0
        for path, layer in targets.items():
            weight, bias = weight_of(layer), getattr(layer, "bias", None)
            turned = is_conv1d(layer)
            made = self.make(
                path,
                layer,
                in_features=weight.shape[0 if turned else 1],
                out_features=weight.shape[1 if turned else 0],
                bias=bias is not None,
                seed=seed_of(seed, name, path),
                device=weight.device,
                dtype=weight.dtype,
            )
            made.conv1d = turned
            small += sum(p.numel() for p in made.parameters())
            dense += sum(p.numel() for p in layer.parameters())
            model = swap(model, layer, made.train(layer.training))
        leave_fast_path(model)
        if small >= dense:
            warnings.warn(
                f"{self.spec()} holds {small:,} parameters in the place of {dense:,}: nothing is "
                "saved; lower the rank",
                stacklevel=2,
            )
        return model

    def export(self, model: nn.Module) -> nn.Module:
        """Form every weight and put plain layers back, of the kind that was there."""
        for layer in [m for m in model.modules() if isinstance(m, LowRankLinear)]:
            plain = layer.merge()
            model = swap(model, layer, _as_conv1d(plain) if layer.conv1d else plain)
        return model


def _refuse_ties(name: str, model: nn.Module, targets: dict[str, nn.Module]) -> None:
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    tied = [path for path, layer in targets.items() if len(holders[id(layer.weight)]) > 1]
    if tied:
        raise Conflict(
            f"{name!r} would replace the weight of {tied[0]!r}, which is tied to another layer's",
            "untie them, or leave it out of target_modules",
        )


def _say_what_is_lost(name: str, model: nn.Module) -> None:
    """A model that was loaded knows its folder; one from scratch does not."""
    folder = getattr(getattr(model, "config", None), "_name_or_path", "")
    if folder:
        warnings.warn(
            f"{name!r} trains from scratch: the weights that it replaces in the model of "
            f"{folder!r} start anew",
            stacklevel=3,
        )


def _as_conv1d(plain: nn.Linear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        layer = Conv1D(plain.out_features, plain.in_features)
    layer.weight = nn.Parameter(plain.weight.detach().T.contiguous())
    layer.bias = plain.bias
    return layer.train(plain.training)
