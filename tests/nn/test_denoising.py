"""Known answers of span masks, lengths, sentinels and mixtures."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from outlay.core.errors import ConfigError
from outlay.nn.denoising import (
    PRESETS,
    UL2_S20,
    UL2_UNIFORM,
    UL2R,
    CausalDenoising,
    Mixture,
    PrefixDenoising,
    SpanCorruption,
    arranged,
    check_sentinels,
    corrupt,
    denoise,
    random_composition,
    raw_length,
    restore,
    span_counts,
    span_mask,
)

SENTINELS = list(range(1000, 1200))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_square(counts, expected):
    return sum((count - expected) ** 2 / expected for count in counts)


# ---- compositions and masks ----------------------------------------------------------------------


def test_the_two_splits_of_three_in_two_are_equally_likely():
    generator = draws()
    counts = Counter(tuple(random_composition(3, 2, generator)) for _ in range(4000))
    assert set(counts) == {(1, 2), (2, 1)}
    assert abs(counts[1, 2] / 4000 - 0.5) < 4 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize(("total", "parts"), [(6, 3), (5, 5), (4, 1), (1, 1), (7, 2)])
def test_compositions_are_uniform(total, parts):
    every = {c for c in itertools.product(range(1, total + 1), repeat=parts) if sum(c) == total}
    generator, count = draws(1), 400 * len(every)
    seen = Counter(tuple(random_composition(total, parts, generator)) for _ in range(count))
    assert set(seen) == every
    # 99.99 % of chi-square with up to nine degrees of freedom lies below 35.
    assert chi_square(seen.values(), 400) < 35


@pytest.mark.parametrize("setting", [(3, 0.15), (8, 0.15), (3, 0.5), (64, 0.5), (1, 0.9)])
@pytest.mark.parametrize("length", [2, 3, 17, 128, 401])
def test_counts_are_exact_in_every_draw(setting, length):
    noise, spans = span_counts(length, *setting)
    assert noise == min(max(round(length * setting[1]), 1), length - 1)
    generator = draws()
    for _ in range(20):
        mask = span_mask(length, *setting, generator)
        runs = [is_noise for is_noise, _ in itertools.groupby(mask)]
        assert len(mask) == length and sum(mask) == noise
        assert runs == [False, True] * spans


def test_masks_of_six_tokens_are_uniform():
    # Two ways to split the noise times two to split the rest.
    generator = draws(2)
    counts = Counter(tuple(span_mask(6, 1.5, 0.5, generator)) for _ in range(4000))
    assert len(counts) == 4 and chi_square(counts.values(), 1000) < 22


def test_one_span_is_always_the_suffix_and_moves_when_rolled():
    generator = draws()
    masks = {tuple(span_mask(600, 64, 0.15, generator)) for _ in range(20)}
    assert masks == {(False,) * 510 + (True,) * 90}
    rolled = [span_mask(600, 64, 0.15, generator, roll=True) for _ in range(50)]
    assert all(sum(mask) == 90 for mask in rolled)
    assert len({mask.index(True) for mask in rolled}) > 20


def test_rolled_masks_use_at_most_one_more_sentinel():
    denoiser = SpanCorruption(3, 0.3, roll=True)
    generator, most = draws(), 0
    for _ in range(200):
        mask = denoiser.mask(40, generator)
        inputs, targets = corrupt(range(40), mask, SENTINELS)
        assert restore(inputs, targets, SENTINELS) == list(range(40))
        used = sum(token >= 1000 for token in inputs)
        most = max(most, used)
        made = denoiser.lengths(40)
        assert len(inputs) <= made.inputs and len(targets) <= made.targets
    assert most == denoiser.spans(40) == span_counts(40, 3, 0.3)[1] + 1


# ---- lengths -------------------------------------------------------------------------------------

# (mean span, rate): raw, targets, noise tokens and spans at 512 tokens of input.
TABLE = {
    (3, 0.15): (568, 114, 85, 28),
    (8, 0.15): (588, 100, 88, 11),
    (3, 0.5): (766, 512, 383, 128),
    (8, 0.5): (908, 512, 454, 57),
    (64, 0.15): (600, 92, 90, 1),
    (64, 0.5): (1006, 512, 503, 8),
}


@pytest.mark.parametrize("setting", TABLE)
def test_the_table_of_lengths(setting):
    raw, targets, noise, spans = TABLE[setting]
    denoiser = SpanCorruption(*setting)
    assert raw_length(denoiser, 512) == raw
    assert span_counts(raw, *setting) == (noise, spans)
    made = denoise(range(raw), denoiser, draws(), SENTINELS)
    assert len(made[1]) + 1 <= 512 and len(made[2]) + 1 == targets


def test_the_number_of_spans_in_the_lengths_is_that_of_the_mask():
    long = SpanCorruption(64, 0.15)
    assert raw_length(long, 128) == 148 and raw_length(long, 64) == 73


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("room", [8, 33, 64, 200])
@pytest.mark.parametrize(
    "denoiser",
    [
        *UL2_UNIFORM.denoisers,
        PrefixDenoising(0.5, "uniform"),
        PrefixDenoising(0.1),
        CausalDenoising(),
        SpanCorruption(3, 0.5, roll=True),
    ],
)
def test_raw_lengths_fit_in_every_draw_and_one_more_need_not(denoiser, room, joint):
    raw = raw_length(denoiser, room, joint=joint)
    generator = draws()

    def most(length):
        made = [denoise(range(length), denoiser, generator, SENTINELS) for _ in range(300)]
        if joint:
            return max(len(i) + len(t) + 1 for _, i, t in made)
        return max(max(len(i) + 1, len(t) + 1) for _, i, t in made)

    assert most(raw) <= room
    one_more = denoiser.lengths(raw + 1)
    largest = one_more.both if joint else max(one_more.inputs, one_more.targets)
    assert largest + 1 > room
    for length in (raw, raw + 1, 2, 3):
        made = denoiser.lengths(length)
        found = [denoise(range(length), denoiser, generator, SENTINELS) for _ in range(50)]
        assert all(len(i) <= made.inputs and len(t) <= made.targets for _, i, t in found)
        assert all(len(i) + len(t) <= made.both for _, i, t in found)


def test_room_for_targets_of_their_own():
    assert raw_length(SpanCorruption(3, 0.5), 512, 256) == 382
    assert raw_length(SpanCorruption(3, 0.15), 3) == 2
    assert raw_length(SpanCorruption(3, 0.15), 2) == 0


# ---- corruption ----------------------------------------------------------------------------------


@pytest.mark.parametrize("denoiser", [*UL2_UNIFORM.denoisers, CausalDenoising()])
def test_there_and_back(denoiser):
    generator = draws(3)
    for length in (2, 5, 64, 150):
        tokens = torch.randint(0, 900, (length,), generator=generator).tolist()
        _, inputs, targets = denoise(tokens, denoiser, generator, SENTINELS)
        spans = isinstance(denoiser, SpanCorruption)
        assert restore(inputs, targets, SENTINELS if spans else None) == tokens
        used = [[t for t in part if t >= 1000] for part in (inputs, targets)]
        assert used[0] == used[1] == SENTINELS[: denoiser.spans(length)]


def test_targets_name_each_span_and_do_not_close_the_last():
    mask = [False, True, True, False, False, True]
    assert corrupt([1, 2, 3, 4, 5, 6], mask, [91, 92, 93]) == ([1, 91, 4, 5, 92], [91, 2, 3, 92, 6])
    assert corrupt([1, 2, 3, 4, 5, 6], mask, None) == ([1, 4, 5], [2, 3, 6])


def test_sentinels_never_run_out_unnoticed():
    denoiser = SpanCorruption(3, 0.5, "X")
    with pytest.raises(ConfigError, match=r"SpanCorruption\(mean_span=3, .* 128 spans of 766"):
        check_sentinels([denoiser], 766, 100)
    with pytest.raises(ValueError, match="128 spans"):
        denoise(range(766), denoiser, draws(), SENTINELS[:100])
    check_sentinels([denoiser], 766, 128)
    with pytest.raises(ConfigError, match="more noise spans than the 1 sentinels"):
        corrupt([1, 2, 3], [True, False, True], [9])


@pytest.mark.parametrize("tokens", [[], [5]])
@pytest.mark.parametrize("denoiser", [SpanCorruption(3, 0.15), PrefixDenoising()])
def test_texts_without_two_tokens_are_refused(denoiser, tokens):
    with pytest.raises(ConfigError, match=type(denoiser).__name__):
        denoise(tokens, denoiser, draws(), SENTINELS)


# ---- prefixes ------------------------------------------------------------------------------------


def test_the_uniform_split_has_every_prefix_equally_often():
    generator, denoiser = draws(4), PrefixDenoising(distribution="uniform")
    counts = Counter(denoiser.mask(9, generator).index(True) for _ in range(8000))
    assert set(counts) == set(range(1, 9))
    assert chi_square(counts.values(), 1000) < 32


def test_the_default_split_removes_a_quarter_on_average():
    generator, denoiser = draws(5), PrefixDenoising()
    removed = [sum(denoiser.mask(400, generator)) for _ in range(4000)]
    assert min(removed) >= 1 and max(removed) <= 1 + 0.5 * 399 + 0.5
    # The share is uniform on [0, 0.5]: its deviation is 0.5 / sqrt(12).
    mean = 1 + 0.25 * 399
    assert abs(sum(removed) / 4000 - mean) < 4 * 399 * 0.5 / math.sqrt(12 * 4000)
    assert all(mask == sorted(mask) for mask in (denoiser.mask(7, generator) for _ in range(20)))


# ---- mixtures ------------------------------------------------------------------------------------


def test_presets():
    modes = [d.mode for d in UL2_UNIFORM.denoisers]
    assert modes == ["R", "R", "S", "X", "X", "X", "X"]
    spans = [d for d in UL2_UNIFORM.denoisers if isinstance(d, SpanCorruption)]
    assert {(d.mean_span, d.rate) for d in spans} == set(TABLE)

    def share(mixture, mode):
        pairs = zip(mixture.denoisers, mixture.rates)
        return sum(rate for d, rate in pairs if d.mode == mode) / sum(mixture.rates)

    assert [share(UL2_S20, mode) for mode in "RSX"] == pytest.approx([0.4, 0.2, 0.4])
    assert [share(UL2R, mode) for mode in "RSX"] == pytest.approx([0.25, 0.5, 0.25])
    assert len(PRESETS["t5"].denoisers) == 1


def test_denoisers_are_drawn_by_their_rates():
    mixture = Mixture(UL2_UNIFORM.denoisers[:4], (3.0, 0.0, 1.0, 0.0))
    generator = draws(6)
    counts = Counter(mixture.draw(generator) for _ in range(4000))
    assert set(counts) == {0, 2}
    assert abs(counts[0] / 4000 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)
    assert mixture.used == (mixture.denoisers[0], mixture.denoisers[2])


def test_a_mixture_fits_its_least_denoiser_that_is_drawn():
    # A prefix may leave all but one token in the inputs.
    assert UL2_UNIFORM.raw_length(512) == 512
    assert UL2_UNIFORM.raw_length(512, joint=True) == raw_length(
        SpanCorruption(3, 0.5), 512, joint=True
    )
    one_hot = Mixture(UL2_UNIFORM.denoisers, (1.0, 0, 0, 0, 0, 0, 0))
    assert one_hot.raw_length(512) == 568


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SpanCorruption(0.5, 0.15), "mean_span is 0.5"),
        (lambda: SpanCorruption(3, 0.0), "rate is 0.0"),
        (lambda: SpanCorruption(3, 1.0), "rate is 1.0"),
        (lambda: PrefixDenoising(0.6), "rate is 0.6"),
        (lambda: Mixture(()), "names none"),
        (lambda: Mixture(UL2R.denoisers, (1.0,)), "1 numbers for 5"),
        (lambda: Mixture(PRESETS["t5"].denoisers, (-1.0,)), "not allowed"),
        (lambda: Mixture(PRESETS["t5"].denoisers, (0.0,)), "not allowed"),
    ],
)
def test_bad_denoisers_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_where_everything_stands():
    parts = ([1, 91], [91, 2], [91, 2])
    assert arranged(*parts, "encoder_decoder", 7, 3) == {
        "input_ids": [7, 1, 91, 3], "labels": [91, 2, 3]
    }  # fmt: skip
    assert arranged(*parts, "prefix_lm", None, 3) == {
        "input_ids": [1, 91, 91, 2, 3],
        "labels": [-100, -100, 91, 2, 3],
        "bidirectional": [1, 1, 0, 0, 0],
    }
    assert "bidirectional" not in arranged(*parts, "causal", 7, 3)
