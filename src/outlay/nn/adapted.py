"""A layer with adapters around a frozen base layer: switching, merging, looking through.

Shapes: `in` and `out` are the features of the layer, `r` is a rank. A weight is spoken of as
(out, in) whatever the layer stores; the `in` of a convolution counts its kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ConfigError, Conflict, nearest
from .heads import switch_head
from .targets import is_conv1d, is_linear, weight_of

DEFAULT = "default"


def as_matrix(layer: nn.Module) -> Float[Tensor, "out in"]:
    """A layer's weight as (out, in), whatever it stores; a convolution's in counts its kernel."""
    weight = weight_of(layer)
    return weight.T if is_conv1d(layer) else weight.flatten(1)


def apply_weight(
    x: Tensor, layer: nn.Module, weight: Float[Tensor, "out in"], bias: Tensor | None = None
) -> Tensor:
    """What `layer` would answer with another weight and bias.

    Raises:
        Conflict: If the layer is neither linear nor a 2D convolution.
    """
    if is_linear(layer):
        return F.linear(x, weight, bias)
    if not isinstance(layer, nn.Conv2d):
        raise Conflict(
            f"{type(layer).__name__} cannot take an adapter",
            "target nn.Linear, Conv1D or nn.Conv2d layers",
        )
    kernel = weight.reshape(layer.weight.shape)
    return layer._conv_forward(x, kernel, bias)


def delta_dtype(layer: nn.Module) -> torch.dtype:
    """Data type of adapter parameters: float32, or float64 on a float64 base."""
    return torch.float64 if layer.weight.dtype == torch.float64 else torch.float32


def fusable(x: Tensor, base: nn.Module) -> bool:
    """True where a hand-written gradient through `base` may stand in for autograd's.

    That is: a plain, frozen, unhooked linear layer, no autocast and no function transform.
    """
    # Asked by every layer in every step: exact types and plain loops.
    if type(base) is not nn.Linear and not is_conv1d(base):
        return False
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        return False
    if base._backward_pre_hooks or base._modules:
        return False
    for parameter in base._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return False
    return not (
        torch.is_autocast_enabled(x.device.type) or torch._C._are_functorch_transforms_active()
    )


class Delta(nn.Module):
    """What one adapter adds to one layer.

    A subclass writes `weight`; `forward` and `output` have defaults that it overrides to be
    fast. A delta always speaks about the frozen base weight, so several of them on one layer
    add up whatever their order.

    Attributes:
        multiplicative: True if the delta depends on the base weight's value.
    """

    multiplicative = False

    def forward(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """What is added to `base(x)`."""
        plain = plain_layer(base)
        return apply_weight(x, plain, self.weight(as_matrix(plain)).to(x.dtype))

    def output(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """`base(x)` and what is added to it, in the base's dtype; override to fuse both."""
        out = base(x)
        return (out + self(x, base)).to(out.dtype)

    def weight(self, base: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The delta as a weight, given the base weight."""
        raise NotImplementedError

    def to_lora(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]] | None:
        """(A, B) with `weight == B @ A` exactly, or None where the delta is not low-rank."""
        return None

    def peft_tensors(self) -> dict[str, Tensor]:
        """Tensors by their names in PEFT's files, where the method is one of PEFT's."""
        return {}

    def load_peft_tensors(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
    ) -> None:
        """Take over what `peft_tensors` gave.

        Args:
            tensors: Tensors of this layer by their names in PEFT's files.
            config: PEFT's config.
            name: Path of the layer.
        """
        raise NotImplementedError


def plain_layer(layer: nn.Module) -> nn.Module:
    """The innermost base layer below any wrappers, outlay's or PEFT's."""
    while isinstance(inner := layer._modules.get("base_layer"), nn.Module):
        layer = inner
    return layer


class AdaptedLayer(nn.Module):
    """A linear layer (or `Conv1D`, or convolution) with named adapters.

    Attributes:
        base_layer: The frozen layer.
        deltas: Adapters by name.
        active: Names of the adapters that act, in order.
        merged: Names whose delta is folded into the base weight.
        methods: What made each delta, None where it came from elsewhere.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.deltas = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.methods: dict[str, Any] = {}
        # In a list, so that it is not registered: it is not part of the state.
        self._kept: list[nn.Parameter] = []

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
        return as_matrix(plain_layer(self.base_layer))

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus what the active, unmerged adapters add."""
        # Straight from the tables: attribute look-up of modules costs as much as a small kernel.
        base: Any = self._modules["base_layer"]
        deltas: Any = self._modules["deltas"]._modules  # type: ignore[union-attr]
        acting = [deltas[name] for name in self.active if name not in self.merged]
        if not acting:
            return base(x)
        out = acting[0].output(x, base)
        for delta in acting[1:]:
            out = (out + delta(x, base)).to(out.dtype)
        return out

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the active adapters into the base weight, in float32 or wider, rounding once.

        The weight becomes a new parameter, so a tensor tied to the old one stays as it was.
        """
        if set(self.active) <= set(self.merged):
            return
        layer = plain_layer(self.base_layer)
        if not self._kept:
            self._kept = [layer.weight]  # type: ignore[list-item]
        stored = self._kept[0]
        frozen = stored.T if is_conv1d(layer) else stored.flatten(1)
        wide = frozen.to(delta_dtype(layer))
        names = tuple(dict.fromkeys((*self.merged, *self.active)))
        total = wide
        for name in names:
            total = total + self.deltas[name].weight(wide)  # type: ignore[operator]
        total = total.T if is_conv1d(layer) else total.reshape(stored.shape)
        layer.weight = nn.Parameter(
            total.to(stored.dtype).contiguous(), requires_grad=stored.requires_grad
        )
        self.merged = names

    def unmerge(self) -> None:
        """Put back the very weight that `merge` set aside."""
        if self._kept:
            layer = plain_layer(self.base_layer)
            kept = self._kept.pop()
            kept.data = kept.data.to(weight_of(layer).device)
            layer.weight = kept
        self.merged = ()


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """All adapted layers by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of all adapters in a model."""
    return tuple(dict.fromkeys(n for m in adapted_layers(model).values() for n in m.deltas))


def set_adapter(model: nn.Module, *names: str) -> None:
    """Let the named adapters act, in this order, and no others; merged ones are unmerged first.

    Modules that were loaded with an adapter (its head) come with it: those of the last name.

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
        layer.unmerge()
        layer.active = tuple(name for name in names if name in layer.deltas)
    switch_head(model, names[-1] if names else None)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model answers as its base does, even where adapters were merged.

    A head that was loaded with an adapter gives way to the base's; one trained in place stays.
    """
    layers = list(adapted_layers(model).values())
    before = [(layer, layer.active, bool(layer.merged)) for layer in layers]
    theirs = [m for m in model.modules() if hasattr(m, "_disable_adapters") and wraps(m)]
    switches = [(m, m._disable_adapters) for m in theirs]
    head: str | None = None
    try:
        for layer in layers:
            layer.unmerge()
            layer.active = ()
        for module in theirs:
            module._disable_adapters = True  # type: ignore[assignment]
        head = switch_head(model, None)
        yield model
    finally:
        switch_head(model, head)
        for module, off in switches:
            module._disable_adapters = off
        for layer, active, merged in before:
            layer.active = active
            if merged:
                layer.merge()


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


def unwrap_adapters(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Merge, then put plain base layers back where adapted layers stood.

    Args:
        model: The adapted model; changed in place.
        adapter_name: Only layers that have this adapter; None takes all.

    Returns:
        The model (the bare layer if the model itself was one adapted layer).
    """
    for layer in adapted_layers(model).values():
        if adapter_name is None or adapter_name in layer.deltas:
            layer.merge()
            model = swap(model, layer, layer.base_layer)
    untie(model)
    return model


def swap(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put one module in another's place everywhere it is registered; returns the model."""
    for parent in list(model.modules()):
        if parent is not new and parent is not old:
            for key, child in parent._modules.items():
                if child is old:
                    parent._modules[key] = new
    return new if model is old else model


def leave_fast_path(model: nn.Module) -> None:
    """Torch's own encoder layers read weights past `forward` in evaluation: make them not."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def untie(model: nn.Module) -> None:
    """Tell the config when a merge has given input and output embeddings different weights."""
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        first = getattr(model, "get_input_embeddings", lambda: None)()
        last = getattr(model, "get_output_embeddings", lambda: None)()
        tied = first is None or last is None or first.weight is last.weight
        if not tied:
            config.tie_word_embeddings = False  # type: ignore[union-attr]


def bare(model: nn.Module) -> nn.Module:
    """The model itself, or a view of it in which every wrapper shows as its base layer."""
    wrapped = any(wraps(module) for module in model.modules())
    return _Unwrapped(model) if wrapped else model


class _Unwrapped(nn.Module):
    """A view of an adapted model in which every adapted layer shows as its base layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)
        self.base_model_prefix = getattr(model, "base_model_prefix", "")

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_model"), name)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The model's own: the head is found among them."""
        return self._model.named_children()

    def get_output_embeddings(self) -> nn.Module | None:
        """The plain output embedding, adapted or not."""
        found = getattr(self._model, "get_output_embeddings", lambda: None)()
        return found if found is None else plain_layer(found)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:  # type: ignore[override]
        """Modules by original path, wrappers and what they hold beside the base left out."""
        inside: dict[str, str] = {}
        for path, module in self._model.named_modules():
            parent = next((p for p in _parents(path) if p in inside), None)
            if parent is not None and not f"{path}.".startswith(f"{inside[parent]}."):
                continue
            if wraps(module):
                inside[path] = f"{path}.base_layer" if path else "base_layer"
                continue
            yield original_name(path), module


def _parents(path: str) -> Iterator[str]:
    """Every path above one, the nearest first."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def wraps(module: nn.Module) -> bool:
    """True for outlay's adapted layers and for PEFT's, known by what they are made of."""
    return isinstance(module, AdaptedLayer) or (
        hasattr(module, "adapter_layer_names") and "base_layer" in module._modules
    )


def original_name(path: str) -> str:
    """A path without the `base_layer` steps that wrappers put into it."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def base_device(layer: nn.Module) -> torch.device:
    """Where a layer's weight lies."""
    return layer.weight.device  # type: ignore[union-attr,return-value]
