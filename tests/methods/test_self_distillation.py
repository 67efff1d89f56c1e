"""Distillation from a further-pre-trained copy: the penalty, and the stages around it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from outlay import Recipe, run
from outlay.core.errors import CheckpointError, ConfigError, Conflict
from outlay.core.losses import Losses, Objective, Term
from outlay.core.meter import FlopTable
from outlay.core.method import Context, Step
from outlay.methods.objectives.self_distillation import (
    TERM,
    FeatureDistillation,
    feature_distance,
    pooled,
)
from outlay.recipes.self_distillation import self_distillation
from outlay.training import checkpoint
from outlay.training.backend import OneDevice
from outlay.training.keeper import Silent
from outlay.training.materials import load_materials
from outlay.training.stages import Runner, stage_recipes

MIM = "masked-image-modeling"
STEP = Step(0, 0.0, 0)
warned = pytest.mark.filterwarnings("ignore:feature_distillation")


@pytest.fixture
def images(tmp_path):
    draw = np.random.default_rng(0)
    rows = [
        {"pixels": (draw.random((4, 4)) + n % 2).round(3).tolist(), "label": "ab"[n % 2]}
        for n in range(32)
    ]
    place = tmp_path / "images.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place)


def recipe(images, *methods, **more):
    fields = {
        "task": MIM, "model": {"config": "vit", "layers": 2, "width": 32, "heads": 2},
        "data": {"path": images, "validation_share": 4, "test_share": 4},
        "batch": {"size": 8}, "optimizer": {"lr": 0.01, "weight_decay": 0.0},
        "budget": "3steps", "methods": methods,
    } | more  # fmt: skip
    return Recipe(**fields)


def assembled(of, folder=Path("."), index=0):
    """One stage of a recipe, not yet trained."""
    stage, own = stage_recipes(of)[index]
    backend = OneDevice("cpu", of.precision)
    runner = Runner(of, load_materials(of), folder, backend, Silent(), (), FlopTable(), {})
    return runner.assembled(stage, own, index, None)


def trained(of):
    stage = assembled(of)
    losses = []
    stage.loop.on_step = lambda step, values: losses.append(values)
    stage.loop.run()
    return stage, losses


# ---- the distance --------------------------------------------------------------------------------


def test_the_sum_over_the_width():
    """A difference of 0.1 at width 64 is 0.64; its mean convention would be 0.01."""
    student, teacher = torch.full((3, 1, 64), 0.1), torch.zeros(3, 1, 64)
    assert feature_distance(student, teacher).tolist() == pytest.approx([0.64] * 3)
    assert feature_distance(student, teacher, "mse").tolist() == pytest.approx([0.01] * 3)
    turned = torch.tensor([[[0.0, 2.0]], [[3.0, 0.0]]])
    upright = torch.tensor([[[5.0, 0.0]], [[5.0, 0.0]]])
    assert feature_distance(turned, upright, "cosine").tolist() == pytest.approx([1.0, 0.0])


def test_padding_counts_nowhere():
    states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pooled(states, "cls").tolist() == [[[0, 1]], [[6, 7]]]
    assert pooled(states, "mean", mask).tolist() == [[[1, 2]], [[8, 9]]]
    found = feature_distance(states, torch.zeros_like(states), "mse_sum", mask.float())
    assert found.tolist() == pytest.approx([(1 + 13) / 2, (85 + 145 + 221) / 3])
    image = torch.arange(8.0).view(1, 2, 2, 2)
    assert pooled(image, "mean").tolist() == [[[1.5, 5.5]]]


class _States(nn.Module):
    """Hidden states that are one weight times the input."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.cls_token = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)

    def forward(self, x, output_hidden_states=False):
        from types import SimpleNamespace

        states = self.weight * x[:, None, None]
        return SimpleNamespace(logits=states[:, 0, 0], hidden_states=(states,))


class _Halved(Objective):
    """Half a squared error, as the linear model has it."""

    def forward(self, model, batch, step):
        values = 0.5 * (model(batch["x"]).logits - batch["labels"]).square()
        return Losses({"error": Term(values, torch.ones_like(values))}, "error")

    def weight_sums(self, batch):
        return {"error": float(len(batch["x"]))}


