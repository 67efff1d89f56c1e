"""Bone: one zero-initialized block shared by all shards of a weight matrix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Lt
from torch import nn

from ...core.card import Card
from ...core.claims import Claim
from ...core.errors import ConfigError
from ...core.method import Context, OnModel
from ...nn.adapter import AdapterMethod, Delta, delta_dtype
from ...nn.targets import linear_shape, pattern_value
from ._bone_layers import GuidedBlocksDelta, SharedBlockDelta

Variant = Literal["shard", "mini", "bat"]


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
