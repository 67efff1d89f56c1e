"""A small network, fixed gradients for any optimizer, and published optimizers as peers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SHAPES = {"mlp.tall": (24, 10), "attn.wide": (10, 24), "norm": (12,), "head": (16, 12)}


def network(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    """A tall matrix, a wide one, a vector, and a matrix outside attention and mlp."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        for name, shape in SHAPES.items()
    }


def groups(parameters: dict[str, nn.Parameter], **more: Any) -> list[dict[str, Any]]:
    given = {"lr": 0.01, "weight_decay": 0.1} | more
    return [{"params": list(parameters.values()), "names": list(parameters), **given}]


SETTINGS = SimpleNamespace(betas=(0.9, 0.99), eps=1e-6)


def gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    """Fresh gradients of growing size, the same for every optimizer."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (noise * (1 + step % 7)).to(parameter.dtype)


def walked(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: int = 20
) -> dict[str, Tensor]:
    """Values after so many steps."""
    for step in range(steps):
        gradients(parameters, step)
        optimizer.step()
    return {name: p.detach().clone() for name, p in parameters.items()}


def tensor_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors with a dimension in the optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim()
    )


def peer(package: str, module: str) -> Any:
    """A module of a package whose own `__init__` needs a compiled extension for CUDA."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            name = package.replace("_", "-")
            pytest.skip(f"the authors' code is missing: pip install --no-deps {name}")
        sys.modules[package] = bare = types.ModuleType(package)
        bare.__spec__, bare.__path__ = spec, list(spec.submodule_search_locations or ())
    return importlib.import_module(f"{package}.{module}")
