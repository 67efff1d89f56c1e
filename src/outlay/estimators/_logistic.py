"""Multinomial logistic regression whose strength is chosen on a validation split."""

from __future__ import annotations

from typing import Any


class TunedLogisticRegression:
    """What the linear baselines share; a subclass says how rows become a matrix in `matrix`.

    Attributes:
        strengths: Inverse regularization strengths that are tried.
        model_: The fitted model of the best strength.
        chosen_: That strength.
        classes_: Classes in the order of the probabilities.
    """

    strengths: tuple[float, ...]

    def matrix(self, rows: Any, fit: bool = False) -> Any:
        """Rows as a numeric matrix; with `fit`, learn how from them."""
        raise NotImplementedError

    def fit(self, rows: Any, labels: Any, validation: tuple[Any, Any]) -> Any:
        """Fit on training rows, choosing the strength on the validation rows.

        Args:
            rows: Training rows.
            labels: One class a row.
            validation: Rows and classes that decide the strength; the test split stays unseen.
        """
        from sklearn.linear_model import LogisticRegression

        inputs, held_out = self.matrix(rows, fit=True), self.matrix(validation[0])
        best = -1.0
        for strength in self.strengths:
            model = LogisticRegression(C=strength, max_iter=500, tol=1e-3).fit(inputs, labels)
            score = model.score(held_out, validation[1])
            if score > best:
                best, self.model_, self.chosen_ = score, model, strength
        self.classes_ = self.model_.classes_
        return self

    @property
    def num_parameters(self) -> int:
        """Fitted coefficients and intercepts."""
        return int(self.model_.coef_.size + self.model_.intercept_.size)

    def linear_form(self) -> tuple[Any, Any]:
        """Coefficients and intercepts. Shapes (classes or 1, width) and (classes or 1,)."""
        return self.model_.coef_, self.model_.intercept_

    def predict(self, rows: Any) -> Any:
        """Classes of rows."""
        return self.model_.predict(self.matrix(rows))

    def predict_proba(self, rows: Any) -> Any:
        """Probabilities in the order of `classes_`."""
        return self.model_.predict_proba(self.matrix(rows))
