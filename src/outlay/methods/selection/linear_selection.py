"""Keep the documents that a linear classifier finds most like a target.

The direct classifier: target texts against a random sample of the pool, as DataComp-LM's
(arXiv:2406.11794, section 4.4) and as the baseline of BETR (arXiv:2507.12466, table 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from ...core.card import Card
from ...core.errors import ConfigError
from ...core.method import OnData
from ...shards.deciding import AtMost, Rule, Twin, Unit
from ...shards.scorers import FastText, HashedLinear, Overlap, Scorer, fasttext_module
from ...shards.selector import Selecting, Texts, refuse_held_out, texts_of

COLUMN, SAME = "target_likeness", "in_target"


@dataclass(frozen=True, kw_only=True)
class LinearSelection(Selecting, OnData):
    """Keep what is most like a target: `linear_selection(target='task.jsonl', keep=0.1)`.

    The classifier learns from the target and from up to 20,000 documents of the pool, which are
    its negatives whatever they hold. A document whose words are those of a target text is left
    out as contamination.

    Attributes:
        target: File or folder of target texts: Parquet or JSONL.
        keep: Share of the pool that is kept, in (0, 1].
        unit: What the share counts: "tokens", "characters", "bytes" or "documents".
        target_column: Column of the target's texts.
        ngrams: Longest run of words that is a feature.
        bits: Logarithm of the number of hashed features; at least 18 for fastText.
        backend: "hashed", our own; or "fasttext" (`outlay[fasttext]`).
        keep_targets: Keep documents that are target texts.
        allow_held_out: Allow a target that is named after a test or validation split.
        inverse: Keep the same share from the other end: the documents least like the target.
        twin: Keep random documents of as many tokens in its place: "random", or "length" within
            each doubling of length.
        seed: Of the twin's draw; None takes the run's.
    """

    card: ClassVar[Card] = Card(
        name="linear_selection",
        title="DataComp-LM: In search of the next generation of training sets for language models",
        arxiv="2406.11794",
        group="selection",
        summary="Keep the documents that a linear classifier finds most like a target.",
        authors="Jeffrey Li, Alex Fang, Georgios Smyrnis, Maor Ivgi, and others",
        year=2024,
        saves=("tokens",),
    )
    target: str
    keep: Annotated[float, Gt(0), Le(1)] = 0.1
    unit: Unit = "tokens"
    target_column: str = "text"
    ngrams: Annotated[int, Ge(1), Le(5)] = 2
    bits: Annotated[int, Ge(8), Le(24)] = 18
    backend: Literal["hashed", "fasttext"] = "hashed"
    keep_targets: bool = False
    allow_held_out: bool = False
    inverse: bool = False
    twin: Twin | None = None
    seed: Annotated[int, Ge(0)] | None = None

    def validate(self) -> None:
        """Refuse held-out targets, a column without a name, and a backend that is not there."""
        refuse_held_out(self.target, self.allow_held_out, f"{self.card.name}.target")
        if not self.target_column:
            raise ConfigError(
                f"{self.card.name}.target_column = '' is not allowed", "name a column"
            )
        if self.backend == "fasttext":
            fasttext_module(training=True)
            if self.bits < 18:
                raise ConfigError(
                    f"{self.card.name}.bits = {self.bits} is too few for fastText",
                    "give 18 or more",
                )

    def files(self) -> tuple[str, ...]:
        """The target."""
        return (self.target,)

    def scorers(self, pool: Texts, folder: Path) -> tuple[Scorer, ...]:
        """The classifier, and which documents are target texts."""
        targets = texts_of(self.target, self.target_column, "target texts")
        same = Overlap.of(targets, SAME, 0)
        shape = {"ngrams": self.ngrams, "bits": self.bits}
        if self.backend == "fasttext":
            return FastText.fit(targets, pool(), COLUMN, folder / "target.bin", **shape), same
        return HashedLinear.fit(targets, pool(), COLUMN, **shape), same

    def rule(self, seed: int) -> Rule:
        """A cut at the share, after the target's own texts are taken out."""
        tests = () if self.keep_targets else (AtMost(SAME, 0.0, "is a target text"),)
        return Rule(
            self.card.name, tests, self.keep, COLUMN, self.unit, self.inverse, self.twin,
            seed if self.seed is None else self.seed,
        )  # fmt: skip
