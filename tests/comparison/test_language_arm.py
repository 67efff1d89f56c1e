"""Reference language models beside a run: the same rows, the same bytes, the same names."""

import json
import math

import pytest

from outlay import Recipe, run
from outlay.comparison.language_arm import fit_language_arm, references
from outlay.core.errors import Conflict
from outlay.estimators.ngram import NGram
from outlay.estimators.xz import Xz
from outlay.training.finished import open_run
from outlay.training.materials import load_materials


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    words = ["one", "two", "three", "four"]
    with place.open("w") as file:
        for i in range(60):
            text = " ".join(words[(i + k * k) % 4] for k in range(30))
            file.write(json.dumps({"text": text, "domain": f"d{i % 2}"}) + "\n")
    return Recipe(
        name="tiny-lm",
        model={
            "config": "llama",
            "layers": 1,
            "width": 32,
            "vocabulary": 280,
            "tokenizer": "bpe",
        },
        task="causal-language-modeling",
        data={"path": str(place), "domain": "domain", "blocks": True},
        batch={"size": 4, "length": 32},
        budget="600tokens",
        evaluate={"references": ["ngram(order=3)", "xz"]},
    )


def test_a_run_reports_bits_by_domain_and_can_be_opened_without_its_rows(recipe, tmp_path):
    result = run(recipe, out=tmp_path, threads=1)
    names = {"test/bits_per_byte", "test/bits_per_byte.d0", "test/bits_per_byte.d1"}
    assert names <= set(result.metrics) and result.meter["tokens"] >= 600
    materials = load_materials(recipe)
    found = references(recipe, materials, tmp_path / result.run)
    assert set(found) == {"ngram(order=3)", "xz"}
    assert names <= set(found["ngram(order=3)"]) and names <= set(found["xz"])
    assert references(recipe, materials, tmp_path / result.run) == found, "kept beside the run"
    assert len(open_run(tmp_path / result.run, rows=False).tokenizer) == len(materials.tokenizer)


def test_bits_are_those_of_the_formula(recipe, tmp_path):
    materials = load_materials(recipe)
    metrics = fit_language_arm(NGram(2), materials, recipe, tmp_path).metrics
    model = NGram(2).fit([e["input_ids"] for e in materials.train], len(materials.tokenizer))
    test = materials.splits["test"]
    nats = sum(part.sum() for part in model.nats([e["input_ids"] for e in test]))
    tokenizer = materials.tokenizer
    said = [t for e in test for t in e["labels"][1:] if t not in tokenizer.all_special_ids]
    size = sum(len(tokenizer.convert_ids_to_tokens(t)) for t in said)
    assert metrics["test/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-12)
    packed = fit_language_arm(Xz(), materials, recipe, tmp_path).metrics
    assert packed["test/bits_per_byte"] > metrics["test/bits_per_byte"]


def test_another_task_is_refused(recipe, tmp_path):
    materials = load_materials(recipe)
    other = recipe.changed({"task": "sequence-classification", "data.blocks": False})
    with pytest.raises(Conflict, match="models text"):
        fit_language_arm(NGram(), materials, other, tmp_path)
