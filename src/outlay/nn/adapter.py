"""A layer with adapters around a frozen base layer, and the method base that puts them there.

An adapter method writes one `Delta` module (what is added to the layer's output, and the same
as a weight) and `make`, which builds it for one layer. Wrapping, freezing, switching, merging
and export are here, once.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Len
from jaxtyping import Float
from torch import Tensor, nn

from ..core.claims import Claim
from ..core.errors import ConfigError, Conflict, nearest
from ..core.method import Context, Method
from .targets import is_conv1d, linear_shape, match_modules

DEFAULT = "default"


class Delta(nn.Module):
    """What one adapter adds to one layer.

    Attributes:
        multiplicative: True if the delta depends on the base weight's value.
    """

    multiplicative = False

    def forward(
        self, x: Float[Tensor, "*batch in"], base: nn.Module
    ) -> Float[Tensor, "*batch out"]:
        """What is added to `base(x)`."""
        raise NotImplementedError

    def weight(self, base: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The same as a weight, given the base weight."""
        raise NotImplementedError

    def to_lora(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]] | None:
        """(A, B) with `weight == B @ A` exactly, or None where the delta is not low-rank."""
        return None


class AdaptedLayer(nn.Module):
    """A linear layer (or `Conv1D`, or convolution) with named adapters.

    Attributes:
        base_layer: The frozen layer.
        deltas: Adapters by name.
        active: Names of the adapters that act, in order.
        merged: Names whose delta is folded into the base weight.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.deltas = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self._kept: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as stored."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def base_weight(self) -> Float[Tensor, "out in"]:
        """The base weight as (out, in), whatever the layer stores."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight.T if is_conv1d(self.base_layer) else weight.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus what the active, unmerged adapters add."""
        out = self.base_layer(x)
        for name in self.active:
            if name not in self.merged:
                out = out + self.deltas[name](x, self.base_layer)
        return out

    def merge(self) -> None:
        """Fold the active adapters into the base weight, in order, in float32 or wider."""
        for name in self.active:
            if name in self.merged:
                continue
            delta = self.deltas[name]
            assert isinstance(delta, Delta)
            with torch.no_grad():
                if self._kept is None:
                    self._kept = self.base_layer.weight.detach().clone()  # type: ignore[union-attr]
                base = self.base_weight()
                wide = base.double() if base.dtype == torch.float64 else base.float()
                self._write((wide + delta.weight(wide)).to(base.dtype))
            self.merged = (*self.merged, name)

    def unmerge(self) -> None:
        """Restore the base weight bit for bit from the copy kept by `merge`."""
        if self._kept is not None:
            with torch.no_grad():
                self.base_layer.weight.copy_(self._kept)  # type: ignore[union-attr]
        self._kept, self.merged = None, ()

    def _write(self, weight: Tensor) -> None:
        stored = self.base_layer.weight
        assert isinstance(stored, Tensor)
        stored.copy_(weight.T if is_conv1d(self.base_layer) else weight.reshape(stored.shape))


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """All adapted layers by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of all adapters in a model."""
    return tuple(dict.fromkeys(n for m in adapted_layers(model).values() for n in m.deltas))


def set_adapter(model: nn.Module, *names: str) -> None:
    """Let the named adapters act, in this order, and no others.

    Raises:
        ConfigError: If no layer has an adapter of that name.
    """
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"no adapter {name!r}", f"{nearest(name, known)}the model has {', '.join(known)}"
            )
    for layer in adapted_layers(model).values():
        layer.active = tuple(name for name in names if name in layer.deltas)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model answers as its base does."""
    layers = adapted_layers(model)
    active = {name: layer.active for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.active = ()
        yield model
    finally:
        for name, layer in layers.items():
            layer.active = active[name]


def merge_adapters(model: nn.Module) -> nn.Module:
    """Fold every active adapter into its base weight, in place."""
    for layer in adapted_layers(model).values():
        layer.merge()
    return model


def unmerge_adapters(model: nn.Module) -> nn.Module:
    """Undo `merge_adapters` bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unmerge()
    return model


