"""Packed batches for training, in transformers' `Trainer` or in a loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError
from .attention import segment_mask
from .isolation import additive, register
from .packing import PackedBatch, prepack

TELL = ("mask", "additive", "bounds")
IGNORED = -100


@dataclass(frozen=True)
class PackedCollator:
    """Pack examples into rows; the loss is that of the examples one by one.

    Called with a list of examples (`input_ids`, and `labels` where they differ from them), it
    gives `input_ids`, `position_ids`, `labels`, and what keeps the examples apart. The loss,
    averaged over labels, is the mean of the examples' own losses weighted by their predicted
    tokens, and so is its gradient.

    Source: arXiv 2404.09529, section 3, applied to training batches.

    Attributes:
        capacity: Tokens that a row may hold; the longest example of the batch by default.
        pad_token_id: Token that fills what is left of a row.
        method: How examples are packed: see `pack`.
        tell: "mask" gives a boolean `attention_mask` of shape (R, 1, S, S), for "sdpa";
            "additive" the same in float32 numbers, for "eager"; "bounds" gives `cu_seq_lens_q`,
            `cu_seq_lens_k`, `max_length_q` and `max_length_k`, for flash implementations and,
            anywhere, for `model.set_attn_implementation("outlay_segments")`.
        shifted: Labels are the tokens that follow (for a loop of one's own), -100 at the last
            position of each example; by default they stand at their own tokens (transformers
            shifts them), -100 at the first.
        segment_ids: Add `segment_ids`, -1 for padding; not for `Trainer`.
        pad_to: The width is rounded up to a multiple of this.

    Raises:
        ConfigError: An unknown setting; when called, an empty example or one longer than the
            capacity.
    """

    capacity: int | None = None
    pad_token_id: int = 0
    method: str = "bfd"
    tell: str = "mask"
    shifted: bool = False
    segment_ids: bool = False
    pad_to: int = 1

    def __post_init__(self) -> None:
        if self.tell not in TELL:
            raise ConfigError(f"tell = {self.tell!r} is unknown", f"use {', '.join(TELL)}")
        if self.tell == "bounds":
            register()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some examples.

        Args:
            examples: Maps with `input_ids` and perhaps `labels`, of one length.
        """
        tokens = [example["input_ids"] for example in examples]
        batch = prepack(
            tokens, self.capacity, self.method, pad_token_id=self.pad_token_id, pad_to=self.pad_to
        )
        made: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "labels": self._labels(examples, batch),
        }
        if self.segment_ids:
            made["segment_ids"] = batch.segment_ids
        if self.tell == "bounds":
            made |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch.cu_seqlens)
            made |= dict.fromkeys(("max_length_q", "max_length_k"), batch.max_seqlen)
        else:
            seen = segment_mask(batch.segment_ids)
            made["attention_mask"] = (
                additive(seen, torch.float32) if self.tell == "additive" else seen
            )
        return made

    def _labels(self, examples: Sequence[Mapping[str, Any]], batch: PackedBatch) -> Tensor:
        labels = torch.full_like(batch.input_ids, IGNORED)
        for number, (row, start, stop) in enumerate(batch.index.tolist()):
            own = torch.as_tensor(examples[number].get("labels", examples[number]["input_ids"]))
            if len(own) != stop - start:
                raise DataError(
                    f"example {number} has {stop - start} tokens and {len(own)} labels",
                    "give one label a token, -100 where none is wanted",
                )
            if self.shifted:
                labels[row, start : stop - 1] = own[1:]
            else:
                labels[row, start + 1 : stop] = own[1:]
        return labels
