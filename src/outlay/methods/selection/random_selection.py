"""Keep a random share of the documents: the control beside every other selection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le

from ...core.card import Card
from ...core.method import OnData
from ...shards.deciding import Rule, Unit
from ...shards.scorers import Scorer
from ...shards.selector import Selecting, Texts


@dataclass(frozen=True, kw_only=True)
class RandomSelection(Selecting, OnData):
    """Keep a share drawn by a hash of the seed and each document's id.

    What is drawn does not depend on the order of the documents or on how they lie in shards, and a
    larger share holds every smaller one.

    Attributes:
        keep: Share that is kept, in (0, 1].
        unit: What the share counts: "tokens", "characters", "bytes" or "documents".
        inverse: Keep the same share from the other end of the drawn order.
        seed: Of the draw; None takes the run's.
    """

    card: ClassVar[Card] = Card(
        name="random_selection",
        title="A random share of the documents",
        group="selection",
        summary="Keep a random share of the documents: the control of every selection.",
        saves=("tokens",),
    )
    keep: Annotated[float, Gt(0), Le(1)] = 0.1
    unit: Unit = "tokens"
    inverse: bool = False
    seed: Annotated[int, Ge(0)] | None = None

    def scorers(self, pool: Texts, folder: Path) -> tuple[Scorer, ...]:
        """None: the order is the ids' own."""
        return ()

    def rule(self, seed: int) -> Rule:
        """A cut without a column."""
        return Rule(
            self.card.name, share=self.keep, unit=self.unit, inverse=self.inverse,
            seed=seed if self.seed is None else self.seed,
        )  # fmt: skip
