"""Nearest class mean on frozen features: the floor for every continual or few-shot method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..core.card import Card
from ..core.errors import ConfigError
from ._classifier import ClassStatisticsClassifier


@dataclass(eq=False, repr=False)
class NearestClassMean(ClassStatisticsClassifier):
    """One mean a class of unit-length features; a row belongs to the nearest mean.

    Nothing is trained and nothing is replayed: each class costs one vector, a new class leaves the
    means of the others as they are, and the result does not depend on the order of the rows. The
    defaults are the paper's rule (arXiv 2210.04428 and its code: rows normalized, means not,
    Euclidean distance). The same as a Gaussian of unit covariance and equal priors for each class,
    so probabilities follow from the squared distances.

    Attributes:
        normalize: Divide every row by its Euclidean norm first; rows of norm zero stay zero and
            are counted in `zero_rows_`.
        priors: "uniform", or "empirical": each class by its share of the rows seen.
        normalize_means: Divide each mean by its norm too; with normalized rows the rule is then
            the largest cosine.
        metric: "euclidean", or "cosine": rows and means both normalized, whatever is said above.
    """

    card: ClassVar[Card] = Card(
        name="nearest_class_mean",
        title="A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning",
        paper=17,
        arxiv="2210.04428",
        group="estimators",
        summary="Class means of frozen, unit-length features; nothing is trained or replayed.",
        authors="Paul Janson, Wenxuan Zhang, Rahaf Aljundi, Mohamed Elhoseiny",
        year=2022,
        saves=("FLOPs", "trainable parameters", "wall time"),
    )
    normalize_means: bool = False
    metric: Literal["euclidean", "cosine"] = "euclidean"

    def _check_settings(self) -> None:
        super()._check_settings()
        if self.metric not in ("euclidean", "cosine"):
            raise ConfigError(
                f"metric = {self.metric!r} is not allowed", 'give "euclidean" or "cosine"'
            )

    def _normalizes(self) -> bool:
        return self.normalize or self.metric == "cosine"

    def _centers(self) -> np.ndarray:
        means = self.statistics_.means
        if not (self.normalize_means or self.metric == "cosine"):
            return means
        norms = np.linalg.norm(means, axis=1, keepdims=True)
        return means / np.where(norms == 0, 1.0, norms)
