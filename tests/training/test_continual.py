"""Tasks in sequence: streams, the matrix and its metrics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.core.errors import ConfigError, DataError
from outlay.estimators import NearestClassMean
from outlay.training.continual import (
    TaskMatrix,
    class_incremental,
    domain_incremental,
    run_stream,
)

NAN = float("nan")


def matrix(values, rows=None):
    values = np.array(values, dtype=float)
    names = tuple(f"t{i}" for i in range(len(values)))
    return TaskMatrix(names, values, np.array(rows or [1] * len(values)))


def test_the_metrics_by_hand():
    found = matrix([[0.9, NAN, NAN], [0.7, 0.8, NAN], [0.6, 0.9, 1.0]], rows=[1, 1, 2])
    np.testing.assert_allclose(found.after_each_task, [0.9, 0.75, (0.6 + 0.9 + 2.0) / 4])
    assert found.final == pytest.approx(0.875)
    assert found.average_incremental == pytest.approx((0.9 + 0.75 + 0.875) / 3)
    assert found.backward_transfer == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.9)) / 2)
    alone = matrix([[0.5]])
    assert alone.metrics() == {
        "final": 0.5, "average_incremental": 0.5, "backward_transfer": None, "forgetting": None,
    }  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_the_average_is_at_least_the_end_where_accuracy_only_falls(count, seed):
    falling = np.sort(np.random.default_rng(seed).random(count))[::-1]
    values = np.full((count, count), np.nan)
    for t in range(count):
        values[t, : t + 1] = falling[t]
    found = matrix(values)
    assert found.average_incremental >= found.final - 1e-12
    assert found.forgetting >= -1e-12


def test_streams_hold_every_row_once():
    labels = np.array(list("abcdefg") * 6)
    tasks = class_incremental(labels, labels, 3, seed=1)
    assert [len(t.name.split(", ")) for t in tasks] == [3, 2, 2]
    assert sorted(np.concatenate([t.train for t in tasks]).tolist()) == list(range(42))
    assert class_incremental(labels, labels, 3, seed=1)[0].name == tasks[0].name
    orders = {class_incremental(labels, labels, 3, seed=s)[0].name for s in range(8)}
    assert len(orders) > 1
    given = class_incremental(labels, labels, 7, order=list("gfedcba"))
    assert [t.name for t in given] == list("gfedcba")
    domains = domain_incremental(labels, labels, order=list("abcdefg"))
    assert [t.name for t in domains] == list("abcdefg")


def test_what_streams_refuse():
    with pytest.raises(ConfigError, match="2 classes cannot be parted into 3"):
        class_incremental([0, 1], [0, 1], 3)
    with pytest.raises(ConfigError, match="each once"):
        class_incremental([0, 1], [0, 1], 2, order=[0, 0])
    with pytest.raises(DataError, match="0 held out"):
        class_incremental([0, 1], [0, 0], 2, order=[0, 1])
    with pytest.raises(ConfigError, match="one domain"):
        domain_incremental(["a", "a"], ["a"])


def test_forgetting_without_a_single_change_of_old_means():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 6, 600)
    features = generator.normal(size=(6, 3))[labels] + 0.5 * generator.normal(size=(600, 3))
    tasks = class_incremental(labels[:400], labels[400:], 3, order=range(6))
    train, test = (features[:400], labels[:400]), (features[400:], labels[400:])
    learner = NearestClassMean()
    result = run_stream(learner, tasks, train, test)
    alone = NearestClassMean().fit(features[:400][labels[:400] < 2], labels[:400][labels[:400] < 2])
    np.testing.assert_array_equal(learner.means_[:2], alone.means_)
    assert result.matrix.forgetting > 0
    assert np.isnan(result.matrix.values[0, 1:]).all()
    assert result.bytes[0] < result.bytes[-1]
    # What was learned in sequence is what is learned at once.
    assert result.matrix.final == pytest.approx(NearestClassMean().fit(*train).score(*test))
