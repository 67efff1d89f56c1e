"""Sequences of different lengths in a few dense rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int, Int32
from torch import Tensor

from ..core.errors import DataError
from .bins import pack

Sequences = Sequence[Sequence[int]] | Sequence[Tensor]


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid one after the other in rows; nothing of one may reach another.

    The rows, read one after the other, are R * S tokens cut into segments: one a sequence, and
    one for what is empty at the end of a row.

    Attributes:
        input_ids: Tokens; the padding token where a row is empty. Shape (R, S).
        position_ids: Position inside the sequence, from 0; 1 for padding. Shape (R, S).
        segment_ids: Which sequence each token belongs to, counted in input order; -1 for
            padding. Shape (R, S).
        cu_seqlens: Where each segment of the flattened rows starts, and R * S at the end.
            Shape (segments + 1,).
        max_seqlen: Tokens of the longest segment.
        index: Row, first and past-the-last column of each sequence, in input order; (0, 0, 0)
            for one that was left without a token. Shape (sequences, 3).
    """

    input_ids: Int[Tensor, "rows width"]
    position_ids: Int[Tensor, "rows width"]
    segment_ids: Int[Tensor, "rows width"]
    cu_seqlens: Int32[Tensor, " bounds"]
    max_seqlen: int
    index: Int[Tensor, "sequences 3"]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, in input order."""
        return (self.index[:, 2] - self.index[:, 1]).tolist()

    def unpack(self, values: Tensor | None = None) -> list[Tensor]:
        """What belongs to each sequence, in input order.

        Args:
            values: Anything with one entry a position, of shape (R, S, ...); the tokens by
                default.

        Returns:
            Views of shape (tokens of the sequence, ...).
        """
        values = self.input_ids if values is None else values
        width, flat = self.input_ids.shape[1], values.flatten(0, 1)
        return [flat[row * width + a : row * width + b] for row, a, b in self.index.tolist()]

    def to(self, device: Any) -> PackedBatch:
        """A copy on a device; `index` stays where it is."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            segment_ids=self.segment_ids.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
        )


def prepack(
    sequences: Sequences,
    capacity: int | None = None,
    method: str = "bfd",
    max_rows: int | None = None,
    pad_token_id: int = 0,
    pad_to: int = 1,
    drop_last: bool = False,
) -> PackedBatch:
    """Pack sequences of tokens. Source: arXiv 2404.09529, section 3.

    Args:
        sequences: Tokens of each sequence, at least one.
        capacity: Tokens that a row may hold; the longest sequence by default.
        method: How they are packed: see `pack`.
        max_rows: Rows that there may be.
        pad_token_id: Token that fills what is left of a row.
        pad_to: The width is rounded up to a multiple of this.
        drop_last: Leave out the last token of each, as generation from a cache wants it.

    Raises:
        ConfigError: An empty sequence, one longer than the capacity, or an unknown method.
        DoesNotFit: More rows are needed than `max_rows`.
    """
    tokens = as_lists(sequences)
    if drop_last:
        tokens = [sequence[:-1] for sequence in tokens]
    kept = [number for number, sequence in enumerate(tokens) if sequence]
    bins = pack([len(tokens[number]) for number in kept], capacity, method, max_rows)
    rows = [[kept[item] for item in some] for some in bins]
    width = max((sum(len(tokens[n]) for n in row) for row in rows), default=0)
    width = -(-width // pad_to) * pad_to
    ids, positions, segments = [], [], []
    bounds = [0]
    index = torch.zeros(len(tokens), 3, dtype=torch.long)
    for row_number, row in enumerate(rows):
        line: list[int] = []
        place: list[int] = []
        owner: list[int] = []
        for number in row:
            start, length = len(line), len(tokens[number])
            index[number] = torch.tensor([row_number, start, start + length])
            line += tokens[number]
            place += range(length)
            owner += [number] * length
            bounds.append(row_number * width + start + length)
        empty = width - len(line)
        if empty:
            bounds.append((row_number + 1) * width)
        ids.append(line + [pad_token_id] * empty)
        positions.append(place + [1] * empty)
        segments.append(owner + [-1] * empty)
    shape = (len(rows), width)
    return PackedBatch(
        torch.tensor(ids, dtype=torch.long).reshape(shape),
        torch.tensor(positions, dtype=torch.long).reshape(shape),
        torch.tensor(segments, dtype=torch.long).reshape(shape),
        torch.tensor(bounds, dtype=torch.int32),
        max((stop - start for start, stop in itertools.pairwise(bounds)), default=0),
        index,
    )


def as_lists(sequences: Sequences) -> list[list[int]]:
    """Tokens as lists.

    Raises:
        DataError: If there is no sequence, or one is empty.
    """
    found = [s.tolist() if isinstance(s, Tensor) else [int(t) for t in s] for s in sequences]
    if not found:
        raise DataError("there is no sequence", "give at least one")
    for number, sequence in enumerate(found):
        if not sequence:
            raise DataError(
                f"sequence {number} is empty", "leave it out, or start it with a first token"
            )
    return found
