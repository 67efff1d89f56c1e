"""GaLore: Adam's moments in the leading singular directions of the gradient. A baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from ...core.card import Card
from ...core.method import Context, OnOptimizer
from ...nn.projected_adam import ProjectedAdamW, pattern_of, project_back
from ...nn.targets import ATTENTION_AND_MLP


@dataclass(frozen=True, kw_only=True)
class GaLore(OnOptimizer):
    """AdamW on gradients projected to their leading singular subspace. arXiv 2403.03507, alg. 2.

    The weight stays dense; moments take r (2 max + min) entries in place of 2 m n. They are kept
    when the subspace changes. Singular vectors are given a sign (their largest entry is
    positive), so that a new subspace does not depend on the decomposition's choice; the
    published code leaves it open. The decompositions are not among the FLOPs that a run counts.

    Attributes:
        rank: r.
        update_every: Steps between two decompositions; 200 in the paper.
        scale: Factor of the projected update; 0.25 in the paper's pre-training.
        target_modules: Regular expression over the paths of modules whose matrices are projected.
    """

    card: ClassVar[Card] = Card(
        name="galore",
        title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        arxiv="2403.03507",
        group="optimizers",
        summary="AdamW whose moments live in the gradient's leading singular subspace.",
        authors="Jiawei Zhao, Zhenyu Zhang, Beidi Chen, Zhangyang Wang, Anima Anandkumar, "
        "Yuandong Tian",
        year=2024,
        claims=("optimizer",),
        saves=("optimizer memory",),
    )

    rank: Annotated[int, Ge(1)] = 128
    update_every: Annotated[int, Ge(1)] = 200
    scale: Annotated[float, Gt(0)] = 0.25
    target_modules: str = ATTENTION_AND_MLP

    def validate(self) -> None:
        """Refuse a broken expression."""
        pattern_of(self.target_modules)

    def build(
        self, groups: Sequence[dict[str, Any]], settings: Any, context: Context
    ) -> torch.optim.Optimizer:
        """The optimizer over these groups."""
        return _GaLoreAdamW(self, groups, settings.betas, settings.eps)


class _GaLoreAdamW(ProjectedAdamW):
    def __init__(
        self, method: GaLore, groups: Sequence[dict[str, Any]], betas: tuple[float, float],
        eps: float,
    ) -> None:  # fmt: skip
        super().__init__(
            groups, betas, eps, method.rank, method.update_every, method.target_modules
        )
        self.scale = method.scale

    def basis(self, gradient: Float[Tensor, "m n"], name: str, turn: int) -> Tensor:
        """Leading singular vectors of the shorter side."""
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        tall = gradient.shape[0] >= gradient.shape[1]
        kept = right[: self.rank] if tall else left[:, : self.rank].T
        largest = kept.gather(1, kept.abs().argmax(1, keepdim=True))
        kept = kept * largest.sign()
        return kept if tall else kept.T.contiguous()

    def full_update(
        self, small: Tensor, projected: Tensor, gradient: Tensor, state: dict[str, Any]
    ) -> Tensor:
        """The small update carried back, times the scale."""
        return project_back(small, state["basis"], gradient.shape) * self.scale
