"""Leave out documents that share a run of words with evaluation texts.

The first part of the rule in BETR (arXiv:2507.12466, appendix B.2): runs of 8 to 13 words. The
authors cut a hit out of its document and keep the rest; here the whole document goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from ...core.card import Card
from ...core.errors import ConfigError
from ...core.method import OnData
from ...shards.deciding import AtMost, Rule
from ...shards.scorers import Overlap, Scorer
from ...shards.selector import Selecting, Texts, texts_of

COLUMN = "evaluation_overlap"


@dataclass(frozen=True, kw_only=True)
class Decontamination(Selecting, OnData):
    """Drop what overlaps an evaluation: `decontamination(against='evaluation.jsonl', n=13)`.

    A document goes if it holds `n` words in a row of an evaluation text.
    Words are compared normalized and case-folded, without punctuation; the comparison is exact and
    finds no paraphrase. Evaluation texts of fewer than `n` words cannot be found.

    Attributes:
        against: File or folder of evaluation texts: Parquet or JSONL.
        n: Words in a row, 8 to 13.
        column: Column of the evaluation texts.
    """

    card: ClassVar[Card] = Card(
        name="decontamination",
        title="Language Models Improve When Pretraining Data Matches Target Tasks",
        arxiv="2507.12466",
        group="selection",
        summary="Drop documents that share a run of 8 to 13 words with evaluation texts.",
        authors="David Mizrahi, Anders Boesen Lindbo Larsen, Jesse Allardice, and others",
        year=2025,
    )
    against: str
    n: Annotated[int, Ge(8), Le(13)] = 13
    column: str = "text"

    def validate(self) -> None:
        """Refuse a column without a name."""
        if not self.column:
            raise ConfigError(f"{self.card.name}.column = '' is not allowed", "name a column")

    def files(self) -> tuple[str, ...]:
        """The evaluation texts."""
        return (self.against,)

    def scorers(self, pool: Texts, folder: Path) -> tuple[Scorer, ...]:
        """Which documents overlap."""
        references = texts_of(self.against, self.column, "evaluation texts")
        found = Overlap.of(references, COLUMN, self.n)
        if not found.runs:
            raise ConfigError(
                f"no evaluation text in {self.against!r} has n = {self.n} words",
                "lower n, or give longer texts",
            )
        return (found,)

    def rule(self, seed: int) -> Rule:
        """No overlap."""
        return Rule(self.card.name, (AtMost(COLUMN, 0.0, "overlaps the evaluation"),))
