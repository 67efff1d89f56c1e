r"""Singular value decompositions of weights: computed once, with fixed signs, and cached.

$W = U \Sigma V^\top$ with U (out, k), the diagonal of Sigma (k,) in decreasing order and V^T
(k, in), k <= min(out, in). The decomposition is made in float64 and kept in float32 (float64 for
a float64 weight), so what one machine rebuilds from a weight is what another one trained with.

The sign of each pair (u_i, v_i) is free; here the entry of u_i of largest magnitude is positive.
Where singular values repeat, the vectors themselves are free: `Decomposition.gap` tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..core.errors import ConfigError, Conflict, NonFinite
from ..core.method import generator_of
from .adapted import as_matrix
from .targets import is_conv1d

EXACT_BELOW = 2048
"""Smaller side of a weight up to which the decomposition is always exact."""

DISTINCT = 1e-8
"""Gap between neighbouring singular values, as a share of the largest one, below which their
vectors are arbitrary: float64 finds them to about 1e-16 / gap."""

_TOLERANCE = 1e-4  # residual of an iterated triplet, as a share of the largest singular value
_SMALL = 1024  # smaller side up to which more threads gain less than they may lose
_FORMAT = "1"


@dataclass(frozen=True)
class Decomposition:
    """The k leading singular triplets of one weight.

    Attributes:
        u: Left vectors. Shape (out, k).
        s: Singular values, decreasing. Shape (k,).
        vh: Right vectors as rows. Shape (k, in).
        energy: Sum of all squared singular values, those beyond k included.
        fingerprint: Content hash of the weight, 32 hexadecimal digits.
        exact: False if found by iteration up to a residual of 1e-4 of the largest value.
    """

    u: Float[Tensor, "out k"]
    s: Float[Tensor, " k"]
    vh: Float[Tensor, "k in"]
    energy: float
    fingerprint: str
    exact: bool = True

    def gap(self, indices: Sequence[int]) -> float:
        """Smallest distance of the chosen values to any neighbour, as a share of the largest.

        Args:
            indices: Chosen triplets, in any order.

        Returns:
            0 for a zero weight; infinity where there is no neighbour.
        """
        if not len(indices) or hollow(self.s):
            return float("inf")
        values = self.s.double().cpu()
        if float(values[0]) == 0.0:
            return 0.0
        steps = values[:-1] - values[1:]
        near = {j for i in indices for j in (i - 1, i) if 0 <= j < len(steps)}
        return float(steps[sorted(near)].min() / values[0]) if near else float("inf")

    def degenerate(self, indices: Sequence[int]) -> bool:
        """True if another machine could find other vectors for the chosen values."""
        return self.gap(indices) < (DISTINCT if self.exact else _TOLERANCE)

    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(t.numel() * t.element_size() for t in (self.u, self.s, self.vh))


def hollow(tensor: Tensor) -> bool:
    """True for a tensor without values: on the meta device, or a fake one of a plan."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


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


