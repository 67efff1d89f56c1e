"""Updates inside backward: the same weights, gradients that are let go, and refusals."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import pytest
import torch
from conformance import kit

from outlay import LayerwiseUpdates
from outlay.core.card import Card
from outlay.core.errors import Conflict
from outlay.core.method import OnStep
from outlay.core.watcher import Watcher
from outlay.training.assemble import refuse_inside
from outlay.training.planning.plan import plan

OPTIMIZERS = [None, "galore(rank=4, update_every=2)", "apollo(rank=4, update_every=2)"]
if find_spec("torchao"):
    OPTIMIZERS.append("adamw_8bit(block_size=64)")


def recipe(methods, **more):
    fields = {"precision": "float64", "optimizer": {"lr": 0.01, "clip": None}} | more
    return kit.recipe("llama", methods, **fields)


def weights(methods, **more):
    return kit.weights(kit.trained(kit.stage(recipe(methods, **more))))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("micro", [8, 2])
def test_the_weights_are_those_of_the_plain_order(optimizer, micro):
    batch = {"size": 8, "micro": micro, "length": 48}
    others = [optimizer] if optimizer else []
    plain = weights(others, batch=batch)
    inside = weights(["layerwise_updates", *others], batch=batch)
    assert plain.keys() == inside.keys()
    for name, value in plain.items():
        torch.testing.assert_close(inside[name], value, rtol=1e-12, atol=1e-12)


def test_how_a_step_is_split_changes_nothing():
    whole, *parts = (
        weights(
            ["layerwise_updates", "sltrain(rank=8)"], batch={"size": 8, "micro": m, "length": 48}
        )
        for m in (8, 2, 1)
    )
    for other in parts:
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value, rtol=1e-7, atol=1e-9)


def test_gradients_are_let_go_as_they_come():
    """At most one other gradient is there when one arrives: tied or not yet used."""
    stage = kit.stage(recipe(["layerwise_updates"], budget="1steps"))
    parameters = [p for _, p in stage.live.named_parameters()]
    most = []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(p.grad is not None for p in parameters))
        )
    kit.trained(stage)
    assert len(parameters) > 10 and len(most) >= len(parameters) and max(most) == 1
    assert all(p.grad is None for p in parameters)


def test_one_optimizer_a_parameter():
    stage = kit.stage(recipe(["layerwise_updates", "galore(rank=4)"]))
    held = [[p for g in o.param_groups for p in g["params"]] for o in stage.live.optimizers]
    assert all(len(some) == 1 for some in held)
    assert len(held) == len(list(stage.live.named_parameters()))


def test_a_plan_counts_the_largest_gradient_alone():
    """One short row, so that weights and gradients make the peak and not activations."""

    def planned(methods, size=1, micro=None):
        batch = {"size": size, "micro": micro, "length": 16, "pad_to": 8}
        shape = {"layers": 4, "width": 64}
        made = recipe(methods, model=shape, precision="float32", batch=batch)
        return plan(made, device="cpu").memory_bytes

    plain, inside = planned([]), planned(["layerwise_updates"])
    assert inside["gradients"] < plain["gradients"] / 4
    assert inside["peak"] < plain["peak"] - 0.5 * plain["gradients"]
    # Over several micro-batches gradients add up, and all of them are there.
    split = planned(["layerwise_updates"], size=2, micro=1)
    assert split["gradients"] == plain["gradients"]


@dataclass(frozen=True, kw_only=True)
class Gazing(OnStep):
    """Wants to look at a step's gradients."""

    card: ClassVar[Card] = Card(name="gazing", title="toy")

    def watch(self, live):
        class Gaze(Watcher):
            def after_backward(self, step, seen):
                pass

        return Gaze()


def test_clipping_is_refused_by_name():
    problem = "'layerwise_updates' updates inside backward and optimizer.clip = 1.0"
    with pytest.raises(Conflict, match=problem):
        refuse_inside([LayerwiseUpdates()], 1.0)
    with pytest.raises(Conflict, match="'layerwise_updates'"):
        refuse_inside([LayerwiseUpdates()], None, [{"clip": None}, {"clip": 0.5}])
    assert refuse_inside([LayerwiseUpdates()], None)


def test_a_watcher_of_gradients_is_refused_by_name():
    with pytest.raises(Conflict, match=r"'gazing' looks at .*'layerwise_updates' spends"):
        kit.stage(recipe([Gazing(), LayerwiseUpdates()]))
