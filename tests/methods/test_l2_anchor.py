"""The pull towards earlier weights, by hand and in runs."""

from __future__ import annotations

import pytest
import torch
from conformance import kit

from outlay import L2Anchor
from outlay.core import registry
from outlay.core.errors import ConfigError, Conflict
from outlay.core.method import Step, Watcher

STEP = Step(0, 0.0, 0)


def penalty(stage):
    found = stage.live.objective.penalties(stage.model, STEP)
    return sum(float(value.detach()) for value in found.values())


def test_the_initial_weights_without_the_head():
    stage = kit.stage(kit.recipe(methods=["l2_anchor(anchor='initial', strength=3.0)"]))
    assert penalty(stage) == 0.0
    start = kit.weights(stage)
    kit.jitter(stage.live)
    moved = sum(
        float((p.detach() - start[n]).square().sum())
        for n, p in stage.live.named_parameters()
        if not n.startswith("classifier.")
    )
    assert any(name.startswith("classifier.") for name in start)
    assert penalty(stage) == pytest.approx(1.5 * moved, rel=1e-5)


def test_its_gradient_is_strength_times_the_distance():
    recipe = {"tasks": False, "precision": "float64", "optimizer": {"lr": 0.01, "clip": None}}
    plain = kit.gradients(kit.stage(kit.recipe(**recipe))).gradients
    stage = kit.stage(kit.recipe(methods=["l2_anchor(anchor='initial', strength=2.5)"], **recipe))
    start = kit.weights(stage)
    twin = kit.stage(kit.recipe(**recipe))
    kit.jitter(twin.live)
    for name, gradient in kit.gradients(stage).gradients.items():
        head = name.startswith("classifier.")
        pull = 0.0 if head else 2.5 * (twin.live.parameter(name).detach() - start[name])
        torch.testing.assert_close(gradient, plain[name] + pull, rtol=1e-9, atol=1e-12)


def test_a_task_pulls_to_where_the_last_one_ended():
    stage = kit.stage(kit.recipe(methods=["l2_anchor"], budget="6steps"))
    values = []

    class Look(Watcher):
        def after_update(self, step: Step) -> None:
            values.append((penalty(stage), kit.weights(stage)))

    stage.loop.watchers = [*stage.loop.watchers, Look()]
    kit.trained(stage)
    assert stage.live.pool.starts == (0, 2, 6)
    assert [v for v, _ in values[:2]] == [0.0, 0.0]
    end = values[1][1]
    for value, weights in values[2:]:
        distance = sum(float((w - end[n]).square().sum()) for n, w in weights.items())
        assert value == pytest.approx(0.005 * distance, rel=1e-4) and value > 0


def test_two_of_them_add_up():
    specs = ["l2_anchor(anchor='initial', strength=3.0)"] * 2
    stage = kit.stage(kit.recipe(methods=specs))
    kit.jitter(stage.live)
    one = kit.stage(kit.recipe(methods=specs[:1]))
    kit.jitter(one.live)
    assert penalty(stage) == pytest.approx(2 * penalty(one), rel=1e-6)


def test_what_it_refuses():
    assert registry.build("l2_anchor") == L2Anchor()
    with pytest.raises(ConfigError, match=r"l2_anchor\.strength"):
        registry.build("l2_anchor(strength=0)")
    with pytest.raises(Conflict, match="'l2_anchor' follows the tasks"):
        kit.stage(kit.recipe(methods=["l2_anchor"], tasks=False))


def test_a_parameter_that_changed_its_shape_is_refused():
    stage = kit.stage(kit.recipe(methods=["l2_anchor(anchor='initial')"]))
    name = next(n for n, p in stage.live.named_parameters() if p.dim() == 2)
    stage.live.replace(name, torch.zeros(2, 2))
    with pytest.raises(Conflict, match="another method changed"):
        penalty(stage)
