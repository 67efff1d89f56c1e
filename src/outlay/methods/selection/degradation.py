"""How much a year between training and test data costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...core.errors import DataError


@dataclass(frozen=True)
class Degradation:
    """What distance in time costs.

    Attributes:
        per_year: Points lost a year of distance, mean over test years; positive is a loss.
        correlation: Pearson's r of distance and loss over all pairs; NaN where either is constant.
        by_test_year: Points lost a year for each test year.
    """

    per_year: float
    correlation: float
    by_test_year: Mapping[int, float]


def temporal_degradation(scores: Mapping[tuple[int, int], float]) -> Degradation:
    r"""Temporal degradation after Luu et al. (arXiv:2111.07408) as Longpre et al. use it.

    With the score $S(\tau \to t)$ on test year t of a model whose data end in year $\tau$, the loss
    $L = S(t \to t) - S(\tau \to t)$ is regressed on the distance $|t - \tau|$ by least squares
    through the origin, one slope a test year. The papers' exact regression is not established; this
    one is 0 for a model that is as good everywhere.

    Args:
        scores: (training year, test year) to score; every test year needs its own model's score
            and at least one other's.

    Raises:
        DataError: If a test year has no aligned score or no other, or a score is not finite.
    """
    slopes: dict[int, float] = {}
    points: list[tuple[float, float]] = []
    for year in sorted({test for _, test in scores}):
        if (year, year) not in scores:
            raise DataError(
                f"no score of test year {year} with data up to {year}", "measure that pair as well"
            )
        pairs = [
            (abs(train - test), scores[year, year] - score)
            for (train, test), score in scores.items()
            if test == year and train != year
        ]
        if not pairs or not all(math.isfinite(loss) for _, loss in pairs):
            raise DataError(
                f"test year {year} has no finite scores from other years", "measure at least one"
            )
        slopes[year] = sum(d * loss for d, loss in pairs) / sum(d * d for d, _ in pairs)
        points += pairs
    if not slopes:
        raise DataError("no scores", "give at least two training years")
    return Degradation(sum(slopes.values()) / len(slopes), _pearson(points), slopes)


def _pearson(points: list[tuple[float, float]]) -> float:
    means = [math.fsum(column) / len(points) for column in zip(*points)]
    apart = [(x - means[0], y - means[1]) for x, y in points]
    spreads = [math.fsum(value * value for value in column) for column in zip(*apart)]
    if min(spreads) <= 1e-18:
        return math.nan
    return math.fsum(x * y for x, y in apart) / math.sqrt(spreads[0] * spreads[1])
