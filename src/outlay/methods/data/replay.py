"""Experience replay: a part of each later task is drawn from a memory of earlier examples."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt

from ...core.card import Card
from ...core.errors import Conflict
from ...core.method import Context, OnData, seed_of


@dataclass(frozen=True, kw_only=True)
class Replay(OnData):
    """Keep a uniform sample of what earlier tasks trained on, and mix it into later ones.

    The memory is a reservoir: of all examples seen before the task, those with the smallest
    random keys. It is decided by the seed, and never needs an example that was dropped earlier.
    Replayed examples count in the budget like any others. arXiv 1902.10486, its reservoir.

    Attributes:
        size: Examples that the memory holds, of all earlier tasks together.
        share: Of the examples of every task but the first, those that come from memory.
    """

    card: ClassVar[Card] = Card(
        name="replay",
        title="On Tiny Episodic Memories in Continual Learning",
        arxiv="1902.10486",
        group="data",
        summary="Mix a small memory of earlier tasks' examples into later ones.",
        authors="Arslan Chaudhry, Marcus Rohrbach, Mohamed Elhoseiny et al.",
        year=2019,
        claims=("data.order",),
    )
    size: Annotated[int, Ge(1)] = 500
    share: Annotated[float, Gt(0), Lt(1)] = 0.25

    def select(self, pool: Any, context: Context | None = None) -> Any:
        """The pool with a memory.

        Raises:
            Conflict: If the run's data is no sequence of tasks.
        """
        if not hasattr(pool, "rehearse"):
            raise Conflict(
                "'replay' keeps examples of earlier tasks, and this run has none",
                "give the recipe data.tasks, or leave it out",
            )
        return pool.rehearse(self.memory, self.share)

    def memory(self, pool: Any, task: int) -> list[int]:
        """Indices of the examples that are kept while a task is learned."""
        ids = pool.ids
        seen = (index for earlier in range(task) for index in pool.seen_of(earlier))
        keys = ((seed_of(pool.seed, "replay", ids[index]), index) for index in seen)
        return sorted(index for _, index in heapq.nsmallest(self.size, keys))
