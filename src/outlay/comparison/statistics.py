"""Paired statistics over seeds: differences, tests, intervals, and what could have been seen.

Plain functions on numbers. All differences are `first - second` in the metric's own unit, one
per seed; n is the number of seeds, s the standard deviation of the n differences (n - 1 in the
denominator), m the number of pairs that are compared at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from ..core.errors import ConfigError

EXACT_FLIPS = 20
"""Up to this many seeds all 2**n sign flips are enumerated; above, they are sampled."""

Interval = tuple[float, float]
Floats = NDArray[np.float64]


def paired_differences(
    first: Mapping[int, float], second: Mapping[int, float]
) -> tuple[list[int], Floats]:
    """Differences `first - second` on the seeds that both have.

    Args:
        first: Metric by seed.
        second: Metric by seed.

    Returns:
        The shared seeds in ascending order, and one difference for each.
    """
    seeds = sorted(first.keys() & second.keys())
    return seeds, np.array([first[seed] - second[seed] for seed in seeds], dtype=float)


def is_constant(values: ArrayLike, scale: float | None = None) -> bool:
    """True if the values differ by no more than rounding, so that no spread can be estimated.

    Args:
        values: Numbers, e.g. paired differences.
        scale: Size of the numbers that were subtracted to get `values`; their rounding, not
            that of the small differences, decides. Default: the largest absolute value.
    """
    x = np.asarray(values, dtype=float)
    size = max(float(np.abs(x).max(initial=0)), scale or 0.0)
    return bool(float(np.ptp(x)) <= 16 * np.finfo(float).eps * size)


def paired_t_test(differences: ArrayLike) -> float:
    """Two-sided p-value of the paired t test: t = mean * sqrt(n) / s with n - 1 degrees of freedom.

    Args:
        differences: One per seed, n >= 2.

    Raises:
        ConfigError: With fewer than two seeds, or if all differences are the same (s = 0).
    """
    x, mean, error = _mean_and_error(differences)
    return float(2 * stats.t.sf(abs(mean) / error, len(x) - 1))


def mean_interval(differences: ArrayLike, alpha: float = 0.05, comparisons: int = 1) -> Interval:
    """Interval of the mean: mean +- t(1 - alpha / 2m, n - 1) * s / sqrt(n).

    With m `comparisons` (Bonferroni), the probability that any of the m intervals misses its
    mean is at most alpha, whatever the dependence between them.

    Args:
        differences: One per seed, n >= 2.
        alpha: Share of misses allowed, over all m intervals together.
        comparisons: m, the number of intervals that are shown together.

    Raises:
        ConfigError: As `paired_t_test`.
    """
    x, mean, error = _mean_and_error(differences)
    half = float(stats.t.isf(_adjusted(alpha, comparisons) / 2, len(x) - 1)) * error
    return mean - half, mean + half


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjustment of m p-values, in the order given.

    Sorted ascending, the k-th smallest (k = 1 .. m) becomes max over j <= k of
    min(1, (m - j + 1) * p_j). Comparing the result with alpha keeps the probability of any
    false rejection at or below alpha under any dependence.

    Raises:
        ConfigError: If a p-value lies outside [0, 1].
    """
    p = np.asarray(p_values, dtype=float)
    if p.size and not ((p >= 0) & (p <= 1)).all():
        raise ConfigError(f"p-values outside [0, 1]: {p.tolist()}", "give probabilities")
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1.0, np.arange(p.size, 0, -1) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(stepped) if p.size else stepped
    return adjusted


def sign_flip_test(differences: ArrayLike, resamples: int = 100_000, seed: int = 0) -> float:
    """Two-sided sign-flip p: share of sign flips whose |mean| is at least the observed one.

    Exact over all 2**n flips up to `EXACT_FLIPS` seeds. Above, `resamples` random flips are
    drawn from a generator of their own and p = (1 + hits) / (1 + resamples).

    Args:
        differences: One per seed, n >= 1.
        resamples: Random flips when n > `EXACT_FLIPS`.
        seed: Of the generator of random flips.
    """
    x = np.asarray(differences, dtype=float)
    observed = abs(x.sum())
    # Two sums of the same numbers in another order may differ by rounding and still tie.
    bound = observed - 8 * np.finfo(float).eps * np.abs(x).sum()
    if x.size <= EXACT_FLIPS:
        # Flipping every sign gives the same |sum|, so the first sign can stay.
        sums = x[:1].copy()
        for value in x[1:]:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= bound))
    generator = np.random.default_rng(seed)
    hits = 0
    for start in range(0, resamples, 10_000):
        rows = min(10_000, resamples - start)
        signs = generator.integers(0, 2, size=(rows, x.size)) * 2 - 1
        hits += int(np.count_nonzero(np.abs(signs @ x) >= bound))
    return (1 + hits) / (1 + resamples)


def sign_flip_floor(seeds: int, resamples: int = 100_000) -> float:
    """Smallest p that `sign_flip_test` can return: 2 / 2**n, or 1 / (1 + resamples) if sampled."""
    return 2.0 / 2**seeds if seeds <= EXACT_FLIPS else 1.0 / (1 + resamples)


