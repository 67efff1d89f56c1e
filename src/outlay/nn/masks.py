"""Which entries of weights live: exact counts, thresholds over many tensors, structure, regrowth.

Nothing here knows a model or a run. A mask is a bool tensor of its weight's shape, True where the
entry lives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError, NonFinite

Distribution = Literal["uniform", "erk"]


def keep_largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """The `count` largest scores over several tensors; of equal ones the first are kept.

    The same choice as `core.allocate` on the joined scores, without joining or sorting them: the
    bits of a non-negative float are in the order of its value, so the threshold is found a byte
    at a time from histograms. No limit on the number of entries, no overshoot at ties.

    Args:
        scores: >= 0, infinity allowed. Any floating type, any shapes.
        count: How many are kept over all tensors.

    Raises:
        NonFinite: If a score is NaN.
        ConfigError: If a score is negative, or there are fewer scores than `count`.
    """
    total = sum(s.numel() for s in scores)
    if not 0 <= count <= total:
        raise ConfigError(f"{count} of {total} entries cannot be kept", f"keep 0 to {total}")
    if any(bool(s.isnan().any()) for s in scores):
        raise NonFinite("a weight's score is NaN", "lower the learning rate")
    if any(bool((s < 0).any()) for s in scores):
        raise ConfigError("a score is negative", "give magnitudes")
    if count in (0, total):
        return [torch.full(s.shape, count > 0, dtype=torch.bool, device=s.device) for s in scores]
    wide = any(s.dtype == torch.float64 for s in scores)
    keys = [_ordered(s, wide) for s in scores]
    prefix, left = 0, count
    bits = 64 if wide else 32
    for shift in range(bits - 8, -1, -8):
        histogram = torch.zeros(256, dtype=torch.int64)
        for key in keys:
            inside = key if shift + 8 == bits else key[key >> (shift + 8) == prefix]
            histogram += torch.bincount((inside >> shift) & 255, minlength=256).cpu()
        reached = histogram.flip(0).cumsum(0)
        digit = 255 - int((reached >= left).nonzero()[0])
        left -= int(histogram[digit + 1 :].sum())
        prefix = prefix << 8 | digit
    kept = []
    for score, key in zip(scores, keys):
        keep = key > prefix
        ties = (key == prefix).nonzero().flatten()[:left]
        keep[ties] = True
        left -= len(ties)
        kept.append(keep.view(score.shape))
    return kept


def _ordered(score: Tensor, wide: bool) -> Tensor:
    """Integers in the order of non-negative scores, flat."""
    flat = score.detach().flatten().abs()  # of a negative zero, the positive one
    if wide:
        return flat.double().view(torch.int64)
    return flat.float().view(torch.int32)


def random_mask(shape: Sequence[int], density: float, generator: torch.Generator) -> Tensor:
    """A mask with exactly round(density * entries) live ones, drawn on CPU."""
    size = torch.Size(shape)
    keep = torch.zeros(size.numel(), dtype=torch.bool)
    order = torch.randperm(size.numel(), generator=generator)
    keep[order[: round(density * size.numel())]] = True
    return keep.view(size)


def densities(
    shapes: Mapping[str, Sequence[int]], sparsity: float, distribution: Distribution = "uniform"
) -> dict[str, float]:
    r"""Density of each weight so that all together have density 1 - `sparsity`.

    "uniform" gives every weight the same. "erk" (Erdős-Rényi, arXiv 1911.11134 section 3.1) makes
    the density of an n x m matrix proportional to (n + m) / (n m): thin layers stay denser; what
    would be above 1 is dense and the rest shares the difference.

    Raises:
        ConfigError: If a weight would be left without a live entry.
    """
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    found = dict.fromkeys(shapes, 1.0 - sparsity)
    if distribution == "erk":
        raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
        dense: set[str] = set()
        while True:
            rest = [name for name in shapes if name not in dense]
            budget = (1 - sparsity) * sum(sizes.values()) - sum(sizes[n] for n in dense)
            scale = budget / sum(raw[n] * sizes[n] for n in rest) if rest else 0.0
            over = {n for n in rest if scale * raw[n] > 1}
            if not over:
                break
            dense |= over
        found = {n: 1.0 if n in dense else scale * raw[n] for n in shapes}
    for name, density in found.items():
        if round(density * sizes[name]) == 0:
            raise ConfigError(
                f"sparsity {sparsity} leaves {name!r} ({sizes[name]} entries) without a live one",
                "use a smaller sparsity, or exclude it",
            )
    return found


def two_of_four(scores: Tensor, axis: int) -> Tensor:
    """The two largest of every four consecutive scores along an axis; the first of equal ones.

    Args:
        scores: Shape whose `axis` is a multiple of 4.
        axis: The inputs of the weight, along which hardware skips zeros.
    """
    groups = scores.movedim(axis, -1).unflatten(-1, (-1, 4))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return keep.flatten(-2).movedim(-1, axis).contiguous()


def regrown(
    keep: Tensor, magnitudes: Tensor, growth: Tensor, fraction: float
) -> tuple[Tensor, Tensor]:
    """Drop the smallest live entries and let as many others live in their place.

    As in RigL (arXiv 1911.11134, algorithm 1) an entry that is dropped is a candidate again, so
    that there are always enough of them; it starts from zero like any other.

    Args:
        keep: Mask so far.
        magnitudes: Of the weight.
        growth: Score by which entries come; >= 0. Random numbers for SET, gradient magnitudes for
            RigL.
        fraction: Share of the live entries that is dropped, rounded down.

    Returns:
        What stays of the old mask, and the new one, of equally many entries.
    """
    alive = int(keep.sum())
    dropped = int(fraction * alive)
    stays = torch.zeros_like(keep)
    stays[keep] = keep_largest([magnitudes[keep]], alive - dropped)[0]
    fresh = stays.clone()
    fresh[~stays] = keep_largest([growth[~stays]], dropped)[0]
    return stays, fresh


def average_density(events: Sequence[tuple[int, float]], total_steps: int) -> float:
    """Mean density over the steps of a pruning schedule.

    Args:
        events: (steps taken before it, density from then on), in order; dense before the first.
        total_steps: Steps of the run.
    """
    spent, since, density = 0.0, 0, 1.0
    for step, following in events:
        spent, since, density = spent + (step - since) * density, step, following
    return (spent + (total_steps - since) * density) / total_steps


def packed(keep: Tensor) -> Tensor:
    """Eight entries a byte; flat, on CPU."""
    import numpy as np

    return torch.from_numpy(np.packbits(keep.cpu().numpy().ravel()))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """What `packed` took, in its shape."""
    import numpy as np

    size = torch.Size(shape)
    flat = np.unpackbits(bits.cpu().numpy(), count=size.numel()).astype(bool)
    return torch.from_numpy(flat).view(size)