def is_quantized(layer: nn.Module) -> bool:
    """True if a layer's weight is stored as anything but plain floating-point numbers."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.is_quantized or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2


def fingerprint(weight: Float[Tensor, "out in"]) -> str:
    """Content hash of a matrix: equal values give equal hashes, whatever floating type holds them.

    The values are hashed as float32 unless they need float64. A hollow tensor gives zeros.
    """
    if hollow(weight):
        return "0" * 32
    matrix = weight.detach().cpu()
    narrow = matrix.float()
    if matrix.dtype != torch.float64 or torch.equal(narrow.double(), matrix):
        matrix = narrow
    facts = f"{matrix.dtype} {tuple(matrix.shape)}"
    digest = hashlib.blake2b(facts.encode(), digest_size=16)
    digest.update(matrix.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def iterates(shape: Sequence[int], rank: int | None, exact_below: int = EXACT_BELOW) -> bool:
    """True if so few triplets of so large a weight are found by iteration."""
    small = min(shape)
    return rank is not None and small > exact_below and 8 * rank <= small


def decompose(
    weight: Float[Tensor, "out in"],
    rank: int | None = None,
    name: str = "the weight",
    exact_below: int = EXACT_BELOW,
    mark: str | None = None,
) -> Decomposition:
    """Decompose a weight: exactly, or the leading `rank` triplets of a large one by iteration.

    Exact: eigenvectors of the smaller Gram matrix in float64, which is 2.6 times as fast as the
    float64 SVD and more accurate than the float32 one; where the weight is too close to singular
    for that (or is float64 itself), the SVD.

    Iterated (smaller side above `exact_below`, rank at most an eighth of it): a block Krylov
    space from a start that the fingerprint seeds, grown until every residual
    ||W v_i - sigma_i u_i|| is below 1e-4 sigma_1 and the vectors are orthonormal; exact if that
    never happens.

    Args:
        weight: Any floating type; a hollow one gives hollow tensors of the right shapes.
        rank: Triplets that are needed; None means all.
        name: How errors name the weight.
        exact_below: Largest smaller side that is always decomposed exactly.
        mark: The weight's fingerprint, if it is known already.

    Raises:
        NonFinite: If the weight holds NaN or infinity.
    """
    out, width = weight.shape
    small = min(out, width)
    if hollow(weight):
        kept = torch.float64 if weight.dtype == torch.float64 else torch.float32
        k = small if rank is None else min(rank + 1, small)
        u, s, vh = (weight.new_empty(size, dtype=kept) for size in ((out, k), (k,), (k, width)))
        return Decomposition(u, s, vh, 1.0, fingerprint(weight))
    with _one_thread() if small <= _SMALL else contextlib.nullcontext():
        return _decompose(weight.detach(), rank, name, exact_below, mark)


def _decompose(
    matrix: Tensor, rank: int | None, name: str, exact_below: int, mark: str | None
) -> Decomposition:
    device, careful = matrix.device, matrix.dtype == torch.float64
    if not torch.isfinite(matrix).all():
        raise NonFinite(
            f"the weight of {name!r} holds NaN or infinity, so it has no singular values",
            "repair or reload the model, or leave the layer out of target_modules",
        )
    if device.type == "mps":  # no float64 there
        matrix = matrix.cpu()
    wide = matrix.double()
    mark = mark or fingerprint(matrix)
    energy = float(wide.square().sum())
    found = None
    if rank is not None and iterates(matrix.shape, rank, exact_below):
        found = _krylov(wide, rank + 1, mark)  # one more, for the gap behind the last
    u, s, vh = found or _exact(wide, careful)
    u, vh = _fix_signs(u, vh)
    kept = torch.float64 if careful else torch.float32
    u, s, vh = (t.to(device, kept).contiguous() for t in (u, s, vh))
    return Decomposition(u, s, vh, energy, mark, found is None)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread.

    The result then has the same bits whatever the number of threads, and a busy machine, where
    threads wait for each other at every column, does not take ten times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _exact(wide: Tensor, careful: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All triplets of a float64 matrix."""
    if not careful:
        tall = wide.shape[0] >= wide.shape[1]
        values, vectors = torch.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)
        vectors = vectors.flip(-1)
        # Squaring halves the digits: below 1e-6 of the largest value they are noise.
        if float(values[0]) > 1e-12 * float(values[-1]):
            other = wide @ vectors if tall else wide.T @ vectors
            s = other.norm(dim=0)
            # Norms of near-equal pairs may come out in either order by a rounding error.
            s, order = s.sort(descending=True, stable=True)
            vectors, other = vectors[:, order], other[:, order] / s
            return (other, s, vectors.T) if tall else (vectors, s, other.T)
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    return u, s, vh


def _krylov(wide: Tensor, rank: int, seed: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """The leading triplets from a growing block Krylov space, or None if they do not settle."""
    out, width = wide.shape
    block = rank + 16
    start = torch.randn(width, block, dtype=wide.dtype, generator=generator_of("svd", seed))
    fresh = torch.linalg.qr(wide @ start.to(wide.device))[0]
    basis = fresh
    while basis.shape[1] + block <= min(out, width) // 2:
        fresh = wide @ (wide.T @ fresh)
        for _ in range(2):  # once leaves rounding errors that grow with the space
            fresh = fresh - basis @ (basis.T @ fresh)
        fresh = torch.linalg.qr(fresh)[0]
        basis = torch.cat([basis, fresh], 1)
        inner, s, vh = torch.linalg.svd(basis.T @ wide, full_matrices=False)
        u, s, vh = basis @ inner[:, :rank], s[:rank], vh[:rank]
        residual = (wide @ vh.T - u * s).norm(dim=0).max()
        slant = (u.T @ u - torch.eye(rank, dtype=u.dtype, device=u.device)).abs().max()
        if float(residual) <= _TOLERANCE * float(s[0]) and float(slant) <= 1e-10:
            return u, s, vh
    return None


def _fix_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Make the entry of largest magnitude of each left vector positive."""
    peak = u.gather(0, u.abs().argmax(0, keepdim=True)).squeeze(0)
    sign = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, vh * sign[:, None]


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
