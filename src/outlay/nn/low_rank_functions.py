"""Forward and backward of W = scaling * B A + S in two ways; both keep x and the parameters alone.

Shapes: W (m, n), A (r, n), B (m, r), t tokens, S with k entries or absent. With g = dL/dy:
dx = g W, dB = g^T (x A^T) * scaling, dA = (g B)^T x * scaling, dS = g^T x at the support.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..core.meter import stand_for
from .sparse_products import sampled_product, sparse_product

Shape = tuple[int, int, int, int]


def cast(x: Tensor) -> Tensor:
    """The input in the type that autocast asks for, as a plain linear layer would take it."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(kind))


def _shape(a: Tensor, b: Tensor, values: Tensor | None) -> Shape:
    """m, n, r and k."""
    return len(b), a.shape[1], len(a), 0 if values is None else len(values)


def _report(executed: int, tokens: int, shape: Shape) -> None:
    """FLOPs of a forward pass: the factored count, and the dense one."""
    m, n, r, k = shape
    effective = 2 * tokens * (r * (m + n) + k)
    stand_for(executed, effective=effective, dense=2 * tokens * m * n)


def _report_back(executed: int, tokens: int, shape: Shape, needs: tuple[bool, ...]) -> None:
    """FLOPs of a backward pass, of the gradients that are needed."""
    m, n, r, k = shape
    for_x, for_a, for_b, for_values = needs[:4]
    inner = for_x * (r * (m + n) + k) + for_a * r * n + for_b * r * m + for_values * k
    dense = m * n * (for_x + (for_a or for_b or for_values))
    stand_for(executed, effective=2 * tokens * inner, dense=2 * tokens * dense)


def _formed(left: Tensor, right: Tensor, values: Tensor | None, positions: Tensor | None) -> Tensor:
    """The weight, dense."""
    weight = left @ right
    if values is not None and positions is not None:
        weight.view(-1).index_add_(0, positions, values.to(weight.dtype))
    return weight


class Materialized(torch.autograd.Function):
    """The weight is formed, used and thrown away, in the forward and in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, values: Tensor | None,
        positions: Tensor | None, bias: Tensor | None, scaling: float,
    ) -> Tensor:  # fmt: skip
        """Output x W^T + bias; 2 r m n + 2 t m n FLOPs."""
        ctx.save_for_backward(x, a, b, values, positions)
        ctx.scaling = scaling
        shape = m, n, r, _ = _shape(a, b, values)
        rows, left = x.reshape(-1, n), b.to(x.dtype)
        weight = _formed(left, (a * scaling).to(x.dtype), values, positions)
        out = F.linear(rows, weight, None if bias is None else bias.to(x.dtype))
        _report(2 * m * n * (r + len(rows)), len(rows), shape)
        return out.view(*x.shape[:-1], m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Through the weight's dense gradient D = g^T x: dB = D A^T, dA = B^T D, dS = D there."""
        x, a, b, values, positions = ctx.saved_tensors
        needs, shape = ctx.needs_input_grad, _shape(a, b, values)
        m, n, r, _ = shape
        rows, flat = x.reshape(-1, n), grads[0].reshape(-1, m)
        left, right = b.to(x.dtype), (a * ctx.scaling).to(x.dtype)
        dx = da = db = dvalues = None
        products, formings = 0, 0
        if needs[0]:
            dx = (flat @ _formed(left, right, values, positions)).view(x.shape)
            products, formings = 1, 1
        if any(needs[1:4]):
            dense = flat.T @ rows
            products += 1
            if needs[1]:
                da = (left.T @ dense).to(a.dtype) * ctx.scaling
            if needs[2]:
                db = (dense @ right.T).to(b.dtype)
            if values is not None and needs[3]:
                dvalues = dense.view(-1).index_select(0, positions).to(values.dtype)
            formings += needs[1] + needs[2]
        executed = 2 * m * n * (len(rows) * products + r * formings)
        _report_back(executed, len(rows), shape, needs)
        dbias = flat.sum(0).to(a.dtype) if needs[5] else None
        return dx, da, db, dvalues, None, dbias, None


class Factored(torch.autograd.Function):
    """Products with the parts; neither the weight nor its gradient is ever formed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, values: Tensor | None,
        positions: Tensor | None, bias: Tensor | None, scaling: float,
    ) -> Tensor:  # fmt: skip
        """Output (x A^T) B^T * scaling + x S^T + bias; 2 t (r (m + n) + k) FLOPs."""
        ctx.save_for_backward(x, a, b, values, positions)
        ctx.scaling = scaling
        shape = m, n, r, k = _shape(a, b, values)
        rows = x.reshape(-1, n)
        hidden = rows @ (a * scaling).to(x.dtype).T
        out = F.linear(hidden, b.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if values is not None and positions is not None:
            out += sparse_product(values, positions, m, n, rows.T, False).T
        _report(2 * len(rows) * (r * (m + n) + k), len(rows), shape)
        return out.view(*x.shape[:-1], m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With h = x A^T made again: dB = g^T h, dA = (g B)^T x, dx = (g B) A + g S."""
        x, a, b, values, positions = ctx.saved_tensors
        needs, shape = ctx.needs_input_grad, _shape(a, b, values)
        m, n, r, k = shape
        rows, flat = x.reshape(-1, n), grads[0].reshape(-1, m)
        left, right = b.to(x.dtype), (a * ctx.scaling).to(x.dtype)
        dx = da = db = dvalues = None
        inner = flat @ left if needs[0] or needs[1] else None
        work = r * m * (inner is not None)
        if needs[0]:
            dx = inner @ right
            if values is not None:
                dx += sparse_product(values, positions, m, n, flat.T, True).T
            dx = dx.view(x.shape)
            work += r * n + k
        if needs[1]:
            da = (inner.T @ rows).to(a.dtype) * ctx.scaling  # type: ignore[union-attr]
            work += r * n
        if needs[2]:
            db = (flat.T @ (rows @ right.T)).to(b.dtype)
            work += r * (n + m)
        if values is not None and needs[3]:
            dvalues = sampled_product(flat.T, rows, positions).to(values.dtype)
            work += k
        _report_back(2 * len(rows) * work, len(rows), shape, needs)
        dbias = flat.sum(0).to(a.dtype) if needs[5] else None
        return dx, da, db, dvalues, None, dbias, None


__all__ = ["Factored", "Materialized", "cast"]
