"""What rules keep: complements, thresholds, inverses and twins."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import kstest

from outlay.core.errors import DataError
from outlay.shards.deciding import AtMost, Dated, InDomains, Rule, decide, random_scores


def table(count=4000, seed=0):
    draw = np.random.default_rng(seed)
    return {
        "key": draw.integers(0, 2**64, count, dtype=np.uint64),
        "tokens": draw.integers(1, 500, count),
        "characters": draw.integers(1, 3000, count),
        "bytes": draw.integers(1, 4000, count),
        "toxicity": draw.choice([0.0, 0.1, 0.5, 1.0], count).astype(np.float32),
        "quality": draw.random(count).astype(np.float32),
        "date": np.asarray(draw.choice(["", "1990", "2000-06", "2010-01-02"], count), object),
        "domain": np.asarray(draw.choice(["web", "books"], count), object),
    }


def kept(rule, rows, pieces=3):
    """Decided over pieces, applied to all rows."""
    parts = np.array_split(np.arange(len(rows["key"])), pieces)
    split = [{name: values[part] for name, values in rows.items()} for part in parts]
    return decide(rule, lambda: split).apply(rows) == ""


FILTERS = Rule("f", (AtMost("toxicity", 0.3, "toxicity"), Dated("2000"), InDomains(("web",))))


def test_a_filter_and_its_inverse_are_everything_and_share_nothing():
    rows = table()
    one, other = kept(FILTERS, rows), kept(Rule("f", FILTERS.tests, inverse=True), rows)
    assert np.array_equal(one, ~other) and 0 < one.sum() < len(one)


def test_a_share_and_its_inverse_keep_the_same_tokens_within_one_document():
    rows = table()
    for share in (0.1, 0.3, 0.5):
        amounts = [
            rows["tokens"][kept(Rule("c", share=share, column="quality", inverse=side), rows)].sum()
            for side in (False, True)
        ]
        assert all(0 <= share * rows["tokens"].sum() - amount < 500 for amount in amounts)
    top = kept(Rule("c", share=0.3, column="quality"), rows)
    bottom = kept(Rule("c", share=0.3, column="quality", inverse=True), rows)
    assert rows["quality"][top].min() > rows["quality"][bottom].max()


@pytest.mark.parametrize("unit", ["tokens", "characters", "bytes", "documents"])
def test_units(unit):
    rows = table()
    chosen = kept(Rule("c", share=0.25, column="quality", unit=unit), rows)
    weights = np.ones(4000) if unit == "documents" else rows[unit]
    assert 0 <= 0.25 * weights.sum() - weights[chosen].sum() < weights.max()


def test_thresholds_are_monotone_and_their_ends_are_known():
    rows = table()
    shares = [kept(Rule("f", (AtMost("toxicity", t, "t"),)), rows) for t in (0, 0.1, 0.3, 0.7, 1)]
    assert all(np.all(a <= b) for a, b in itertools.pairwise(shares))
    assert shares[-1].all() and np.array_equal(shares[0], rows["toxicity"] == 0)


def test_dates_at_their_limits():
    rows = table(8)
    days = ["", "1999", "1999-12-31", "2000", "2000-01", "2000-06-30", "2001", "2001-01-01"]
    rows["date"] = np.asarray(days, object)
    assert kept(Rule("f", (Dated("2000"),)), rows).tolist() == [False] * 3 + [True] * 5
    assert kept(Rule("f", (Dated(None, "2000-06"),)), rows).tolist() == [
        False, True, True, True, True, False, False, False,
    ]  # fmt: skip
    assert kept(Rule("f", (Dated("2000-06-30", "2001"),)), rows).tolist() == [
        False, False, False, False, False, True, False, False,
    ]  # fmt: skip


def test_no_date_at_all_is_refused_with_the_number_of_documents():
    rows = table(10) | {"date": np.asarray([""] * 10, object)}
    with pytest.raises(DataError, match="none of 10 documents has one"):
        kept(Rule("f", (Dated("2000"),)), rows)


def test_the_first_failing_test_is_the_reason():
    rows = table()
    reasons = decide(FILTERS, lambda: [rows]).apply(rows)
    toxic, late = rows["toxicity"] > np.float32(0.3), rows["date"] >= "2000"
    assert set(reasons[toxic]) == {"f: toxicity"}
    assert set(reasons[~toxic & ~late]) == {"f: date"}
    assert set(reasons[~toxic & late & (rows["domain"] == "books")]) == {"f: domain"}


def test_a_random_twin_has_the_scores_and_the_size_of_all_but_not_the_choice():
    rows = table()
    rule = Rule("c", share=0.2, column="quality", twin="random", seed=7)
    own, twin = kept(Rule("c", share=0.2, column="quality"), rows), kept(rule, rows)
    assert 0 <= rows["tokens"][own].sum() - rows["tokens"][twin].sum() < 500
    assert kstest(rows["quality"][twin], "uniform").pvalue > 0.01
    assert abs(rows["quality"][twin].mean() - 0.5) < 0.04 < rows["quality"][own].mean() - 0.8
    assert not np.array_equal(
        twin, kept(Rule("c", share=0.2, column="quality", twin="random"), rows)
    )


def test_a_length_matched_twin_keeps_the_tokens_of_every_length():
    rows = table()
    rows["quality"] = (1 / rows["tokens"]).astype(np.float32)  # the cut takes short ones
    own = kept(Rule("c", share=0.2, column="quality"), rows)
    twin = kept(Rule("c", share=0.2, column="quality", twin="length"), rows)
    classes = np.log2(rows["tokens"]).astype(int)
    for number in range(9):
        among = classes == number
        amounts = [int(rows["tokens"][among & side].sum()) for side in (own, twin)]
        assert 0 <= amounts[0] - amounts[1] < 2 ** (number + 1), number
    assert kept(Rule("f", FILTERS.tests, twin="length"), rows).sum() > 0


def test_random_scores_are_uniform_and_differ_by_seed():
    keys = table()["key"]
    first, other = random_scores(keys, 0), random_scores(keys, 1)
    assert kstest(first, "uniform").pvalue > 0.01 and kstest(other, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.05
    assert np.array_equal(first, random_scores(keys[::-1], 0)[::-1])


def test_a_larger_random_share_holds_a_smaller_one():
    rows = table()
    small, large = (kept(Rule("r", share=share, unit="documents"), rows) for share in (0.2, 0.4))
    assert np.all(small <= large) and (small.sum(), large.sum()) == (800, 1600)
