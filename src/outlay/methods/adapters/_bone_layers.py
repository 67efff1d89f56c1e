"""Bone's layers: the repeated block, and the blocks that guide the weight. arXiv 2409.15371."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn.adapter import Delta, as_matrix, fusable, plain_layer
from ...nn.targets import is_linear
from ._bone_math import GuidedBlocks, SharedBlock, block_sum, guided, repeated


class BlockDelta(Delta):
    """What both forms share: one parameter named `block`, PEFT's `miss_block`."""

    block: nn.Parameter

    def peft_tensors(self) -> dict[str, Tensor]:
        """The block."""
        return {"miss_block": self.block}

    @torch.no_grad()
    def load_peft_tensors(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
    ) -> None:
        """Take over a block of the same shape."""
        self.block.copy_(tensors["miss_block"])


class SharedBlockDelta(BlockDelta):
    r"""The shard and mini forms: delta W[o, i] = D[i mod r, o mod q].

    Attributes:
        block: D, zeros at the start. Shape (r, q); q = out in the shard form.
    """

    def __init__(self, r: int, width: int, shape: tuple[int, int], p: float, dtype: torch.dtype):
        super().__init__()
        self.block = nn.Parameter(torch.zeros(r, width, dtype=dtype))
        self.shape = shape
        self.dropout = nn.Dropout(p) if p else nn.Identity()

    def forward(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """Block sums of x times D; dropout acts on x before the sum."""
        if not is_linear(plain_layer(base)):
            return super().forward(self.dropout(x), base)
        rows = self.dropout(x).reshape(-1, x.shape[-1])
        sums = block_sum(rows, len(self.block), self.block.dtype)
        return (sums @ repeated(self.block, self.shape[0])).view(*x.shape[:-1], self.shape[0])

    def output(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """Base and delta in one function that keeps the block sums and not x."""
        dropping = self.training and isinstance(self.dropout, nn.Dropout)
        if dropping or not fusable(x, base):
            return super().output(x, base)
        return SharedBlock.apply(x, self.block, base)[0]  # type: ignore[index]

    def weight(self, base: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """D repeated over the shards, transposed."""
        block = repeated(self.block, self.shape[0]).to(base.dtype)
        return block.repeat(math.ceil(self.shape[1] / len(block)), 1)[: self.shape[1]].T

    def to_lora(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """A = [I I ...] cut to the input's width, B = D repeated, transposed: exact."""
        r = len(self.block)
        eye = torch.eye(r, dtype=self.block.dtype, device=self.block.device)
        a = eye.repeat(1, math.ceil(self.shape[1] / r))[:, : self.shape[1]]
        return a, repeated(self.block.detach(), self.shape[0]).T


class GuidedBlocksDelta(BlockDelta):
    """The bat form: W'_ac = W_ac (I + D_a) + D_a, or with D_c for the axis "col".

    Attributes:
        block: D, zeros at the start. Shape (blocks, r, r).
    """

    multiplicative = True

    def __init__(self, r: int, blocks: int, axis: str, dtype: torch.dtype):
        super().__init__()
        self.block = nn.Parameter(torch.zeros(blocks, r, r, dtype=dtype))
        self.axis = axis

    def output(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """One product with the changed weight, which is not kept for the backward pass."""
        if fusable(x, base):
            return GuidedBlocks.apply(x, self.block, base, self.axis)  # type: ignore[return-value]
        if is_linear(base):
            merged = guided(as_matrix(base), self.block, self.axis).to(x.dtype)
            return F.linear(x, merged, base.bias)  # type: ignore[arg-type]
        return super().output(x, base)

    def weight(self, base: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W' - W."""
        return (guided(base, self.block, self.axis) - base).to(base.dtype)
