r"""The exact cut at a budget, over any number of shards, without a sort.

Rows are ordered by score and, where scores are equal, by a 64-bit hash of their id. The order is
written as a 96-bit number: an order-preserving image of the float32 score, then the hash. Six
passes find the number at which the budget ends, 16 bits a pass: each adds up the weights of all
rows by the next 16 bits, among those that share the bits known so far. A pass's state is 65,536
integers (512 kB); those of several shards or machines are added, in any order, to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError

Chunk = tuple[NDArray[np.float32], NDArray[np.uint64], NDArray[np.int64]]
_DIGITS = 6
_BINS = 1 << 16


def order_of(scores: NDArray[Any], highest_first: bool = True) -> NDArray[np.uint32]:
    """Unsigned integers in the order of the scores: the smallest is the first to be kept.

    -0.0 equals 0.0.

    Raises:
        DataError: If a score is not a number.
    """
    scores = np.asarray(scores, np.float32)
    if np.isnan(scores).any():
        raise DataError(
            f"{int(np.isnan(scores).sum()):,} of {len(scores):,} scores are not numbers",
            "repair the scorer, or leave those rows out",
        )
    bits = (scores + np.float32(0)).view(np.uint32)
    negative = bits >> np.uint32(31) == 1
    ascending = np.where(negative, ~bits, bits | np.uint32(1 << 31))
    return ~ascending if highest_first else ascending


@dataclass(frozen=True)
class Threshold:
    """Rows before (score, id) are kept.

    Attributes:
        score: Image of the score of the first row that is not kept; None keeps everything.
        id: Hash of its id.
        highest_first: Whether high scores come first.
    """

    score: int | None = None
    id: int = 0
    highest_first: bool = True

    def keeps(self, scores: NDArray[Any], keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which rows are kept. Shape (rows,)."""
        if self.score is None:
            return np.ones(len(scores), bool)
        order = order_of(scores, self.highest_first)
        return (order < self.score) | ((order == self.score) & (keys < np.uint64(self.id)))

    @property
    def value(self) -> float | None:
        """The score at which the budget ended; None if everything is kept."""
        if self.score is None:
            return None
        ascending = np.uint32(self.score)
        if self.highest_first:
            ascending = ~ascending
        positive = bool(ascending >> np.uint32(31))
        bits = ascending & np.uint32(0x7FFFFFFF) if positive else ~ascending
        return float(np.asarray(bits, np.uint32).view(np.float32))


def histogram(
    chunk: Chunk, known: int, digit: int, highest_first: bool = True
) -> NDArray[np.int64]:
    """Weights by the next 16 bits, among the rows that share the bits known so far.

    Args:
        chunk: Scores, hashed ids and weights >= 0. Shapes (rows,).
        known: The bits found by the passes before, most significant first.
        digit: How many digits of 16 bits they are.
        highest_first: See `Threshold`.

    Returns:
        Sums of weights. Shape (65536,).
    """
    scores, keys, weights = chunk
    order = order_of(scores, highest_first)
    if digit < 2:
        among = slice(None) if digit == 0 else order >> np.uint32(16) == known
        bins = (order >> np.uint32(16 - 16 * digit))[among] & np.uint32(0xFFFF)
    else:
        behind = digit - 2  # digits of the hash that are known
        among = order == known >> 16 * behind
        keys = keys[among]
        weights = weights[among]
        if behind:
            same = keys >> np.uint64(64 - 16 * behind) == known & ((1 << 16 * behind) - 1)
            keys, weights = keys[same], weights[same]
        bins = (keys >> np.uint64(48 - 16 * behind)) & np.uint64(0xFFFF)
        among = slice(None)
    # Sums of doubles are exact up to 2^53 tokens a chunk.
    return np.bincount(bins.astype(np.int64), weights[among], _BINS).astype(np.int64)


def find_threshold(
    chunks: Callable[[], Iterable[Chunk]], budget: int, highest_first: bool = True
) -> Threshold:
    """Where the rows in their order have used up a budget; the row that would exceed it is out.

    Args:
        chunks: Gives all rows anew each time it is called, in any order.
        budget: In the weights' unit.
        highest_first: Keep high scores, or low ones.

    Raises:
        DataError: If a score is not a number.
    """
    known, before = 0, 0
    for digit in range(_DIGITS):
        total = np.zeros(_BINS, np.int64)
        for chunk in chunks():
            total += histogram(chunk, known, digit, highest_first)
        upto = before + np.cumsum(total)
        place = int(np.searchsorted(upto, budget, side="right"))
        if place == _BINS:
            return Threshold(highest_first=highest_first)
        known = known << 16 | place
        before = int(upto[place] - total[place])
    return Threshold(known >> 64, known & ((1 << 64) - 1), highest_first)


def select_top(
    scores: NDArray[Any],
    keys: NDArray[np.uint64],
    weights: NDArray[np.int64],
    budget: int,
    highest_first: bool = True,
) -> NDArray[np.bool_]:
    """`find_threshold` over arrays in memory: which rows are kept. Shape (rows,)."""
    chunk = (np.asarray(scores, np.float32), keys, weights)
    return find_threshold(lambda: [chunk], budget, highest_first).keeps(scores, keys)
