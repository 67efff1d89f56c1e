"""Linear discriminant analysis from streamed statistics: class means and one shared covariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..core.card import Card
from ..core.errors import ConfigError
from ._classifier import ClassStatisticsClassifier
from ._statistics import Scatter


@dataclass(eq=False, repr=False)
class StreamingLDA(ClassStatisticsClassifier):
    """Gaussian classes with one covariance, from statistics that rows in any order give.

    The covariance is the pooled scatter about the class means over the rows seen (maximum
    likelihood), shrunk to (1 - shrinkage) covariance + shrinkage target. Deep streaming LDA
    (arXiv 1909.01520, section 4) updates its covariance with running means, so that the order of
    rows changes it; here it is exact, and merging and unlearning are too.

    Attributes:
        normalize: Divide every row by its Euclidean norm first.
        priors: "uniform", or "empirical": each class by its share of the rows seen.
        shrinkage: From 0 to 1. With 0, directions in which nothing varies are left out; with 1 and
            target "identity" this is `NearestClassMean`.
        target: "identity" as in the paper, or "trace": the identity times the mean variance, which
            does not depend on the features' scale (scikit-learn's target).
        covariance: "full", or "diagonal": features as if they were uncorrelated within a class.
    """

    card: ClassVar[Card] = Card(
        name="streaming_lda",
        title="Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis",
        arxiv="1909.01520",
        group="estimators",
        summary="Class means and one shared covariance of frozen features, exact in any order.",
        authors="Tyler L. Hayes, Christopher Kanan",
        year=2019,
        saves=("FLOPs", "trainable parameters", "wall time"),
    )
    normalize: bool = False
    shrinkage: float = 1e-4
    target: Literal["identity", "trace"] = "identity"
    covariance: Literal["full", "diagonal"] = "full"

    def _check_settings(self) -> None:
        super()._check_settings()
        if isinstance(self.shrinkage, str) or not 0 <= self.shrinkage <= 1:
            raise ConfigError(
                f"shrinkage = {self.shrinkage!r} is not allowed", "give a number from 0 to 1"
            )
        for name, allowed in (("target", ("identity", "trace")),
                              ("covariance", ("full", "diagonal"))):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} is not allowed",
                    f"give {' or '.join(map(repr, allowed))}",
                )

    def _scatter(self) -> Scatter:
        return self.covariance

    @property
    def covariance_(self) -> np.ndarray:
        """Pooled covariance within classes, before shrinkage. Shape (D, D) or (D,)."""
        found = self._learned("covariance_")
        pooled = found.deviations if found.scatter == "full" else found.deviations.sum(axis=0)
        return pooled / max(1, found.total)

    def _precision(self) -> np.ndarray:
        derived = self.statistics_.derived
        key = ("precision", self.shrinkage, self.target)
        if key not in derived:
            derived[key] = self._inverse()
        return derived[key]

    def _inverse(self) -> np.ndarray:
        from scipy import linalg

        covariance = self.covariance_
        width = self.statistics_.width
        diagonal = covariance.ndim == 1
        trace = covariance.sum() if diagonal else np.trace(covariance)
        amount = self.shrinkage * (trace / width if self.target == "trace" else 1.0)
        shrunk = (1 - self.shrinkage) * covariance
        if diagonal:
            values = shrunk + amount
            small = values <= values.max(initial=0.0) * width * np.finfo(float).eps
            return np.where(small, 0.0, 1.0 / np.where(small, 1.0, values))
        shrunk = shrunk + amount * np.eye(width)
        if amount > 0:
            try:
                factor = linalg.cho_factor(shrunk, lower=True)
                return linalg.cho_solve(factor, np.eye(width))
            except linalg.LinAlgError:
                pass  # shrunk too little for its condition: the pseudo-inverse below
        values, vectors = linalg.eigh(shrunk)
        kept = values > values.max(initial=0.0) * width * np.finfo(float).eps
        return (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
