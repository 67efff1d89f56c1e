"""Logistic regression on the frozen model's mean-pooled features: what an adapter has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Float
from numpy import ndarray

from ..core.card import Card


@dataclass
class FeatureProbe:
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
    chosen_: float = field(default=float("nan"), init=False)

    def fit(
        self,
        features: Float[ndarray, "rows width"],
        labels: Sequence[Any],
        validation: tuple[Float[ndarray, "held width"], Sequence[Any]],
    ) -> FeatureProbe:
        """Fit on training features, choosing the strength on the validation features."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        self.scale_ = StandardScaler().fit(features)
        rows, held_out = self.scale_.transform(features), self.scale_.transform(validation[0])
        best = -1.0
        for strength in self.strengths:
            model = LogisticRegression(C=strength, max_iter=500, tol=1e-3).fit(rows, labels)
            score = model.score(held_out, validation[1])
            if score > best:
                best, self.model_, self.chosen_ = score, model, strength
        self.classes_ = self.model_.classes_
        return self

    @property
    def num_parameters(self) -> int:
        """Fitted coefficients and intercepts."""
        return int(self.model_.coef_.size + self.model_.intercept_.size)

    def predict(self, features: Float[ndarray, "rows width"]) -> Any:
        """Labels of rows of features."""
        return self.model_.predict(self.scale_.transform(features))

    def predict_proba(self, features: Float[ndarray, "rows width"]) -> Any:
        """Probabilities in the order of `classes_`."""
        return self.model_.predict_proba(self.scale_.transform(features))
