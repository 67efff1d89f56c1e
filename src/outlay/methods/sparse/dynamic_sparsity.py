"""SET and RigL: sparse training whose live entries move, baselines of fixed masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from ...core.card import Card
from ...core.claims import Claim
from ...core.live import Live
from ...core.method import OnStep, Seen, Step
from ...nn.masking import Rule
from ...nn.masks import Distribution
from ...nn.prunable import prunable_in, prunable_weights
from ...nn.sparse_run import MaskWatcher, known_steps


@dataclass(frozen=True, kw_only=True)
class DynamicSparsity(OnStep):
    r"""Sparse training at constant density with a mask that moves.

    Every `every` steps, up to `stop` of the run, each weight drops the share
    $\frac{f}{2}(1 + \cos(\pi t / T_{stop}))$ of its live entries, those of smallest magnitude, and
    lets as many others live, from zero: at random in SET (arXiv 1707.04780), where the gradient is
    largest in RigL (arXiv 1911.11134, algorithm 1). Settings are those of the SPDF authors' 125 M
    reference configurations.

    The dense gradient that RigL looks at is there in any step of this loop and costs nothing more.
    In RigL's algorithm a step that moves the mask updates no weight; here it updates the entries
    that live afterwards. Hardware that skips zeros would need a dense product in these steps, which
    `effective_flops` leaves out: at most 1 % more at 75 % and `every=100`.

    Attributes:
        rule: "rigl" or "set".
        sparsity: Share of the prunable weights held at zero.
        distribution: "uniform" over weights, or "erk", see `densities`.
        drop_fraction: Share f of the live entries that the first move would drop.
        every: Steps between moves.
        stop: Share of the run's steps after which the mask stays.
        exclude: Expressions or ends of paths of layers that stay dense.
        head: The output layer too, if it is not tied to the embedding.
    """

    card: ClassVar[Card] = Card(
        name="dynamic_sparsity",
        title="Dynamic sparse training: SET and RigL",
        arxiv="1911.11134",
        group="sparse",
        summary="Sparse training whose live entries move: at random (SET) or by gradient (RigL).",
        authors="Utku Evci, Trevor Gale, Jacob Menick, Pablo Samuel Castro, Erich Elsen",
        year=2019,
        claims=("mask",),
        saves=("effective FLOPs",),
    )
    rule: Rule = "rigl"
    sparsity: Annotated[float, Ge(0.0), Lt(1.0)] = 0.75
    distribution: Distribution = "uniform"
    drop_fraction: Annotated[float, Gt(0.0), Le(1.0)] = 0.3
    every: Annotated[int, Ge(1)] = 100
    stop: Annotated[float, Gt(0.0), Le(1.0)] = 0.75
    exclude: tuple[str, ...] = ()
    head: bool = False

    def claims(self, model: nn.Module | None) -> list[Claim]:
        """The weights that may be masked."""
        names = () if model is None else prunable_weights(model, self.exclude, self.head)
        return [Claim("mask", frozenset(names))]

    def dropped(self, step: int, last: float) -> float:
        """Share of the live entries that a move at this step drops; `last` is the stop."""
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * step / last))

    def watch(self, live: Live) -> MaskWatcher:
        """Draws the masks before the first step and moves them.

        Raises:
            ConfigError: If the budget does not say how many steps there will be.
        """
        return _Moving(self, live)


class _Moving(MaskWatcher):
    """Masks that move where gradients are complete and the update has not been made."""

    def __init__(self, method: DynamicSparsity, live: Live) -> None:
        super().__init__(live, prunable_in(live, method.exclude, method.head), method.card.name)
        self.method = method
        self.last = method.stop * known_steps(live, method.card.name)

    def start(self) -> None:
        """Draw the masks."""
        self.masks.draw(self.method.sparsity, self.method.distribution)

    def after_backward(self, step: Step, seen: Seen) -> None:
        """Move the masks by the step's dense gradients."""
        if step.index % self.method.every == 0 and 0 < step.index < self.last:
            fraction = self.method.dropped(step.index, self.last)
            self.masks.regrow(fraction, self.method.rule, f"{step.index}")

    def may_stop(self, step: Step) -> bool:
        """Only where the mask stays."""
        return step.index + 1 >= self.last