def linear(at, taught, **settings):
    model, wise = _States(at), _States(taught)
    context = Context(loader=lambda _: wise)
    objective = FeatureDistillation(teacher="stage:t", **settings).shape(_Halved(), model, context)
    batch = {"x": torch.ones(2, dtype=torch.float64), "ids": ("a", "b")}
    batch |= {"labels": torch.ones(2, dtype=torch.float64), "clean": dict(batch)}
    return model, wise, objective, batch


def loss_of(objective, model, batch):
    losses = objective(model, batch, STEP)
    sums = objective.weight_sums(batch)
    return sum(t.coefficient * t.row_sums().sum() / sums[n] for n, t in losses.terms.items())


@warned
@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_progress_in_a_linear_model(strength, steps):
    """The student goes b (1 + 2 lambda a) / (1 + 2 lambda) of the way, its teacher a."""
    rate = 0.25
    teacher, _, plain, batch = linear(0.0, 0.0, weight=0.0, primary_weight=1.0)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss_of(plain, teacher, batch), [teacher.weight])
        teacher.weight.data -= rate * gradient
    a = 1 - (1 - rate) ** steps
    assert teacher.weight.item() == pytest.approx(a, rel=1e-12)
    student, _, objective, batch = linear(0.0, a, weight=strength)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss_of(objective, student, batch), [student.weight])
        student.weight.data -= rate * gradient
    b = 1 - (1 - rate * (1 + 2 * strength)) ** steps
    expected = b * (1 + 2 * strength * a) / (1 + 2 * strength)
    assert student.weight.item() == pytest.approx(expected, rel=1e-12)


def test_the_students_progress_in_numbers():
    """With eta s = 0.5 and lambda = 0.5 the teacher is half way, the student three quarters."""
    student, _, objective, batch = linear(0.0, 0.5, weight=0.5)
    (gradient,) = torch.autograd.grad(loss_of(objective, student, batch), [student.weight])
    assert (student.weight - 0.5 * gradient).item() == pytest.approx(0.75)


def test_no_gradient_reaches_the_teacher_and_passes_may_be_split():
    model, wise, objective, batch = linear(0.0, 0.5)
    losses = objective(model, batch, STEP)
    (both,) = torch.autograd.grad(loss_of(objective, model, batch), [model.weight])
    apart = [
        torch.autograd.grad(term.values.mean(), [model.weight], retain_graph=True)[0]
        for term in losses.terms.values()
    ]
    assert both.item() == pytest.approx(sum(apart).item(), rel=1e-12)
    assert wise.weight.grad is None and not wise.weight.requires_grad and not wise.training
    wise.train()
    assert not wise.training


# ---- in a run ------------------------------------------------------------------------------------


@warned
def test_without_weight_it_is_a_second_further_pre_training(images):
    """Bit for bit, though the distance is measured."""
    plain, _ = trained(recipe(images))
    measured, _ = trained(recipe(images, "feature_distillation(teacher='original', weight=0.0)"))
    assert checkpoint.weights_sha256(plain.live) == checkpoint.weights_sha256(measured.live)
    assert measured.context.meter.charges["teacher"]["flops"] > 0


@warned
def test_a_teacher_that_is_the_start_keeps_it_there(images):
    only = "feature_distillation(teacher='original', primary_weight=0.0)"
    stage, log = trained(recipe(images, only))
    assert [line["objective"] for line in log] == [0.0, 0.0, 0.0]
    start = assembled(recipe(images)).model.state_dict()
    assert all(torch.equal(v, start[n]) for n, v in stage.model.state_dict().items())


def test_a_teacher_that_is_the_start_is_warned_of(images):
    with pytest.warns(UserWarning, match="pulls back to the start"):
        assembled(recipe(images, "feature_distillation(teacher='original')"))


