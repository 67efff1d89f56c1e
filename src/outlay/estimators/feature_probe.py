"""Logistic regression on the frozen model's mean-pooled features: what an adapter has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.card import Card
from ._logistic import TunedLogisticRegression


@dataclass
class FeatureProbe(TunedLogisticRegression):
    """Standardized mean-pooled last hidden states, then multinomial logistic regression.

    The inverse regularization strength is chosen on the validation split; the test split is
    touched once.

    Attributes:
        strengths: Inverse regularization strengths that are tried.
    """

    card: ClassVar[Card] = Card(
        name="feature_probe",
        title="Logistic regression on mean-pooled features of the frozen model",
        group="baselines",
        summary="A tuned logistic regression on the frozen model's mean-pooled features.",
        saves=("FLOPs", "trainable parameters"),
    )
    takes: ClassVar[str] = "features"
    strengths: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

    def matrix(self, rows: Any, fit: bool = False) -> Any:
        """Features with training mean 0 and deviation 1. Shape (rows, width)."""
        from sklearn.preprocessing import StandardScaler

        if fit:
            self.scale_ = StandardScaler().fit(rows)
        return self.scale_.transform(rows)
