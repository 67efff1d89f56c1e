"""Tasks that hide parts of their inputs: what is hidden, what is scored, what stages hand on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from outlay import Recipe, plan, run
from outlay.core.card import Card
from outlay.core.errors import ConfigError
from outlay.core.meter import FlopTable
from outlay.core.method import OnBatch, Step, generator_of
from outlay.training.backend import OneDevice
from outlay.training.checkpoint import read_folder
from outlay.training.data.batch import Drawer
from outlay.training.data.corruption import corruption_for
from outlay.training.data.pool import Pool
from outlay.training.finished import open_run
from outlay.training.keeper import Silent
from outlay.training.materials import load_materials
from outlay.training.models.load import load_model, save_model
from outlay.training.models.tokens import byte_tokenizer
from outlay.training.objectives import objective_for
from outlay.training.stages import Runner, stage_recipes

TEXT, IMAGES = "masked-language-modeling", "masked-image-modeling"
STEP = Step(0, 0.0, 0)


def masking(**special):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"} | special)
    return tokenizer


@pytest.fixture
def data(tmp_path):
    """Rows of text and of images, with classes."""
    draw = np.random.default_rng(0)
    rows = [
        {
            "text": " ".join(draw.choice(["salt", "fish", "tide", "saw"], 4)), "label": "ab"[n % 2],
            "pixels": (draw.random((4, 4)) + n % 2).round(3).tolist(),
        }
        for n in range(40)
    ]  # fmt: skip
    place = tmp_path / "rows.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place)


def recipe(data, task, **more):
    shape = "bert" if task == TEXT else "vit"
    fields = {
        "task": task, "model": {"config": shape, "layers": 1, "width": 32, "heads": 2},
        "data": {"path": data, "validation_share": 6, "test_share": 6}, "budget": "3steps",
        "batch": {"size": 8, "length": 24},
    } | more  # fmt: skip
    return Recipe(**fields)


def assembled(of):
    stage, own = stage_recipes(of)[0]
    runner = Runner(
        of,
        load_materials(of),
        Path("."),
        OneDevice("cpu", "float32"),
        Silent(),
        (),
        FlopTable(),
        {},
    )
    return runner.assembled(stage, own, 0, None)


# ---- what is hidden ------------------------------------------------------------------------------


def test_the_share_of_masked_tokens_and_what_becomes_of_them():
    tokenizer = masking()
    corrupt = corruption_for(TEXT, {}, tokenizer)
    ids = tokenizer("abcdefghij" * 20)["input_ids"]
    fates = {"mask": 0, "other": 0, "same": 0}
    for index in range(200):
        found = corrupt({"id": "a", "input_ids": ids}, generator_of(index))
        scored = [at for at, label in enumerate(found["labels"]) if label != -100]
        assert len(scored) == 30
        for at, token in enumerate(found["input_ids"]):
            if at not in scored:
                assert token == ids[at]
                continue
            assert found["labels"][at] == ids[at]
            masked, same = token == tokenizer.mask_token_id, token == ids[at]
            fates["mask" if masked else "same" if same else "other"] += 1
    shares = [count / 6000 for count in fates.values()]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_special_tokens_stay_and_short_rows_count():
    tokenizer = masking(cls_token="[CLS]", sep_token="[SEP]")
    corrupt = corruption_for(TEXT, {"mask_ratio": 0.01}, tokenizer)
    ends = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])
    for index in range(20):
        ids = [ends[0], 70, 71, ends[1]]
        found = corrupt({"id": "a", "input_ids": ids}, generator_of(index))
        assert sum(label != -100 for label in found["labels"]) == 1
        assert [found["input_ids"][0], found["input_ids"][-1]] == ends
    empty = corrupt({"id": "a", "input_ids": [tokenizer.pad_token_id]}, generator_of(0))
    assert empty["labels"] == [-100]


def test_three_quarters_of_the_patches_are_hidden():
    found = corruption_for(IMAGES, {}, patches=16)({"id": "a"}, generator_of(0))
    assert len(found["visible"]) == 4 and int(found["masked"].sum()) == 12
    assert not found["masked"][found["visible"]].any()
    assert torch.equal(found["visible"], found["visible"].sort().values)


def test_what_cannot_be_hidden():
    with pytest.raises(ConfigError, match="mask token"):
        corruption_for(TEXT, {}, byte_tokenizer())
    with pytest.raises(ConfigError, match="leaves 0 of 4"):
        corruption_for(IMAGES, {"mask_ratio": 0.9}, patches=4)
    for task, value in ((TEXT, 0), (IMAGES, 1.0), (TEXT, "half")):
        with pytest.raises(ConfigError, match="mask_ratio"):
            objective_for(task, {"mask_ratio": value})
    with pytest.raises(ConfigError, match="normalize_pixels"):
        objective_for(IMAGES, {"normalize_pixels": 1})
    assert corruption_for("causal-language-modeling", {}) is None


@dataclass(frozen=True, kw_only=True)
class Blank(OnBatch):
    """A made-up method that corrupts examples itself."""

    card: ClassVar[Card] = Card(name="blank", title="toy", claims=("example.corruption",))

    def transform(self, example, draw, step, context):
        return {**example, "labels": example["input_ids"]}


def test_a_method_that_corrupts_takes_the_tasks_place(data):
    stage = assembled(recipe(data, TEXT))
    pool, spec, corrupt = Pool(load_materials(stage.recipe).train, 0), stage.recipe.batch, None
    corrupt = stage.corruption
    own = Drawer(pool, spec, [Blank()], stage.context, corruption=corrupt).draw(STEP)[0]
    kept = own["attention_mask"] == 1
    assert torch.equal(own["labels"][kept], own["input_ids"][kept])
    pool = Pool(load_materials(stage.recipe).train, 0)
    tasks = Drawer(pool, spec, [], stage.context, clean=True, corruption=corrupt).draw(STEP)[0]
    assert (tasks["labels"] != -100).sum() < kept.sum()
    hidden = tasks["labels"] != -100
    assert torch.equal(tasks["labels"][hidden], tasks["clean"]["input_ids"][hidden])
    assert "labels" not in tasks["clean"]


@pytest.mark.parametrize("task", [TEXT, IMAGES])
def test_evaluation_hides_the_same_whatever_the_seed(data, task):
    key = "input_ids" if task == TEXT else "visible"
    stages = [assembled(recipe(data, task, seed=seed)) for seed in (0, 1)]
    first, second = (torch.cat([b[key] for b in s.batches("test")]) for s in stages)
    assert torch.equal(first, second)
    train = [s.loop.drawer.draw(STEP)[0] for s in stages]
    assert not torch.equal(train[0][key], train[1][key])


# ---- what is scored ------------------------------------------------------------------------------


def test_pixels_of_hidden_patches():
    objective = objective_for(IMAGES, {"normalize_pixels": False})
    image = torch.arange(32.0).view(1, 2, 4, 4)
    masked = torch.tensor([[False, True, True, True]])
    batch = {"pixel_values": image, "masked": masked, "ids": ("a",)}
    targets = objective.targets(batch)
    # Rows before columns, channels last: the upper right patch of both channels.
    assert targets[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]
    assert objective.weight_sums(batch) == {"squared_error": 3.0}
    assert objective.values(targets + 2, targets).tolist() == [[4.0] * 4]
    normal = objective_for(IMAGES).targets(batch)
    torch.testing.assert_close(normal.mean(-1), torch.zeros(1, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(normal.square().mean(-1), torch.ones(1, 4))


def test_what_is_not_seen_changes_no_prediction(data):
    stage = assembled(recipe(data, IMAGES))
    model, batch = stage.model.eval(), next(iter(stage.batches("test")))
    pixels, visible = batch["pixel_values"], batch["visible"]
    first = model(pixel_values=pixels, visible=visible).logits
    hidden = batch["masked"].view(-1, 1, 2, 2)
    noise = torch.nn.functional.interpolate(hidden.float(), scale_factor=2.0)
    second = model(pixel_values=pixels + noise, visible=visible).logits
    torch.testing.assert_close(first, second)
    assert model(pixel_values=pixels).logits is None


# ---- in a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [TEXT, IMAGES])
def test_the_encoder_goes_on_and_the_head_is_new(data, tmp_path, task):
    kind = "sequence-classification" if task == TEXT else "image-classification"
    notes = []

    class Hear(Silent):
        def note(self, text):
            notes.append(text)

    of = recipe(
        data, task, budget="1steps",
        stages=[{"name": "hide", "budget": "3steps"},
                {"name": "tune", "task": kind, "optimizer": {"lr": 1e-12}}],
    )  # fmt: skip
    assert plan(of).params["trainable"] > 0
    result = run(of, out=tmp_path, progress=Hear())
    assert {"hide/test/loss", "test/accuracy"} <= set(result.metrics)
    assert any("from stage:hide" in note for note in notes)
    given = read_folder(Path(result.folder) / "stages/hide")["model"]
    tuned = dict(open_run(result.folder).model.named_parameters())
    prefix = "bert." if task == TEXT else "vit."
    shared = [n for n in given if n.startswith(prefix) and "position_ids" not in n]
    assert len(shared) > 15 and all(
        torch.allclose(given[n], tuned[n].detach(), atol=1e-6) for n in shared
    )
    new = {n for n in tuned if not n.startswith(prefix) or "pooler" in n}
    assert set(tuned) - set(given) == new


@pytest.mark.parametrize("task", [TEXT, IMAGES])
def test_it_learns_and_scores_rows_without_labels(data, tmp_path, task):
    # Noise has no structure but its level, which normalizing takes away.
    plain = {"normalize_pixels": False} if task == IMAGES else {}
    of = recipe(
        data, task, budget="60steps", optimizer={"lr": 5e-3}, every={"evaluate": 30},
        objective=plain,
    )  # fmt: skip
    short = run(of.changed({"budget": "1steps"}), out=tmp_path)
    long = run(of, out=tmp_path)
    assert long.metrics["test/loss"] < 0.9 * short.metrics["test/loss"]
    if task == TEXT:
        assert long.metrics["test/perplexity"] == pytest.approx(
            np.exp(long.metrics["test/loss"]), rel=1e-6
        )
    finished = open_run(long.folder)
    assert finished.evaluate()["test/loss"] == pytest.approx(long.metrics["test/loss"], rel=1e-5)
    key = "text" if task == TEXT else "pixels"
    plain = json.loads(Path(data).read_text().splitlines()[0])[key]
    (scored,) = finished.predict([{key: plain}])
    assert scored["loss"] >= 0


def test_vit_folders_become_auto_encoders_and_come_back(data, tmp_path):
    classes = load_materials(recipe(data, "image-classification"))
    model, _ = load_model(recipe(data, IMAGES).model, "image-classification", classes.labels)
    save_model(model, None, tmp_path / "vit", classes.labels)
    path = {"path": str(tmp_path / "vit")}
    hiding, _ = load_model(recipe(data, IMAGES, model=path).model, IMAGES, classes.labels)
    save_model(hiding, None, tmp_path / "hiding")
    path = {"path": str(tmp_path / "hiding")}
    again, _ = load_model(
        recipe(data, IMAGES, model=path).model, "image-classification", classes.labels
    )
    back, _ = load_model(recipe(data, IMAGES, model=path).model, IMAGES, classes.labels)
    for name, value in model.vit.state_dict().items():
        assert torch.equal(value, hiding.vit.state_dict()[name])
        assert torch.equal(value, again.vit.state_dict()[name])
    assert all(torch.equal(v, back.state_dict()[n]) for n, v in hiding.state_dict().items())


def test_classes_that_are_there_decide_the_splits_alone(data):
    both = [load_materials(recipe(data, t)) for t in (IMAGES, "image-classification")]
    assert [r["id"] for r in both[0].rows["test"]] == [r["id"] for r in both[1].rows["test"]]
    assert both[0].labels.names == () and "labels" not in both[0].train[0]


def test_cached_lower_layers_are_refused(data):
    model = {"config": "bert", "layers": 1, "width": 32, "cache_frozen": True}
    with pytest.raises(ConfigError, match="cache_frozen"):
        recipe(data, TEXT, model=model)
