"""TF-IDF and logistic regression: the classic text classifier, with its own tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.card import Card
from ._logistic import TunedLogisticRegression


@dataclass
class TfidfLogisticRegression(TunedLogisticRegression):
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

    def matrix(self, rows: Any, fit: bool = False) -> Any:
        """Sparse TF-IDF weights of texts. Shape (texts, n-grams)."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        if not fit:
            return self.features_.transform(rows)
        self.features_ = TfidfVectorizer(
            ngram_range=(1, self.ngrams), sublinear_tf=True, min_df=self.min_documents
        )
        return self.features_.fit_transform(rows)
