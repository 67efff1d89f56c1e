"""Packed rows in a transformers model: how its attention is told, and the proof that it obeys."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, Conflict
from .attention import segment_attention, segment_mask
from .packing import PackedBatch, prepack

# The name under which `segment_attention` stands among transformers' implementations.
SEGMENTS = "outlay_segments"
WAYS = ("auto", "segments", "mask")
_FULL = ("full_attention", "sliding_attention")
_proved: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()


def body_of(model: nn.Module) -> nn.Module:
    """The model without its head, where that is a module of its own."""
    from transformers import PreTrainedModel

    return model.base_model if isinstance(model, PreTrainedModel) else model


def way_of(model: nn.Module, way: str = "auto") -> str:
    """How a model will be told: "segments", "mask", or "kernel" for its own flash attention.

    Raises:
        ConfigError: An unknown way.
        Conflict: The model's attention can be told in no way that is asked for.
    """
    if way not in WAYS:
        raise ConfigError(f"attention = {way!r} is unknown", f"use {', '.join(WAYS)}")
    implementation = _implementation(model)
    config = _config(model)
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - set(_FULL))
    if strange:
        raise Conflict(
            f"the model has layers of type {strange[0]!r}, which run on from prompt to prompt",
            "prefill its prompts one at a time",
        )
    if way != "mask" and implementation.startswith("flash"):
        return "kernel"
    if way != "mask" and getattr(model, "_supports_attention_backend", False):
        return "segments"
    if way == "segments" or implementation not in ("sdpa", "eager"):
        raise Conflict(
            f"the attention implementation {implementation!r} takes no mask of segments",
            'load the model with attn_implementation="sdpa"',
        )
    return "mask"


@contextlib.contextmanager
def isolated(model: nn.Module, batch: PackedBatch, attention: str = "auto") -> Iterator[dict]:
    """Inside, calling the model with the given arguments keeps the segments of a batch apart.

    Args:
        model: A causal transformers model.
        batch: Packed rows, on the model's device.
        attention: "segments" has `segment_attention` do the attention of every layer, "mask"
            hands the model a boolean (or, for "eager", additive) mask of width x width a row,
            "auto" is the first where the model allows it. A model that was loaded with a flash
            implementation is told the segments' bounds.

    Yields:
        Arguments of the call: `input_ids`, `position_ids` and what tells segments apart.

    Raises:
        Conflict: The model's attention cannot be told, or a sliding window is narrower than the
            longest sequence and attention goes by mask.
    """
    way = way_of(model, attention)
    told: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if way == "mask":
        yield told | {"attention_mask": _mask(model, batch)}
        return
    bounds = batch.cu_seqlens
    told |= {
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
        "max_length_q": batch.max_seqlen, "max_length_k": batch.max_seqlen,
    }  # fmt: skip
    if way == "kernel":
        yield told
        return
    register()
    config = _config(model)
    before = config._attn_implementation
    config._attn_implementation = SEGMENTS
    try:
        yield told
    finally:
        config._attn_implementation = before


def check_isolation(model: nn.Module, attention: str = "auto") -> None:
    """Prove that a model keeps the prompts of a packed row apart; once a model and setting.

    Two short prompts are packed into one row. A changed token of the first must leave the
    outputs of the second as they were, bit for bit; and both must agree with what each gives
    alone (to 1e-3 of the largest output in 32 bits, 5e-2 in 16).

    Raises:
        Conflict: The model trains, its outputs leak from prompt to prompt, or they differ from
            those of a prompt alone; the message names the attention implementation.
    """
    if model.training:
        raise Conflict("the model is in training mode", "call model.eval() first")
    way, first = way_of(model, attention), next(model.parameters())
    key = (way, _implementation(model), first.dtype, str(first.device))
    if key in _proved.setdefault(model, set()):
        return
    size = int(_config(model).vocab_size)
    prompts = [[(3 * i + 1) % size for i in range(6)], [(5 * i + 2) % size for i in range(4)]]
    changed = [[*prompts[0][:2], (prompts[0][2] + 1) % size, *prompts[0][3:]], prompts[1]]
    outputs, others = (
        _outputs(model, some, attention, len(prompts)) for some in (prompts, changed)
    )
    wrong = None
    if not torch.equal(outputs[1], others[1]):
        wrong = "lets one prompt of a packed row change another"
    else:
        alone = [_outputs(model, [prompt], attention, 1)[0] for prompt in prompts]
        limit = 1e-3 if first.dtype in (torch.float32, torch.float64) else 5e-2
        largest = max(float(a.abs().max()) for a in alone)
        gap = max(float((a - b).abs().max()) for a, b in zip(outputs, alone))
        if not gap <= limit * largest:
            wrong = f"gives packed prompts outputs that differ by {gap:.2g}"
    if wrong:
        raise Conflict(
            f"the attention implementation {key[1]!r} {wrong}",
            'load the model with attn_implementation="sdpa", or prefill one prompt at a time',
        )
    _proved[model].add(key)


@torch.no_grad()
def _outputs(model: nn.Module, prompts: list[list[int]], attention: str, room: int) -> list[Tensor]:
    device = next(model.parameters()).device
    if room == 1:
        out = body_of(model)(torch.tensor(prompts, device=device), use_cache=False)
        return [_values(out)[0]]
    capacity = sum(map(len, prompts))
    batch = prepack(prompts, capacity, pad_to=capacity + 1).to(device)
    with isolated(model, batch, attention) as told:
        out = body_of(model)(**told, use_cache=False)
    return batch.unpack(_values(out))


def _values(out: Any) -> Tensor:
    return out[0] if getattr(out, "last_hidden_state", None) is None else out.last_hidden_state


def register() -> None:
    """Put `segment_attention` among transformers' attention implementations."""
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENTS, _segments_forward)


