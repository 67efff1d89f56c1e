"""Moving modules only if they are elsewhere (under fake tensors a needless move fails)."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

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
