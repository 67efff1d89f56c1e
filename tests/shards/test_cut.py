"""The cut against a full sort, and its parts against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.core.errors import DataError
from outlay.shards.cut import find_threshold, histogram, order_of, select_top


def by_sorting(scores, keys, weights, budget, highest_first=True):
    """Slow reference: sort, add up, stop at the first row that exceeds the budget."""
    scores = scores.astype(np.float64) + 0.0
    order = sorted(range(len(scores)), key=lambda i: (-scores[i] if highest_first else scores[i],
                                                      int(keys[i])))  # fmt: skip
    kept, spent = np.zeros(len(scores), bool), 0
    for index in order:
        spent += int(weights[index])
        if spent > budget:
            break
        kept[index] = True
    return kept


def rows(count, kind, seed=0):
    draw = np.random.default_rng(seed)
    scores = {
        "plain": draw.normal(size=count),
        "ties": draw.integers(0, 3, count) / 2,
        "equal": np.full(count, 0.25),
        "zeros": draw.choice([-0.0, 0.0, 1e-45, -1e-45], count),
        "infinite": draw.choice([-np.inf, np.inf, 0.0, 3.4e38], count),
        "close": 1.0 + draw.integers(0, 4, count) * 2.0**-23,
    }[kind].astype(np.float32)
    keys = draw.integers(0, 2**64, count, dtype=np.uint64)
    return scores, keys, draw.integers(1, 2000, count)


@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "zeros", "infinite", "close"])
@pytest.mark.parametrize("highest_first", [True, False])
def test_it_equals_a_full_sort_to_the_row(kind, highest_first):
    scores, keys, weights = rows(3000, kind)
    for share in (0.0, 0.001, 0.1, 0.5, 0.999, 1.0):
        budget = int(share * weights.sum())
        kept = select_top(scores, keys, weights, budget, highest_first)
        assert np.array_equal(kept, by_sorting(scores, keys, weights, budget, highest_first))
        assert weights[kept].sum() <= budget


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(width=32, allow_nan=False), st.integers(0, 3), st.integers(1, 9)
        ),
        min_size=1, max_size=40, unique_by=lambda row: (row[0] + 0.0, row[1]),
    ),
    st.integers(0, 200),
)  # fmt: skip
def test_it_equals_a_full_sort_on_any_rows(table, budget):
    scores = np.asarray([row[0] for row in table], np.float32)
    keys = np.asarray([row[1] << 62 | 5 for row in table], np.uint64)
    weights = np.asarray([row[2] for row in table], np.int64)
    expected = by_sorting(scores, keys, weights, budget)
    assert np.array_equal(select_top(scores, keys, weights, budget), expected)


def test_shards_in_any_order_and_pieces_give_one_threshold():
    scores, keys, weights = rows(4000, "ties")
    whole = find_threshold(lambda: [(scores, keys, weights)], 400_000)
    order = np.random.default_rng(1).permutation(4000)
    parts = np.array_split(order, 7)
    pieces = [(scores[part], keys[part], weights[part]) for part in parts]
    assert find_threshold(lambda: pieces, 400_000) == whole


def test_a_pass_keeps_half_a_megabyte_and_adds_up():
    scores, keys, weights = rows(1000, "plain")
    whole = histogram((scores, keys, weights), 0, 0)
    assert whole.nbytes == 512 * 1024 and whole.sum() == weights.sum()
    halves = [histogram((scores[s], keys[s], weights[s]), 0, 0)
              for s in (slice(0, 400), slice(400, None))]  # fmt: skip
    assert np.array_equal(halves[0] + halves[1], whole)


def test_the_order_of_floats_is_the_order_of_integers():
    values = np.asarray([-np.inf, -2.5, -1e-45, 0.0, 1e-45, 1.0, 3e38, np.inf], np.float32)
    assert np.all(np.diff(order_of(values, False).astype(np.int64)) > 0)
    assert order_of(np.float32([-0.0]))[0] == order_of(np.float32([0.0]))[0]


@pytest.mark.parametrize("highest_first", [True, False])
def test_the_threshold_says_its_score(highest_first):
    scores = np.asarray([0.5, -1.25, 3.0, 0.0], np.float32)
    keys, weights = np.arange(4, dtype=np.uint64), np.ones(4, np.int64)
    found = find_threshold(lambda: [(scores, keys, weights)], 2, highest_first)
    assert found.value == (0.0 if highest_first else 0.5)
    assert find_threshold(lambda: [(scores, keys, weights)], 4).value is None


def test_nan_is_refused():
    with pytest.raises(DataError, match="1 of 2 scores are not numbers"):
        select_top(np.float32([1.0, np.nan]), np.zeros(2, np.uint64), np.ones(2, np.int64), 1)
