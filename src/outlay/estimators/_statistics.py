"""Sufficient statistics of classes: counts, sums and scatter in float64.

They can be added, merged and taken away again, so neither the order of rows, nor batches, nor the
order in which parts are merged changes what is learned, beyond rounding in float64.

Shapes: C classes seen, D features, n rows.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
from scipy import sparse

from ..core.errors import DataError
from ._features import ZeroRowsWarning, blocks_of, not_finite, row_norms

Scatter = Literal["none", "diagonal", "full"]


class ClassStatistics:
    """Counts and sums of each class and, if asked for, the scatter about the class means.

    Args:
        width: Features a row, D.
        scatter: "none"; "diagonal": squared deviations of each class, (C, D); "full": one matrix
            of all classes together, (D, D).
        normalize: Divide every row by its Euclidean norm first; a row of norm zero stays zero.

    Attributes:
        labels: Classes that were seen, sorted. Shape (C,).
        counts: Rows of each class, int64. Shape (C,).
        zero_rows: Rows of norm zero among them, int64. Shape (C,).
        sums: Summed rows of each class. Shape (C, D).
        deviations: The scatter. Shape (C, 0), (C, D) or (D, D).
        derived: What was computed from the rest; emptied by every change.
    """

    def __init__(self, width: int, scatter: Scatter = "none", normalize: bool = False) -> None:
        self.width, self.normalize = width, normalize
        self.scatter: Scatter = scatter
        self.labels = np.zeros(0, dtype=np.int64)
        self.counts = np.zeros(0, dtype=np.int64)
        self.zero_rows = np.zeros(0, dtype=np.int64)
        self.sums = np.zeros((0, width))
        self.deviations = self._no_deviations(0)
        self.derived: dict[Any, Any] = {}

    def _no_deviations(self, classes: int) -> np.ndarray:
        columns = 0 if self.scatter == "none" else self.width
        return np.zeros((self.width if self.scatter == "full" else classes, columns))

    @property
    def total(self) -> int:
        """Rows of all classes."""
        return int(self.counts.sum())

    @property
    def means(self) -> np.ndarray:
        """Class means. Shape (C, D)."""
        return self.sums / self.counts[:, None]

    def num_bytes(self) -> int:
        """Bytes of counts, sums and scatter."""
        arrays = (self.counts, self.zero_rows, self.sums, self.deviations)
        return sum(array.nbytes for array in arrays)

    def update(self, features: np.ndarray, labels: np.ndarray) -> None:
        """Add rows; classes may be new. Nothing changes if a row is refused.

        Args:
            features: Shape (n, D), float32 or float64.
            labels: Shape (n,).

        Raises:
            DataError: If a row holds NaN or infinity, naming all such rows, or if labels are of
                another kind than those seen before.
        """
        self.merge(self._collected(features, labels, warn=True))

    def subtract(self, features: np.ndarray, labels: np.ndarray) -> None:
        """Take rows away that were added before; a class without rows is forgotten.

        Args:
            features: Shape (n, D).
            labels: Shape (n,).

        Raises:
            DataError: If a class was never seen or has fewer rows.
        """
        taken = self._collected(features, labels, warn=False)
        places = self._places(taken.labels)
        left = self.counts[places] - taken.counts
        if (left < 0).any():
            label = taken.labels[left < 0][0]
            have, ask = self.counts[places][left < 0][0], taken.counts[left < 0][0]
            raise DataError(
                f"{ask} rows of class {label} are to be taken away and only {have} were seen",
                "take away rows that were fitted, each once",
            )
        sums = self.sums[places] - taken.sums
        shift = taken.means - sums / np.maximum(left, 1)[:, None]
        share = taken.counts * left / self.counts[places]
        self._add_deviations(places, -taken.deviations, -share, shift)
        self.sums[places] = sums
        self.counts[places] = left
        self.zero_rows[places] -= taken.zero_rows
        self._keep(self.counts > 0)

    def merge(self, other: ClassStatistics) -> None:
        """Add the statistics of other rows; `other` is left as it is.

        Raises:
            DataError: If widths, scatter or normalization differ, or kinds of labels.
        """
        for name in ("width", "scatter", "normalize"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise DataError(
                    f"statistics with {name}={mine!r} and {name}={theirs!r} cannot be merged",
                    "fit both parts with the same settings on the same features",
                )
        if not len(other.labels):
            return
        self._admit(other.labels)
        places = np.searchsorted(self.labels, other.labels)
        before = self.counts[places]
        shift = other.means - self.sums[places] / np.maximum(before, 1)[:, None]
        share = before * other.counts / (before + other.counts)
        self._add_deviations(places, other.deviations, share, shift)
        self.counts[places] += other.counts
        self.zero_rows[places] += other.zero_rows
        self.sums[places] += other.sums
        self.derived = {}

    def remove_class(self, label: Any) -> None:
        """Forget a class.

        Raises:
            DataError: If it was never seen, or if one full scatter is kept for all classes, which
                cannot tell what this class gave to it.
        """
        place = self._places(np.asarray([label]))[0]
        if self.scatter == "full" and len(self.labels) > 1:
            raise DataError(
                f"the shared scatter cannot tell what class {label} gave to it",
                "take its rows away with subtract(features, labels), or use a diagonal covariance",
            )
        keep = np.ones(len(self.labels), dtype=bool)
        keep[place] = False
        self._keep(keep)

    def _places(self, labels: np.ndarray) -> np.ndarray:
        """Rows of known classes. Shape as given."""
        unknown = [label for label in labels.tolist() if label not in self.labels.tolist()]
        if unknown:
            known = ", ".join(map(str, self.labels[:12])) or "none"
            raise DataError(f"class {unknown[0]!r} was never seen", f"known classes: {known}")
        return np.searchsorted(self.labels, labels)

    def _keep(self, kept: np.ndarray) -> None:
        self.labels, self.counts = self.labels[kept], self.counts[kept]
        self.zero_rows, self.sums = self.zero_rows[kept], self.sums[kept]
        if self.scatter != "full":
            self.deviations = self.deviations[kept]
        elif not len(self.labels):
            self.deviations = self._no_deviations(0)
        self.derived = {}

    def _admit(self, labels: np.ndarray) -> None:
        """Make room for classes that are new; the sums of the others are copied as they are."""
        if not len(self.labels):
            joined = labels.copy()
        else:
            text = [kind.dtype.kind in "UO" for kind in (self.labels, labels)]
            if text[0] != text[1]:
                raise DataError(
                    f"labels of type {labels.dtype} do not go with {self.labels.dtype}",
                    "give all labels as whole numbers or all as text",
                )
            joined = np.union1d(self.labels, labels)
        if len(joined) == len(self.labels):
            return
        places = np.searchsorted(joined, self.labels)

        def widened(old: np.ndarray) -> np.ndarray:
            new = np.zeros((len(joined), *old.shape[1:]), dtype=old.dtype)
            new[places] = old
            return new

        self.counts, self.zero_rows = widened(self.counts), widened(self.zero_rows)
        self.sums = widened(self.sums)
        if self.scatter != "full":
            self.deviations = widened(self.deviations)
        self.labels = joined

    def _add_deviations(
        self, places: np.ndarray, given: np.ndarray, share: np.ndarray, shift: np.ndarray
    ) -> None:
        """Join scatters about two means: their sum plus share * shift shiftᵀ for each class."""
        if self.scatter == "diagonal":
            self.deviations[places] += given + share[:, None] * shift**2
            np.maximum(self.deviations, 0.0, out=self.deviations)
        elif self.scatter == "full":
            self.deviations += given
            apart = np.flatnonzero(share)
            if len(apart):
                self.deviations += (share[apart, None] * shift[apart]).T @ shift[apart]

    def _collected(self, features: np.ndarray, labels: np.ndarray, warn: bool) -> ClassStatistics:
        """Statistics of these rows alone, in one pass over blocks."""
        found = ClassStatistics(self.width, self.scatter, self.normalize)
        found.labels, index = np.unique(labels, return_inverse=True)
        found.counts = np.bincount(index, minlength=len(found.labels))
        found.zero_rows = np.zeros_like(found.counts)
        found.sums = np.zeros((len(found.labels), self.width))
        found.deviations = found._no_deviations(len(found.labels))
        reference = np.zeros_like(found.sums)
        started = np.zeros(len(found.labels), dtype=bool)
        parts = blocks_of(*features.shape)
        buffer = np.empty((parts[0].stop if parts else 0, self.width))
        spare = np.empty_like(buffer) if self.scatter != "none" else buffer
        for part in parts:
            classes = index[part]
            block = buffer[: len(classes)]
            np.copyto(block, features[part])
            if self.normalize:
                norms = row_norms(block, features)
                zero = norms == 0
                if zero.any():
                    found.zero_rows += np.bincount(classes[zero], minlength=len(found.labels))
                weights = 1.0 / np.where(zero, 1.0, norms)
            else:
                weights = np.ones(len(classes))
            if self.scatter == "none":
                found.sums += _summed(weights, classes, len(found.labels), block)
                continue
            if self.normalize:
                block *= weights[:, None]
            sums = _summed(np.ones(len(classes)), classes, len(found.labels), block)
            found.sums += sums
            fresh = ~started & (np.bincount(classes, minlength=len(started)) > 0)
            if fresh.any():
                rows = np.bincount(classes, minlength=len(started))[fresh]
                reference[fresh] = sums[fresh] / rows[:, None]
                started |= fresh
            centered = np.take(reference, classes, axis=0, out=spare[: len(classes)], mode="clip")
            np.subtract(block, centered, out=centered)
            if self.scatter == "full":
                found.deviations += centered.T @ centered
            else:
                centered *= centered
                found.deviations += _summed(
                    np.ones(len(classes)), classes, len(found.labels), centered
                )
        if not np.isfinite(found.sums).all():
            raise not_finite(features)
        # About the reference until here; about the mean from here on.
        places = np.arange(len(found.labels))
        found._add_deviations(
            places, np.zeros(()), -found.counts.astype(float), found.means - reference
        )
        if warn and found.zero_rows.any():
            warnings.warn(
                f"{found.zero_rows.sum()} of {len(features)} feature rows have norm zero; "
                "they are kept as zeros and counted",
                ZeroRowsWarning,
                stacklevel=5,
            )
        return found


def _summed(weights: np.ndarray, classes: np.ndarray, count: int, rows: np.ndarray) -> np.ndarray:
    """Weighted rows summed by class, row after row in float64. Shape (count, D)."""
    ends = np.arange(len(classes) + 1)
    return sparse.csc_array((weights, classes, ends), shape=(count, len(classes))) @ rows
