"""Scorers: what they find, what they must not find, and that they come back from disk."""

from __future__ import annotations

import importlib.metadata
import random
import types

import numpy as np
import pytest

from outlay.core import errors
from outlay.core.errors import ConfigError, DataError, MissingExtra
from outlay.shards import scorers
from outlay.shards.scorers import FastText, HashedLinear, Overlap, WordList, load_scorer

SEA = ["wave", "salt", "fish", "tide", "shore", "boat", "net", "gull"]
TOOL = ["saw", "file", "drill", "axe", "hammer", "plane", "nail", "vice"]


def texts(words, count, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choice(words) for _ in range(draw.randint(8, 40))) for _ in range(count)]


def auc(good, bad):
    """Share of pairs in the right order."""
    return float(np.mean(good[:, None] > bad[None, :]) + 0.5 * np.mean(good[:, None] == bad))


def test_the_linear_model_tells_texts_apart():
    model = HashedLinear.fit(texts(SEA, 60, 0), texts(TOOL, 60, 1), "sea", bits=14)
    good, bad = model.score(texts(SEA, 40, 2)), model.score(texts(TOOL, 40, 3))
    assert auc(good, bad) == 1.0
    assert good.dtype == np.float32 and bad.min() >= 0 and good.max() <= 1
    assert model.score(["", "unseen"]).shape == (2,)


def test_shuffled_labels_teach_nothing():
    """Half the labels are wrong: 400 held-out pairs a side, standard error of the AUC 0.02."""
    mixed = texts(SEA + TOOL, 800, 4)
    model = HashedLinear.fit(mixed[:200], mixed[200:400], "nothing", bits=14)
    assert abs(auc(model.score(mixed[400:600]), model.score(mixed[600:])) - 0.5) < 0.1


def test_runs_of_words_matter_with_two_words_only():
    one, other = ["a b a b a b"] * 4, ["a a a b b b"] * 4
    assert len({*HashedLinear.fit(one, other, "order", ngrams=1, bits=10).score(one + other)}) == 1
    scores = HashedLinear.fit(one, other, "order", ngrams=2, bits=10).score(one + other)
    assert scores[:4].min() > scores[4:].max()


def test_the_same_texts_give_the_same_model(tmp_path):
    rows = (texts(SEA, 30, 0), texts(TOOL, 30, 1))
    state = np.random.get_state(legacy=False)
    first = HashedLinear.fit(*rows, "sea", bits=12)
    assert repr(np.random.get_state(legacy=False)) == repr(state)
    again = HashedLinear.fit(*rows, "sea", bits=12)
    assert np.array_equal(first.weights, again.weights) and first.bias == again.bias
    first.save(tmp_path / "model")
    read = load_scorer(tmp_path / "model")
    assert read.fingerprint == first.fingerprint == again.fingerprint
    assert np.array_equal(read.score(rows[0]), first.score(rows[0]))
    assert load_scorer(tmp_path / "model", "other").column == "other"
    assert load_scorer(tmp_path / "model", "other").fingerprint != first.fingerprint


def test_the_gradient_vanishes_at_the_solution():
    """The fit is the minimum of the stated objective, by finite differences."""
    rows = (["a b", "a", "b c"], ["c d", "d"])
    model = HashedLinear.fit(*rows, "x", ngrams=1, bits=8, penalty=0.5)

    def loss(weights, bias):
        total = 0.0
        for side, sign in zip(rows, (1, -1)):
            for text in side:
                places = scorers._places(text, 1, 8)
                margin = sign * (weights[places].sum() / len(places) ** 0.5 + bias)
                total += 0.5 / len(side) * np.logaddexp(0, -margin)
        return total + 0.5 * 0.5 / 5 * (weights @ weights)

    weights = model.weights.astype(np.float64)
    best = loss(weights, model.bias)
    draw = np.random.default_rng(0)
    for _ in range(20):
        step = draw.normal(size=256) * 0.05
        assert loss(weights + step, model.bias + 0.05 * draw.normal()) >= best - 1e-7


def test_an_empty_class_is_refused():
    with pytest.raises(DataError, match="without the property 'x'"):
        HashedLinear.fit(["a"], [], "x")


