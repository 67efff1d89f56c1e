"""Which modules of a model a method acts on, in PEFT's words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..core.errors import ConfigError, Conflict, NoEffect, nearest

ALL_LINEAR = "all-linear"

# What pre-training with small weights or small moments acts on: embeddings, norms and head stay.
ATTENTION_AND_MLP = r"(?i).*(attn|attention|mlp).*"


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' `Conv1D` (GPT-2), whose weight is stored as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear` and transformers' `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the top-level children outside the pre-trained body: the task's head.

    A transformers model names its body in `base_model_prefix`; a model without that attribute
    has no head. A language model's output embedding is pre-trained, so it is no head either.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix):
        return ()
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return tuple(
        name
        for name, child in model.named_children()
        if name != prefix
        and next(child.parameters(), None) is not None
        and not any(module is output for module in child.modules())
    )


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Path and list of the model's repeated blocks: the `ModuleList` with most parameters."""
    lists = [
        (sum(p.numel() for p in module.parameters()), -len(name), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        return None
    *_, name, module = max(lists, key=lambda item: item[:2])
    return name, module


def match_modules(
    model: nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    layers_to_transform: Sequence[int] | None = None,
    kinds: tuple[type[nn.Module], ...] = (),
) -> dict[str, nn.Module]:
    """Modules that a method acts on.

    Args:
        model: The original model.
        target_modules: "all-linear" (every linear layer outside the head and the output
            embedding; in a model without any, every convolution that `kinds` allows), a regular
            expression over the whole path, or names that a path ends in.
        layers_to_transform: Indices of the repeated blocks to keep; negative ones count from
            the end; None keeps everything.
        kinds: Module types beside linear layers that the method can adapt.

    Returns:
        Modules by path, in model order.

    Raises:
        NoEffect: If nothing matches, naming the nearest module names.
        ConfigError: If a layer index is out of range or the expression is broken.
    """
    head = head_modules(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    modules = dict(model.named_modules())
    # Torch's own attention reads the weight of its output projection and never calls it.
    past = {f"{n}.out_proj" for n, m in modules.items() if isinstance(m, nn.MultiheadAttention)}
    fits = {
        name: module
        for name, module in modules.items()
        if (is_linear(module) or isinstance(module, kinds)) and name not in past
    }
    if target_modules == ALL_LINEAR:
        body = {n: m for n, m in fits.items() if n.split(".")[0] not in head and m is not output}
        found = {n: m for n, m in body.items() if is_linear(m)} or body
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ConfigError(
                f"target_modules = {target_modules!r} is not a regular expression ({error})",
                'give an expression, a list of names, or "all-linear"',
            ) from None
        found = {n: m for n, m in fits.items() if pattern.fullmatch(n)}
    else:
        found = {
            n: m
            for n, m in fits.items()
            if any(n == t or n.endswith("." + t) for t in target_modules)
        }
    if layers_to_transform is not None:
        found = _in_layers(model, found, layers_to_transform)
    if not found:
        leaves = sorted({name.rpartition(".")[2] for name in fits})
        wanted = target_modules if isinstance(target_modules, str) else ", ".join(target_modules)
        raise NoEffect(
            f"target_modules = {wanted!r} matches no layer of {type(model).__name__} that can "
            "be adapted",
            f"{nearest(str(wanted), leaves)}it has {', '.join(leaves[:12]) or 'none'}",
        )
    return found


def pattern_value(
    pattern: Sequence[tuple[str, Any]] | Mapping[str, Any], name: str, default: Any
) -> Any:
    """The value that a pattern (PEFT's `rank_pattern`) gives to a path.

    Args:
        pattern: Value by regular expression or name that the path ends in; the first that fits
            decides.
        name: Path of a module.
        default: Value where none fits.
    """
    for key, value in pattern.items() if isinstance(pattern, Mapping) else pattern:
        if re.fullmatch(rf"(.*\.)?({key})", name):
            return value
    return default


def _in_layers(
    model: nn.Module, found: dict[str, nn.Module], layers: Sequence[int]
) -> dict[str, nn.Module]:
    stack = blocks(model)
    if stack is None:
        raise ConfigError(
            f"layers_to_transform = {tuple(layers)}: {type(model).__name__} has no list of layers",
            "leave layers_to_transform out",
        )
    path, modules = stack
    depth = len(modules)
    for layer in layers:
        if not -depth <= layer < depth:
            raise ConfigError(
                f"layers_to_transform has {layer}, the model has {depth} layers",
                f"give indices from {-depth} to {depth - 1}",
            )
    prefixes = tuple(f"{path}.{layer % depth}." for layer in layers)
    return {name: module for name, module in found.items() if name.startswith(prefixes)}


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer, as stored.

    Raises:
        Conflict: If it is packed (a quantized layer): adapters here need the plain numbers.
    """
    weight = module.weight
    assert isinstance(weight, Tensor), f"{type(module).__name__} has no weight"
    if not weight.is_floating_point():
        raise Conflict(
            f"the weight of a {type(module).__name__} is quantized ({weight.dtype})",
            "load the base model in float32 or bfloat16",
        )
    return weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear-like layer; a convolution counts in * kernel height * width."""
    weight = weight_of(module)
    if is_conv1d(module):
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight[0].numel()
