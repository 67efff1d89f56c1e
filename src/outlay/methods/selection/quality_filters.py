"""Cuts by toxicity, quality, age, domain and word list, each with its inverse and random twin.

Longpre et al., arXiv:2305.13169 (NAACL 2024): what such cuts do to a model, measured. Scores have
the paper's direction: `low_quality` is near 0 for good text, `toxicity` near 1 for toxic text; a
filter with threshold T drops the documents that score above T (figures 6 and 7).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from ...core.card import Card
from ...core.errors import ConfigError
from ...core.method import OnData
from ...shards.deciding import AtMost, Dated, InDomains, Rule, Test, Twin
from ...shards.scorers import HashedLinear, Profanity, Scorer, WordList, load_scorer
from ...shards.selector import Selecting, Texts, texts_of

Threshold = Annotated[float, Ge(0), Le(1)]
_DAY = re.compile(r"\d{4}(-\d\d(-\d\d)?)?")
PROFANITY = "profanity"


@dataclass(frozen=True, kw_only=True)
class QualityFilters(Selecting, OnData):
    """Drop documents by several properties, as `quality_filters(after='2000')` does by age.

    The first property that a document fails is its reason.

    Attributes:
        toxicity: Drop documents that score above this, in [0, 1]; the paper tries 0.95 to 0.3.
        toxicity_model: "profanity", the model of alt-profanity-check (`outlay[toxicity]`), or the
            folder of a scorer that was saved.
        low_quality: Drop documents that score above this, in [0, 1]; the paper tries 0.975 to 0.7.
        good: Texts of quality for the scorer of `low_quality`: Parquet or JSONL.
        poor: Texts without; None takes a random sample of the pool.
        quality_model: Folder of a saved scorer, in place of `good` and `poor`.
        after: Keep documents of this year, month or day and later.
        before: Keep documents from before this year, month or day.
        domains: Keep these domains alone.
        without_domains: Drop these domains.
        words: Drop documents with one of these words or runs of words, whole and case-folded.
        inverse: Keep exactly the documents that the filters drop.
        twin: Keep random documents of as many tokens in its place: "random", or "length" within
            each doubling of length.
        seed: Of the twin's draw; None takes the run's.
    """

    card: ClassVar[Card] = Card(
        name="quality_filters",
        title="A Pretrainer's Guide to Training Data: Measuring the Effects of Data Age, Domain "
        "Coverage, Quality, & Toxicity",
        paper=29,
        arxiv="2305.13169",
        group="selection",
        summary="Drop documents by toxicity, quality, age, domain or word list.",
        authors="Shayne Longpre, Gregory Yauney, Emily Reif, Katherine Lee, Adam Roberts, "
        "Barret Zoph, Denny Zhou, Jason Wei, Kevin Robinson, David Mimno, Daphne Ippolito",
        year=2023,
        saves=("tokens",),
    )
    toxicity: Threshold | None = None
    toxicity_model: str = PROFANITY
    low_quality: Threshold | None = None
    good: str | None = None
    poor: str | None = None
    quality_model: str | None = None
    after: str | None = None
    before: str | None = None
    domains: tuple[str, ...] = ()
    without_domains: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    inverse: bool = False
    twin: Twin | None = None
    seed: Annotated[int, Ge(0)] | None = None

    def validate(self) -> None:
        """Refuse filters that nothing can score, dates that are none, and no filter at all."""
        name = self.card.name
        for field in ("after", "before"):
            value = getattr(self, field)
            if value is not None and not _DAY.fullmatch(value):
                raise ConfigError(
                    f"{name}.{field} = {value!r} is not allowed",
                    'write a year, month or day: "2000", "2000-06" or "2000-06-30"',
                )
        if self.after and self.before and not self.after < self.before:
            raise ConfigError(
                f"{name}: after = {self.after!r} is not earlier than before = {self.before!r}",
                "swap them",
            )
        learns = self.good is not None or self.poor is not None
        if self.low_quality is not None and self.good is None and self.quality_model is None:
            raise ConfigError(
                f"{name}.low_quality = {self.low_quality} has nothing to score with",
                "give good texts with good='good.jsonl', or a saved scorer with quality_model",
            )
        if learns and (self.low_quality is None or self.quality_model is not None):
            raise ConfigError(
                f"{name}.good = {self.good!r} and poor = {self.poor!r} teach nothing here",
                "they go with low_quality, and in place of quality_model",
            )
        if self.domains and self.without_domains:
            raise ConfigError(
                f"{name}: domains = {self.domains} and without_domains = {self.without_domains} "
                "say the same thing twice",
                "give one of them",
            )
        if not self._tests():
            raise ConfigError(
                f"{name} has no filter",
                "set toxicity, low_quality, after, before, domains or words",
            )

    def files(self) -> tuple[str, ...]:
        """Texts to learn from and saved scorers."""
        scorers = [self.quality_model]
        if self.toxicity is not None and self.toxicity_model != PROFANITY:
            scorers.append(self.toxicity_model)
        return tuple(name for name in (self.good, self.poor, *scorers) if name is not None)

    def scorers(self, pool: Texts, folder: Path) -> tuple[Scorer, ...]:
        """One for each property that is filtered on."""
        found: list[Scorer] = []
        if self.toxicity is not None:
            found.append(
                Profanity("toxicity")
                if self.toxicity_model == PROFANITY
                else load_scorer(Path(self.toxicity_model).expanduser(), "toxicity")
            )
        if self.low_quality is not None:
            found.append(self._quality(pool))
        if self.words:
            found.append(WordList("listed_words", self.words))
        return tuple(found)

    def _quality(self, pool: Texts) -> Scorer:
        if self.quality_model is not None:
            return load_scorer(Path(self.quality_model).expanduser(), "low_quality")
        assert self.good is not None
        good = texts_of(self.good, what="good texts")
        poor = pool() if self.poor is None else texts_of(self.poor, what="poor texts")
        return HashedLinear.fit(poor, good, "low_quality", ngrams=1)

    def _tests(self) -> tuple[Test, ...]:
        found: list[Test] = []
        if self.toxicity is not None:
            found.append(AtMost("toxicity", self.toxicity, "toxicity"))
        if self.low_quality is not None:
            found.append(AtMost("low_quality", self.low_quality, "low quality"))
        if self.after is not None or self.before is not None:
            found.append(Dated(self.after, self.before))
        if self.domains or self.without_domains:
            found.append(InDomains(self.domains or self.without_domains, not self.domains))
        if self.words:
            found.append(AtMost("listed_words", 0.0, "listed word"))
        return tuple(found)

    def rule(self, seed: int) -> Rule:
        """All filters, or what they would drop, or its twin."""
        return Rule(
            self.card.name, self._tests(), inverse=self.inverse, twin=self.twin,
            seed=seed if self.seed is None else self.seed,
        )  # fmt: skip
