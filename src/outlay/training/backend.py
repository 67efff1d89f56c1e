"""The seam to the machine: place, autocast, backward, clip. One device here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, MissingExtra
from ..core.losses import Batch
from ..nn.placement import moved


class OneDevice:
    """CPU, CUDA or MPS, in one process.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps" or "auto".
        precision: "float32", "float64" or "bfloat16" (compute; weights stay float32).

    Raises:
        ConfigError: If the device does not exist here.
    """

    rank, world = 0, 1

    def __init__(self, device: str = "auto", precision: str = "float32") -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise ConfigError(
                f"unknown device {device!r}", "use cpu, cuda, cuda:N or mps"
            ) from None
        absent = (self.device.type == "cuda" and not torch.cuda.is_available()) or (
            self.device.type == "mps" and not torch.backends.mps.is_available()
        )
        if absent:
            raise MissingExtra(f"there is no {device!r} device here", "use --device cpu")
        self.precision = precision
        self.dtype = torch.float64 if precision == "float64" else torch.float32

    def place(self, thing: Any) -> Any:
        """Move a module, a tensor or every tensor of a batch to the device."""
        if isinstance(thing, nn.Module):
            return moved(thing, self.device, self.dtype)
        if isinstance(thing, Tensor):
            floating = thing.is_floating_point()
            return thing.to(self.device, self.dtype if floating else thing.dtype)
        if isinstance(thing, Mapping):
            return {key: self.place(value) for key, value in thing.items()}
        return thing

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 compute where the recipe asks for it."""
        if self.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        if loss.requires_grad:
            loss.backward()

    def seed(self, value: int) -> None:
        """Seed torch's default generators that this machine uses, and no other's."""
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(value)
        elif self.device.type == "mps":
            torch.mps.manual_seed(value)

    def norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Norm over gradients, added in the order given."""
        found = list(gradients)
        return torch.nn.utils.get_total_norm(found) if found else torch.zeros(())

    def clip(self, parameters: list[nn.Parameter], largest: float, norm: Tensor) -> None:
        """Scale gradients whose norm is `norm` down to a norm of at most `largest`."""
        if parameters:
            torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks: there is one."""
        return tensor

    def all_gather(self, rows: Any) -> Any:
        """Rows of all ranks: there is one."""
        return rows

    def rng_devices(self) -> list[torch.device]:
        """Devices beside the CPU whose generators must be kept from the caller's."""
        return [self.device] if self.device.type == "cuda" else []

    def peak_bytes(self) -> int:
        """Peak of CUDA's allocator; 0 elsewhere."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.max_memory_allocated(self.device)


def batch_key(batch: Batch) -> tuple[Any, ...]:
    """Shapes of a batch: what FLOPs depend on."""
    return tuple(
        (key, tuple(value.shape)) for key, value in batch.items() if isinstance(value, Tensor)
    )
