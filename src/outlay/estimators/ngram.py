"""An n-gram language model over the run's own tokens, smoothed by interpolated Kneser-Ney."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..core.card import Card
from ..core.errors import ConfigError, DataError


@dataclass
class NGram:
    """What a language model must beat: counts of the last few tokens.

    Interpolated Kneser-Ney with one absolute discount an order, `D = n1 / (n1 + 2 n2)` (Ney, Essen
    and Kneser 1994); lower orders count in how many contexts a token follows, and the lowest is
    interpolated with the uniform distribution. Everything is a sorted array, so that
    millions of tokens are counted without a dictionary.

    Attributes:
        order: Longest run of tokens that is counted, the predicted one included.
    """

    card: ClassVar[Card] = Card(
        name="ngram",
        title="Improved backing-off for M-gram language modeling",
        authors="Kneser, Ney",
        year=1995,
        group="baselines",
        summary="Interpolated Kneser-Ney over the run's tokens: what a language model must beat.",
        saves=("FLOPs", "wall time"),
    )
    takes: ClassVar[str] = "tokens"
    order: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 8:
            raise ConfigError(f"ngram.order = {self.order} is not allowed", "give 1 to 8")

    def fit(self, rows: Sequence[Sequence[int]], vocabulary: int) -> NGram:
        """Count.

        Args:
            rows: Token ids of documents or windows; nothing is counted across two of them, and
                the first token of each is context only.
            vocabulary: Number of token ids.

        Raises:
            DataError: If no row has two tokens, or an id is not in the vocabulary.
        """
        tokens, place = _flat(rows)
        if not (place > 0).any():
            raise DataError("there is no token to predict", "give rows of at least two tokens")
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise DataError(
                f"token id {tokens.max()} is outside the vocabulary of {vocabulary}",
                "encode the rows with the model's own tokenizer",
            )
        self.vocabulary_ = int(vocabulary)
        self.keys_: list[Any] = []
        prefixes, suffixes, raw = [], [], []
        rank = np.zeros(len(tokens), np.int64)
        for order in range(1, self.order + 1):
            # The first token of a row is predicted by nothing, but is context for the next.
            there = place >= order - 1
            before = _shifted(rank, order)
            key = before * vocabulary + tokens
            keys, index, inverse, counts = np.unique(
                key[there], return_index=True, return_inverse=True, return_counts=True
            )
            at = np.flatnonzero(there)
            prefixes.append(before[at[index]])
            suffixes.append(rank[at[index]] if order > 1 else np.zeros(len(keys), np.int64))
            predicted = np.bincount(inverse, weights=place[at] > 0, minlength=len(keys))
            raw.append(predicted.astype(np.int64) if order == 1 else counts)
            rank = np.full(len(tokens), -1, np.int64)
            rank[at] = inverse
            self.keys_.append(keys)
        self._weigh(prefixes, suffixes, raw)
        return self

    def _weigh(self, prefixes: list[Any], suffixes: list[Any], raw: list[Any]) -> None:
        """Adjusted counts of every n-gram, and total, kinds and discount of every context."""
        self.counts_: list[Any] = []
        self.totals_: list[Any] = []
        self.kinds_: list[Any] = []
        self.discounts_: list[float] = []
        for order in range(self.order):
            last = order == self.order - 1
            counts = raw[order]
            if not last:
                counts = np.bincount(suffixes[order + 1], minlength=len(self.keys_[order]))
            contexts = 1 if order == 0 else len(self.keys_[order - 1])
            before = prefixes[order]
            self.counts_.append(counts)
            self.totals_.append(np.bincount(before, weights=counts, minlength=contexts))
            self.kinds_.append(np.bincount(before[counts > 0], minlength=contexts))
            once, twice = int((counts == 1).sum()), int((counts == 2).sum())
            self.discounts_.append(once / (once + 2 * twice) if once and twice else 0.5)

    def nats(self, rows: Sequence[Sequence[int]]) -> list[Any]:
        """Minus the log-probability of every token but the first of each row.

        Args:
            rows: Token ids, as in `fit`.

        Returns:
            One array a row. Shape (tokens - 1,).
        """
        tokens, place = _flat(rows)
        chance = np.full(len(tokens), 1.0 / self.vocabulary_)
        rank = np.zeros(len(tokens), np.int64)
        for order in range(1, self.order + 1):
            before = np.where(place >= order - 1, _shifted(rank, order), -1)
            found = _lookup(self.keys_[order - 1], before, tokens, self.vocabulary_)
            context = np.maximum(before, 0)
            total = np.where(before >= 0, self.totals_[order - 1][context], 0.0)
            seen = total > 0
            counts = np.where(found >= 0, self.counts_[order - 1][np.maximum(found, 0)], 0)
            discount = self.discounts_[order - 1]
            own = np.maximum(counts - discount, 0) / np.where(seen, total, 1)
            left = discount * self.kinds_[order - 1][context] / np.where(seen, total, 1)
            chance = np.where(seen, own + left * chance, chance)
            rank = found
        every = -np.log(chance)
        starts = np.flatnonzero(place == 0)
        return [part[1:] for part in np.split(every, starts[1:])] if len(tokens) else []

    @property
    def num_parameters(self) -> int:
        """N-grams that are stored."""
        return sum(len(keys) for keys in self.keys_)


def _flat(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """All tokens in a line, and the place of each in its row."""
    parts = [np.asarray(row, np.int64) for row in rows if len(row)]
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(parts), np.concatenate([np.arange(len(part)) for part in parts])


def _shifted(rank: Any, order: int) -> Any:
    """Rank of the context of each token: the n-gram that ends one token earlier."""
    if order == 1:
        return np.zeros(len(rank), np.int64)
    before = np.empty_like(rank)
    before[:1], before[1:] = -1, rank[:-1]
    return before


def _lookup(keys: Any, before: Any, tokens: Any, vocabulary: int) -> Any:
    """Rank of each n-gram, -1 where it was never seen."""
    key = np.where(before >= 0, before * vocabulary + tokens, -1)
    index = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
    return np.where((before >= 0) & (keys[index] == key), index, -1)
