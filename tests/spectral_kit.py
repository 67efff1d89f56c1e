"""What the tests of spectral adapters share."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class EightBit(Tensor):
    """Whole numbers that know their step, as quantization libraries store weights."""

    step: float

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor).float() * self.step


class Quantized(nn.Linear):
    """A linear layer over an 8-bit weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.exact = layer.weight.detach().clone()
        step = float(self.exact.abs().max()) / 127
        store = (self.exact / step).round().to(torch.int8).as_subclass(EightBit)
        store.step = step
        self.weight = nn.Parameter(store, requires_grad=False)
        self.weight.step = step
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.dequantize().to(x.dtype), self.bias)


def saved_by(function, *arguments):
    """A function's value, and the tensors that autograd keeps for its backward pass."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = function(*arguments)
    return value, kept


def unchecked(cls: type, **settings):
    """Make a settings object past the run-time type checker of the tests, as users do."""
    made = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(made, field.name, settings.get(field.name, field.default))
    made.__post_init__()
    return made
