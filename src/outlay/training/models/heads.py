"""The task's head: fresh weights, classes in another order, and the unit of real targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.method import generator_of
from ...nn.targets import head_modules
from ..data.labels import Labels


def fresh_parameters(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Draw parameters that a folder lacked, each from (seed, name).

    Matrices are normal with the config's initializer range (1 / sqrt(inputs) where it names
    none), biases 0, norm weights 1.
    """
    wanted = set(names)
    spread = getattr(getattr(model, "config", None), "initializer_range", None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in wanted:
                continue
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = spread or parameter[0].numel() ** -0.5
            draw = generator_of(seed, "parameter", name)
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float32)
            parameter.copy_(std * noise)


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The head's last linear layer, which gives the logits."""
    found = None
    for name in head_modules(model):
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                found = module
    return found


def fit_head(
    model: nn.Module,
    task: str,
    labels: Labels,
    saved: Mapping[Any, str],
    fresh: set[str],
    seed: int,
) -> None:
    """Make a loaded head mean what the labels say.

    A head of the same classes in another order is reordered; one of other classes starts
    afresh; one of real targets is divided by their scale, as `save_model` multiplied it.
    """
    layer = output_layer(model)
    if layer is None or not labels.names:
        return
    path = next(name for name, module in model.named_modules() if module is layer)
    if f"{path}.weight" in fresh:
        start_at_mean(model, labels)
        return
    if task == "regression":
        scale_head(model, [1.0 / s for s in labels.scale])
        return
    names = [saved[key] for key in sorted(saved, key=int)]
    if sorted(names) != sorted(labels.names):
        fresh_parameters(model, {f"{path}.weight", f"{path}.bias"}, seed)
    elif tuple(names) != labels.names:
        order = torch.tensor([names.index(name) for name in labels.names])
        with torch.no_grad():
            layer.weight.copy_(layer.weight[order])
            if layer.bias is not None:
                layer.bias.copy_(layer.bias[order])


def start_at_mean(model: nn.Module, labels: Labels) -> None:
    """Let a fresh regression head predict the targets' mean, where it has a bias."""
    layer = output_layer(model)
    if labels.scale and layer is not None and layer.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(torch.tensor(labels.mean) / torch.tensor(labels.scale))


def scale_head(model: nn.Module, factors: Iterable[float]) -> None:
    """Multiply each output of the head by its factor, in place."""
    layer = output_layer(model)
    factors = list(factors)
    if layer is None or not factors:
        return
    column: Tensor = torch.tensor(factors, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_((layer.weight.double() * column[:, None]).to(layer.weight.dtype))
        if layer.bias is not None:
            layer.bias.copy_((layer.bias.double() * column).to(layer.bias.dtype))