def t_test_power(
    difference: float, spread: float, seeds: int, alpha: float = 0.05, comparisons: int = 1
) -> float:
    """Probability that a paired t test at level alpha / m finds a true difference.

    P(|T| > t(1 - alpha / 2m, n - 1)) with T noncentral t, noncentrality difference * sqrt(n) / s.

    Args:
        difference: True mean difference, in the metric's unit.
        spread: s, standard deviation of paired differences between seeds, > 0.
        seeds: n >= 2.
        alpha: Level over all comparisons together.
        comparisons: m. Holm's first step tests at alpha / m; its later steps only gain power.

    Raises:
        ConfigError: If spread, seeds, alpha or comparisons is out of range.
    """
    _check_design(spread, seeds)
    critical = float(stats.t.isf(_adjusted(alpha, comparisons) / 2, seeds - 1))
    return _power(abs(difference) * math.sqrt(seeds) / spread, critical, seeds - 1)


def detectable_difference(
    spread: float, seeds: int, alpha: float = 0.05, comparisons: int = 1, power: float = 0.8
) -> float:
    """Smallest true difference that these seeds would show with the given power.

    The solution of `t_test_power(difference, ...) = power`, in the metric's unit.

    Args:
        spread: s, standard deviation of paired differences between seeds, > 0.
        seeds: n >= 2.
        alpha: Level over all comparisons together.
        comparisons: m, the number of pairs compared at once.
        power: In (alpha, 1).

    Raises:
        ConfigError: If an argument is out of range.
    """
    _check_design(spread, seeds)
    level = _adjusted(alpha, comparisons)
    if not alpha < power < 1:
        raise ConfigError(f"power {power} is not between {alpha} and 1", "0.8 is usual")
    return _noncentrality(seeds - 1, level, power) * spread / math.sqrt(seeds)


def seeds_needed(
    difference: float,
    spread: float,
    alpha: float = 0.05,
    comparisons: int = 1,
    power: float = 0.8,
) -> int:
    """Fewest seeds (at least 2) with which a true difference is found with the given power.

    Args:
        difference: To be seen, in the metric's unit, not 0.
        spread: s, standard deviation of paired differences between seeds, > 0.
        alpha: Level over all comparisons together.
        comparisons: m, the number of pairs compared at once.
        power: In (alpha, 1).

    Raises:
        ConfigError: If an argument is out of range.
    """
    if not (math.isfinite(difference) and difference != 0):
        raise ConfigError(f"cannot plan for a difference of {difference}", "give a number not 0")
    _check_design(spread, 2)
    level = _adjusted(alpha, comparisons)
    if not alpha < power < 1:
        raise ConfigError(f"power {power} is not between {alpha} and 1", "0.8 is usual")
    # With the spread known (normal instead of t) fewer seeds suffice: a lower bound to start from.
    quantiles = float(stats.norm.isf(level / 2)) + float(stats.norm.ppf(power))
    seeds = max(2, math.floor((quantiles * spread / difference) ** 2))
    if seeds > 1_000_000:
        return seeds
    while t_test_power(difference, spread, seeds, alpha, comparisons) < power:
        seeds += 1
    return seeds


