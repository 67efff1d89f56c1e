"""Decompositions of weights made once and cached, their energies, and weights read as matrices."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.errors import ConfigError, Conflict
from .adapted import as_matrix
from .decomposition import Decomposition, decompose, fingerprint, hollow, iterates
from .targets import is_conv1d

_FORMAT = "1"


def float_matrix(layer: nn.Module, name: str = "the layer") -> Float[Tensor, "out in"]:
    """A layer's weight as a floating-point matrix (out, in); a quantized one is dequantized.

    Raises:
        Conflict: If the weight is neither floating-point nor knows how to dequantize itself, or
            the layer is a grouped convolution, whose matrix has no low-rank neighbour.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if getattr(layer, "groups", 1) != 1:
        raise Conflict(
            f"{name!r} is a convolution in {layer.groups} groups",
            "leave it out of target_modules: spectral adapters need groups=1",
        )
    if not is_quantized(layer):
        return as_matrix(layer)
    own = getattr(type(weight), "dequantize", None)
    if not weight.is_quantized and own in (None, Tensor.dequantize, nn.Parameter.dequantize):
        raise Conflict(
            f"the weight of {name!r} is stored as {str(weight.dtype).removeprefix('torch.')} and "
            "cannot be read as numbers",
            "leave it out of target_modules, or load the model unquantized",
        )
    wide = weight.dequantize()
    return wide.T if is_conv1d(layer) else wide.flatten(1)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix, quantized or not."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    first, rest = weight.shape[0], weight.shape[1:].numel()
    return (rest, first) if is_conv1d(layer) else (first, rest)


def is_quantized(layer: nn.Module) -> bool:
    """True if a layer's weight is stored as anything but plain floating-point numbers."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.is_quantized or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2


class SvdCache:
    """One decomposition a weight, in memory and, if a folder is given, on disk.

    Entries are keyed by the weight's content, so a changed weight is another entry. Files are
    safetensors, written atomically; one that cannot be read is made again.

    Args:
        folder: Where decompositions are kept between processes; None keeps them in memory alone.
        limit_bytes: Memory for entries; the least recently used ones go first.

    Attributes:
        hits: Decompositions answered from memory.
        loaded: Decompositions read from disk.
        made: Decompositions computed.
    """

    def __init__(self, folder: str | Path | None = None, limit_bytes: int = 1 << 28) -> None:
        self.folder = Path(folder) if folder else None
        self.limit_bytes = limit_bytes
        self.hits = self.loaded = self.made = 0
        self._entries: OrderedDict[str, Decomposition] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self, weight: Float[Tensor, "out in"], rank: int | None = None, name: str = "the weight"
    ) -> Decomposition:
        """The decomposition of a weight; tensors are shared, so copy before writing.

        Args:
            weight: A floating-point matrix.
            rank: Leading triplets needed; more may come back. None means all.
            name: How errors name the weight.
        """
        if hollow(weight):
            return decompose(weight, rank, name)
        whole = not iterates(weight.shape, rank)
        wide = "float64" if weight.dtype == torch.float64 else "float32"
        mark = fingerprint(weight)
        key = f"{mark}-{wide}-{'all' if whole else rank}-{_FORMAT}"
        with self._lock:
            for known in (f"{mark}-{wide}-all-{_FORMAT}", key):
                if known in self._entries:
                    self._entries.move_to_end(known)
                    self.hits += 1
                    return _moved(self._entries[known], weight.device)
        found = self._read(key, mark)
        if found is None:
            found = decompose(weight, None if whole else rank, name, mark=mark)
            self.made += 1
            self._write(key, found)
        else:
            self.loaded += 1
        with self._lock:
            self._entries[key] = found
            while len(self._entries) > 1 and self._bytes() > self.limit_bytes:
                self._entries.popitem(last=False)
        return _moved(found, weight.device)

    def clear(self) -> None:
        """Forget what is in memory; files stay."""
        with self._lock:
            self._entries.clear()

    def _bytes(self) -> int:
        return sum(entry.nbytes() for entry in self._entries.values())

    def _read(self, key: str, mark: str) -> Decomposition | None:
        from safetensors import SafetensorError, safe_open

        if self.folder is None:
            return None
        try:
            with safe_open(self.folder / f"{key}.safetensors", framework="pt") as file:
                facts = file.metadata() or {}
                u, s, vh = (file.get_tensor(part) for part in ("u", "s", "vh"))
            energy, exact = float(facts["energy"]), facts["exact"] == "True"
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return Decomposition(u, s, vh, energy, mark, exact)

    def _write(self, key: str, found: Decomposition) -> None:
        from safetensors.torch import save_file

        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{key}.{os.getpid()}.{threading.get_ident()}.part"
        tensors = {"u": found.u.cpu(), "s": found.s.cpu(), "vh": found.vh.cpu()}
        save_file(tensors, part, {"energy": repr(found.energy), "exact": str(found.exact)})
        os.replace(part, self.folder / f"{key}.safetensors")


def _moved(found: Decomposition, device: torch.device) -> Decomposition:
    if found.u.device == device:
        return found
    u, s, vh = (t.to(device) for t in (found.u, found.s, found.vh))
    return Decomposition(u, s, vh, found.energy, found.fingerprint, found.exact)


_SHARED: dict[str, SvdCache] = {}


def shared_cache() -> SvdCache:
    """The process's one cache; its folder is the environment variable OUTLAY_SVD_CACHE, if set."""
    folder = os.environ.get("OUTLAY_SVD_CACHE", "")
    return _SHARED.setdefault(folder, SvdCache(folder or None))


def energies(s: Float[Tensor, " k"], total: float | None = None) -> Float[Tensor, " k"]:
    r"""Share of the squared energy in the leading directions: $\sum_{i \le k} \sigma_i^2$ / total.

    Args:
        s: Singular values, decreasing.
        total: Sum of all squares, where `s` holds the leading values only.

    Returns:
        Rising values up to 1, in float64; ones for a zero weight, which no direction improves.
    """
    squares = s.double().square()
    whole = float(squares.sum()) if total is None else total
    return squares.cumsum(0) / whole if whole > 0 else torch.ones_like(squares)


def spectral_energy(
    weight: Float[Tensor, "out in"], name: str = "the weight"
) -> Float[Tensor, " k"]:
    r"""Normalized energy E(k) of a weight's k leading directions, from its spectrum alone.

    "Normalized spectrum analysis" of arXiv 2406.12832, and a reading of "information kept" in
    arXiv 2409.05926, which does not define it.

    Args:
        weight: A floating-point matrix.
        name: How errors name it.
    """
    return energies(shared_cache().get(weight, None, name).s)


def energy_rank(s: Float[Tensor, " k"], share: float, total: float | None = None) -> int:
    """Smallest number of leading directions that hold a share of the squared energy.

    Args:
        s: Singular values, decreasing; of a hollow tensor the answer is the bound len(s).
        share: Wanted share in (0, 1].
        total: Sum of all squares, where `s` holds the leading values only.

    Raises:
        ConfigError: If the share is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"energy share {share} is not allowed", "give a share in (0, 1]")
    if hollow(s):
        return len(s)
    # A share of 1 must not fail on the last bit of the sum.
    enough = energies(s, total) >= share - 1e-12
    return int(enough.nonzero()[0]) + 1 if bool(enough.any()) else len(s)


__all__ = [
    "Decomposition", "SvdCache", "decompose", "energies", "energy_rank", "fingerprint",
    "float_matrix", "hollow", "is_quantized", "matrix_shape", "shared_cache", "spectral_energy",
]  # fmt: skip
