"""EWC: the Fisher by hand, the sum of quadratics, and what a run does with it."""

from __future__ import annotations

import pytest
import torch
from conformance import kit
from torch import nn

from outlay import EWC
from outlay.core import registry
from outlay.core.errors import ConfigError, Conflict
from outlay.core.losses import Losses, Objective, Term
from outlay.core.method import Step, Watcher
from outlay.methods.objectives.ewc import nats, sampled_nats
from outlay.nn.anchoring import Anchored, add_quadratic

STEP = Step(0, 0.0, 0)


class Nothing(Objective):
    """An objective that adds nothing."""


def losses_of(model, x, target) -> Losses:
    logits = model(x)
    term = Term(nn.functional.cross_entropy(logits, target, reduction="none"), torch.ones(len(x)))
    return Losses({"class": term}, "class", {"logits": logits, "targets": target}, term)


def mean_square(model, x, targets, value_of, repeats=1):
    total = torch.zeros_like(model.weight)
    for _ in range(repeats):
        for row, target in zip(x, targets):
            value = value_of(losses_of(model, row[None], target[None]))
            (gradient,) = torch.autograd.grad(value, [model.weight])
            total += gradient.square() / (len(x) * repeats)
    return total


def logistic():
    torch.manual_seed(3)
    model = nn.Linear(3, 2, bias=False)
    x, target = torch.randn(12, 3), torch.randint(0, 2, (12,))
    return model, x, target, model(x).softmax(1)[:, 1].detach()


# ---- known answers -------------------------------------------------------------------------------


def test_the_sampled_fisher_of_logistic_regression():
    """(1/N) sum p (1 - p) x^2, for the logit of either class."""
    model, x, target, p = logistic()
    generator = torch.Generator().manual_seed(0)
    found = mean_square(model, x, target, lambda each: sampled_nats(each, generator), 300)
    exact = ((p * (1 - p))[:, None] * x.square()).mean(0)
    torch.testing.assert_close(found, exact.expand(2, 3), rtol=0.06, atol=1e-3)


