"""Selections in a run and their settings; what shards do with them is in tests/shards."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import numpy as np
import pytest

from outlay.core import registry
from outlay.core.context import Context
from outlay.core.errors import ConfigError, DataError
from outlay.methods.selection.degradation import temporal_degradation
from outlay.shards import HashedLinear
from outlay.training.data.blocks import Blocks
from outlay.training.data.pool import Pool


def pool(rows):
    """Examples of one or two windows a row."""
    examples = []
    for row in rows:
        words = len(row.get("text", "").split())
        examples.append({"id": row["id"], "domain": row["domain"], "input_ids": [1] * words})
        if words > 5:
            examples.append({"id": f"{row['id']}#1", "domain": row["domain"], "input_ids": [1] * 3})
    return Pool(examples, seed=3, rows=rows)


def rows_of(texts, **columns):
    return [
        {"id": f"r{n}", "domain": "", "text": text, **{k: v[n] for k, v in columns.items()}}
        for n, text in enumerate(texts)
    ]


def names(chosen):
    return list(dict.fromkeys(str(name).split("#")[0] for name in chosen.ids))


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


TEXTS = ["salt", "a b c d e f g", "the salt of the earth and sea", "saw and file"]


def test_all_windows_of_a_kept_row_stay_and_no_other():
    start = pool(rows_of(TEXTS))
    chosen = registry.build("quality_filters(words=('salt',))").select(start)
    assert list(chosen.ids) == ["r1", "r1#1", "r3"]
    assert list(start.ids) == ["r0", "r1", "r1#1", "r2", "r2#1", "r3"]
    inverse = registry.build("quality_filters(words=('salt',), inverse=True)").select(start)
    assert sorted([*inverse.ids, *chosen.ids]) == sorted(start.ids)


def test_selections_chain_and_order_matters():
    rows = rows_of([f"word {n} " + "x " * (n % 7) for n in range(60)])
    first = registry.build("random_selection(keep=0.5, unit='documents', seed=1)")
    second = registry.build("random_selection(keep=0.5, unit='documents', seed=2)")
    assert len(names(second.select(first.select(pool(rows))))) == 15


def test_dates_and_domains_of_rows_are_seen():
    rows = rows_of(TEXTS, date=["1999", "2001", "2001-05", ""])
    chosen = registry.build("quality_filters(after='2001', before='2001-05')").select(pool(rows))
    assert names(chosen) == ["r1"]
    rows = [row | {"domain": domain} for row, domain in zip(rows, "abab")]
    assert names(registry.build("quality_filters(domains=('a',))").select(pool(rows))) == [
        "r0", "r2",
    ]  # fmt: skip
    assert names(registry.build("quality_filters(without_domains=('a',))").select(pool(rows))) == [
        "r1", "r3",
    ]  # fmt: skip
    with pytest.raises(DataError, match="none of 4 documents has one"):
        registry.build("quality_filters(after='2000')").select(pool(rows_of(TEXTS)))


def test_a_run_reads_the_dates_of_its_rows(tmp_path):
    """From a file to the pool, through the recipe's own reading."""
    from outlay.training.materials import load_materials
    from outlay.training.recipe import Recipe

    draw = random.Random(0)
    lines = [{"text": f"{draw.choice(TEXTS)} {n}", "label": "ab"[n % 2], "year": 1990 + n}
             for n in range(40)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = Recipe(
        task="sequence-classification", model={"config": "bert", "layers": 1, "width": 32},
        data={"path": str(tmp_path / "rows.jsonl"), "date": "year"}, budget="1steps",
    )  # fmt: skip
    own = load_materials(recipe)
    chosen = registry.build("quality_filters(after='2010')").select(
        Pool(own.train, rows=own.rows["train"])
    )
    assert names(chosen) == [row["id"] for row in own.rows["train"] if row["date"] >= "2010"]
    assert 0 < len(chosen) < len(own.train)


def test_linear_selection_keeps_what_is_like_its_target(tmp_path):
    draw = random.Random(0)
    kinds = [(["wave", "salt", "fish", "tide"], "sea"), (["saw", "file", "drill", "axe"], "tool")]
    rows = []
    for n in range(200):
        words, domain = kinds[n % 2]
        text = " ".join(draw.choice(words) for _ in range(draw.randint(4, 12)))
        rows.append({"id": f"r{n}", "domain": domain, "text": text})
    target = write(tmp_path / "task.jsonl", [rows[n]["text"] + " boat" for n in range(0, 60, 2)])
    call = f"linear_selection(target={target!r}, keep=0.2, bits=12)"
    kept = registry.build(call).select(pool(rows))
    assert set(kept.domains) == {"sea"}
    tokens = sum(len(e["input_ids"]) for e in pool(rows).examples)
    assert 0 <= 0.2 * tokens - sum(len(e["input_ids"]) for e in kept.examples) < 16
    least = dataclasses.replace(registry.build(call), inverse=True).select(pool(rows))
    assert set(least.domains) == {"tool"}
    twin = dataclasses.replace(registry.build(call), twin="random").select(pool(rows))
    assert set(twin.domains) == {"sea", "tool"}


def test_a_target_text_in_the_pool_is_left_out(tmp_path):
    target = write(tmp_path / "task.jsonl", ["Saw, and FILE!"])
    call = f"linear_selection(target={target!r}, keep=1.0, bits=8)"
    assert names(registry.build(call).select(pool(rows_of(TEXTS)))) == ["r0", "r1", "r2"]
    kept = dataclasses.replace(registry.build(call), keep_targets=True).select(pool(rows_of(TEXTS)))
    assert len(names(kept)) == 4


def test_low_quality_is_learnt_and_may_be_loaded(tmp_path):
    good = [f"the tide turned at {n} and the boats came home" for n in range(30)]
    poor = [f"click buy free offer {n} now" for n in range(30)]
    rows = rows_of([*good[20:], *poor[20:]])
    names_of = {"good": write(tmp_path / "good.jsonl", good[:20]),
                "poor": write(tmp_path / "poor.jsonl", poor[:20])}  # fmt: skip
    call = registry.construct(
        registry.find("quality_filters").load(), {"low_quality": 0.5, **names_of}
    )
    assert names(call.select(pool(rows))) == [f"r{n}" for n in range(10)]
    scorer = HashedLinear.fit(poor[:20], good[:20], "anything", bits=12)
    scorer.save(tmp_path / "scorer")
    loaded = registry.build(
        f"quality_filters(low_quality=0.5, quality_model={str(tmp_path / 'scorer')!r})"
    )
    assert names(loaded.select(pool(rows))) == [f"r{n}" for n in range(10)]


def test_decontamination_drops_overlaps(tmp_path):
    words = [f"w{n}" for n in range(12)]
    against = write(tmp_path / "evaluation.jsonl", [" ".join(words)])
    rows = rows_of(["x " + " ".join(words[2:10]) + " y", " ".join(words[:7]), "else"])
    call = f"decontamination(against={against!r}, n=8)"
    assert names(registry.build(call).select(pool(rows))) == ["r1", "r2"]
    with pytest.raises(ConfigError, match=r"no evaluation text .* has n = 13 words"):
        registry.build(f"decontamination(against={against!r})").select(pool(rows))


def test_the_runs_seed_draws_unless_the_method_has_its_own():
    def context(seed):
        found = Context.__new__(Context)
        found.seed = seed
        return found

    rows = rows_of([f"word {n}" for n in range(80)])
    method, fixed = (
        registry.build(f"random_selection(keep=0.5{more})") for more in ("", ", seed=1")
    )
    drawn = [names(method.select(pool(rows), context(seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert names(fixed.select(pool(rows), context(0))) == drawn[2]


def test_examples_that_are_no_single_rows_are_refused():
    blocks = Blocks(np.arange(30, dtype=np.uint16), [("a", 30)], 10)
    chooser = registry.build("random_selection(keep=0.5)")
    with pytest.raises(DataError, match="not made from one row"):
        chooser.select(Pool(blocks, rows=rows_of(TEXTS)))
    images = [{"id": "r0", "domain": "", "pixel_values": 0}]
    with pytest.raises(DataError, match="no text"):
        chooser.select(Pool([{"id": "r0"}], rows=images))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("quality_filters", "has no filter"),
        ("quality_filters(toxicity=1.2)", "toxicity = 1.2 is not allowed"),
        ("quality_filters(low_quality=0.9)", "nothing to score with"),
        ("quality_filters(after='May 2000')", "after = 'May 2000'"),
        ("quality_filters(after='2001', before='2000')", "not earlier"),
        ("quality_filters(words=('a',), good='g.jsonl')", "teach nothing"),
        ("quality_filters(domains=('a',), without_domains=('b',))", "twice"),
        ("linear_selection(target='a/test.jsonl')", "named after a test split"),
        ("linear_selection(target='squad-validation-00.parquet')", "named after a validation"),
        ("linear_selection(target='dev/rows.jsonl')", "named after a dev split"),
        ("linear_selection(target='t.jsonl', keep=0.0)", "keep = 0.0 is not allowed"),
        ("decontamination(against='e.jsonl', n=7)", "n = 7 is not allowed"),
        ("linear_selection(target='t.jsonl', backend='fasttext', bits=10)", "too few for fastText"),
    ],
)
def test_bad_settings_are_named(call, message):
    if "fasttext" in call:
        pytest.importorskip("fasttext")
    with pytest.raises(ConfigError, match=message):
        registry.build(call)


def test_a_held_out_target_is_taken_if_asked_for():
    call = "linear_selection(target='a/test.jsonl', allow_held_out=True)"
    assert registry.build(call).target == "a/test.jsonl"
    assert registry.build("linear_selection(target='contest-latest.jsonl')")


# ---- temporal degradation ------------------------------------------------------------------------

YEARS = (2013, 2016, 2019, 2022)


def linear(slope=0.4):
    return {(a, b): 80 - slope * abs(a - b) for a in YEARS for b in YEARS}


def test_a_linear_loss_is_found_exactly():
    found = temporal_degradation(linear())
    assert found.per_year == pytest.approx(0.4, abs=1e-12)
    assert found.correlation == pytest.approx(1.0, abs=1e-12)
    assert found.by_test_year == pytest.approx(dict.fromkeys(YEARS, 0.4))


def test_noise_lowers_the_correlation_and_not_the_mean():
    draw = np.random.default_rng(0)
    found = [
        temporal_degradation({
            (a, b): s + (draw.normal() if a != b else 0) for (a, b), s in linear().items()
        })
        for _ in range(300)
    ]  # fmt: skip
    means = [f.per_year for f in found]
    assert abs(np.mean(means) - 0.4) < 4 * np.std(means) / math.sqrt(300)
    assert np.mean([f.correlation for f in found]) < 0.95


def test_constant_scores_cost_nothing_and_have_no_correlation():
    found = temporal_degradation(linear(0.0))
    assert found.per_year == 0 and math.isnan(found.correlation)


def test_a_constant_for_each_test_year_changes_nothing():
    moved = {(a, b): s + 3.0 * (b % 7) for (a, b), s in linear().items()}
    one, other = temporal_degradation(linear()), temporal_degradation(moved)
    assert other.per_year == pytest.approx(one.per_year)
    assert other.correlation == pytest.approx(one.correlation)


@pytest.mark.parametrize(
    "scores",
    [{}, {(2013, 2016): 1.0}, {(2013, 2013): 1.0}, {(1, 1): 1.0, (2, 1): math.nan, (2, 2): 1.0}],
)
def test_missing_scores_are_refused(scores):
    with pytest.raises(DataError):
        temporal_degradation(scores)
