"""SLTrain: every linear weight as a low-rank product plus a fixed random sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt
from torch import nn

from ...core.card import Card
from ...core.errors import ConfigError
from ...core.method import OnModel
from ...nn.replaced import ReplacingMethod
from ...nn.sparse_low_rank import Mode, SparseLowRankLinear


@dataclass(frozen=True, kw_only=True)
class SLTrain(ReplacingMethod, OnModel):
    r"""Pre-training with $W = \frac{\alpha}{r} B A + S$. arXiv 2406.02214, section 3.

    A is Kaiming, B zero, so that W = S at the start; S has `int(density * m * n)` entries at
    random places, fixed from the start, and its values train. Weights, gradients and moments
    shrink from m n to r (m + n) + density m n. All parameters train at one learning rate, 3e-3
    with AdamW in the paper, without weight decay: decay of B and A is not decay of W.

    The support is drawn from (seed, path of the layer) and kept in checkpoints. The factor
    alpha / r belongs to the trained function.

    Attributes:
        rank: r; 128 at 60 M parameters, 256 at 130 M and 350 M, 512 at 1 B, 1024 at 7 B.
        density: Share of the weight's entries that S holds: 0.03, 0.05 at 7 B.
        alpha: 32 at 60 M, 16 at 130 M and 350 M, 8 at 1 B and 7 B.
        mode: How products are computed, see `nn.sparse_low_rank.SparseLowRankLinear`; the result
            is one up to rounding. The published code is "materialize".
        train_values: False freezes S: the control that shows whether its training matters.
    """

    card: ClassVar[Card] = Card(
        name="sltrain",
        title="SLTrain: a sparse plus low-rank approach for parameter and memory efficient "
        "pretraining",
        paper=16,
        arxiv="2406.02214",
        group="sparse",
        summary="Pre-train every linear weight as low-rank factors plus a fixed random sparse "
        "matrix.",
        authors="Andi Han, Jiaxiang Li, Wei Huang, Mingyi Hong, Akiko Takeda, Pratik Jawanpuria, "
        "Bamdev Mishra",
        year=2024,
        claims=("weight.replaced",),
        saves=("memory", "trainable parameters", "optimizer memory"),
    )

    rank: Annotated[int, Ge(1)] = 128
    density: Annotated[float, Gt(0), Lt(1)] = 0.03
    alpha: Annotated[float, Gt(0)] = 32.0
    mode: Mode = "auto"
    train_values: bool = True

    def make(self, name: str, layer: nn.Module, **about: Any) -> SparseLowRankLinear:
        """Factors and sparse values for one layer.

        Raises:
            ConfigError: If the density leaves no entry.
        """
        size = about["in_features"] * about["out_features"]
        if int(self.density * size) == 0:
            raise ConfigError(
                f"sltrain.density = {self.density} leaves no entry in {name!r} "
                f"({about['out_features']} x {about['in_features']})",
                f"give at least {1 / size:.2g}, or use low_rank",
            )
        made = SparseLowRankLinear(
            rank=self.rank, density=self.density, alpha=self.alpha, mode=self.mode, **about
        )
        made.values.requires_grad_(self.train_values)
        return made
