"""Recipes that come with outlay: found by name, written and read back, and they learn."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from outlay import assets, recipes
from outlay.core.errors import ConfigError
from outlay.core.method import Step
from outlay.training.data.dataset import encode, load
from outlay.training.evaluate import evaluate
from outlay.training.models.load import load_model, token_bytes
from outlay.training.objectives import objective_for
from outlay.training.recipe import Recipe


def need(recipe):
    known = assets.available()
    tasks = [task.asset for task in recipe.data.tasks]
    for name in (recipe.model.asset, recipe.data.asset, *tasks):
        if name is not None and not known[name].installed:
            pytest.skip(known[name].install_line)


def padded(examples):
    batch = {"ids": tuple(e["id"] for e in examples)}
    for key in examples[0].keys() - {"id", "domain", "task"}:
        values = [e[key] for e in examples]
        if isinstance(values[0], torch.Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], list):
            width, fill = max(map(len, values)), {"labels": -100}.get(key, 0)
            batch[key] = torch.tensor([v + [fill] * (width - len(v)) for v in values])
            if key == "input_ids":
                batch["attention_mask"] = torch.tensor(
                    [[1] * len(v) + [0] * (width - len(v)) for v in values]
                )
        else:
            batch[key] = torch.tensor(values)
    return batch


def test_names_need_nothing_heavy():
    code = (
        "import sys; from outlay import recipes; print(recipes.names()); "
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert {"digits-vit", "glass-lm", "minilm-questions"} <= set(recipes.names())


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_written_and_read_back(name):
    recipe = recipes.get(name)
    assert recipe.name == name
    assert recipe == recipes.get(name.replace("-", "_"))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipes.summary(name).endswith((".", "seconds."))


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'digits-vit'"):
        recipes.get("digit-vit")


@pytest.mark.parametrize("name", ["digits-vit", "digits-cnn"])
def test_digits_are_learned(name):
    before, after = fitted(recipes.get(name), steps=8)
    assert after["loss"] < 0.9 * before["loss"]


@pytest.mark.assets
def test_digits_and_garments_share_ten_outputs():
    recipe = recipes.get("digits-then-fashion")
    need(recipe)
    splits = load(recipe.data.model_copy(update={"limit": 500}), recipe.task)
    assert splits.labels.names == tuple("0123456789")
    assert {row["task"] for row in splits.test} == {0, 1} and len(splits.test) == 4000
    before, after = fitted(recipe, steps=8)
    assert after["loss"] < before["loss"]


@pytest.mark.assets
@pytest.mark.parametrize("name", ["glass-lm", "minilm-questions", "minilm-reviews"])
def test_packaged_models_learn(name):
    before, after = fitted(recipes.get(name), steps=3)
    assert after["loss"] < before["loss"]
    if name == "glass-lm":
        # It knows English: far better than guessing among 1,024 tokens.
        assert before["loss"] < 6.5
        assert 1 < before["bits_per_byte"] < 4


def fitted(recipe, steps):
    """Metrics on eight rows before and after a few steps on them."""
    need(recipe)
    splits = load(recipe.data, recipe.task)
    length, labels = recipe.batch.length, splits.labels
    model, tokenizer = load_model(recipe.model, recipe.task, labels, length=length)
    objective = objective_for(recipe.task, recipe.objective, labels)
    rows = encode(splits.train[:8], recipe.task, tokenizer, length, labels)[:8]
    batch = padded(rows)
    sizes = token_bytes(tokenizer) if recipe.task == "causal-language-modeling" else None

    def measured():
        return evaluate(model, objective, [batch], recipe.task, labels, token_bytes=sizes).metrics

    if recipe.model.asset == "minilm":
        model.base_model.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    before = measured()
    for step in range(steps):
        losses = objective(model, batch, Step(step, 0.0, 0))
        term = losses.terms[losses.primary]
        weight = objective.weight_sums(batch)[losses.primary]
        ((term.values * term.weights).sum() / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, measured()