def unwrap_adapters(model: nn.Module) -> nn.Module:
    """Merge, then put plain base layers back where adapted layers stood."""
    merge_adapters(model)
    for path, layer in adapted_layers(model).items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base_layer)
    return model


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(Method):
    """Settings and steps that every adapter shares; a subclass also inherits `OnModel`.

    Attributes:
        target_modules: "all-linear", a regular expression over paths, or names that paths end in.
        layers_to_transform: Indices of the repeated blocks; None means all.
        modules_to_save: Modules that train in full beside the adapter (the task's head always
            does).
        adapter_name: Name under which the deltas stand, for switching.
    """

    target_modules: str | Annotated[tuple[str, ...], Len(1)] = "all-linear"
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    adapter_name: str = DEFAULT

    @abstractmethod
    def make(self, name: str, layer: nn.Module, context: Context | None) -> Delta:
        """The delta of one layer. `layer` is the plain base layer, `name` its path."""

    def kinds(self) -> tuple[type[nn.Module], ...]:
        """Layer types beside linear ones that the method can adapt."""
        return ()

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """Plain layers that the method adapts, by original path."""
        return match_modules(
            bare(model), self.target_modules, self.layers_to_transform, self.kinds()
        )

    def adapt(self, model: nn.Module, context: Context | None = None) -> nn.Module:
        """Wrap the matched layers in place; freeze everything else when called by hand.

        Raises:
            NoEffect: If no module matches.
            Conflict: If a layer already has an adapter of this name.
        """
        if context is None or not context.freezes:
            freeze_base(model, keep=self.trains(model))
        for name, layer in self.targets(model).items():
            path = _path(model, layer, name)
            current = model.get_submodule(path.removesuffix(".base_layer"))
            if not isinstance(current, AdaptedLayer):
                parent, _, leaf = path.rpartition(".")
                current = AdaptedLayer(layer)
                current.train(layer.training)
                setattr(model.get_submodule(parent), leaf, current)
            if self.adapter_name in current.deltas:
                raise Conflict(
                    f"layer {name!r} already has an adapter named {self.adapter_name!r}",
                    "give one of them another adapter_name",
                )
            delta = self.make(name, layer, context)
            current.deltas[self.adapter_name] = delta.to(layer.weight.device)  # type: ignore[arg-type]
            current.active = (*current.active, self.adapter_name)
        return model

    def export(self, model: nn.Module) -> nn.Module:
        """Merge this method's deltas and put plain layers back where nothing else remains."""
        for path, layer in adapted_layers(model).items():
            if self.adapter_name in layer.deltas:
                layer.merge()
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer.base_layer)
        return model

    def deltas(self, model: nn.Module) -> dict[str, Any]:
        """This method's deltas by the original path of their layer."""
        return {
            path.replace(".base_layer", ""): layer.deltas[self.adapter_name]
            for path, layer in adapted_layers(model).items()
            if self.adapter_name in layer.deltas
        }

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


def freeze_base(model: nn.Module, keep: tuple[str, ...] = ()) -> None:
    """Freeze everything but adapters, the task's head and the named parameters."""
    from .targets import head_modules

    heads = head_modules(model)
    for name, parameter in model.named_parameters():
        trains = name in keep or name.split(".")[0] in heads or ".deltas." in name
        parameter.requires_grad_(trains)


def bare(model: nn.Module) -> nn.Module:
    """The model itself; adapted layers are looked through by `targets`."""
    return model if not adapted_layers(model) else _Unwrapped(model)


class _Unwrapped(nn.Module):
    """A view of an adapted model in which every adapted layer shows as its base layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)
        self.base_model_prefix = getattr(model, "base_model_prefix", "")

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_model"), name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:  # type: ignore[override]
        """Modules by original path, wrappers and deltas left out."""
        for name, module in self._model.named_modules():
            if isinstance(module, AdaptedLayer) or ".deltas" in name:
                continue
            yield name.replace(".base_layer", ""), module


def _path(model: nn.Module, layer: nn.Module, name: str) -> str:
    """Current path of a base layer, wrapped or not."""
    for path, module in model.named_modules():
        if module is layer:
            return path
    raise ConfigError(f"layer {name!r} is not in the model", "adapt the model that was matched")


def base_device(layer: nn.Module) -> torch.device:
    """Where a layer's weight lies."""
    return layer.weight.device  # type: ignore[union-attr,return-value]


__all__ = [
    "AdaptedLayer", "AdapterMethod", "Delta", "adapted_layers", "adapter_names",
    "disable_adapters", "freeze_base", "linear_shape", "merge_adapters", "set_adapter",
    "unmerge_adapters", "unwrap_adapters",
]  # fmt: skip