def test_a_word_list_finds_whole_words_alone():
    found = WordList("listed_words", ("cunt", "straße", "two words", "don't"))
    scores = found.score(
        [
            "Scunthorpe United",
            "a CUNT",
            "die STRASSE",
            "ｔｗｏ Words here",
            "two other words",
            "Don't!",
        ]
    )
    assert (scores > 0).tolist() == [False, True, True, True, False, True]
    assert scores[1] == 0.5
    composed, decomposed = WordList("w", ("caf\u00e9",)), "un cafe\u0301 noir"
    assert composed.score([decomposed])[0] > 0


def test_overlaps_are_exact_runs(tmp_path):
    words = [f"w{n}" for n in range(20)]
    found = Overlap.of([" ".join(words)], "evaluation_overlap", 8)
    inside = "x " + " ".join(words[5:13]).upper() + "!"
    assert found.score([inside, " ".join(words[5:12]), " ".join(words[::-1])]).tolist() == [1, 0, 0]
    assert not Overlap.of(["too short"], "evaluation_overlap", 8).runs
    found.save(tmp_path / "o")
    again = load_scorer(tmp_path / "o")
    assert again == found and again.fingerprint == found.fingerprint
    WordList("w", ("a", "b c")).save(tmp_path / "w")
    assert load_scorer(tmp_path / "w") == WordList("w", ("a", "b c"))


def test_whole_texts_are_compared_by_their_words():
    found = Overlap.of(["One, two THREE."], "in_target", 0)
    assert found.score(["one two three", "one two three four"]).tolist() == [1, 0]


def test_a_folder_without_a_scorer_is_refused(tmp_path):
    for content in (None, "{}", '{"kind": "no such"}', "["):
        if content is not None:
            (tmp_path / "scorer.json").write_text(content)
        with pytest.raises(ConfigError, match="holds no scorer"):
            load_scorer(tmp_path)


def test_fasttext_trains_and_comes_back(tmp_path):
    pytest.importorskip("fasttext", reason='pip install "outlay[fasttext]"')
    rows = (texts(SEA, 60, 0), texts(TOOL, 60, 1))
    first = FastText.fit(*rows, "sea", tmp_path / "a.bin")
    again = FastText.fit(*rows, "sea", tmp_path / "b.bin")
    assert first.fingerprint == again.fingerprint
    first.save(tmp_path / "model")
    (tmp_path / "a.bin").unlink()
    read = load_scorer(tmp_path / "model")
    good, bad = read.score(texts(SEA, 20, 2)), read.score(texts(TOOL, 20, 3))
    assert auc(good, bad) == 1.0 and read.fingerprint == again.fingerprint
    # Labels and line breaks inside a text are text.
    odd = ["salt\nfish __label__0 tide " * 4] * 60
    assert FastText.fit(odd, rows[1], "sea", tmp_path / "d.bin").score(odd[:1])[0] > 0.5
    with pytest.raises(ConfigError, match="bits = 10 is too few for fastText"):
        FastText.fit(*rows, "sea", tmp_path / "c.bin", bits=10)
    with pytest.raises(DataError, match="no texts to learn"):
        FastText.fit([], ["a"], "x", tmp_path / "c.bin")


def test_packages_over_each_other_are_named(monkeypatch):
    def version(name):
        if name in ("fasttext-numpy2-wheel", "fasttext-predict"):
            return "1"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match="fasttext-numpy2-wheel and fasttext-predict install"):
        scorers.fasttext_module()


def test_a_fasttext_that_cannot_train_is_named(monkeypatch):
    def version(name):
        if name == "fasttext-predict":
            return "1"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(scorers, "require", lambda *_: types.SimpleNamespace())
    assert scorers.fasttext_module() is not None
    with pytest.raises(MissingExtra, match="fasttext-predict cannot train"):
        scorers.fasttext_module(training=True)


def test_a_missing_profanity_check_is_named(monkeypatch):
    monkeypatch.setattr(scorers, "require", lambda module, extra: errors.require("no_such", extra))
    with pytest.raises(MissingExtra, match=r"no_such(.|\n)*outlay\[toxicity\]"):
        scorers.Profanity()


def test_profanity():
    pytest.importorskip("profanity_check", reason='pip install "outlay[toxicity]"')
    mild, rude = scorers.Profanity().score(["a lovely morning", "you damn fool"])
    assert 0 <= mild < 0.2 < 0.8 < rude <= 1
