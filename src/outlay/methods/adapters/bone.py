"""Bone: one zero-initialized block shared by all shards of a weight matrix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Lt
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.card import Card
from ...core.claims import Claim
from ...core.errors import ConfigError
from ...core.method import Context, OnModel
from ...nn.adapter import AdapterMethod, Delta, as_matrix, delta_dtype, fusable, plain_layer
from ...nn.targets import is_linear, linear_shape, pattern_value
from ._bone_math import GuidedBlocks, SharedBlock, block_sum, guided, repeated

Variant = Literal["shard", "mini", "bat"]


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
        return SharedBlock.apply(x, self.block, base)  # type: ignore[return-value]

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


@dataclass(frozen=True, kw_only=True)
class Bone(AdapterMethod, OnModel):
    r"""Block affine adapter: a small zero block repeated over a weight. arXiv 2409.15371.

    - "shard" (Bone of v4 on, DiSHA, MiSS): $\Delta W_{oi} = D_{i \bmod r,\,o}$, r x out
      parameters, rank at most r.
    - "mini": $\Delta W_{oi} = M_{i \bmod r,\,o \bmod q}$ with q = `mini_r`, r x q parameters.
    - "bat" (Bone of v1 to v3): $W'_{ac} = W_{ac}(I + D_a) + D_a$ over r x r blocks, r x out
      parameters (r x in for `bat_axis="col"`), full rank; multiplies the frozen weight.

    There is no scaling factor. Comparing by r across methods is meaningless: compare by
    trainable parameters. The paper trains with AdamW, learning rate 2e-5, weight decay 0; a
    tuned rate is far higher on small models.

    Attributes:
        r: Size of the block, 64 in the paper. In bat it must divide in and out.
        variant: "shard", "mini" or "bat".
        mini_r: Width q of the repeated block in mini; must divide out.
        bat_axis: Which block index D follows in bat: "row" (output, as published) or "col".
        dropout: Probability of dropping an input feature before the sum (shard and mini).
        rank_pattern: r of layers that differ, by name or regular expression.
    """

    card: ClassVar[Card] = Card(
        name="bone",
        title="Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for "
        "Large Language Models",
        paper=34,
        arxiv="2409.15371",
        group="adapters",
        summary="One zero block shared by all shards of a weight; no scaling, no random factor.",
        authors="Jiale Kang and Qingyu Yin",
        year=2024,
        claims=("delta.additive",),
        saves=("trainable parameters", "optimizer memory"),
        freezes_base=True,
    )

    r: Annotated[int, Ge(1)] = 64
    variant: Variant = "shard"
    mini_r: Annotated[int, Ge(1)] = 1
    bat_axis: Literal["row", "col"] = "row"
    dropout: Annotated[float, Ge(0.0), Lt(1.0)] = 0.0
    rank_pattern: tuple[tuple[str, Annotated[int, Ge(1)]], ...] | dict[str, int] = ()

    def validate(self) -> None:
        """Refuse settings of another variant."""
        if self.variant == "bat" and self.dropout:
            raise ConfigError(
                f"bone.dropout = {self.dropout} with variant 'bat', which changes the weight",
                "set dropout=0, or use variant 'shard' or 'mini'",
            )
        if self.variant != "mini" and self.mini_r != 1:
            raise ConfigError(
                f"bone.mini_r = {self.mini_r} with variant {self.variant!r}",
                "only variant 'mini' has it: set variant='mini' or leave mini_r out",
            )

    def kinds(self) -> tuple[type[nn.Module], ...]:
        """Convolutions too, as the matrix (out, in * kernel)."""
        return (nn.Conv2d,)

    def make(self, name: str, layer: nn.Module, context: Context | None = None) -> Delta:
        """A zero block for one layer.

        Raises:
            ConfigError: If r or mini_r does not divide the layer's sizes.
        """
        out, width = linear_shape(layer)
        r, dtype = pattern_value(self.rank_pattern, name, self.r), delta_dtype(layer)
        if self.variant == "bat":
            common = math.gcd(out, width)
            if common % r:
                divisors = [str(d) for d in range(1, common + 1) if common % d == 0]
                raise ConfigError(
                    f"bone.r = {r} does not divide {name!r} ({out} x {width}) into square blocks",
                    f"variant 'bat' needs a common divisor: {', '.join(divisors)}",
                )
            blocks = (out if self.bat_axis == "row" else width) // r
            return GuidedBlocksDelta(r, blocks, self.bat_axis, dtype)
        if r > width:
            warnings.warn(
                f"bone.r = {r} is above the {width} inputs of {name!r}: rows of the block are idle",
                stacklevel=2,
            )
        q = out if self.variant == "shard" else self.mini_r
        if out % q:
            raise ConfigError(
                f"bone.mini_r = {q} does not divide the {out} outputs of {name!r}",
                f"use one of {', '.join(str(d) for d in range(1, out + 1) if out % d == 0)}",
            )
        return SharedBlockDelta(r, q, (out, width), self.dropout, dtype)

    def to_peft(
        self, deltas: Mapping[str, Delta], layers: Mapping[str, nn.Module]
    ) -> dict[str, Any] | None:
        """PEFT's MiSS: one r, `nn.Linear` alone, the blocks of bat along the output alone."""
        linear = all(isinstance(layer, nn.Linear) for layer in layers.values())
        columns = self.variant == "bat" and self.bat_axis == "col"
        if self.rank_pattern or columns or not linear:
            return None
        return {
            "peft_type": "MISS",
            "r": self.r,
            "miss_dropout": self.dropout,
            "mini_r": self.mini_r,
            "init_weights": True if self.variant == "shard" else self.variant,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Bone | None:
        """The settings of a MiSS config."""
        if config["peft_type"] != "MISS":
            return None
        kind = config.get("init_weights", True)
        variant: Variant = kind if kind in ("mini", "bat") else "shard"
        return cls(
            r=config["r"],
            variant=variant,
            mini_r=config.get("mini_r", 1) if variant == "mini" else 1,
            dropout=float(config.get("miss_dropout", 0.0)) if variant != "bat" else 0.0,
        )

    def claims(self, model: nn.Module | None) -> list[Claim]:
        """An addition that stacks, or in bat a product that does not."""
        word = "delta.multiplicative" if self.variant == "bat" else "delta.additive"
        return [Claim(word, claim.parameters) for claim in super().claims(model)]
