"""Paired statistics: known answers, scipy as the peer, and simulated error rates."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from scipy import stats

from outlay.comparison import statistics as st
from outlay.core.errors import ConfigError

DIFFERENCES = [0.011, 0.004, 0.009, -0.002, 0.013, 0.007]


def test_differences_are_taken_on_shared_seeds_in_order():
    seeds, differences = st.paired_differences({3: 5.0, 1: 2.0, 9: 1.0}, {1: 1.5, 3: 1.0, 4: 0.0})
    assert seeds == [1, 3]
    assert differences.tolist() == [0.5, 4.0]


def test_paired_t_equals_scipy():
    expected = stats.ttest_rel(np.array(DIFFERENCES) + 0.3, np.full(6, 0.3)).pvalue
    assert st.paired_t_test(DIFFERENCES) == pytest.approx(expected, rel=1e-10)


def test_paired_t_by_hand():
    # Mean 2, s = 1, n = 3: t = 2 * sqrt(3) = 3.4641 with 2 degrees of freedom, whose two-sided
    # p has the closed form 1 - t / sqrt(2 + t^2) = 1 - sqrt(12 / 14).
    assert st.paired_t_test([1.0, 2.0, 3.0]) == pytest.approx(1 - (12 / 14) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("comparisons", [1, 15])
def test_interval_equals_scipy_at_the_bonferroni_level(comparisons):
    expected = stats.t.interval(
        1 - 0.05 / comparisons, 5, loc=np.mean(DIFFERENCES), scale=stats.sem(DIFFERENCES)
    )
    assert st.mean_interval(DIFFERENCES, 0.05, comparisons) == pytest.approx(expected, rel=1e-12)


def test_interval_excludes_zero_exactly_when_p_is_below_alpha():
    generator = np.random.default_rng(1)
    for _ in range(200):
        x = generator.normal(0.8, 1, 5)
        low, high = st.mean_interval(x)
        assert (st.paired_t_test(x) < 0.05) == (low > 0 or high < 0)


@pytest.mark.parametrize(
    ("given_p", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm_by_hand(given_p, expected):
    assert st.holm(given_p).tolist() == pytest.approx(expected)


@given(some.lists(some.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_the_raw_p_and_bonferroni_and_keeps_the_order(p):
    adjusted = st.holm(p)
    raw = np.array(p)
    assert (adjusted >= raw).all()
    assert (adjusted <= np.minimum(1, len(p) * raw) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(raw, kind="stable")]) >= 0).all()


def test_holm_refuses_what_is_no_probability():
    with pytest.raises(ConfigError, match="outside"):
        st.holm([0.1, float("nan")])


def slow_sign_flip(x):
    sums = [abs(np.dot(signs, x)) for signs in itertools.product([1, -1], repeat=len(x))]
    return np.mean(np.array(sums) >= abs(sum(x)) - 1e-12)


@given(some.lists(some.integers(-5, 5), min_size=1, max_size=8))
def test_sign_flip_equals_the_slow_enumeration(x):
    assert st.sign_flip_test(x) == slow_sign_flip(x)


def test_sign_flip_floor_is_reached_when_all_signs_agree():
    assert st.sign_flip_test([1, 2, 3, 4, 5, 6]) == st.sign_flip_floor(6) == 2 / 64


def test_sign_flip_is_sampled_above_twenty_seeds_and_repeats():
    x = np.random.default_rng(2).normal(0.3, 1, 24)
    p = st.sign_flip_test(x, resamples=20_000)
    assert p == st.sign_flip_test(x, resamples=20_000)
    assert p == pytest.approx(st.paired_t_test(x), abs=0.02)
    assert st.sign_flip_test(np.ones(40), resamples=1_000) == st.sign_flip_floor(40, 1_000)


@pytest.mark.parametrize(
    "function", [st.paired_t_test, st.mean_interval], ids=lambda function: function.__name__
)
@pytest.mark.parametrize(
    ("x", "said"), [([0.1], "1 seed"), ([0.2, 0.2, 0.2], "spread"), ([0.1, np.nan], "finite")]
)
def test_what_cannot_be_tested_is_refused(function, x, said):
    with pytest.raises(ConfigError, match=said) as caught:
        function(x)
    assert caught.value.remedy


def test_rounding_is_not_taken_for_spread():
    first, second = np.array([0.7, 0.8, 0.3]), np.array([0.6, 0.7, 0.2])
    assert np.ptp(first - second) > 0
    assert st.is_constant(first - second, scale=0.8)
    assert not st.is_constant([0.1, 0.1001, 0.1])


@pytest.mark.parametrize(("seeds", "comparisons"), [(3, 1), (6, 15), (30, 15)])
def test_power_equals_scipys_noncentral_t(seeds, comparisons):
    critical = stats.t.isf(0.05 / comparisons / 2, seeds - 1)
    for difference in (0.5, 1.0, 2.0):
        shift = difference * seeds**0.5
        # scipy returns NaN for some lower tails that are far below the tolerance.
        lower = np.nan_to_num(stats.nct.cdf(-critical, seeds - 1, shift))
        expected = stats.nct.sf(critical, seeds - 1, shift) + lower
        power = st.t_test_power(difference, 1.0, seeds, comparisons=comparisons)
        assert power == pytest.approx(expected, abs=1e-5)


def test_detectable_difference_known_answers():
    # Cohen (1988), two-sided 0.05, power 0.8, paired: d = 0.5 takes 34 pairs, d = 0.8 takes 15.
    assert st.seeds_needed(0.5, 1.0) == 34
    assert st.seeds_needed(0.8, 1.0) == 15
    assert st.detectable_difference(1.0, 34) == pytest.approx(0.495, abs=0.001)


@pytest.mark.parametrize("seeds", [2, 3, 6, 30, 1000])
@pytest.mark.parametrize("comparisons", [1, 21, 1225])
def test_detectable_difference_solves_the_power_equation_and_scales(seeds, comparisons):
    found = st.detectable_difference(0.02, seeds, comparisons=comparisons)
    assert st.t_test_power(found, 0.02, seeds, comparisons=comparisons) == pytest.approx(0.8)
    twice = st.detectable_difference(0.04, seeds, comparisons=comparisons)
    assert twice == pytest.approx(2 * found)


@pytest.mark.parametrize(("difference", "comparisons"), [(0.01, 1), (0.01, 21), (-0.3, 3)])
def test_seeds_needed_is_the_smallest_that_suffices(difference, comparisons):
    seeds = st.seeds_needed(difference, 0.02, comparisons=comparisons)
    assert st.t_test_power(difference, 0.02, seeds, comparisons=comparisons) >= 0.8
    if seeds > 2:
        assert st.t_test_power(difference, 0.02, seeds - 1, comparisons=comparisons) < 0.8


@pytest.mark.parametrize(
    "call",
    [
        lambda: st.detectable_difference(0.0, 5),
        lambda: st.detectable_difference(1.0, 1),
        lambda: st.detectable_difference(1.0, 5, power=0.01),
        lambda: st.detectable_difference(1.0, 5, alpha=1.5),
        lambda: st.detectable_difference(1.0, 5, comparisons=0),
        lambda: st.seeds_needed(0.0, 1.0),
        lambda: st.seeds_needed(0.1, float("nan")),
        lambda: st.inside_margin((0, 1), 0),
    ],
)
def test_bad_designs_are_refused(call):
    with pytest.raises(ConfigError):
        call()


def test_bootstrap_agrees_with_the_theory_of_independent_outcomes():
    generator = np.random.default_rng(3)
    outcomes = {"a": generator.normal(0.1, 1, (40, 300)), "b": generator.normal(0, 1, (40, 300))}
    [(low, high)] = st.bootstrap_items(outcomes, [("a", "b")], resamples=4_000)
    difference = float((outcomes["a"] - outcomes["b"]).mean())
    half = 1.96 * (2 / (40 * 300)) ** 0.5
    assert low < difference < high
    # Resampling rows and columns together counts independent noise three times.
    assert (high - low) / 2 == pytest.approx(half * 3**0.5, rel=0.1)


def test_bootstrap_is_paired_repeats_and_widens_with_comparisons():
    generator = np.random.default_rng(4)
    shared = generator.normal(0, 5, (6, 80))
    outcomes = {"a": shared + 0.5, "b": shared}
    [interval] = st.bootstrap_items(outcomes, [("a", "b")], resamples=500)
    assert interval == pytest.approx((0.5, 0.5))
    outcomes["a"] = shared + generator.normal(0, 1, shared.shape)
    once = st.bootstrap_items(outcomes, [("a", "b")], resamples=2_000)
    assert once == st.bootstrap_items(outcomes, [("a", "b")], resamples=2_000)
    [wide] = st.bootstrap_items(outcomes, [("a", "b")], comparisons=10, resamples=2_000)
    assert wide[0] < once[0][0]
    assert wide[1] > once[0][1]


def test_bootstrap_refuses_unpaired_shapes_and_failures():
    with pytest.raises(ConfigError, match="shape"):
        st.bootstrap_items({"a": np.ones((2, 3)), "b": np.ones((2, 4))}, [("a", "b")])
    with pytest.raises(ConfigError, match="finite"):
        st.bootstrap_items({"a": np.full((2, 3), np.nan)}, [("a", "a")])


def test_tie_groups_are_maximal_and_may_overlap():
    assert st.tie_groups("abcd", [("a", "b"), ("c", "b")]) == [["a", "b"], ["b", "c"], ["d"]]
    assert st.tie_groups("abc", list(itertools.combinations("abc", 2))) == [["a", "b", "c"]]
    assert st.tie_groups("abc", []) == [["a"], ["b"], ["c"]]
    assert st.tie_groups([], []) == []


@given(some.sets(some.sampled_from(list(itertools.combinations("abcdef", 2)))))
def test_tie_groups_equal_the_slow_search(tied):
    def is_group(names):
        return all(pair in tied for pair in itertools.combinations(names, 2))

    every = [
        set(names)
        for size in range(1, 7)
        for names in itertools.combinations("abcdef", size)
        if is_group(names)
    ]
    expected = [sorted(g) for g in every if not any(g < other for other in every)]
    assert st.tie_groups("abcdef", tied) == sorted(expected)
