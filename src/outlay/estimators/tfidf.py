"""TF-IDF and logistic regression: the classic text classifier, with its own tuning."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core.card import Card


@dataclass
class TfidfLogisticRegression:
    """Word n-grams weighted by TF-IDF, then multinomial logistic regression.

    The inverse regularization strength is chosen on the validation split; the test split is
    touched once.

    Attributes:
        strengths: Inverse regularization strengths that are tried.
        ngrams: Longest word n-gram.
        min_documents: An n-gram counts if so many training texts have it.
    """

    card: ClassVar[Card] = Card(
        name="tfidf_logistic_regression",
        title="TF-IDF features and logistic regression",
        group="baselines",
        summary="The classic text classifier: n-gram TF-IDF and a tuned logistic regression.",
        saves=("FLOPs", "wall time"),
    )
    takes: ClassVar[str] = "text"
    strengths: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0)
    ngrams: int = 2
    min_documents: int = 2
    chosen_: float = field(default=float("nan"), init=False)
    seconds_: float = field(default=0.0, init=False)

    def fit(
        self,
        texts: Sequence[str],
        labels: Sequence[Any],
        validation: tuple[Sequence[str], Sequence[Any]],
    ) -> TfidfLogisticRegression:
        """Fit on training texts, choosing the strength on the validation texts."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        started = time.perf_counter()
        self.features_ = TfidfVectorizer(
            ngram_range=(1, self.ngrams), sublinear_tf=True, min_df=self.min_documents
        )
        rows = self.features_.fit_transform(texts)
        held_out = self.features_.transform(validation[0])
        best = -1.0
        for strength in self.strengths:
            model = LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(rows, labels)
            score = model.score(held_out, validation[1])
            if score > best:
                best, self.model_, self.chosen_ = score, model, strength
        self.classes_ = self.model_.classes_
        self.seconds_ = time.perf_counter() - started
        return self

    @property
    def num_parameters(self) -> int:
        """Fitted coefficients and intercepts."""
        return int(self.model_.coef_.size + self.model_.intercept_.size)

    def predict(self, texts: Sequence[str]) -> Any:
        """Labels of texts."""
        return self.model_.predict(self.features_.transform(texts))

    def predict_proba(self, texts: Sequence[str]) -> Any:
        """Probabilities in the order of `classes_`."""
        return self.model_.predict_proba(self.features_.transform(texts))
