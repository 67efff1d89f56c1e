"""What `probe` fits on features: heads that are measured, and learners for tasks in sequence.

Heads have `fit(features, labels, validation)`, `predict` and `settings`; learners have
`partial_fit` and `predict`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..core import registry

_NEIGHBOURS = (1, 5, 20)
LDA = "streaming_lda(target='trace', shrinkage=0.01)"


def heads() -> dict[str, Callable[[], Any]]:
    """What makes each head, by name."""
    return {
        "nearest_class_mean": lambda: Statistics("nearest_class_mean"),
        "streaming_lda": lambda: Statistics(LDA),
        "nearest_neighbours": Nearest,
        "linear_probe": Linear,
    }


def learners(classes: np.ndarray, strength: float, neighbours: int, seed: int) -> dict[str, Any]:
    """Fresh learners for one stream, by name.

    Args:
        classes: All classes of the stream.
        strength: Inverse regularization strength of the linear ones.
        neighbours: Neighbours that vote.
        seed: Of the one that draws.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def joint(_: int) -> Any:
        return make_pipeline(
            StandardScaler(), LogisticRegression(C=strength, max_iter=500, tol=1e-3)
        )

    return {
        "nearest_class_mean": registry.build("nearest_class_mean"),
        "streaming_lda": registry.build(LDA),
        "nearest_neighbours, all rows kept": Replayed(lambda n: neighbours_of(neighbours, n)),
        "linear_probe, all rows kept": Replayed(joint),
        "linear layer, task after task": Sequential(classes, strength, seed),
    }


class Nearest:
    """Nearest neighbours by cosine; their number k chosen on validation rows."""

    def fit(self, features: Any, labels: Any, validation: Any) -> None:
        """Keep the rows and choose k."""
        best = -1.0
        for k in _NEIGHBOURS:
            model = neighbours_of(k, len(features)).fit(features, labels)
            score = model.score(*validation) if len(validation[1]) else -0.5
            if score > best:
                best, self.model, self.k = score, model, k
        self.bytes = features.nbytes

    def predict(self, features: Any) -> Any:
        """Classes of rows."""
        return self.model.predict(features)

    def settings(self) -> dict[str, Any]:
        """What was chosen."""
        return {"neighbours": self.k}


class Linear:
    """Multinomial logistic regression on standardized features; strength chosen on validation."""

    def fit(self, features: Any, labels: Any, validation: Any) -> None:
        """Fit, choosing the strength."""
        self.model = registry.build("feature_probe")
        self.model.fit(features, labels, validation if len(validation[1]) else (features, labels))
        self.bytes = 8 * self.model.num_parameters

    def predict(self, features: Any) -> Any:
        """Classes of rows."""
        return self.model.predict(features)

    def settings(self) -> dict[str, Any]:
        """What was chosen."""
        return {"strength": self.model.chosen_}


class Statistics:
    """A head on class statistics, with its own defaults; validation rows are not needed."""

    def __init__(self, call: str) -> None:
        self.model = registry.build(call)

    def fit(self, features: Any, labels: Any, validation: Any) -> None:
        """Take the statistics."""
        del validation
        self.model.fit(features, labels)
        self.bytes = self.model.num_bytes()

    def predict(self, features: Any) -> Any:
        """Classes of rows."""
        return self.model.predict(features)

    def settings(self) -> dict[str, Any]:
        """The estimator's settings."""
        return self.model.get_params()


class Replayed:
    """A learner that keeps every row and fits anew after each task: a bound, not a method."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make
        self.rows: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []

    def partial_fit(self, features: Any, labels: Any) -> None:
        """Keep the rows and fit on all of them."""
        self.rows.append(np.asarray(features))
        self.labels.append(labels)
        every = np.concatenate(self.labels)
        self.only = every[0] if len(set(every.tolist())) == 1 else None
        if self.only is None:
            self.model = self.make(len(every)).fit(np.concatenate(self.rows), every)

    def predict(self, features: Any) -> Any:
        """Classes of rows."""
        if self.only is not None:
            return np.full(len(features), self.only)
        return self.model.predict(features)

    def num_bytes(self) -> int:
        """Bytes of the rows kept."""
        return sum(part.nbytes for part in self.rows)


class Sequential:
    """A linear layer that goes on training on each task alone: what forgetting looks like."""

    def __init__(self, classes: np.ndarray, strength: float, seed: int = 0) -> None:
        from sklearn.linear_model import SGDClassifier
        from sklearn.preprocessing import StandardScaler

        self.classes, self.scaler = classes, StandardScaler()
        self.model = SGDClassifier(loss="log_loss", alpha=1e-4 / strength, random_state=seed)

    def partial_fit(self, features: Any, labels: Any) -> None:
        """Five passes over this task's rows."""
        if not hasattr(self.scaler, "mean_"):
            self.scaler.fit(features)
        scaled = self.scaler.transform(features)
        generator = np.random.default_rng(0)
        for _ in range(5):
            order = generator.permutation(len(scaled))
            self.model.partial_fit(scaled[order], labels[order], classes=self.classes)

    def predict(self, features: Any) -> Any:
        """Classes of rows."""
        return self.model.predict(self.scaler.transform(features))

    def num_bytes(self) -> int:
        """Bytes of the layer."""
        model: Any = self.model
        return model.coef_.nbytes + model.intercept_.nbytes


def neighbours_of(k: int, rows: int) -> Any:
    """A classifier by k nearest neighbours in cosine, or by all rows where there are fewer."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(min(k, rows), metric="cosine", algorithm="brute")
