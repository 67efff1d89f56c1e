"""The n-gram model against a slow one that is written from the formula."""

from collections import Counter

import numpy as np
import pytest

from outlay.core.errors import ConfigError, DataError
from outlay.estimators.ngram import NGram
from outlay.estimators.xz import Xz


def slow(rows, order, vocabulary):
    """Interpolated Kneser-Ney by dictionaries: a function (context, token) -> probability."""
    grams = [Counter() for _ in range(order + 1)]
    for row in rows:
        for k in range(1, order + 1):
            grams[k].update(tuple(row[i : i + k]) for i in range(len(row) - k + 1))
    counts = {}
    for k in range(1, order + 1):
        if k == order:
            counts[k] = grams[k]
            if k == 1:
                counts[k] = Counter((t,) for row in rows for t in row[1:])
        else:
            counts[k] = Counter(gram[1:] for gram in grams[k + 1])
    discount = {}
    for k, table in counts.items():
        once, twice = (sum(c == n for c in table.values()) for n in (1, 2))
        discount[k] = once / (once + 2 * twice) if once and twice else 0.5

    def chance(context, token):
        p = 1 / vocabulary
        for k in range(1, order + 1):
            if len(context) < k - 1:
                break
            tail = tuple(context[len(context) - k + 1 :])
            follows = {g[-1]: c for g, c in counts[k].items() if g[:-1] == tail and c > 0}
            total = sum(follows.values())
            if total:
                left = discount[k] * len(follows) / total
                p = max(follows.get(token, 0) - discount[k], 0) / total + left * p
        return p

    return chance


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 6, generator.integers(1, 12)).tolist() for _ in range(40)]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_slow_one(rows, order):
    model, chance = NGram(order).fit(rows, 7), slow(rows, order, 7)
    unseen = [[6, 6, 1, 2, 6], [0, 1], [3]]
    for row, nats in zip(rows[:10] + unseen, model.nats(rows[:10] + unseen)):
        expected = [
            -np.log(chance(row[max(0, i - order + 1) : i], row[i])) for i in range(1, len(row))
        ]
        np.testing.assert_allclose(nats, expected, rtol=1e-12)


def test_is_a_distribution(rows):
    model = NGram(3).fit(rows, 7)
    for context in ([0, 1], [5, 5], [6, 6], [2]):
        nats = [model.nats([[*context, token]])[0][-1] for token in range(7)]
        assert np.exp(-np.array(nats)).sum() == pytest.approx(1, abs=1e-12)


def test_more_context_helps_where_there_is_some():
    row = [0, 1, 2, 3] * 50
    losses = [np.mean(NGram(order).fit([row], 4).nats([row])[0]) for order in (1, 2, 3)]
    assert losses[0] > 1.3 and losses[1] < 0.1


def test_refusals(rows):
    with pytest.raises(ConfigError, match="order"):
        NGram(0)
    with pytest.raises(DataError, match="two tokens"):
        NGram().fit([[1], []], 4)
    with pytest.raises(DataError, match="outside the vocabulary"):
        NGram().fit(rows, 3)


def test_xz_packs_what_repeats():
    assert Xz().bits(["abc " * 1000]) < Xz().bits([str(np.random.default_rng(0).bytes(1000))])
    with pytest.raises(ConfigError, match="preset"):
        Xz(preset=11)
