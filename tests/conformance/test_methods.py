"""What every method of the registry keeps, on every supported model shape."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from conformance import kit, settings

from outlay.core import registry
from outlay.core.method import OnModel
from outlay.nn.targets import head_modules
from outlay.training import checkpoint
from outlay.training.models.export import save_model
from outlay.training.planning.plan import plan
from outlay.training.recipe import Recipe

SPECS = settings.specs()
METHODS = sorted(name for name, entry in registry.entries().items() if entry.kind == "method")
# A tokenizer from scratch has no mode token; no stage before this one can be the teacher.
pytestmark = pytest.mark.filterwarnings("ignore:mode_token", "ignore:feature_distillation")
each = pytest.mark.parametrize("spec", SPECS)
everywhere = pytest.mark.parametrize(
    ("shape", "spec"),
    [
        pytest.param(shape, spec, marks=pytest.mark.slow if slow else ())
        for shape, spec, slow in settings.on_shapes(tuple(kit.SHAPES))
    ],
)


# ---- settings ------------------------------------------------------------------------------------


def test_every_method_has_a_row():
    assert sorted(settings.ROWS) == METHODS, "add a row of small settings to settings.py"
    for name, rows in settings.ROWS.items():
        assert rows and {registry.build(spec).card.name for spec in rows} == {name}
    named = settings.MOVES_AT_START | settings.HEADS_ONLY
    assert named <= set(SPECS) and set(settings.representatives()) - set(SPECS) <= {
        spec for rows in settings.PAIRED.values() for spec in rows
    }


@each
def test_settings_come_back_and_are_hashable(spec):
    method = registry.build(spec)
    again = registry.build(method.spec())
    assert again == method and hash(again) == hash(method) and again.spec() == method.spec()
    assert registry.build(method) is method
    assert len({method, again}) == 1
    assert dataclasses.replace(method) == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.card_that_is_not = 1
    recipe = kit.recipe(methods=[spec])
    read = Recipe.from_yaml(recipe.to_yaml())
    assert read == recipe and read.methods == (method,)
    assert json.loads(json.dumps(recipe.resolved()))["methods"] == [method.spec()]


@pytest.mark.parametrize("name", METHODS)
def test_bad_values_are_refused_by_field(plain_process, name):
    found = plain_process["refusals"][name]
    assert found["fields"] == found["refused"], "a field takes anything"
    assert found["complaints"] == []


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [s for s in SPECS if isinstance(registry.build(s), OnModel)])
def test_by_hand_the_base_is_frozen(spec):
    method = registry.build(spec.replace("tinit", "total_step=9, tinit"))
    recipe = kit.recipe()
    model = kit.materials(recipe).model(recipe)
    before = {id(p): n for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    adapted = method.adapt(model)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator moved"
    if not method.card.freezes_base:
        return
    heads, kept = head_modules(adapted), {n.split("base_layer.")[-1] for n in method.trains(model)}
    for parameter in adapted.parameters():
        name = before.get(id(parameter))
        if name is not None:
            trains = name.split(".")[0] in heads or name in kept
            assert parameter.requires_grad == trains, name
    assert any(p.requires_grad for p in adapted.parameters())


# ---- in a run ------------------------------------------------------------------------------------


@each
def test_planned_counted_and_real_parameters_agree(spec):
    shape = "bert" if spec in settings.HEADS_ONLY else "gpt2"
    recipe = kit.recipe(shape, [spec], batch={"size": 8, "length": 48, "pad_to": 0})
    stage = kit.stage(recipe)
    trainable = sum(p.numel() for _, p in stage.live.named_parameters() if p.requires_grad)
    held = {p for o in stage.live.optimizers for g in o.param_groups for p in g["params"]}
    assert stage.context.meter.facts["trainable_parameters"] == trainable > 0
    assert sum(p.numel() for p in held) == trainable
    planned = plan(recipe, device="cpu").params
    total = sum(p.numel() for p in stage.model.parameters())
    assert planned["total"] - planned["trainable"] == total - trainable
    if spec in settings.BY_WEIGHTS:
        assert planned["trainable"] >= 0.9 * trainable
    else:
        assert planned["trainable"] == trainable


SPLITS = (8, 2, 4)


@everywhere
def test_how_a_step_is_split_changes_nothing(shape, spec):
    """Ragged rows, and in language modelling masked prompts, at 1x8, 4x2 and 2x4."""
    if registry.build(spec).card.scope != "step":
        pytest.skip("its card says that splitting matters")
    if spec in settings.INSIDE:
        pytest.skip("its gradients are gone: its own tests compare weights")
    seen = {}
    for micro in SPLITS:
        batch = {"size": 8, "micro": micro, "length": 48, "pad_to": 1}
        recipe = kit.recipe(
            shape, [_still(spec)], precision="float64", batch=batch,
            optimizer={"lr": 0.01, "clip": None},
        )  # fmt: skip
        seen[micro] = kit.gradients(kit.stage(recipe))
    first = seen[SPLITS[0]]
    assert first.gradients and any(float(g.abs().max()) > 1e-6 for g in first.gradients.values())
    for micro in SPLITS[1:]:
        other = seen[micro]
        assert abs(other.loss - first.loss) <= 1e-9 * abs(first.loss)
        assert set(other.gradients) == set(first.gradients)
        largest = max(float(g.abs().max()) for g in first.gradients.values())
        for name, gradient in first.gradients.items():
            gap = float((other.gradients[name] - gradient).abs().max())
            assert gap <= 1e-9 * largest, f"{name} at micro = {micro}: {gap}"


def _still(spec: str) -> Any:
    """The row without its own dropout: equality over splits is promised with dropout off."""
    method = registry.build(spec)
    if hasattr(method, "dropout"):
        return dataclasses.replace(method, dropout=0.0)
    return registry.build(spec.replace("lora_dropout=0.1", "lora_dropout=0.0"))


@everywhere
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_starts_at_the_base_and_exports_what_was_trained(
    tmp_path, shape, spec, precision, tolerance
):
    recipe = kit.recipe(shape, [spec], precision=precision)
    stage = kit.stage(recipe)
    base = kit.materials(recipe).model(recipe)
    batch = kit.inputs(stage)
    plain_logits = kit.logits(base, batch)
    if spec not in settings.MOVES_AT_START:
        kit.close(kit.logits(stage.model, batch), plain_logits, tolerance, "the start")
    kit.trained(stage)
    kit.jitter(stage.live, 0.02)
    expected = kit.logits(stage.model, batch)
    apart = float((expected - plain_logits).abs().max())
    assert apart > 1e-4 * float(expected.abs().max()), "nothing was trained"
    plain = stage.exported()
    assert type(plain) is type(base) and _names(plain) == _names(base)
    save_model(plain, None, tmp_path / "model", labels=kit.materials(recipe).labels)
    dtype = torch.float64 if precision == "float64" else torch.float32
    fresh: Any = kit.AUTO[recipe.task].from_pretrained(tmp_path / "model", dtype=dtype)
    assert all(bool(torch.isfinite(p).all()) for p in fresh.parameters())
    kit.close(kit.logits(fresh, batch), expected, tolerance, "the export")


def _names(model: Any) -> set[str]:
    """Parameters by name, the second name of a tied one left out: merging unties."""
    return {name for name in model.state_dict() if not name.startswith("lm_head.")}


@each
def test_equal_seeds_give_equal_bits_and_others_do_not(spec):
    def digest(seed: int) -> str:
        recipe = kit.recipe(methods=[spec], seed=seed, model={"dropout": 0.1})
        return checkpoint.weights_sha256(kit.trained(kit.stage(recipe)).live)

    first = digest(0)
    torch.rand(3)
    assert digest(0) == first
    assert digest(1) != first


@each
def test_bfloat16_takes_a_step(spec):
    stage = kit.stage(kit.recipe(methods=[spec], precision="bfloat16"))
    before = kit.weights(stage)
    grab = kit.Grab(stage)
    stage.loop.watchers = [*stage.loop.watchers, grab]
    kit.trained(stage)
    after = kit.weights(stage)
    assert grab.loss == grab.loss and abs(grab.loss) != float("inf")
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert all(p.dtype == torch.float32 for _, p in stage.live.named_parameters())
    assert any(n in before and not torch.equal(v, before[n]) for n, v in after.items())


# ---- rows without labels -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    sorted(
        spec
        for spec in set(SPECS) - settings.HEADS_ONLY - settings.INSIDE - settings.CHOOSE
        if not settings.needs_tasks([spec])
    ),
)
def test_rows_without_a_label_do_no_harm(spec):
    """Micro-batches of ignored rows alone: the gradient is that of the other rows."""
    fields: dict[str, Any] = {"precision": "float64", "optimizer": {"lr": 0.01, "clip": None}}
    whole = kit.recipe("llama", [_still(spec)], batch={"size": 8, "micro": 1}, **fields)
    rows = kit.materials(whole).train[:8]
    ignored = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    mixed = [*rows[:4], *ignored[4:]]
    with_them = kit.gradients(kit.stage(whole, train=mixed))
    half = kit.recipe("llama", [_still(spec)], batch={"size": 4, "micro": 1}, **fields)
    without = kit.gradients(kit.stage(half, train=rows[:4]))
    assert abs(with_them.loss - without.loss) <= 1e-9 * abs(without.loss)
    for name, gradient in without.gradients.items():
        torch.testing.assert_close(with_them.gradients[name], gradient, rtol=1e-9, atol=1e-11)
    empty = kit.stage(whole, train=ignored)
    kit.trained(empty)
    assert all(bool(torch.isfinite(v).all()) for v in kit.weights(empty).values())


# ---- the caller's generators ---------------------------------------------------------------------


def test_the_callers_generators_are_untouched(plain_process):
    assert plain_process["moved"] == []
