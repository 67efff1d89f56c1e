"""Attention inside segments: nothing of one segment reaches another."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from ..core.errors import ConfigError, Conflict

BACKENDS = ("auto", "loop", "dense", "varlen", "flex")


def segment_mask(
    segment_ids: Int[Tensor, "rows width"], causal: bool = True, window: int | None = None
) -> Bool[Tensor, "rows 1 width width"]:
    """Which position sees which: its own segment, up to itself.

    Padding (a segment below 0) sees itself alone, since a row of scores without an entry has no
    softmax.

    Args:
        segment_ids: Segment of each position, as `PackedBatch.segment_ids`.
        causal: Later positions of the segment are hidden.
        window: A position sees this many positions, itself included; all by default.
    """
    width = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    same &= (segment_ids >= 0)[:, :, None]
    near = torch.ones(width, width, dtype=torch.bool, device=segment_ids.device)
    if causal:
        near = near.tril()
    if window is not None:
        near = near.triu(1 - window) if causal else near.triu(1 - window).tril(window - 1)
    diagonal = torch.eye(width, dtype=torch.bool, device=segment_ids.device)
    return ((same & near) | diagonal)[:, None]


def segment_attention(
    q: Float[Tensor, "tokens heads dim"],
    k: Float[Tensor, "tokens groups dim"],
    v: Float[Tensor, "tokens groups value"],
    cu_seqlens: Int32[Tensor, " bounds"],
    max_seqlen: int,
    causal: bool = True,
    backend: str = "auto",
    *,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "tokens heads value"]:
    r"""Softmax attention of packed tokens, segment by segment.

    Out = softmax(scale \* q k^T) v inside every segment. Arguments follow the convention of
    variable-length attention kernels.

    Args:
        q: Queries.
        k: Keys; fewer heads than queries are shared among neighbours (grouped queries).
        v: Values.
        cu_seqlens: Where each segment starts, 0 first and the number of tokens last.
        max_seqlen: Tokens of the longest segment.
        causal: Later tokens are hidden.
        backend: "loop" calls torch's attention once a segment, "dense" once for all under a
            boolean mask of tokens x tokens; both run anywhere and have gradients. "varlen"
            (CUDA, 16 bits) and "flex" (CUDA) skip what is masked. "auto" is "varlen" where it
            runs and "loop" elsewhere.
        scale: Factor of the scores; dim ** -0.5 by default.
        window: Tokens that a token sees, itself included; needs `causal`.
        dropout: Share of attention weights that are dropped ("loop" and "dense").

    Raises:
        ConfigError: An unknown backend, or (found on the CPU) segments that do not cover the
            tokens.
        Conflict: The backend does not run on these tensors.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend = {backend!r} is unknown", f"use {', '.join(BACKENDS)}")
    # On a GPU, reading the bounds would make every layer wait.
    if not q.is_cuda and (int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(q)):
        raise ConfigError(
            f"the segments cover {int(cu_seqlens[0])} to {int(cu_seqlens[-1])} of {len(q)} tokens",
            "cu_seqlens starts with 0 and ends with the number of tokens",
        )
    if window is not None and not causal:
        raise Conflict("a window needs causal attention", "set causal=True or leave window out")
    if backend == "auto":
        backend = "varlen" if _varlen_runs(q) and not dropout else "loop"
    if backend in ("varlen", "flex"):
        _check_kernel(q, backend, dropout)
    if backend == "varlen":
        return _varlen(q, k, v, cu_seqlens, max_seqlen, causal, scale, window)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if backend == "flex":
        return _flex(q, k, v, cu_seqlens, causal, scale, window)
    settings: dict[str, Any] = {"dropout_p": dropout, "scale": scale}
    if backend == "dense":
        mask = segment_mask(_owners(cu_seqlens, len(q))[None], causal, window)
        return _attend(q, k, v, attn_mask=mask, **settings)
    bounds = cu_seqlens.tolist()
    parts = []
    for start, stop in itertools.pairwise(bounds):
        inside = {**settings, "is_causal": causal and stop - start > 1}
        if window is not None and stop - start > window:
            whole = torch.zeros(1, stop - start, dtype=torch.long, device=q.device)
            inside |= {"is_causal": False, "attn_mask": segment_mask(whole, causal, window)}
        parts.append(_attend(q[start:stop], k[start:stop], v[start:stop], **inside))
    return torch.cat(parts)


def _attend(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    """Torch's attention on (tokens, heads, dim)."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **settings)[0].transpose(0, 1)


def _owners(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Number of the segment of each token."""
    places = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(places, cu_seqlens[1:], right=True)


def _varlen_runs(q: Tensor) -> bool:
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return False
    return hasattr(varlen, "varlen_attn")


def _check_kernel(q: Tensor, backend: str, dropout: float) -> None:
    if dropout:
        raise Conflict(f"backend {backend!r} has no dropout", 'use backend="loop"')
    if backend == "varlen" and not _varlen_runs(q):
        raise Conflict(
            f"backend 'varlen' does not run on {q.dtype} tensors on {q.device.type}",
            'use CUDA with float16 or bfloat16, or backend="loop"',
        )
    if backend == "flex" and not q.is_cuda:
        raise Conflict(
            f"backend 'flex' has no gradient on {q.device.type}", 'use CUDA, or backend="loop"'
        )


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    longest: int,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    behind = -1 if window is None else window - 1
    return varlen_attn(  # pyright: ignore[reportReturnType]
        q, k, v, bounds, bounds, longest, longest, scale=scale,
        window_size=(behind, 0 if causal else -1), enable_gqa=k.shape[1] != q.shape[1],
    )  # fmt: skip


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    owner, tokens = _owners(bounds, len(q)), len(q)

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = owner[query] == owner[key]
        if causal:
            allowed = allowed & (query >= key)
        return allowed if window is None else allowed & (query - key < window)

    blocks = create_block_mask(seen, None, None, tokens, tokens, device=str(q.device))
    swapped = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return _compiled_flex()(*swapped, block_mask=blocks, scale=scale)[0].transpose(0, 1)
