"""Prefill of many prompts in packed rows, and the cache that generation goes on from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..core.errors import ConfigError
from .isolation import body_of, check_isolation, isolated
from .packing import PackedBatch, Sequences, as_lists, prepack

LAYOUTS = ("left", "list")


class Prefilled(NamedTuple):
    """Prompts read up to their last token, which generation starts with.

    The next call of the model is
    `model(last_tokens, past_key_values=cache, attention_mask=..., position_ids=...)`.

    Attributes:
        cache: A `DynamicCache` over all prompts, filled up on the left; or, in the layout "list",
            one a prompt.
        last_tokens: Last token of each prompt. Shape (prompts, 1).
        attention_mask: 1 where the cache or the last token is, 0 where the cache was filled up.
            Shape (prompts, longest prompt).
    """

    cache: Any
    last_tokens: Int[Tensor, "prompts 1"]
    attention_mask: Int[Tensor, "prompts longest"]

    @property
    def position_ids(self) -> Int[Tensor, "prompts 1"]:
        """Position of each last token in its prompt."""
        return self.attention_mask.sum(1, keepdim=True) - 1


@torch.no_grad()
def prefill_packed(
    model: nn.Module,
    sequences: Sequences,
    *,
    capacity: int | None = None,
    method: str = "bfd",
    max_rows: int | None = None,
    attention: str = "auto",
    layout: str = "left",
) -> Prefilled:
    """Fill the key-value cache of many prompts in one pass over a few dense rows, exactly.

    Prompts are packed without their last token, in rows as long as the longest; each attends to
    itself alone and its positions start at 0, so every key and value is what a pass over that
    prompt alone gives. The model's isolation is proved first (`check_isolation`). Source: arXiv
    2404.09529, section 3.

    Args:
        model: A causal transformers model in evaluation mode.
        sequences: Tokens of each prompt, at least one.
        capacity: Tokens that a row may hold; the longest prompt (without its last token) by
            default.
        method: How they are packed: see `pack`.
        max_rows: Rows that there may be.
        attention: How segments are kept apart: see `isolated`.
        layout: "left" for one cache over all prompts, "list" for one cache a prompt.

    Raises:
        ConfigError: An empty prompt, one longer than the capacity, or an unknown setting.
        DoesNotFit: More rows are needed than `max_rows`.
        Conflict: The model's attention does not keep prompts apart.
    """
    _check_layout(layout)
    prompts = as_lists(sequences)
    check_isolation(model, attention)
    device = next(model.parameters()).device
    batch = prepack(prompts, capacity, method, max_rows, drop_last=True).to(device)
    cache = packed_cache(model, batch, attention)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    return Prefilled(
        unpack_cache(cache, batch, layout),
        torch.tensor([prompt[-1:] for prompt in prompts], device=device),
        (torch.arange(longest, device=device) >= longest - lengths[:, None]).long(),
    )


def packed_cache(model: nn.Module, batch: PackedBatch, attention: str = "auto") -> Any:
    """The cache of packed rows as the model writes it, layer by layer (R, heads, S, dim)."""
    from transformers import DynamicCache

    # Made without the config, so that no layer throws away what lies outside its window.
    cache = DynamicCache()
    if len(batch.input_ids):
        with isolated(model, batch, attention) as told:
            body_of(model)(**told, past_key_values=cache, use_cache=True)
    return cache


def unpack_cache(cache: Any, batch: PackedBatch, layout: str = "left") -> Any:
    """Give every prompt the part of a packed cache that is its own.

    Args:
        cache: Cache of the packed rows.
        batch: The rows it was made from.
        layout: "left" gives one cache of all prompts, filled up with zeros on the left to the
            longest; "list" gives one cache a prompt: views of the packed cache.

    Raises:
        ConfigError: An unknown layout.
    """
    _check_layout(layout)
    places = batch.index.tolist()
    if layout == "list":
        return [
            _cache_of(
                (
                    layer.keys[row : row + 1, :, start:stop],
                    layer.values[row : row + 1, :, start:stop],
                )
                for layer in cache.layers
            )
            for row, start, stop in places
        ]
    longest = max(batch.lengths, default=0)
    return _cache_of(
        (_left(layer.keys, places, longest), _left(layer.values, places, longest))
        for layer in cache.layers
    )


def _cache_of(layers: Iterable[tuple[Tensor, Tensor]]) -> Any:
    """A cache that holds these keys and values themselves: `update` would copy them."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    made = DynamicCache()
    for keys, values in layers:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        made.layers.append(layer)
    return made


def _left(packed: Tensor, places: list[list[int]], longest: int) -> Tensor:
    filled = packed.new_zeros(len(places), packed.shape[1], longest, packed.shape[3])
    for number, (row, start, stop) in enumerate(places):
        filled[number, :, longest - (stop - start) :] = packed[row, :, start:stop]
    return filled


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ConfigError(f"layout = {layout!r} is unknown", f"use {' or '.join(LAYOUTS)}")
