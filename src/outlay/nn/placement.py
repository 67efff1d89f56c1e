"""Moving modules only if they are elsewhere, and moving those that hold fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def moved(module: ModuleType, device: torch.device, dtype: torch.dtype | None = None) -> ModuleType:
    """The module on a device, floating-point tensors in a dtype; untouched if it is there.

    Args:
        module: Moved in place.
        device: Where to.
        dtype: Of floating-point tensors; None keeps theirs.
    """
    there = all(
        tensor.device.type == device.type
        and device.index in (None, tensor.device.index)
        and (dtype is None or tensor.dtype == dtype or not tensor.is_floating_point())
        for tensor in (*module.parameters(), *module.buffers())
    )
    return module if there else module.to(device, dtype)


@contextlib.contextmanager
def fakes_move() -> Iterator[None]:
    """Let `Module.to` work on fake tensors, which torch 2.13 refuses to swap; ties are kept."""
    done: dict[tuple[int, int], tuple[nn.Parameter, Any]] = {}
    original = nn.Module._apply

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        held = {n: p for n, p in self._parameters.items() if p is not None}
        if not any(isinstance(p, FakeTensor) for p in held.values()):
            return original(self, fn, recurse)
        for child in self.children() if recurse else ():
            child._apply(fn)
        for name, parameter in held.items():
            key = (id(fn), id(parameter))
            if key not in done:
                with torch.no_grad():
                    value = fn(parameter)
                if value is not parameter:
                    value = nn.Parameter(value, parameter.requires_grad)
                # What the ids belong to stays alive, so that they are not given again.
                done[key] = (value, (fn, parameter))
            self._parameters[name] = done[key][0]
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    nn.Module._apply = apply
    try:
        yield
    finally:
        nn.Module._apply = original
