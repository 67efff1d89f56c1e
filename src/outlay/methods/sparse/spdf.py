"""SPDF: train a fixed random subset of the weights, then let every weight learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from ...core.card import Card
from ...core.claims import Claim
from ...core.live import Live
from ...core.method import OnStep, Step
from ...nn.masking import Start
from ...nn.masks import Distribution
from ...nn.prunable import prunable_in, prunable_weights
from ...nn.sparse_run import MaskWatcher

_ROUNDING = 1e-9


def flop_ratio(
    sparsity: float, *, layers: int, width: int, inner: int, length: int, vocabulary: int
) -> float:
    r"""How many times fewer FLOPs a token costs when a decoder trains sparsely.

    Forward FLOPs of a token are $2 (1 - s) n_P + 2 n_{head} + 4\,\mathrm{length}\,\mathrm{width}\,
    \mathrm{layers}$, with $n_P = \mathrm{layers}\,(4\,\mathrm{width}^2 + 2\,\mathrm{width}\,
    \mathrm{inner})$ prunable weights, $n_{head} = \mathrm{vocabulary}\cdot\mathrm{width}$ and
    attention over all pairs of positions; training costs three times that, dense or sparse. Head
    and attention stay dense, so small models gain less. Reproduces the 2.5 x of arXiv 2303.10464
    for 1.3 billion parameters at 75 %.

    Args:
        sparsity: Share of the prunable weights that is held at zero.
        layers: Blocks.
        width: Hidden width.
        inner: Width of the feed-forward part, of two matrices.
        length: Tokens of a sequence.
        vocabulary: Tokens that the head chooses among.
    """
    prunable = layers * (4 * width * width + 2 * width * inner)
    rest = 2 * vocabulary * width + 4 * length * width * layers
    return (2 * prunable + rest) / (2 * (1 - sparsity) * prunable + rest)


@dataclass(frozen=True, kw_only=True)
class SPDF(OnStep):
    """Sparse pre-training, then dense fine-tuning. arXiv 2303.10464.

    Before the first step a mask is drawn for every prunable weight and never changes: masked
    entries are zero in value, gradient and moments, whatever decay or clipping does. Dense
    fine-tuning is a second stage without this method: it starts from the exported weights with a
    fresh optimizer, masked entries at zero and free to grow. The surviving weights keep the start
    that they would have in a dense model, and the learning rate is the dense one, as published.

    Not established: whether the authors draw an exact count or each entry by itself; here it is
    exactly round((1 - sparsity) * entries) a weight.

    Attributes:
        sparsity: Share of the prunable weights held at zero; the paper has 0.5 and 0.75.
        distribution: "uniform" over weights as published, or "erk", see `densities`.
        init: Live entries are "random", or those of largest "magnitude": for weights that are
            trained already, and to go on sparsely from a sparse stage with the masks it had.
        until: Share of the budget after which all weights train (the follow-up's variable SPDF has
            0.87); 1 for the whole run. A new warm-up for the dense part takes a stage of its own.
        exclude: Expressions or ends of paths of layers that stay dense.
        head: The output layer too, if it is not tied to the embedding.
    """

    card: ClassVar[Card] = Card(
        name="spdf",
        title="SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models",
        paper=5,
        arxiv="2303.10464",
        group="sparse",
        summary="Hold a fixed random share of the weights at zero; a later stage trains them all.",
        authors="Vithursan Thangarasa, Abhay Gupta, William Marshall, Tianda Li, Kevin Leong, "
        "Dennis DeCoste, Sean Lie, Shreyas Saxena",
        year=2023,
        claims=("mask",),
        saves=("effective FLOPs",),
    )
    sparsity: Annotated[float, Ge(0.0), Lt(1.0)] = 0.75
    distribution: Distribution = "uniform"
    init: Start = "random"
    until: Annotated[float, Gt(0.0), Le(1.0)] = 1.0
    exclude: tuple[str, ...] = ()
    head: bool = False

    def claims(self, model: nn.Module | None) -> list[Claim]:
        """The weights that may be masked, as long as they are."""
        names = frozenset(() if model is None else prunable_weights(model, self.exclude, self.head))
        return [Claim("mask", names, (0.0, self.until))]

    def watch(self, live: Live) -> MaskWatcher:
        """Draws the masks before the first step and lifts them when their time is over."""
        return _Static(self, live)


class _Static(MaskWatcher):
    """Fixed masks up to a share of the budget."""

    def __init__(self, method: SPDF, live: Live) -> None:
        axes = prunable_in(live, method.exclude, method.head)
        super().__init__(live, axes, method.card.name)
        self.method, self.dense = method, method.until == 1

    def start(self) -> None:
        """Draw the masks."""
        self.masks.draw(self.method.sparsity, self.method.distribution, self.method.init)

    def before_step(self, step: Step) -> None:
        """Start, or let all weights train."""
        super().before_step(step)
        if not self.dense and step.share >= self.method.until - _ROUNDING:
            self.dense = True
            self.masks.densify()

    def may_stop(self, step: Step) -> bool:
        """Not before the dense part that the settings promise."""
        return self.dense

    def state_dict(self) -> dict[str, Any]:
        """Counts, and whether the dense part has begun."""
        return super().state_dict() | {"dense": self.dense}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        super().load_state_dict(state)
        self.dense = bool(state["dense"])
