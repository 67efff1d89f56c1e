"""The arithmetic of block adapters, with gradients that keep no more than they need.

Shapes: `n` rows of a batch, `in` and `out` features of the layer, `r` the block size, `q` the
width of the repeated block (`q == out` in the shard form). Formulas: arXiv 2409.15371.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import ConfigError
from ...nn.adapter import as_matrix


def block_sum(x: Float[Tensor, "n in"], r: int, dtype: torch.dtype) -> Float[Tensor, "n r"]:
    """Sum the features i with equal i mod r; a last partial block counts as padded with zeros."""
    rest = x.shape[1] % r
    if not rest:
        return x.view(len(x), x.shape[1] // r, r).sum(1, dtype=dtype)
    sums = x[:, :-rest].unflatten(1, (-1, r)).sum(1, dtype=dtype)
    return torch.cat([sums[:, :rest] + x[:, -rest:], sums[:, rest:]], 1)


def spread_(x: Float[Tensor, "n in"], sums: Float[Tensor, "n r"]) -> None:
    """Add sums[:, i mod r] to every feature i, in place: the transpose of `block_sum`."""
    r = sums.shape[1]
    rest = x.shape[1] % r
    if rest:
        x[:, -rest:].add_(sums[:, :rest])
        x = x[:, :-rest]
    x.unflatten(1, (-1, r)).add_(sums[:, None])


def repeated(block: Float[Tensor, "r q"], size: int) -> Float[Tensor, "out in"]:
    """The delta of the shard and mini forms, transposed: D[:, o mod q] for every o."""
    return block if block.shape[1] == size else block.repeat(1, size // block.shape[1])


class SharedBlock(torch.autograd.Function):
    """y = base(x) + S D with S[n, k] = sum of x[n, i] over i = k mod r; keeps S and not x.

    S is an output too, so that a second derivative knows where it came from.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Tensor, base: nn.Module) -> tuple[Tensor, Tensor]:
        """Base output with the block's product added in place, and S."""
        out = base(x)
        rows = x.reshape(-1, x.shape[-1])
        flat = out.view(-1, out.shape[-1])
        sums = block_sum(rows, block.shape[0], block.dtype)
        if block.shape[1] == flat.shape[1] and block.dtype == out.dtype:
            flat.addmm_(sums, block)
        else:
            flat.unflatten(1, (-1, block.shape[1])).add_((sums @ block)[:, None])
        ctx.weight, ctx.shape = as_matrix(base), x.shape
        ctx.save_for_backward(sums, block)
        ctx.set_materialize_grads(False)
        return out, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        """Gives dD = S^T g and dx = g W, plus g D^T spread over the blocks."""
        sums, block = ctx.saved_tensors
        out, grad = ctx.weight.shape[0], grads[0]
        flat = sums.new_zeros(len(sums), out) if grad is None else grad.reshape(-1, out)
        short = flat.to(block.dtype)
        if block.shape[1] != flat.shape[1]:
            short = short.unflatten(1, (-1, block.shape[1])).sum(1)
        dx = dblock = None
        if ctx.needs_input_grad[1]:
            dblock = sums.T @ short
        if ctx.needs_input_grad[0]:
            rows = flat @ ctx.weight
            inner = short @ block.T
            spread_(rows, inner if grads[1] is None else inner + grads[1])
            dx = rows.view(ctx.shape)
        return dx, dblock, None


