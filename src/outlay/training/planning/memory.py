"""Bytes that are alive: counted on fake or real tensors, measured, and free on the machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backend import OneDevice


class LiveBytes(TorchDispatchMode):
    """Running and largest sum of the storages that are alive, each counted once.

    Attributes:
        now: Bytes alive.
        peak: Largest value of `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def hold(self, *tensors: Tensor) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in self._alive:
                self._alive[reference.cdata] = (reference, storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        gone = [key for key, (reference, _) in self._alive.items() if reference.expired()]
        for key in gone:
            self.now -= self._alive.pop(key)[1]
        self.hold(*(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)))
        return out


def measured_peak(work: Callable[[], None], backend: OneDevice, held: Iterable[Tensor]) -> int:
    """Peak bytes of some work.

    CUDA: the allocator's peak. CPU: bytes of the tensors held plus the largest running sum of
    the profiler's memory events.

    Args:
        work: Takes one step.
        backend: The machine.
        held: Tensors that live before and after the work.
    """
    if backend.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return backend.peak_bytes()
    from torch.profiler import ProfilerActivity, profile

    resident = LiveBytes()
    resident.hold(*held)
    with (
        _quiet_descriptors(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        work()
    running = largest = 0
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            running += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            largest = max(largest, running)
    return resident.now + largest


@contextlib.contextmanager
def _quiet_descriptors() -> Iterator[None]:
    """Swallow what the profiler's own library prints past Python."""
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for stream, _ in kept:
            os.dup2(nowhere.fileno(), stream)
        try:
            yield
        finally:
            for stream, copy in kept:
                os.dup2(copy, stream)
                os.close(copy)


def free_bytes(backend: OneDevice) -> int:
    """Memory that is free on the device now."""
    if backend.device.type == "cuda":
        return int(torch.cuda.mem_get_info(backend.device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
