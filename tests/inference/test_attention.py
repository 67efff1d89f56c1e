"""Segment attention: every backend gives what each segment alone gives."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from outlay.core.errors import ConfigError, Conflict
from outlay.inference import segment_attention, segment_mask

BOUNDS = torch.tensor([0, 3, 4, 11, 19], dtype=torch.int32)


def tensors(groups=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(19, heads, 8, generator=generator) for heads in (4, groups, groups))


def reference(q, k, v, causal, window=None):
    """Softmax written out, a segment at a time."""
    parts, bounds = [], BOUNDS.tolist()
    for start, stop in itertools.pairwise(bounds):
        size = stop - start
        near = torch.ones(size, size, dtype=torch.bool)
        near = near.tril() if causal else near
        near = near if window is None else near.triu(1 - window)
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * 8**-0.5
        weights = scores.masked_fill(~near, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[start:stop]))
    return torch.cat(parts)


@pytest.mark.parametrize("backend", ["auto", "loop", "dense"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 3)])
def test_backends_agree_with_the_formula(backend, causal, window):
    q, k, v = tensors()
    out = segment_attention(q, k, v, BOUNDS, 8, causal, backend, window=window)
    torch.testing.assert_close(out, reference(q, k, v, causal, window), atol=1e-6, rtol=1e-6)


def test_loop_and_dense_agree_in_values_and_gradients():
    found = []
    for backend in ("loop", "dense"):
        inputs = [t.requires_grad_() for t in tensors(groups=2)]
        out = segment_attention(*inputs, BOUNDS, 8, backend=backend)
        (out * out.detach().cos()).sum().backward()
        found.append([out.detach(), *(t.grad for t in inputs)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-6)


def test_grouped_queries_share_keys_with_their_neighbours():
    q, k, v = tensors(groups=2)
    out = segment_attention(q, k, v, BOUNDS, 8)
    wide = (t.repeat_interleave(2, 1) for t in (k, v))
    torch.testing.assert_close(out, reference(q, *wide, True), atol=1e-6, rtol=1e-6)


def test_padding_sees_itself_and_gives_no_nan():
    owners = torch.tensor([[0, 0, 1, -1, -1]])
    seen = segment_mask(owners)
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1]]  # fmt: skip
    x = torch.randn(1, 1, 5, 4)
    assert F.scaled_dot_product_attention(x, x, x, attn_mask=seen).isfinite().all()


def test_what_a_backend_cannot_do_is_refused():
    q, k, v = tensors()
    with pytest.raises(ConfigError, match="backend"):
        segment_attention(q, k, v, BOUNDS, 8, backend="magic")
    with pytest.raises(ConfigError, match="segments cover"):
        segment_attention(q, k, v, BOUNDS[:-1], 8)
    with pytest.raises(Conflict, match="window"):
        segment_attention(q, k, v, BOUNDS, 8, False, window=2)
    for backend in ("varlen", "flex"):
        with pytest.raises(Conflict, match=backend):
            segment_attention(q, k, v, BOUNDS, 8, backend=backend)