def guided(
    weight: Float[Tensor, "out in"],
    block: Float[Tensor, "blocks r r"],
    axis: str,
    into: Tensor | None = None,
) -> Float[Tensor, "out in"]:
    """W'_ac = W_ac (I + D_a) + D_a over r x r blocks, or with D_c for axis "col".

    Args:
        weight: W.
        block: D, one an output block-row or an input block-column.
        axis: "row" or "col".
        into: Memory of the result's size to write to (axis "row"); nothing may need its values.
    """
    r = block.shape[1]
    out, width = weight.shape
    wide = weight.to(block.dtype)
    factor = block + torch.eye(r, dtype=block.dtype, device=block.device)
    if axis == "row":
        # Rows (output within a block, input block) lie behind each other: no permutation.
        target = None if into is None else into.view(out // r, width, r)
        stacked = torch.bmm(wide.reshape(out // r, width, r), factor, out=target)
        stacked.view(out // r, r, width // r, r).add_(block[:, :, None])
        return stacked.view(out, width)
    stacked = wide.reshape(out, width // r, r).transpose(0, 1)
    result = (stacked @ factor).transpose(0, 1)
    result.unflatten(0, (-1, r)).add_(block.transpose(0, 1))
    return result.reshape(out, width)


def guided_gradient(
    weight: Float[Tensor, "out in"], grad: Float[Tensor, "out in"], r: int, axis: str
) -> Float[Tensor, "blocks r r"]:
    """dD_a = sum over c of (W_ac + I)^T G_ac (over a of ... for axis "col")."""
    out, width = weight.shape
    if axis == "row":
        first, second = (t.reshape(out // r, width, r) for t in (weight, grad))
        plain = grad.view(out // r, r, width // r, r).sum(2)
    else:
        first, second = (t.reshape(out, width // r, r).transpose(0, 1) for t in (weight, grad))
        plain = grad.view(out // r, r, width // r, r).sum(0).transpose(0, 1)
    return torch.baddbmm(plain, first.transpose(1, 2), second)


def unguided(
    merged: Float[Tensor, "out in"],
    block: Float[Tensor, "blocks r r"],
    axis: str = "row",
    largest_condition: float = 1e4,
) -> Float[Tensor, "out in"]:
    """The base weight of a merged one, W_ac = (W'_ac - D_a)(I + D_a)^-1, when no copy was kept.

    Args:
        merged: A weight that `guided` made.
        block: The blocks it was made with.
        axis: "row" or "col".
        largest_condition: Largest condition number of any I + D_a; above it float32 keeps
            fewer than three digits.

    Raises:
        ConfigError: If a block is too close to singular.
    """
    r = block.shape[1]
    eye = torch.eye(r, dtype=block.dtype, device=block.device)
    condition = float(torch.linalg.cond((block + eye).double()).max())
    if not condition <= largest_condition:
        raise ConfigError(
            f"cond(I + D) = {condition:.3g} is above {largest_condition:.3g}: the merged weight "
            "does not determine the base weight",
            "load the base model again",
        )
    parts = merged.to(block.dtype).unflatten(0, (-1, r)).unflatten(2, (-1, r))  # (a, o, c, i)
    shift = block[:, :, None] if axis == "row" else block.transpose(0, 1)[None]
    inverse = torch.linalg.inv((block + eye).double()).to(block.dtype)
    rule = "aoci,aij->aocj" if axis == "row" else "aoci,cij->aocj"
    return torch.einsum(rule, parts - shift, inverse).reshape(merged.shape)


# Elements of the changed weight that are made at a time on a CPU: they stay in its cache, and
# less fresh memory is touched. 3 to 9 % of a layer's step at widths of 512 to 1376.
PIECE = 2**18


def _pieces(rows: int, width: int, r: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of output rows with their ranges of blocks."""
    step = max(r, PIECE // width // r * r)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), slice(start // r, stop // r)


def _in_pieces(x: Tensor, weight: Tensor, block: Tensor, axis: str) -> bool:
    same = x.dtype == weight.dtype == block.dtype
    return axis == "row" and same and x.device.type == "cpu" and not torch.is_grad_enabled()


def guided_output(
    x: Float[Tensor, "n in"], weight: Float[Tensor, "out in"], block: Tensor, bias: Tensor | None
) -> Float[Tensor, "n out"]:
    """X W'^T + b, W' made piece by piece in one memory (axis "row")."""
    out, width = weight.shape
    result, memory = x.new_empty(len(x), out), None
    for rows, blocks in _pieces(out, width, block.shape[1]):
        count = rows.stop - rows.start
        memory = x.new_empty(count, width) if memory is None else memory[:count]
        merged = guided(weight[rows], block[blocks], "row", memory)
        if bias is None:
            torch.mm(x, merged.T, out=result[:, rows])
        else:
            torch.addmm(bias[rows], x, merged.T, out=result[:, rows])
    return result


def guided_backward(
    x: Float[Tensor, "n in"],
    grad: Float[Tensor, "n out"],
    weight: Float[Tensor, "out in"],
    block: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dD) of `guided_output`: each piece of dW' gives way to its piece of W'."""
    out, width = weight.shape
    dx = x.new_zeros(x.shape) if needs[0] else None
    dblock = torch.empty_like(block) if needs[1] else None
    memory = None
    for rows, blocks in _pieces(out, width, block.shape[1]):
        part, count = grad[:, rows], rows.stop - rows.start
        memory = x.new_empty(count, width) if memory is None else memory[:count]
        if dblock is not None:
            torch.mm(part.T, x, out=memory)
            dblock[blocks] = guided_gradient(weight[rows], memory, block.shape[1], "row")
        if dx is not None:
            dx.addmm_(part, guided(weight[rows], block[blocks], "row", memory))
    return dx, dblock


class GuidedBlocks(torch.autograd.Function):
    """y = W' x + b with W' made from W and the blocks, made again in backward and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Tensor, base: nn.Module, axis: str) -> Tensor:
        """The whole output: base(x) is not computed beside it."""
        ctx.weight, ctx.axis = as_matrix(base), axis
        ctx.save_for_backward(x, block)
        if _in_pieces(x, ctx.weight, block, axis):
            rows = x.reshape(-1, x.shape[-1])
            flat = guided_output(rows, ctx.weight, block, base.bias)  # type: ignore[arg-type]
            return flat.view(*x.shape[:-1], flat.shape[1])
        merged = guided(ctx.weight, block, axis).to(x.dtype)
        return F.linear(x, merged, base.bias)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gives dW' = g^T x gives dD; dx = g W'."""
        x, block = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        weight, dx, dblock = ctx.weight, None, None
        rows = x.reshape(-1, x.shape[-1])
        if _in_pieces(x, weight, block, ctx.axis):
            dx, dblock = guided_backward(rows, grad, weight, block, ctx.needs_input_grad[:2])
            return (None if dx is None else dx.view(x.shape)), dblock, None, None
        if ctx.needs_input_grad[1]:
            outer = (grad.T @ rows).to(block.dtype)
            dblock = guided_gradient(weight.to(block.dtype), outer, block.shape[1], ctx.axis)
        if ctx.needs_input_grad[0]:
            dx = (grad @ guided(weight, block, ctx.axis).to(grad.dtype)).view(x.shape)
        return dx, dblock, None, None
