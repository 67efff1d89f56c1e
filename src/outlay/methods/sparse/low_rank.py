"""Plain low-rank pre-training: SLTrain's control without the sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt
from torch import nn

from ...core.card import Card
from ...core.method import OnModel
from ...nn.replaced import ReplacingMethod
from ...nn.sparse_low_rank import Init, LowRankLinear


@dataclass(frozen=True, kw_only=True)
class LowRank(ReplacingMethod, OnModel):
    r"""Pre-training with $W = \frac{\alpha}{r} B A$: SLTrain at density 0.

    How B starts decides much of how well it does, so both ways are there. With both factors
    Kaiming and alpha = r, the entries of W start about as large as a plain layer's.

    Attributes:
        rank: r.
        alpha: Numerator of the product's factor; None takes the rank, so that W = B A.
        init: "both" (A and B Kaiming) or "zero_b" (B = 0, as in SLTrain: W starts at zero).
    """

    card: ClassVar[Card] = Card(
        name="low_rank",
        title="Low-rank pre-training: every linear weight is a product of two factors",
        group="sparse",
        summary="Pre-train every linear weight as two low-rank factors; SLTrain's control.",
        claims=("weight.replaced",),
        saves=("memory", "flops", "trainable parameters", "optimizer memory"),
    )

    rank: Annotated[int, Ge(1)] = 128
    alpha: Annotated[float, Gt(0)] | None = None
    init: Init = "both"

    def make(self, name: str, layer: nn.Module, **about: Any) -> LowRankLinear:
        """Two factors for one layer."""
        return LowRankLinear(rank=self.rank, alpha=self.alpha, init=self.init, **about)
