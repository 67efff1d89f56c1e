"""The layout of packed training: several examples a row, none of them seeing another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...core.errors import Conflict
from ...core.method import Example
from ...inference.attention import segment_mask
from ...inference.isolation import check_isolation
from ...inference.packing import PackedBatch, prepack
from .batch import by_token, padded


def packed(examples: Sequence[Example], pad_id: int = 0, pad_to: int = 8) -> dict[str, Any]:
    """Examples in as few rows, as long as the longest, as best fit finds.

    What has one entry a token is packed; so is `example_weights`, one value a token of the
    example; the rest is what `padded` makes of it. The batch has `position_ids` that start anew,
    `segment_ids` (which example, -1 for padding) and a boolean `attention_mask` of shape
    (rows, 1, width, width). Source: arXiv 2404.09529, section 3.

    Args:
        examples: What a micro-batch holds; they have `input_ids`.
        pad_id: Token that fills `input_ids`.
        pad_to: The width is rounded up to a multiple of this.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    room = -(-longest // max(1, pad_to)) * max(1, pad_to)
    rows = prepack(
        [example["input_ids"] for example in examples],
        room,
        pad_token_id=pad_id,
        pad_to=max(1, pad_to),
    )
    spread = {
        key: [example[key] for example in examples]
        for key in examples[0]
        if isinstance(examples[0][key], (list, tuple))
        and by_token(key, [example[key] for example in examples], examples)
    }
    rest = [{k: v for k, v in example.items() if k not in spread} for example in examples]
    batch = padded(rest)
    for key, values in spread.items():
        batch[key] = _in_place(rows, values, {"labels": -100}.get(key, 0))
    if "labels" in batch:
        # The first token of an example is predicted from nothing.
        batch["labels"] = batch["labels"].masked_fill(rows.position_ids == 0, -100)
    weights = batch.get("example_weights")
    if isinstance(weights, Tensor) and weights.dim() == 1:
        each = [[float(w)] * n for w, n in zip(weights, rows.lengths)]
        batch["example_weights"] = _in_place(rows, each, 0)
    return batch | {
        "input_ids": rows.input_ids,
        "position_ids": rows.position_ids,
        "segment_ids": rows.segment_ids,
        "attention_mask": segment_mask(rows.segment_ids),
    }


def _in_place(rows: PackedBatch, values: Sequence[Sequence[Any]], filler: int) -> Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    made = torch.full(rows.input_ids.shape, filler, dtype=tensors[0].dtype)
    for (row, start, stop), tensor in zip(rows.index.tolist(), tensors):
        made[row, start:stop] = tensor
    return made


def check_packing(model: nn.Module) -> None:
    """Prove that a model in training keeps the examples of a packed row apart.

    Raises:
        Conflict: If its attention takes no boolean mask, or lets examples see each other.
    """
    config: Any = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation != "sdpa":
        raise Conflict(
            f"packing needs the attention implementation 'sdpa', the model has {implementation!r}",
            'load it with attn_implementation="sdpa", or leave batch.packing out',
        )
    first = next(model.parameters())
    if first.is_meta or isinstance(first, FakeTensor):  # planned, not run
        return
    modes: Mapping[nn.Module, bool] = {module: module.training for module in model.modules()}
    model.eval()
    try:
        check_isolation(model, "mask")
    finally:
        for module, training in modes.items():
            module.training = training
