r"""The singular value decomposition of a weight, with fixed signs and told gaps.

$W = U \Sigma V^\top$ with U (out, k), the diagonal of Sigma (k,) in decreasing order and V^T
(k, in), k <= min(out, in). The decomposition is made in float64 and kept in float32 (float64 for
a float64 weight), so what one machine rebuilds from a weight is what another one trained with.

The sign of each pair (u_i, v_i) is free; here the entry of u_i of largest magnitude is positive.
Where singular values repeat, the vectors themselves are free: `Decomposition.gap` tells.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..core.errors import NonFinite
from ..core.method import generator_of

EXACT_BELOW = 2048
"""Smaller side of a weight up to which the decomposition is always exact."""

DISTINCT = 1e-8
"""Gap between neighbouring singular values, as a share of the largest one, below which their
vectors are arbitrary: float64 finds them to about 1e-16 / gap."""

_TOLERANCE = 1e-4  # residual of an iterated triplet, as a share of the largest singular value
_SMALL = 1024  # smaller side up to which more threads gain less than they may lose


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
