"""The method base that puts adapters into a model and takes them out again.

An adapter method writes one `Delta` module (what is added to a layer's output, and the same as
a weight) and `make`, which builds it for one layer. Finding, wrapping, freezing and export are
here; the layer itself, switching and merging are in `adapted`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Len
from torch import nn

from ..core.claims import Claim
from ..core.errors import ConfigError, Conflict, nearest
from ..core.method import Context, Method
from .adapted import (
    DEFAULT,
    AdaptedLayer,
    Delta,
    adapted_layers,
    adapter_names,
    apply_weight,
    as_matrix,
    bare,
    base_device,
    delta_dtype,
    disable_adapters,
    fusable,
    leave_fast_path,
    merge_adapters,
    original_name,
    plain_layer,
    set_adapter,
    swap,
    unmerge_adapters,
    unwrap_adapters,
    wraps,
)
from .placement import moved
from .targets import head_modules, linear_shape, match_modules


@dataclass(frozen=True, kw_only=True)
class TargetedMethod(Method):
    """What every method has that acts on chosen layers of a frozen model.

    Attributes:
        target_modules: "all-linear", a regular expression over paths, or names that paths end in.
        layers_to_transform: Indices of the repeated blocks; None means all.
        modules_to_save: Modules that train in full beside the adapter (the task's head always
            does).
        adapter_name: Name under which the adapter stands, for switching.
    """

    target_modules: str | Annotated[tuple[str, ...], Len(1)] | list[str] = "all-linear"
    layers_to_transform: tuple[int, ...] | list[int] | None = None
    modules_to_save: tuple[str, ...] | list[str] = ()
    adapter_name: str = DEFAULT

    def kinds(self) -> tuple[type[nn.Module], ...]:
        """Layer types beside linear ones that the method can adapt."""
        return ()

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """Plain layers that the method adapts, by original path."""
        return match_modules(
            bare(model), self.target_modules, self.layers_to_transform, self.kinds()
        )

    def claims(self, model: nn.Module | None) -> list[Claim]:
        """The card's words, on the weights of the matched layers."""
        if model is None:
            return [Claim(word) for word in self.card.claims]
        names = frozenset(f"{name}.weight" for name in self.targets(model))
        return [Claim(word, names) for word in self.card.claims]

    def trains(self, model: nn.Module) -> tuple[str, ...]:
        """Parameters of `modules_to_save`.

        Raises:
            ConfigError: If one of them does not exist.
        """
        names: list[str] = []
        for wanted in self.modules_to_save:
            found = [
                name
                for name, _ in model.named_parameters()
                if f".{name}.".find(f".{wanted}.") >= 0 and "deltas." not in name
            ]
            if not found:
                known = [n for n, _ in model.named_children()]
                raise ConfigError(
                    f"modules_to_save has {wanted!r}, which holds no parameter",
                    f"{nearest(wanted, known)}top-level modules are {', '.join(known)}",
                )
            names += found
        return tuple(names)


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(TargetedMethod):
    """Settings and steps that every adapter shares; a subclass also inherits `OnModel`."""

    @abstractmethod
    def make(self, name: str, layer: nn.Module, context: Context | None) -> Delta:
        """The delta of one layer. `layer` is the plain base layer, `name` its path."""

    def to_peft(
        self, deltas: Mapping[str, Delta], layers: Mapping[str, nn.Module]
    ) -> dict[str, Any] | None:
        """Entries of the PEFT config that means the same, `peft_type` among them, or None.

        Args:
            deltas: This method's deltas by the original path of their layer.
            layers: The plain layers by the same paths; PEFT does not take every kind everywhere.
        """
        return None

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> AdapterMethod | None:
        """The settings that a PEFT config of the same method means, or None."""
        return None

    def adapt(self, model: nn.Module, context: Context | None = None) -> nn.Module:
        """Wrap the matched layers in place; freeze everything else when called by hand.

        Raises:
            NoEffect: If no module matches.
            Conflict: If a layer already has an adapter of this name.
        """
        made = {
            name: self.make(name, layer, context) for name, layer in self.targets(model).items()
        }
        by_hand = context is None or not context.freezes
        if by_hand:
            freeze_base(model, keep=self.trains(model))
        return insert_deltas(model, made, self.adapter_name, self, freeze=by_hand)

    def export(self, model: nn.Module) -> nn.Module:
        """Merge every layer that has this method's delta and put its plain layer back."""
        return unwrap_adapters(model, self.adapter_name)

    def deltas(self, model: nn.Module) -> dict[str, Any]:
        """This method's deltas by the original path of their layer."""
        return {
            original_name(path): layer.deltas[self.adapter_name]
            for path, layer in adapted_layers(model).items()
            if self.adapter_name in layer.deltas
        }


def insert_deltas(
    model: nn.Module,
    deltas: Mapping[str, Delta],
    adapter_name: str = DEFAULT,
    method: Method | None = None,
    freeze: bool = True,
) -> nn.Module:
    """Wrap layers in place and let their deltas act after those that are already there.

    Args:
        model: Adapted already or not.
        deltas: One delta a layer, by the layer's original path.
        adapter_name: Name under which they stand.
        method: What made them; kept beside them so that they can be saved.
        freeze: Freeze the wrapped layers' own parameters.

    Raises:
        Conflict: If a layer already has an adapter of this name.
    """
    wrappers = {
        id(plain_layer(layer.base_layer)): layer for layer in adapted_layers(model).values()
    }
    modules = dict(bare(model).named_modules())
    for name in deltas:
        wrapper = wrappers.get(id(modules[name]))
        if wrapper is not None and adapter_name in wrapper.deltas:
            there, new = (
                "" if owner is None else f"{owner.card.name!r} "
                for owner in (wrapper.methods.get(adapter_name), method)
            )
            raise Conflict(
                f"layer {name!r} already has an adapter {there}named {adapter_name!r}, and "
                f"another {new}takes that name",
                "give one of them another adapter_name",
            )
    for name, delta in deltas.items():
        layer = modules[name]
        wrapper = wrappers.get(id(layer))
        if wrapper is None:
            wrapper = wrappers[id(layer)] = AdaptedLayer(layer)
            wrapper.train(layer.training)
            model = swap(model, layer, wrapper)
        if freeze:
            layer.requires_grad_(False)
        wrapper.unmerge()
        wrapper.deltas[adapter_name] = moved(delta, base_device(layer)).train(layer.training)
        wrapper.methods[adapter_name] = method
        wrapper.active = (*wrapper.active, adapter_name)
    leave_fast_path(model)
    return model


def freeze_base(model: nn.Module, keep: tuple[str, ...] = ()) -> None:
    """Freeze everything but adapters, the task's head and the named parameters."""
    heads = head_modules(model)
    for name, parameter in model.named_parameters():
        trains = name in keep or name.split(".")[0] in heads or ".deltas." in f".{name}"
        parameter.requires_grad_(trains)


__all__ = [
    "AdaptedLayer", "AdapterMethod", "Delta", "TargetedMethod", "adapted_layers",
    "adapter_names", "apply_weight",
    "as_matrix", "bare", "base_device", "delta_dtype", "disable_adapters", "freeze_base",
    "fusable", "insert_deltas", "linear_shape", "merge_adapters", "original_name",
    "plain_layer", "set_adapter", "unmerge_adapters", "unwrap_adapters", "wraps",
]  # fmt: skip