def _segments_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **told: Any,
) -> tuple[Tensor, None]:
    """`segment_attention` under the signature of a transformers attention implementation."""
    unknown = [n for n in ("softcap", "s_aux", "position_bias") if told.get(n) is not None]
    if unknown or attention_mask is not None:
        raise Conflict(
            f"the attention implementation {SEGMENTS!r} knows no "
            f"{unknown[0] if unknown else 'attention_mask'}",
            'use attention="mask", or prefill one prompt at a time',
        )
    bounds = told.get("cu_seq_lens_q")
    if bounds is None:
        raise Conflict(
            f"the attention implementation {SEGMENTS!r} was not told where segments lie",
            "hand the model what PackedCollator or outlay.inference.isolated gives",
        )
    rows, _, width, _ = query.shape
    query, key, value = (
        t.transpose(1, 2).reshape(rows * width, t.shape[1], t.shape[3]) for t in (query, key, value)
    )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = segment_attention(
        query, key, value, bounds, told["max_length_q"], causal, scale=scaling,
        window=sliding_window, dropout=dropout,
    )  # fmt: skip
    return out.reshape(rows, width, *out.shape[1:]), None


def _mask(model: nn.Module, batch: PackedBatch) -> Tensor:
    config = _config(model)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ()
    slides = "sliding_attention" in kinds or (window is not None and not kinds)
    if slides and window is not None and max(batch.lengths) > window:
        raise Conflict(
            f"a sequence of {max(batch.lengths)} tokens is wider than the model's sliding window "
            f"of {window}, which one mask for all layers cannot say",
            'use attention="segments", or shorter sequences',
        )
    seen = segment_mask(batch.segment_ids)
    return additive(seen, _dtype(model)) if _implementation(model) == "eager" else seen


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what is added to the scores: 0, or the lowest number there is."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise Conflict("the model is no transformers model", "give one that has a config")
    return config.get_text_config(decoder=True)


def _implementation(model: nn.Module) -> str:
    return str(getattr(_config(model), "_attn_implementation", None) or "eager")
