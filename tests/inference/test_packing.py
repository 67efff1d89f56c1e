"""Packing: every item once, no bin too full, known sizes, and the order restored."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.core.errors import ConfigError, DoesNotFit
from outlay.inference import pack, prepack

METHODS = ("bfd", "ffd", "least_loaded", "optimal")
items = st.lists(st.integers(1, 30), min_size=1, max_size=14)


def fewest(sizes, room):
    """Number of bins by trying every assignment: slow, for a few items."""
    for bins in range(1, len(sizes) + 1):
        for places in itertools.product(range(bins), repeat=len(sizes)):
            loads = [0] * bins
            for size, place in zip(sizes, places):
                loads[place] += size
            if max(loads) <= room:
                return bins
    raise AssertionError


@pytest.mark.parametrize(
    ("method", "bins"), [("bfd", 3), ("ffd", 3), ("optimal", 3), ("least_loaded", 4)]
)
def test_known_sizes(method, bins):
    assert len(pack([8, 5, 4, 3, 2, 2], 8, method)) == bins


@settings(deadline=None, max_examples=60)
@given(items, st.integers(0, 20), st.sampled_from(METHODS))
def test_every_item_once_and_no_bin_too_full(sizes, spare, method):
    room = max(sizes) + spare
    bins = pack(sizes, room, method)
    assert sorted(i for some in bins for i in some) == list(range(len(sizes)))
    assert all(some and sum(sizes[i] for i in some) <= room for some in bins)
    assert len(bins) >= -(-sum(sizes) // room)


@settings(deadline=None, max_examples=40)
@given(items, st.integers(0, 20))
def test_first_fit_is_within_its_bound_of_the_optimum(sizes, spare):
    room = max(sizes) + spare
    best = len(pack(sizes, room, "optimal"))
    assert best <= min(len(pack(sizes, room, method)) for method in METHODS)
    assert len(pack(sizes, room, "ffd")) <= 11 / 9 * best + 1


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 6))
def test_the_optimum_is_that_of_trying_everything(sizes, spare):
    room = max(sizes) + spare
    assert len(pack(sizes, room, "optimal")) == fewest(sizes, room)


def test_the_optimum_beats_best_fit_where_greed_errs():
    sizes = [9, 5, 4, 4, 3, 2, 2]  # 9 | 5 + 3 + 2 | 4 + 4 + 2
    assert len(pack(sizes, 10, "bfd")) == 4
    assert len(pack(sizes, 10, "optimal")) == 3


def test_equal_lengths_gain_nothing_and_a_long_one_gains_much():
    assert all(len(pack([5] * 7, 5, method)) == 7 for method in METHODS)
    assert all(len(pack([60] + [1] * 50, method=method)) == 2 for method in METHODS)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ConfigError, match="item 1 has 9 tokens, a row holds 8"):
        pack([3, 9], 8)
    with pytest.raises(ConfigError, match="item 0 is empty"):
        pack([0])
    with pytest.raises(ConfigError, match="bfd, ffd"):
        pack([1], method="worst")
    with pytest.raises(ConfigError, match="65 items"):
        pack([1] * 65, method="optimal")
    with pytest.raises(DoesNotFit, match="need 2 rows"):
        pack([5, 5], 5, max_rows=1)
    assert pack([]) == []


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=9), min_size=1, max_size=8),
    st.integers(0, 9),
    st.sampled_from(METHODS),
    st.booleans(),
)
def test_unpacking_gives_the_sequences_back_in_order(sequences, spare, method, drop_last):
    room = max(map(len, sequences)) + spare
    batch = prepack(sequences, room, method, pad_to=4, drop_last=drop_last)
    kept = [s[:-1] for s in sequences] if drop_last else sequences
    assert [part.tolist() for part in batch.unpack()] == kept
    assert batch.lengths == [len(s) for s in kept]
    for number, part in enumerate(batch.unpack(batch.position_ids)):
        assert part.tolist() == list(range(len(kept[number])))
    owners = batch.segment_ids.flatten()
    for number, sequence in enumerate(kept):
        assert int((owners == number).sum()) == len(sequence)
    assert batch.input_ids[batch.segment_ids < 0].eq(0).all()


def test_bounds_cut_the_flattened_rows_at_every_change_of_segment():
    batch = prepack([[1] * 3, [2] * 5, [3] * 2, [4] * 1], 6)
    owners = batch.segment_ids.flatten().tolist()
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(owners) and batch.cu_seqlens.dtype == torch.int32
    assert all(len(set(owners[a:b])) == 1 for a, b in itertools.pairwise(bounds))
    assert batch.max_seqlen == max(b - a for a, b in itertools.pairwise(bounds))
