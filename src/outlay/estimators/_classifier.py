"""What the classifiers on class statistics share: fitting, forgetting, prediction, export, files.

Shapes: C classes seen, D features, n rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin

from ..core.card import Card
from ..core.errors import ConfigError, DataError
from . import _folder
from ._features import NotFitted, blocks_of, checked_features, checked_labels, row_norms
from ._statistics import ClassStatistics, Scatter

if TYPE_CHECKING:
    from torch import nn

Priors = Literal["uniform", "empirical"]


@dataclass(eq=False, repr=False)
class ClassStatisticsClassifier(ClassifierMixin, BaseEstimator):
    """A classifier that is a function of counts, sums and scatter of the classes seen so far.

    Nothing is trained: rows may come in any order and in any batches, parts may be fitted apart
    and merged, rows may be taken away again. Classes that were not seen are never predicted.

    Attributes:
        normalize: Divide every row by its Euclidean norm first.
        priors: "uniform", or "empirical": each class by its share of the rows seen.
    """

    card: ClassVar[Card]
    takes: ClassVar[str] = "features"
    normalize: bool = True
    priors: Priors = "uniform"

    def fit(self, X: Any, y: Any) -> Any:  # noqa: N803 - scikit-learn's names
        """Forget everything and learn these rows.

        Args:
            X: Features: NumPy, pandas or torch. Shape (n, D).
            y: One class a row, whole numbers or text. Shape (n,).

        Raises:
            DataError: If features hold NaN or infinity (the rows are named), if shapes do not go
                together, or if labels are no classes.
            ConfigError: If a setting has a value that is not allowed.
        """
        self._check_settings()
        features = checked_features(self, X, reset=True)
        labels = checked_labels(y, len(features))
        statistics = self._fresh(features.shape[1])
        statistics.update(features, labels)
        self.statistics_ = statistics
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Any:  # noqa: N803
        """Learn more rows; classes may be new.

        Args:
            X: Features. Shape (n, D).
            y: One class a row. Shape (n,).
            classes: Classes that may come, as other estimators want them: labels outside are
                refused, and a class is predicted only once it was seen.

        Raises:
            DataError: As `fit`; the statistics are then what they were before.
        """
        self._check_settings()
        fresh = not hasattr(self, "statistics_")
        features = checked_features(self, X, reset=fresh)
        labels = checked_labels(y, len(features))
        if classes is not None and (
            odd := set(labels.tolist()) - set(np.asarray(classes).tolist())
        ):
            raise DataError(
                f"label {sorted(odd, key=str)[0]!r} is none of the classes given",
                "name it in classes, or leave classes out",
            )
        statistics = self._fresh(features.shape[1]) if fresh else self.statistics_
        statistics.update(features, labels)
        self.statistics_ = statistics
        return self

    def subtract(self, X: Any, y: Any) -> Any:  # noqa: N803
        """Unlearn rows that were fitted: counts exactly, sums to rounding in float64.

        A class whose last row goes is forgotten.

        Raises:
            NotFitted: If nothing was fitted.
            DataError: If a class was never seen or has fewer rows.
        """
        features = checked_features(self, X, reset=False) if self._fitted() else np.zeros((0, 0))
        self.statistics_.subtract(features, checked_labels(y, len(features)))
        return self

    def remove_class(self, label: Any) -> Any:
        """Unlearn a class; the means of the others stay as they are, bit for bit.

        Raises:
            NotFitted: If nothing was fitted.
            DataError: If it was never seen, or if the statistics cannot tell its part.
        """
        self._fitted()
        self.statistics_.remove_class(label)
        return self

    def merge(self, other: ClassStatisticsClassifier) -> Any:
        """Learn what another estimator of the same settings learned from other rows.

        Raises:
            ConfigError: If the settings differ.
            DataError: If the widths differ.
        """
        if type(self) is not type(other) or self.get_params() != other.get_params():
            raise ConfigError(
                f"{self!r} and {other!r} cannot be merged", "fit both with the same settings"
            )
        if not hasattr(other, "statistics_"):
            return self
        if not hasattr(self, "statistics_"):
            self.statistics_ = copy.deepcopy(other.statistics_)
            self.n_features_in_ = other.n_features_in_
            if hasattr(other, "feature_names_in_"):
                self.feature_names_in_ = other.feature_names_in_
            return self
        self.statistics_.merge(other.statistics_)
        return self

    @property
    def classes_(self) -> np.ndarray:
        """Classes seen so far, sorted. Shape (C,)."""
        return self._learned("classes_").labels

    @property
    def class_counts_(self) -> np.ndarray:
        """Rows of each class. Shape (C,)."""
        return self._learned("class_counts_").counts

    @property
    def means_(self) -> np.ndarray:
        """Mean of each class, of normalized rows if they are normalized. Shape (C, D)."""
        return self._learned("means_").means

    @property
    def zero_rows_(self) -> int:
        """Rows of norm zero among those that were normalized."""
        return int(self._learned("zero_rows_").zero_rows.sum())

    def logits(self, X: Any) -> np.ndarray:  # noqa: N803
        """Log density of each class, less a constant of all rows, plus the log prior.

        Shape (n, C).

        Raises:
            NotFitted: If no class was seen.
            DataError: If the width differs or rows hold NaN or infinity.
        """
        return self._scores(X, exact=True)

    def decision_function(self, X: Any) -> np.ndarray:  # noqa: N803
        """Scores that order the classes as `logits` do.

        Shape (n, C); with two classes the second's less the first's, shape (n,).
        """
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The most probable class of each row; the first in order where two are equal."""
        scores = self._scores(X)
        return self.classes_[scores.argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Probabilities under the Gaussian reading, in the order of `classes_`. Shape (n, C)."""
        return softmax(self._scores(X), axis=1)

    def linear_form(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights and biases of the same classifier as a linear layer.

        Means times the inverse covariance, and minus half their squared length in it. They act on
        normalized rows if rows are normalized. Shapes (C, D) and (C,).
        """
        self._fitted()
        return self._linear(self._centers())

    def to_linear(self, dtype: Any = None) -> nn.Linear:
        """The classifier as a torch layer; its outputs are `logits` less a constant of each row.

        Give it rows as the classifier sees them: of norm one, if `normalize` holds.

        Args:
            dtype: torch dtype of weights and biases; float64 by default.
        """
        import torch

        self._fitted()
        weights, biases = self.linear_form()
        layer = torch.nn.Linear(weights.shape[1], weights.shape[0], dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weights))
            layer.bias.copy_(torch.from_numpy(biases))
        return layer.to(dtype or torch.float64).requires_grad_(False)

    def num_bytes(self) -> int:
        """Bytes of the statistics."""
        self._fitted()
        return self.statistics_.num_bytes()

    @property
    def num_parameters(self) -> int:
        """Numbers in the linear form."""
        return int(len(self.classes_) * (self.statistics_.width + 1))

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write `estimator.json` and `statistics.safetensors`, whole or not at all.

        Args:
            folder: Must not exist unless `overwrite`; an estimator without rows is saved too.
            overwrite: Replace a folder that holds an estimator.

        Raises:
            ConfigError: If something is there already.
        """
        return _folder.save(self, Path(folder), overwrite)

    @classmethod
    def load(cls, folder: str | Path) -> Any:
        """Read what `save` wrote.

        Raises:
            DataError: If the folder holds no such estimator, or its files do not go together.
        """
        return _folder.load(cls, Path(folder))

    def _check_settings(self) -> None:
        if self.priors not in ("uniform", "empirical"):
            raise ConfigError(
                f"priors = {self.priors!r} is not allowed", 'give "uniform" or "empirical"'
            )

    def _scatter(self) -> Scatter:
        """Which scatter the statistics keep."""
        return "none"

    def _normalizes(self) -> bool:
        """Whether rows are normalized."""
        return self.normalize

    def _precision(self) -> np.ndarray | None:
        """Inverse covariance: None for the identity, (D,) or (D, D)."""
        return None

    def _centers(self) -> np.ndarray:
        """What rows are compared with. Shape (C, D)."""
        return self.statistics_.means

    def _fresh(self, width: int) -> ClassStatistics:
        return ClassStatistics(width, self._scatter(), self._normalizes())

    def _fitted(self) -> bool:
        if not hasattr(self, "statistics_") or not len(self.statistics_.labels):
            raise NotFitted(
                f"this {type(self).__name__} has seen no class",
                "call fit or partial_fit with labeled rows first",
            )
        return True

    def _learned(self, name: str) -> ClassStatistics:
        if "statistics_" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no {name} before it is fitted")
        return self.statistics_

    def _solution(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights, biases and the origin that rows are measured from.

        The origin is the mean of the centers: scores of features far from zero lose no digits.
        """
        self._fitted()
        key = tuple(sorted((k, str(v)) for k, v in self.get_params().items()))
        derived = self.statistics_.derived
        if key not in derived:
            self._check_settings()
            centers = self._centers()
            origin = centers.mean(axis=0)
            derived[key] = (*self._linear(centers - origin), origin)
        return derived[key]

    def _linear(self, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights and biases of the classifier with these centers."""
        precision = self._precision()
        weights = _times(centers, precision)
        biases = -0.5 * np.vecdot(weights, centers)
        if self.priors == "empirical":
            biases = biases + np.log(self.statistics_.counts / self.statistics_.total)
        return weights, biases

    def _scores(self, X: Any, exact: bool = False) -> np.ndarray:  # noqa: N803
        """Scores of classes; `exact` adds the part that all classes of a row share."""
        weights, biases, origin = self._solution()
        features = checked_features(self, X, reset=False)
        scores = np.empty((len(features), len(biases)))
        precision = self._precision() if exact else None
        for part in blocks_of(*features.shape):
            block = features[part].astype(np.float64)
            norms = row_norms(block, features)
            if self._normalizes():
                block /= np.where(norms == 0, 1.0, norms)[:, None]
            block -= origin
            np.matmul(block, weights.T, out=scores[part])
            scores[part] += biases
            if exact:
                scores[part] -= 0.5 * np.vecdot(block, _times(block, precision))[:, None]
        return scores


def _times(rows: np.ndarray, precision: np.ndarray | None) -> np.ndarray:
    """Rows times an inverse covariance: None is the identity, a vector a diagonal."""
    if precision is None:
        return rows
    return rows * precision if precision.ndim == 1 else rows @ precision