def bootstrap_items(
    outcomes: Mapping[str, ArrayLike],
    pairs: Sequence[tuple[str, str]],
    alpha: float = 0.05,
    comparisons: int = 1,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Interval]:
    """Percentile intervals of mean differences, resampling test items and seeds together.

    Each resample draws n seeds and I items with replacement, the same ones for all arms, and
    takes the mean over the drawn seeds x items; the interval runs from the alpha / 2m to the
    1 - alpha / 2m quantile of the differences. It says what another test set of the same kind
    and other seeds would show. With few seeds it is too narrow, by sqrt((n - 1) / n) at least,
    so it is printed beside the t interval and never ranks.

    Args:
        outcomes: Arm to an array of shape [seeds, items]: what each test item gave (1 or 0 for
            right or wrong, or a loss), the same seeds and items in the same order for all arms.
        pairs: (first, second) arms.
        alpha: Share of misses allowed, over all m intervals together.
        comparisons: m, the number of intervals that are shown together.
        resamples: Number of resamples.
        seed: Of the generator.

    Returns:
        One interval for each pair, in the metric's unit.

    Raises:
        ConfigError: If the arrays differ in shape or hold numbers that are not finite.
    """
    arrays = {name: np.asarray(values, dtype=float) for name, values in outcomes.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ConfigError(
            f"outcomes per item differ in shape: {shapes}",
            "give one array [seeds, items] per arm, the same seeds and items for all",
        )
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ConfigError("an outcome per item is not a finite number", "leave failed runs out")
    seeds, items = next(iter(shapes.values()))
    generator = np.random.default_rng(seed)
    means = {name: np.empty(resamples) for name in arrays}
    for start in range(0, resamples, 500):
        rows = slice(start, min(start + 500, resamples))
        seed_share = _resampled_shares(generator, rows.stop - start, seeds)
        item_share = _resampled_shares(generator, rows.stop - start, items)
        for name, array in arrays.items():
            means[name][rows] = ((seed_share @ array) * item_share).sum(axis=1)
    tail = _adjusted(alpha, comparisons) / 2
    quantiles = [np.quantile(means[a] - means[b], [tail, 1 - tail]) for a, b in pairs]
    return [(float(low), float(high)) for low, high in quantiles]


def inside_margin(interval: Interval, margin: float) -> bool:
    """True if the whole interval lies strictly between -margin and margin.

    Only then may two arms be called equal, and only if the margin was stated beforehand.

    Raises:
        ConfigError: If the margin is not a positive number.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise ConfigError(f"margin {margin} is not positive", "state it in the metric's unit, > 0")
    return -margin < interval[0] and interval[1] < margin


def tie_groups(names: Sequence[str], tied: Collection[tuple[str, str]]) -> list[list[str]]:
    """Maximal groups in which every two arms are tied: the maximal cliques of the tie graph.

    Not being separated is not transitive: with a-b and b-c tied but a and c separated, the
    groups are [a, b] and [b, c], and b is in both. An arm tied with none is a group of its own.

    Args:
        names: All arms, in the order wanted within a group.
        tied: Pairs of names that are not separated, in either order.

    Returns:
        Groups, each in the order of `names`, sorted by their first, second, ... members.
    """
    position = {name: number for number, name in enumerate(names)}
    neighbours: dict[str, set[str]] = {name: set() for name in names}
    for a, b in tied:
        neighbours[a].add(b)
        neighbours[b].add(a)
    groups: list[list[str]] = []

    def extend(group: list[str], candidates: set[str], excluded: set[str]) -> None:
        if not candidates and not excluded:
            groups.append(sorted(group, key=position.__getitem__))
            return
        pivot = max(candidates | excluded, key=lambda name: len(neighbours[name] & candidates))
        for name in sorted(candidates - neighbours[pivot], key=position.__getitem__):
            extend([*group, name], candidates & neighbours[name], excluded & neighbours[name])
            candidates = candidates - {name}
            excluded = excluded | {name}

    if names:
        extend([], set(names), set())
    return sorted(groups, key=lambda group: [position[name] for name in group])


def _mean_and_error(differences: ArrayLike) -> tuple[Floats, float, float]:
    x = np.asarray(differences, dtype=float)
    if x.ndim != 1 or x.size < 2:
        raise ConfigError(
            f"{x.size} seed(s) cannot tell a difference from chance", "give at least two seeds"
        )
    if not np.isfinite(x).all():
        raise ConfigError("a difference is not a finite number", "leave failed runs out")
    if is_constant(x):
        raise ConfigError(
            f"all {x.size} differences are {x[0]:g}: without spread there is no test",
            "check that the seed reaches the data order and the initialization",
        )
    return x, float(x.mean()), float(x.std(ddof=1)) / math.sqrt(x.size)


def _adjusted(alpha: float, comparisons: int) -> float:
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha {alpha} is not between 0 and 1", "0.05 is usual")
    if comparisons < 1:
        raise ConfigError(f"{comparisons} comparisons", "count the pairs shown, at least 1")
    return alpha / comparisons


def _check_design(spread: float, seeds: int) -> None:
    if not (math.isfinite(spread) and spread > 0):
        raise ConfigError(
            f"seed spread {spread} is not positive",
            "give the standard deviation of paired differences from an earlier comparison",
        )
    if seeds < 2:
        raise ConfigError(f"{seeds} seed(s) have no spread", "give at least two seeds")


@lru_cache(maxsize=64)
def _spread_nodes(degrees: int, nodes: int = 4_000) -> Floats:
    """Quantiles of sample over true standard deviation, at the midpoints of equal shares."""
    shares = (np.arange(nodes) + 0.5) / nodes
    return np.sqrt(stats.chi2.ppf(shares, degrees) / degrees)


def _power(noncentrality: float, critical: float, degrees: int) -> float:
    """P(|T| > critical), T noncentral t: a normal given the sample spread, averaged over it.

    scipy's own noncentral t returns NaN at the large critical values that few seeds and many
    pairs give.
    """
    bounds = critical * _spread_nodes(degrees)
    tails = stats.norm.cdf(noncentrality - bounds) + stats.norm.cdf(-noncentrality - bounds)
    return float(np.mean(tails))


@lru_cache(maxsize=256)
def _noncentrality(degrees: int, level: float, power: float) -> float:
    """Noncentrality at which a two-sided t test at `level` has the given power."""
    critical = float(stats.t.isf(level / 2, degrees))
    upper = critical + 10.0
    while _power(upper, critical, degrees) < power:
        upper *= 2
    root: Any = optimize.brentq(lambda d: _power(d, critical, degrees) - power, 0.0, upper)
    return float(root)


def _resampled_shares(generator: np.random.Generator, rows: int, size: int) -> Floats:
    """For each row, how often each of `size` things was drawn with replacement, over `size`."""
    drawn = generator.integers(0, size, size=(rows, size))
    flat = (drawn + np.arange(rows)[:, None] * size).ravel()
    return np.bincount(flat, minlength=rows * size).reshape(rows, size) / size
