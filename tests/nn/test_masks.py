"""Masks by themselves: exact counts, thresholds over many tensors, structure, regrowth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.core.allocate import allocate
from outlay.core.context import generator_of
from outlay.core.errors import ConfigError, NonFinite
from outlay.nn.masks import (
    densities,
    keep_largest,
    packed,
    random_mask,
    regrown,
    two_of_four,
    unpacked,
)


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 1e-40, 0.5, 1.0, 1.5, 7e8, float("inf")]), min_size=3),
    cut=st.floats(0, 1),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_threshold_is_that_of_the_allocator(values, cut, share, dtype):
    """Ties everywhere: exactly as many are kept, the first of equal ones, as in a full sort."""
    scores = torch.tensor(values, dtype=dtype)
    count, at = round(share * len(values)), round(cut * len(values))
    first, second = keep_largest([scores[:at], scores[at:]], count)
    kept = torch.cat([first, second])
    assert int(kept.sum()) == count
    if torch.isfinite(scores).all():
        assert torch.equal(kept, allocate(scores, budget=count))


def test_random_scores_have_the_threshold_of_a_sort():
    scores = torch.rand(7, 301, generator=generator_of("scores"))
    for dtype in (torch.float32, torch.float64):
        (kept,) = keep_largest([scores.to(dtype)], 700)
        assert torch.equal(kept.flatten(), scores.flatten() >= scores.flatten().sort()[0][-700])


def test_bad_scores_are_refused():
    with pytest.raises(NonFinite, match="NaN"):
        keep_largest([torch.tensor([1.0, float("nan")])], 1)
    with pytest.raises(ConfigError, match="negative"):
        keep_largest([torch.tensor([1.0, -1.0])], 1)
    with pytest.raises(ConfigError, match="3 of 2 entries"):
        keep_largest([torch.ones(2)], 3)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.25, 1 / 3, 0.5, 1.0])
def test_a_drawn_mask_has_its_exact_count(density):
    keep = random_mask((7, 11), density, generator_of(0, "mask", "w"))
    assert int(keep.sum()) == round(density * 77) and keep.device.type == "cpu"
    assert torch.equal(keep, random_mask((7, 11), density, generator_of(0, "mask", "w")))
    if 0 < density < 1:
        assert not torch.equal(keep, random_mask((7, 11), density, generator_of(1, "mask", "w")))


def test_uniform_and_erk_densities_spend_the_same():
    shapes = {"thin": (8, 4), "square": (64, 64), "wide": (64, 172)}
    assert densities(shapes, 0.75) == dict.fromkeys(shapes, 0.25)
    found = densities(shapes, 0.75, "erk")
    sizes = {name: shape[0] * shape[1] for name, shape in shapes.items()}
    spent = sum(found[name] * size for name, size in sizes.items())
    assert spent == pytest.approx(0.25 * sum(sizes.values()), rel=1e-12)
    assert found["thin"] == 1.0, "what would be above one is dense"
    raw = {name: (shape[0] + shape[1]) / sizes[name] for name, shape in shapes.items()}
    assert found["square"] / found["wide"] == pytest.approx(raw["square"] / raw["wide"])


def test_a_weight_without_a_live_entry_is_named():
    with pytest.raises(ConfigError, match=r"'b' \(4 entries\)"):
        densities({"a": (100, 100), "b": (2, 2)}, 0.9)


@pytest.mark.parametrize("axis", [0, 1])
def test_two_of_four_along_the_inputs(axis):
    scores = torch.rand(8, 12, generator=generator_of("two"))
    keep = two_of_four(scores, axis)
    groups = keep.movedim(axis, -1).unflatten(-1, (-1, 4))
    assert torch.equal(groups.sum(-1), torch.full(groups.shape[:-1], 2))
    values = scores.movedim(axis, -1).unflatten(-1, (-1, 4))
    lowest = values.masked_fill(~groups, 9.0).amin(-1)
    assert bool((values.masked_fill(groups, -1.0).amax(-1) <= lowest).all())
    assert two_of_four(torch.ones(1, 4), 1).tolist() == [[True, True, False, False]]


def test_regrowth_keeps_the_count_and_takes_the_right_ones():
    keep = torch.tensor([True, True, True, True, False, False, False])
    magnitudes = torch.tensor([4.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0])
    growth = torch.tensor([9.0, 0.0, 9.0, 0.5, 0.1, 0.9, 0.8])
    stays, fresh = regrown(keep, magnitudes, growth, 0.5)
    assert stays.tolist() == [True, False, True, False, False, False, False]
    assert fresh.tolist() == [True, False, True, False, False, True, True]
    # Live entries that stay never take the place of what comes, however large their gradient.
    assert int(fresh.sum()) == int(keep.sum())
    again, same = regrown(keep, magnitudes, growth, 0.1)
    assert torch.equal(again, keep) and torch.equal(same, keep), "rounded down to none"


def test_bits_come_back():
    keep = torch.rand(5, 13, generator=generator_of("bits")) > 0.5
    bits = packed(keep)
    assert bits.dtype == torch.uint8 and len(bits) == 9
    assert torch.equal(unpacked(bits, keep.shape), keep)
