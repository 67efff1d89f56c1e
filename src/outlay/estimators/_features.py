"""Features and labels as they are given, checked: NumPy, pandas or torch in, plain arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.exceptions import NotFittedError
from sklearn.utils import assert_all_finite
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data

from ..core.errors import DataError, OutlayError

BLOCK_VALUES = 1 << 19  # float64 values that are worked on at once: 4 MiB
_SHOWN_ROWS = 10


class NotFitted(OutlayError, NotFittedError):
    """A prediction was asked of an estimator that has seen no class."""

    exit_code = 2


class ZeroRowsWarning(UserWarning):
    """Feature rows of norm zero cannot be normalized; they are kept as zeros."""


def plain_array(values: Any) -> Any:
    """A torch tensor as a NumPy array on the CPU; anything else as it is."""
    if type(values).__module__.split(".")[0] != "torch":
        return values
    values = values.detach().cpu()
    return (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()


def checked_features(estimator: Any, features: Any, reset: bool) -> np.ndarray:
    """A matrix of float32 or float64 features; whole numbers become float64.

    Args:
        estimator: Learns the width with `reset`, compares with what it learned otherwise.
        features: Shape (rows, width).
        reset: True where a fit starts anew.

    Raises:
        DataError: If it is no numeric matrix, or of another width.
    """
    try:
        found: Any = validate_data(
            estimator, plain_array(features), reset=reset, dtype=(np.float64, np.float32),
            ensure_all_finite=False,
        )  # fmt: skip
    except ValueError as error:
        raise DataError(
            str(error).strip(), "give a numeric matrix of the width that was learned, one row each"
        ) from None
    return found


def checked_labels(labels: Any, rows: int) -> np.ndarray:
    """One label a row: whole numbers, truth values or text. Shape (rows,).

    Raises:
        DataError: If labels are real numbers, missing, of mixed kinds, or not one a row.
    """
    if labels is None:
        raise DataError(
            "this estimator requires y to be passed, but the target y is None",
            "give one label a row",
        )
    try:
        found = column_or_1d(plain_array(labels), warn=True)
        assert_all_finite(found, input_name="y")
        check_classification_targets(found)
    except ValueError as error:
        raise DataError(str(error).strip(), "give one class a row, no measured values") from None
    if len(found) != rows:
        raise DataError(
            f"inconsistent lengths: {rows} feature rows and {len(found)} labels",
            "give one label a row",
        )
    if found.dtype.kind == "O" and all(isinstance(label, str) for label in found):
        return found
    if found.dtype.kind not in "iubU":
        kind = "of mixed kinds" if found.dtype.kind == "O" else f"of type {found.dtype}"
        raise DataError(
            f"labels are {kind}; classes are whole numbers or text",
            "convert them, as labels.astype(int) or labels.astype(str)",
        )
    return found


def blocks_of(rows: int, width: int) -> list[slice]:
    """Slices of rows that are worked on at once."""
    step = max(1, BLOCK_VALUES // max(1, width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def row_norms(block: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Euclidean norms of float64 rows, without overflow and underflow. Shape (rows,).

    Args:
        block: Rows of `features` in float64. Shape (block, width).
        features: All rows, for naming those that hold NaN or infinity.

    Raises:
        DataError: With the numbers of rows that are not finite.
    """
    squares = np.vecdot(block, block)
    if np.all((squares > 1e-280) & (squares < np.inf)):
        return np.sqrt(squares)
    largest = np.abs(block).max(axis=1, initial=0.0)
    if not np.isfinite(largest).all():
        raise not_finite(features)
    scale = np.where(largest > 0, largest, 1.0)
    scaled = block / scale[:, None]
    return np.sqrt(np.vecdot(scaled, scaled)) * scale


def not_finite(features: np.ndarray) -> DataError:
    """The error that names every row with NaN or infinity, or says that finite rows overflow."""
    bad = np.concatenate([
        np.flatnonzero(~np.isfinite(features[part]).all(axis=1)) + part.start
        for part in blocks_of(*features.shape)
    ])  # fmt: skip
    if not len(bad):
        return DataError("sums of these features exceed float64", "scale the features down")
    shown = ", ".join(map(str, bad[:_SHOWN_ROWS])) + (", ..." if len(bad) > _SHOWN_ROWS else "")
    return DataError(
        f"features hold NaN or inf in {len(bad)} of {len(features)} rows: {shown}",
        "drop or mend these rows",
    )
