"""Curves for drawing: thinned without losing an extreme, and averaged over seeds.

Only drawings are thinned. The parquet file beside the page holds every point.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from .report_data import COLUMNS

Floats = NDArray[np.float64]
METERS = COLUMNS[:-1]
BUCKETS = 120


def as_points(curve: Sequence[Sequence[float | None]], where: str) -> Floats:
    """A curve as an array [points, 5]; None becomes NaN.

    Raises:
        ConfigError: If a point does not have the five columns of `report_data.COLUMNS`.
    """
    try:
        points = np.array(curve, dtype=float).reshape(len(curve), -1)
    except (TypeError, ValueError):
        points = np.empty((1, 0))
    if len(curve) and points.shape[1] != len(COLUMNS):
        raise ConfigError(
            f"points of {where} are not [{', '.join(COLUMNS)}]", "give all five, or None for one"
        )
    return points.reshape(-1, len(COLUMNS))


def thinned(values: Floats, buckets: int = BUCKETS) -> NDArray[np.intp]:
    """Indices of at most 2 * buckets points that keep both ends and every bucket's extremes.

    Args:
        values: Finite, at least one.
        buckets: Equal stretches of the curve.
    """
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    kept = [0, len(values) - 1]
    # Both ends are kept besides the extremes, so one bucket less stays within the bound.
    for part in np.array_split(np.arange(len(values)), buckets - 1):
        kept += [part[np.argmin(values[part])], part[np.argmax(values[part])]]
    return np.unique(kept)


def knots(column: Floats, tolerance: float = 0.001) -> NDArray[np.intp]:
    """Indices between which straight lines follow a column to within a share of its range.

    Tokens and FLOPs grow almost evenly, so a few knots replace a thousand numbers (Ramer,
    Douglas and Peucker's line simplification, with vertical distance).
    """
    allowed = tolerance * float(np.ptp(column))
    kept, open_spans = [0, len(column) - 1], [(0, len(column) - 1)]
    while open_spans:
        first, last = open_spans.pop()
        if last - first < 2:
            continue
        line = np.linspace(column[first], column[last], last - first + 1)
        distance = np.abs(column[first : last + 1] - line)
        worst = int(distance.argmax())
        if distance[worst] > allowed:
            kept.append(first + worst)
            open_spans += [(first, first + worst), (first + worst, last)]
    return np.unique(kept)


def drawn_curves(runs: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> dict[str, Any]:
    """All that the page needs to draw curves.

    Args:
        runs: As `report_data.RunData`.
        arms: Names of arms, in the order of their colors.

    Returns:
        `names` of the curves; `meters` that at least one curve has; `seeds`: by curve name, a
        list of `{arm, seed, at, value, columns}` (`at` = indices of the points kept, `columns` =
        meter to [indices, values] of its knots); `means`: by curve name, a list of
        `{arm, runs, mean, spread, <meter>...}`. Arms are numbers.
    """
    grouped: dict[str, dict[int, list[Floats]]] = {}
    seeds: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        arm = arms.index(run["arm"])
        for name, curve in run.get("curves", {}).items():
            points = as_points(curve, f"curve {name!r} of {run['arm']}, seed {run['seed']}")
            points = points[np.isfinite(points[:, -1])]
            if not len(points):
                continue
            grouped.setdefault(name, {}).setdefault(arm, []).append(points)
            at = thinned(points[:, -1])
            seeds.setdefault(name, []).append(
                {
                    "arm": arm,
                    "seed": run["seed"],
                    "at": at.tolist(),
                    "value": _rounded(points[at, -1], 5),
                    "columns": _columns(points),
                }
            )
    means = {
        name: [_mean(arm, by_arm[arm]) for arm in sorted(by_arm)]
        for name, by_arm in grouped.items()
    }
    present = {key for entries in seeds.values() for entry in entries for key in entry["columns"]}
    return {
        "names": list(seeds),
        "meters": [meter for meter in METERS if meter in present],
        "seeds": seeds,
        "means": means,
    }


def _columns(points: Floats) -> dict[str, list[list[float]]]:
    columns = {}
    for number, meter in enumerate(METERS):
        column = points[:, number]
        if np.isfinite(column).all():
            at = knots(column)
            columns[meter] = [at.tolist(), _rounded(column[at], 6)]
    return columns


def _mean(arm: int, curves: list[Floats]) -> dict[str, Any]:
    """Mean and standard deviation over seeds; long curves averaged within `BUCKETS` stretches."""
    steps = [points[:, 0] for points in curves]
    if all(np.array_equal(steps[0], other) for other in steps[1:]):
        stacked = np.stack(curves)
        if stacked.shape[1] > 2 * BUCKETS:
            starts = np.linspace(0, stacked.shape[1], BUCKETS, endpoint=False).astype(int)
            sizes = np.diff(np.append(starts, stacked.shape[1]))
            stacked = np.add.reduceat(stacked, starts, axis=1) / sizes[None, :, None]
    else:
        # Seeds logged at other steps: read all of them at common ones, where all have values.
        low, high = max(s[0] for s in steps), min(s[-1] for s in steps)
        grid = np.linspace(low, max(low, high), BUCKETS)
        stacked = np.stack(
            [
                np.stack([np.interp(grid, points[:, 0], column) for column in points.T], axis=-1)
                for points in curves
            ]
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column may hold nothing but NaN
        center = np.nanmean(stacked, axis=0)
    spread = stacked[:, :, -1].std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(center))
    series: dict[str, Any] = {
        "arm": arm,
        "runs": len(curves),
        "mean": _rounded(center[:, -1], 5),
        "spread": _rounded(spread, 3),
    }
    for number, meter in enumerate(METERS):
        if np.isfinite(center[:, number]).all():
            series[meter] = _rounded(center[:, number], 6)
    return series


def _rounded(values: Floats, digits: int) -> list[float]:
    """Numbers cut to so many significant digits; whole ones as int, which is shorter in JSON."""
    short = [float(f"{value:.{digits}g}") for value in values]
    return [int(value) if value.is_integer() and abs(value) < 1e15 else value for value in short]