@warned
@pytest.mark.parametrize("pool", ["cls", "tokens"])
def test_the_clean_view_is_the_encoder_on_all_patches(images, pool):
    """Order of the patches apart, it is what a mask that hides nothing gives."""
    stage = assembled(recipe(images, f"feature_distillation(teacher='original', pool={pool!r})"))
    model = stage.model.eval()
    pixels = next(iter(stage.batches("validation")))["pixel_values"]
    whole = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    order = torch.tensor([2, 0, 3, 1]).expand(len(pixels), -1)
    turned = model(pixel_values=pixels, visible=order, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(turned[:, 0], whole[:, 0])
    torch.testing.assert_close(turned[:, 1:], whole[:, 1:][:, order[0]])
    (batch,) = stage.loop.drawer.draw(STEP)
    assert set(batch["clean"]) == {"ids", "domains", "pixel_values"}
    assert torch.equal(batch["clean"]["pixel_values"], batch["pixel_values"])


def staged(images, student="feature_distillation", **more):
    stages = [{"name": "teacher"}, {"name": "student", "start": "original", "methods": [student]}]
    return recipe(images, stages=stages, **more)


def test_at_its_first_step_the_student_is_as_far_as_the_teacher_went(images, tmp_path):
    of = staged(images)
    result = run(of, out=tmp_path)
    stage = assembled(of, Path(result.folder), 1)
    (batch,) = stage.loop.drawer.draw(STEP)
    losses = stage.objective(stage.model, batch, STEP)
    start, clean = assembled(recipe(images)).model, batch["clean"]["pixel_values"]
    wise = assembled(recipe(images)).model
    wise.load_state_dict(checkpoint.read_folder(Path(result.folder) / "stages/teacher")["model"])

    def cls(model):
        return model(pixel_values=clean, output_hidden_states=True).hidden_states[-1][:, 0]

    expected = (cls(start) - cls(wise)).square().sum(-1)
    torch.testing.assert_close(losses.terms[TERM].values, expected)
    assert expected.mean().item() > 0
    assert result.meter["student/teacher/flops"] > 0
    # The teacher is in no checkpoint and in no count.
    assert not any("teacher" in name for name, _ in stage.live.named_parameters())


@pytest.mark.parametrize("view", ["clean", "corrupted"])
def test_how_a_step_is_split_changes_nothing(images, tmp_path, view):
    seen = {}
    for micro in (8, 4, 2):
        of = staged(
            images, f"feature_distillation(view={view!r}, pool='mean')", precision="float64",
            batch={"size": 8, "micro": micro}, model={
                "config": "vit", "layers": 1, "width": 16, "heads": 2,
            },
        )  # fmt: skip
        seen[micro] = run(of, out=tmp_path / str(micro)).metrics["test/loss"]
    assert seen[4] == pytest.approx(seen[8], rel=1e-9)
    assert seen[2] == pytest.approx(seen[8], rel=1e-9)


@warned
def test_two_teachers_are_two_terms(images):
    text = "feature_distillation(teacher='original', pool={!r})"
    stage = assembled(recipe(images, text.format("cls"), text.format("mean")))
    (batch,) = stage.loop.drawer.draw(STEP)
    terms = stage.objective(stage.model, batch, STEP).terms
    assert list(terms) == ["squared_error", TERM, f"{TERM}_2"]
    assert set(stage.objective.weight_sums(batch)) == set(terms)


@warned
def test_it_stands_beside_weights_that_couple_the_step(images):
    text = "feature_distillation(teacher='original')"
    found = {}
    for micro in (8, 2):
        of = recipe(
            images, "loss_weights(temperature=0.4)", text, precision="float64",
            batch={"size": 8, "micro": micro},
        )  # fmt: skip
        _, log = trained(of)
        found[micro] = [line["objective"] for line in log]
    assert found[2] == pytest.approx(found[8], rel=1e-9)


def test_a_killed_student_goes_on_with_the_same_bits(images, tmp_path):
    of = staged(images, budget="6steps", every={"save": 2})
    whole = run(of, out=tmp_path / "whole")

    class Kill(Silent):
        def step(self, step, values, meter):
            if self.at == "student" and step.index == 3:
                raise KeyboardInterrupt

        def stage(self, name, budget, meter):
            self.at = name

    with pytest.raises(KeyboardInterrupt):
        run(of, out=tmp_path / "killed", progress=Kill())
    again = run(of, out=tmp_path / "killed")
    assert again.weights_sha256 == whole.weights_sha256
    assert again.metrics == whole.metrics


# ---- refusals ------------------------------------------------------------------------------------


def test_what_is_refused_by_itself():
    with pytest.raises(ConfigError, match="both 0"):
        FeatureDistillation(weight=0.0, primary_weight=0.0)
    with pytest.raises(ConfigError, match="teacher"):
        FeatureDistillation(teacher=" ")
    with pytest.raises(ConfigError, match="weight"):
        FeatureDistillation(weight=-1.0)


def test_a_teacher_of_another_width_is_refused(images):
    other = assembled(recipe(images, model={"config": "vit", "layers": 1, "width": 64})).model
    model = assembled(recipe(images)).model
    with pytest.raises(ConfigError, match=r"64 wide.*32"):
        FeatureDistillation().shape(_Halved(), model, Context(loader=lambda _: other))


@warned
def test_a_layer_and_a_class_token_have_to_be_there(images):
    with pytest.raises(ConfigError, match="layer = 7"):
        trained(recipe(images, "feature_distillation(teacher='original', layer=7)"))
    cnn = recipe(
        images, "feature_distillation(teacher='original')", task="image-classification",
        model={"config": "cnn", "layers": 1, "width": 16},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no class token"):
        assembled(cnn)
    trained(cnn.changed({"methods": ["feature_distillation(teacher='original', pool='mean')"]}))


def test_packed_rows_are_refused():
    model, _, objective, batch = linear(0.0, 0.5)
    packed = {**batch, "segment_ids": torch.zeros(1, 2)}
    with pytest.raises(Conflict, match="packed"):
        objective(model, packed, STEP)


# ---- the recipe ----------------------------------------------------------------------------------


def tuning(images, **more):
    return recipe(images, task="image-classification", **more)


def test_rounds_start_from_the_original_and_learn_from_the_one_before(images, tmp_path):
    of = self_distillation(tuning(images), MIM, "2steps", rounds=2, objective={"mask_ratio": 0.5})
    assert [s.name for s in of.stages] == ["teacher", "student-1", "student-2", "fine-tune"]
    assert [s.start for s in of.stages] == ["original"] * 3 + ["stage:student-2"]
    teachers = [s.methods[0].teacher for s in of.stages[1:3]]
    assert teachers == ["stage:teacher", "stage:student-1"]
    assert Recipe.from_yaml(of.to_yaml()) == of
    result = run(of, out=tmp_path)
    assert {"teacher/test/loss", "student-2/test/loss", "test/accuracy"} <= set(result.metrics)
    folder = Path(result.folder)
    assert len(json.loads((folder / "originals.json").read_text())) == 1
    lines = (folder / "metrics-student-2.jsonl").read_text()
    assert '"relative_distance.0"' in lines


def test_no_stage_sees_what_another_is_tested_on(images):
    of = self_distillation(tuning(images), MIM, "2steps")
    tested = [
        {row["id"] for row in load_materials(own, hollow=True).rows["test"]}
        for _, own in stage_recipes(of)
    ]
    assert tested[0] == tested[1] == tested[2]


def test_an_original_that_changed_is_refused(images, tmp_path):
    from outlay.training.models.load import load_model, save_model

    own = load_materials(recipe(images))
    model, _ = load_model(recipe(images).model, MIM, own.labels)
    save_model(model, None, tmp_path / "model")
    of = recipe(
        images, model={"path": str(tmp_path / "model")},
        stages=[{"name": "teacher"}, {"name": "student", "start": "original"}],
    )  # fmt: skip

    class Meddle(Silent):
        def stage(self, name, budget, meter):
            if name == "teacher":
                with torch.no_grad():
                    model.vit.layernorm.bias += 1
                save_model(model, None, tmp_path / "model", overwrite=True)

    with pytest.raises(CheckpointError, match="student"):
        run(of, out=tmp_path / "runs", progress=Meddle())


def test_recipes_that_cannot_be(images):
    with pytest.raises(ConfigError, match="rounds = 0"):
        self_distillation(tuning(images), MIM, "2steps", rounds=0)
    with pytest.raises(ConfigError, match="stages"):
        self_distillation(self_distillation(tuning(images), MIM, "2steps"), MIM, "2steps")
    with pytest.raises(ConfigError, match="regression"):
        self_distillation(recipe(images, task="regression"), MIM, "2steps")
