"""APOLLO: full gradients scaled as small random projections of them say. A baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from ...core.card import Card
from ...core.method import Context, OnOptimizer, generator_of
from ...nn.projected_adam import ProjectedAdamW, pattern_of
from ...nn.targets import ATTENTION_AND_MLP

_LARGEST_GROWTH = 1.01  # of the update's norm from one step to the next
_TINY = 1e-8


@dataclass(frozen=True, kw_only=True)
class Apollo(OnOptimizer):
    """SGD-like memory: each channel's gradient gets Adam's step length. arXiv 2412.05270, alg. 1.

    Moments are kept of a random projection alone; the ratio of the norms of Adam's direction and
    of the projected gradient scales the full gradient, a channel at a time ("apollo") or as a
    whole ("mini"). The norm of the update may grow by 1 % a step. Projections are drawn from
    (seed, parameter, turn) and kept, so they take part in the memory.

    Attributes:
        variant: "apollo" or "mini".
        rank: None takes the published one: 256, or 1 for mini.
        update_every: Steps between two projections; 200 in the paper.
        scale: The update is multiplied by its root. None takes the published one: 1, or 128 for
            mini.
        target_modules: Regular expression over the paths of modules whose matrices are projected.
    """

    card: ClassVar[Card] = Card(
        name="apollo",
        title="APOLLO: SGD-like Memory, AdamW-level Performance",
        arxiv="2412.05270",
        group="optimizers",
        summary="Gradients scaled by channel as AdamW on a random projection would scale them.",
        authors="Hanqing Zhu, Zhenyu Zhang, Wenyan Cong, Xi Liu, Sem Park, Vikas Chandra, Bo "
        "Long, David Z. Pan, Zhangyang Wang, Jinwon Lee",
        year=2024,
        claims=("optimizer",),
        saves=("optimizer memory",),
    )

    variant: Literal["apollo", "mini"] = "apollo"
    rank: Annotated[int, Ge(1)] | None = None
    update_every: Annotated[int, Ge(1)] = 200
    scale: Annotated[float, Gt(0)] | None = None
    target_modules: str = ATTENTION_AND_MLP

    def validate(self) -> None:
        """Refuse a broken expression."""
        pattern_of(self.target_modules)

    def build(
        self, groups: Sequence[dict[str, Any]], settings: Any, context: Context
    ) -> torch.optim.Optimizer:
        """The optimizer over these groups."""
        return _ApolloAdamW(self, groups, settings.betas, settings.eps, context.seed)


class _ApolloAdamW(ProjectedAdamW):
    def __init__(
        self, method: Apollo, groups: Sequence[dict[str, Any]], betas: tuple[float, float],
        eps: float, seed: int,
    ) -> None:  # fmt: skip
        self.by_channel, self.seed = method.variant == "apollo", seed
        rank = (256 if self.by_channel else 1) if method.rank is None else method.rank
        scale = (1.0 if self.by_channel else 128.0) if method.scale is None else method.scale
        super().__init__(groups, betas, eps, rank, method.update_every, method.target_modules)
        self.factor = math.sqrt(scale)

    def basis(self, gradient: Float[Tensor, "m n"], name: str, turn: int) -> Tensor:
        """Normal entries of variance 1 / r."""
        m, n = gradient.shape
        shape = (self.rank, n) if m >= n else (m, self.rank)
        drawn = torch.randn(shape, generator=generator_of(self.seed, "apollo", name, turn))
        return (drawn / math.sqrt(self.rank)).to(gradient)

    def full_update(
        self, small: Tensor, projected: Tensor, gradient: Tensor, state: dict[str, Any]
    ) -> Tensor:
        """The gradient, scaled and held back where its norm grows too fast."""
        along = None
        if self.by_channel:
            along = 1 if gradient.shape[0] >= gradient.shape[1] else 0
        lengths = [torch.linalg.vector_norm(t, dim=along, keepdim=True) for t in (small, projected)]
        update = gradient * (lengths[0] / (lengths[1] + _TINY))
        norm = torch.linalg.vector_norm(update)
        if "update_norm" in state:
            growth = norm / (state["update_norm"] + _TINY)
            held = growth.clamp(min=_LARGEST_GROWTH) / _LARGEST_GROWTH
            update, norm = update / held, norm / held
        state["update_norm"] = norm
        return update * self.factor