def test_the_empirical_fisher_takes_the_examples_own_labels():
    model, x, target, p = logistic()
    found = mean_square(model, x, target, nats)
    exact = ((p - target).square()[:, None] * x.square()).mean(0)
    torch.testing.assert_close(found, exact.expand(2, 3), rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(nats(losses_of(model, x, target)), [model.weight])
    assert (gradient.square() < found).all(), "the square of a batch gradient is too small"


def test_a_sum_of_quadratics_is_one_and_a_constant():
    model = nn.Linear(4, 3).double()
    anchored = Anchored(Nothing(), EWC(), 7.0)
    generator = torch.Generator().manual_seed(1)

    def like(p, positive=False):
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        return drawn.relu() if positive else drawn

    parts = []
    for _ in range(3):
        values = {n: like(p) for n, p in model.named_parameters()}
        weights = {n: like(p, positive=True) for n, p in model.named_parameters()}
        parts.append((values, weights))
        add_quadratic(anchored, dict(values), dict(weights))
    (penalty,) = anchored.penalties(model, STEP).values()
    plain = sum(
        3.5 * (weights[n] * (p - values[n]).square()).sum()
        for values, weights in parts
        for n, p in model.named_parameters()
    )
    torch.testing.assert_close(penalty, plain, rtol=1e-12, atol=0)
    for found, wanted in zip(
        torch.autograd.grad(penalty, list(model.parameters())),
        torch.autograd.grad(plain, list(model.parameters())),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_a_task_without_classes_has_no_sampled_fisher():
    term = Term(torch.ones(2), torch.ones(2))
    real = Losses({"t": term}, "t", {"logits": torch.ones(2), "targets": torch.ones(2)}, term)
    with pytest.raises(Conflict, match="this task has none"):
        sampled_nats(real, torch.Generator())


# ---- in a run ------------------------------------------------------------------------------------


def trained(spec, budget="6steps", **more):
    stage = kit.stage(
        kit.recipe(methods=[spec], tasks=True, budget=budget, precision="float64", **more)
    )
    return kit.trained(stage), stage.live.objective


def test_the_fisher_of_a_run_is_that_of_single_examples():
    spec = "ewc(samples=4, fisher='empirical')"
    recipe = kit.recipe(methods=[spec], tasks=True, budget="6steps", precision="float64")
    stage = kit.stage(recipe)
    at_the_change = {}

    class Look(Watcher):
        def after_update(self, step: Step) -> None:
            if step.index == 1:
                at_the_change.update(kit.weights(stage))

    stage.loop.watchers = [*stage.loop.watchers, Look()]
    kit.trained(stage)
    anchored = stage.live.objective
    assert all(torch.equal(anchored.anchors[n], v) for n, v in at_the_change.items())
    with torch.no_grad():
        for name, parameter in stage.live.named_parameters():
            parameter.copy_(at_the_change[name])
    pool = stage.live.pool
    seen = [pool.examples[i] for i in pool.seen_of(0)]
    order = torch.randperm(len(seen), generator=stage.context.generator("ewc 0"))[:4].tolist()
    expected = {n: torch.zeros_like(p) for n, p in stage.live.named_parameters()}
    stage.model.eval()
    for index in order:
        (batch,) = stage.batches_of([seen[index]])
        stage.model.zero_grad()
        nats(stage.plain(stage.model, batch, STEP)).backward()
        for name, parameter in stage.live.named_parameters():
            if parameter.grad is not None:
                expected[name] += parameter.grad.square() / 4
    for name, value in expected.items():
        torch.testing.assert_close(anchored.importance[name], value, rtol=1e-9, atol=1e-18)
    assert stage.context.meter.charges["ewc"]["passes"] == 4


def test_a_strong_pull_keeps_the_weights_that_matter():
    free, _ = trained("l2_anchor(strength=1e-12)", budget="20steps")
    held, anchored = trained("ewc(strength=1e7, fisher='empirical')", budget="20steps")

    def moved(stage):
        return sum(
            float((anchored.importance[n] * (value - anchored.anchors[n]).square()).sum())
            for n, value in kit.weights(stage).items()
        )

    assert moved(held) < 0.1 * moved(free)


def test_online_decays_and_moves_the_anchor():
    data = kit.recipe(tasks=True).data.model_dump()
    path = data["tasks"][0]["path"]
    data["tasks"] = [{"path": path, "name": name} for name in ("one", "two", "three")]
    recipe = kit.recipe(
        methods=["ewc(samples=3, online=True, decay=0.25)"], data=data, budget="6steps"
    )
    stage = kit.stage(recipe)
    seen = []

    class Look(Watcher):
        def before_forward(self, step: Step, batches) -> None:
            anchored = stage.live.objective
            seen.append(dict(anchored.importance) and {
                "importance": {n: v.clone() for n, v in anchored.importance.items()},
                "moved": max(float((v - anchored.anchors[n]).abs().max())
                             for n, v in kit.weights(stage).items()),
            })  # fmt: skip

    stage.loop.watchers = [*stage.loop.watchers, Look()]
    kit.trained(stage)
    assert not seen[0] and not seen[1] and stage.live.objective.constant == 0
    assert [seen[i]["moved"] == 0 for i in (2, 3, 4, 5)] == [True, False, True, False]
    first, second = seen[2]["importance"], seen[4]["importance"]
    assert all((second[n] >= 0.25 * first[n]).all() for n in first)
    assert any((second[n] > 0.25 * first[n]).any() for n in first)


def test_settings_and_runs_without_tasks():
    assert registry.build("ewc(strength=30)") == EWC(strength=30.0)
    with pytest.raises(ConfigError, match=r"ewc\.decay = 0\.5"):
        registry.build("ewc(decay=0.5)")
    with pytest.raises(ConfigError, match=r"ewc\.samples = 0"):
        registry.build("ewc(samples=0)")
    with pytest.raises(Conflict, match="'ewc' follows the tasks"):
        kit.stage(kit.recipe(methods=["ewc"], tasks=False))
