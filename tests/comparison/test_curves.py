"""Thinning and averaging of curves, against slow references."""

import numpy as np
import pytest

from outlay.comparison.page import curves
from outlay.comparison.page.axes import (
    CHARACTER,
    Box,
    Scale,
    clipped_pair,
    linear_ticks,
    log_ticks,
    place_labels,
    tick_text,
)
from outlay.comparison.page.charts import forest, pareto
from outlay.comparison.page.meters import meter_text


def test_thinning_keeps_ends_extremes_and_short_curves():
    values = np.random.default_rng(0).normal(size=1000)
    values[517], values[801] = 9.0, -9.0
    kept = curves.thinned(values)
    assert len(kept) <= 2 * curves.BUCKETS
    assert {0, 517, 801, 999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert curves.thinned(values[:200]).tolist() == list(range(200))


@pytest.mark.parametrize("kind", ["even", "jump", "noisy", "constant", "single"])
def test_knots_follow_a_column_within_the_tolerance(kind):
    generator = np.random.default_rng(1)
    column = {
        "even": np.arange(500.0) * 384,
        "jump": np.arange(500.0) + 1000 * (np.arange(500) > 250),
        "noisy": np.cumsum(generator.uniform(0, 2, 500)),
        "constant": np.full(500, 3.0),
        "single": np.array([4.0]),
    }[kind]
    at = curves.knots(column)
    drawn = np.interp(np.arange(len(column)), at, column[at])
    assert np.abs(drawn - column).max() <= 0.001 * np.ptp(column) + 1e-12
    if kind in ("even", "constant"):
        assert len(at) == 2


def run_of(seed, values, steps=None):
    steps = range(1, len(values) + 1) if steps is None else steps
    return {
        "arm": "a", "seed": seed, "curves": {"loss": [[s, s * 10, None, s / 2, v]
                                                      for s, v in zip(steps, values)]},
    }  # fmt: skip


def test_means_over_seeds():
    drawn = curves.drawn_curves([run_of(0, [1.0, 2.0]), run_of(1, [3.0, 6.0])], ["a"])
    assert drawn["names"] == ["loss"]
    assert drawn["meters"] == ["step", "tokens", "seconds"]
    [mean] = drawn["means"]["loss"]
    assert mean["mean"] == [2, 4]
    assert mean["spread"] == pytest.approx([2**0.5, 8**0.5], rel=0.01)
    assert mean["tokens"] == [10, 20]


def test_long_curves_are_averaged_and_uneven_ones_read_at_common_steps():
    values = np.random.default_rng(2).normal(size=1200)
    drawn = curves.drawn_curves([run_of(0, values.tolist())], ["a"])
    [mean] = drawn["means"]["loss"]
    assert mean["mean"] == pytest.approx(values.reshape(120, 10).mean(axis=1), rel=1e-3, abs=1e-4)
    uneven = [run_of(0, [0.0, 10.0], [0, 10]), run_of(1, [4.0, 8.0, 12.0], [2, 6, 10])]
    [mean] = curves.drawn_curves(uneven, ["a"])["means"]["loss"]
    assert mean["step"][0] == 2
    assert mean["mean"][0] == pytest.approx(3)
    assert mean["mean"][-1] == pytest.approx(11)


def test_values_that_are_not_finite_are_left_out():
    drawn = curves.drawn_curves([run_of(0, [1.0, None, float("nan"), 4.0])], ["a"])
    assert drawn["seeds"]["loss"][0]["value"] == [1, 4]
    assert curves.drawn_curves([run_of(0, [None])], ["a"])["names"] == []


def test_ticks_are_round_and_inside():
    assert linear_ticks(0.0, 1.0, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert log_ticks(10, 100_000) == [10, 100, 1000, 10_000, 100_000]
    assert all(2000 <= tick <= 9000 for tick in log_ticks(2000, 9000))
    assert tick_text(-0.05, [-0.05, 0.0]) == "−0.05"
    assert tick_text(0.5, [0.0, 0.5], plus=True) == "+0.5"


def test_scales_map_ends_to_ends():
    assert Scale(0, 10, 100, 300)(5) == 200
    assert Scale(1, 100, 0, 200, logarithmic=True)(10) == 100


def test_both_names_of_a_pair_survive_clipping():
    assert clipped_pair("a", "b", 100) == "a − b"
    text = clipped_pair("short", "x" * 60, 20 * CHARACTER)
    assert text.startswith("short − xxx")
    assert len(text) <= 20
    assert len(clipped_pair("y" * 60, "x" * 60, 21 * CHARACTER)) <= 21


def test_labels_avoid_each_other():
    points = [(100.0, 100.0), (104.0, 101.0), (98.0, 103.0)]
    boxes = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in points]
    labels = place_labels(points, ["first", "second", "third"], boxes, Box(0, 0, 300, 300))
    overlaps = [a.box.overlap(b.box) for a in labels for b in labels if a is not b]
    assert max(overlaps) == 0


def pair(difference, interval, outcome="separated"):
    return {"a": "x", "b": "y", "difference": difference, "interval": interval, "outcome": outcome}


@pytest.mark.parametrize("width", [920, 340])
def test_forest_coordinates_follow_the_numbers(width):
    pairs = [pair(-0.1, [-0.2, 0.0]), pair(0.3, [0.2, 0.4]), pair(None, None, "too_few_seeds")]
    plot = forest(pairs, 0.05, True, width)
    assert [row["x"] for row in plot["rows"]] == sorted(
        (row["x"] for row in plot["rows"]), reverse=True
    )
    [up, down] = plot["rows"]
    unit = (up["x"] - down["x"]) / 0.4
    assert up["x"] - plot["zero"] == pytest.approx(0.3 * unit, abs=0.02)
    assert up["ends"]["x2"] - up["ends"]["x1"] == pytest.approx(0.2 * unit, abs=0.02)
    assert plot["band"][1] - plot["band"][0] == pytest.approx(0.1 * unit, abs=0.02)


def test_absurdly_wide_intervals_end_in_arrows():
    pairs = [pair(0.1 * i, [0.1 * i - 0.05, 0.1 * i + 0.05]) for i in range(5)]
    plot = forest([*pairs, pair(0.2, [-90.0, 90.0], "not_separated")], None, True, 920)
    wide = next(row for row in plot["rows"] if row["ends"]["more_left"])
    assert wide["ends"]["more_right"]
    assert wide["ends"]["x1"] >= plot["left"]


@pytest.mark.parametrize("higher", [True, False])
def test_the_pareto_line_joins_what_none_beats(higher):
    sign = 1 if higher else -1
    means = {"cheap": 1.0, "good": 3.0, "beaten": 2.0, "best": 4.0}
    arms = [
        {"name": name, "number": i, "mean": sign * mean, "interval": None}
        for i, (name, mean) in enumerate(means.items())
    ]
    amounts = {"cheap": 1.0, "good": 2.0, "beaten": 3.0, "best": 4.0}
    plot = pareto(arms, amounts, meter_text("seconds"), higher, 920)
    corners = plot["front"].split()
    at = {point["label"]: f"{point['x']},{point['y']}" for point in plot["points"]}
    assert at["cheap"] in corners
    assert at["good"] in corners
    assert at["best"] in corners
    assert at["beaten"] not in corners
    assert pareto(arms, {}, meter_text("seconds"), higher, 920) is None
