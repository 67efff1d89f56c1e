"""Optimizers, schedules, clipping, groups and updates inside backward."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from contracts import checks, rig, toys

from outlay.core.card import Card
from outlay.core.errors import ConfigError, Conflict, NoEffect
from outlay.core.method import Context, OnObjective, OnStep, ParameterGroup, Step, Watcher
from outlay.training.optimizer import schedule_of
from outlay.training.specs import ScheduleSpec


@pytest.mark.parametrize("methods", [
    [], [toys.Focus(), toys.Anchor()], [toys.Operate(script=((1, "held"), (2, "freeze")))],
], ids=["plain", "coupled and penalized", "masked and frozen"])  # fmt: skip
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_updates_inside_backward_end_where_ordinary_ones_do(methods, optimizer):
    checks.check_inside_equals_ordinary(methods, optimizer)


def test_tied_weights_are_updated_inside_once():
    setting = {"clip": None}
    plain = rig.trained(rig.language([], micro=4, optimizer=setting))
    inside = rig.trained(rig.language([toys.Inside()], micro=4, optimizer=setting))
    checks.same(checks.values(plain), checks.values(inside), 1e-12, "weights")
    assert len(inside.live.optimizers) == 3


def test_parameters_of_one_optimizer_are_updated_one_at_a_time():
    """After an edit two new parameters share an optimizer; neither may move early."""
    script = ((0, "split"),)
    setting = {"clip": None}
    plain = rig.trained(
        rig.make([toys.Operate(script=script)], micro=4, steps=5, optimizer=setting)
    )
    inside = rig.trained(
        rig.make([toys.Inside(), toys.Operate(script=script)], micro=4, steps=5, optimizer=setting)
    )
    checks.same(checks.values(plain), checks.values(inside), 1e-12, "weights")


def test_parameters_that_meet_only_earlier_micro_batches_are_swept():
    class Gate(toys.Net):
        def forward(self, x):
            out = super().forward(x)
            return out if bool(x[0, 0] > 0) else out.detach() + self.head.bias

    found = []
    for methods in ([], [toys.Inside()]):
        run = rig.make(methods, model=toys.filled(Gate()), micro=1, steps=4,
                       optimizer={"clip": None})  # fmt: skip
        found.append(checks.values(rig.trained(run)))
    checks.same(*found, 1e-12, "weights")


def test_clipping_and_whole_gradients_refuse_updates_inside_by_name():
    with pytest.raises(Conflict, match=r"'inside' updates inside backward and optimizer\.clip"):
        rig.make([toys.Inside()])

    with pytest.raises(Conflict, match="'note' looks at a step's gradients and 'inside'"):
        rig.make([toys.Inside(), toys.Note()], optimizer={"clip": None})

    @dataclass(frozen=True, kw_only=True)
    class Whole(toys.Anchor):
        card: ClassVar[Card] = Card(name="whole", title="toy", claims=("gradient.whole",))

    with pytest.raises(Conflict, match=r"'inside' holds 'update\.inside'.*'whole'"):
        rig.make([toys.Inside(), Whole()], optimizer={"clip": None})

    @dataclass(frozen=True, kw_only=True)
    class Clipped(toys.Anchor):
        card: ClassVar[Card] = Card(name="clipped", title="toy")

        def groups(self, model, objective):
            return [ParameterGroup(("head.weight",), clip=0.1)]

    with pytest.raises(Conflict, match=r"clip = 0\.1"):
        rig.make([toys.Inside(), Clipped()], optimizer={"clip": None})


def test_a_foreign_optimizer_gets_names_and_rates():
    run = rig.make([toys.Sign(), toys.Rewarm(at=0.5)], steps=4, optimizer={"lr": 0.01})
    rates = []
    run.loop.on_step = lambda step, values: rates.append(values["lr"])
    before = checks.values(run)
    rig.trained(run)
    assert isinstance(run.live.optimizers[0], toys.SignMomentum)
    assert run.live.optimizers[0].param_groups[0]["names"]
    assert rates[2] < 0.11 * rates[1], "the second half is re-warmed"
    moved = [float((v - before[n]).abs().max()) for n, v in checks.values(run).items()]
    assert max(moved) <= sum(rates) + 1e-12


def test_two_optimizers_and_ones_that_lose_parameters_are_refused():
    class Other(toys.Sign):
        card = Card(name="other", title="toy")

    with pytest.raises(Conflict, match=r"'sign'.*'other'"):
        rig.make([toys.Sign(), Other()])

    class Lossy(toys.Sign):
        def build(self, groups, settings, context):
            return torch.optim.SGD([groups[0]["params"][0]], lr=0.1)

    with pytest.raises(Conflict, match="leaves out"):
        rig.make([Lossy()])


def test_schedules():
    spec = ScheduleSpec(name="linear", warmup=0.2, floor=0.1)
    factor = schedule_of(spec, [], Context())
    at = [factor(Step(i, i / 10, 0, total=10)) for i in range(11)]
    assert at[:3] == [0.5, 1.0, 1.0] and at[10] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(at[1:]))


@dataclass(frozen=True, kw_only=True)
class Head(OnStep):
    """A group of its own for the head."""

    card: ClassVar[Card] = Card(name="head", title="toy")
    factor: float = 0.0

    def groups(self, model, objective):
        return [ParameterGroup(("head.weight",), lr_factor=self.factor, weight_decay=0.0)]

    def watch(self, live):
        return Watcher()


def test_groups_have_their_own_rate():
    run = rig.make([Head()], steps=2)
    before = checks.values(run)
    rig.trained(run)
    after = checks.values(run)
    assert torch.equal(before["head.weight"], after["head.weight"])
    assert not torch.equal(before["head.bias"], after["head.bias"])

    class Again(Head):
        card = Card(name="again", title="toy")

    with pytest.raises(Conflict, match=r"'head' and 'again' both group 'head\.weight'"):
        rig.make([Head(), Again()])

    class Missing(Head):
        def groups(self, model, objective):
            return [ParameterGroup(("heed.weight",))]

    with pytest.raises(ConfigError, match="does not train"):
        rig.make([Missing()])


def test_the_norm_is_that_before_clipping():
    runs = [rig.make([toys.Note()], steps=1, optimizer={"clip": clip}) for clip in (None, 1e-2)]
    logged = []
    for run in runs:
        run.loop.on_step = lambda step, values: logged.append(values["gradient_norm"])
        rig.trained(run)
    assert logged[0] == logged[1] > 1e-2
    clipped = rig.notes(runs[1]).gradients[0]
    norm = sum(float(g.square().sum()) for g in clipped.values()) ** 0.5
    assert norm == pytest.approx(1e-2, rel=1e-4)


@dataclass(frozen=True, kw_only=True)
class Learned(OnObjective):
    """An objective with a parameter of its own."""

    card: ClassVar[Card] = Card(name="learned", title="toy")

    def shape(self, objective, model, context):
        class Tempered(toys.Shaped):
            def __init__(self, inner):
                super().__init__(inner)
                self.scale = torch.nn.Parameter(torch.ones(()))

            def forward(self, model, batch, step):
                losses = self.inner(model, batch, step)
                term = losses.terms["task"]
                return losses.with_term("task", toys.Term(term.values * self.scale, term.weights))

        return Tempered(objective)


def test_parameters_of_the_objective_join_the_optimizer():
    run = rig.trained(rig.make([Learned()], micro=4))
    assert float(run.objective.scale.detach()) != 1.0
    assert "objective.scale" in run.live.touched
    checks.check_resume(lambda: rig.make([Learned()], micro=4))


def test_nothing_to_train_is_refused():
    model = toys.filled(toys.Net()).requires_grad_(False)
    with pytest.raises(NoEffect, match="nothing in this recipe trains"):
        rig.make(model=model)
