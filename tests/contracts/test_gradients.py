"""One truth for a step: splits, couplings, teachers, penalties and what they cost."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contracts import checks, rig, toys
from torch import nn
from torch.nn import functional as F

from outlay.core.errors import ConfigError, Conflict, NonFinite
from outlay.core.losses import Losses, Term
from outlay.core.method import Step

STACKS = {
    "plain": [],
    "reweighted": [toys.Reweight()],
    "coupled": [toys.Focus()],
    "neighbour": [toys.Neighbour()],
    "coupled under a reweighter": [toys.Focus(), toys.Reweight()],
    "distilled": [toys.Distil()],
    "penalized": [toys.Anchor()],
    "stacked": [
        toys.Reweight(), toys.Focus(), toys.Neighbour(), toys.Distil(), toys.Anchor(),
        toys.MeanTeacher(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_splits_change_nothing(name):
    checks.check_splits(rig.make, STACKS[name], steps=4)


@pytest.mark.parametrize("methods", [
    [], [toys.Focus()], [toys.Pack()], [toys.Pack(), toys.Focus(), toys.Corrupt()],
], ids=["ragged", "coupled", "packed", "packed and coupled"])  # fmt: skip
def test_splits_of_ragged_rows_change_nothing(methods):
    def make(more, micro=16, **settings):
        # Packing needs two examples in a micro-batch.
        return rig.language(more, micro=max(2, micro), **settings)

    checks.check_splits(make, methods, steps=4)


def test_focus_is_the_gradient_of_the_whole_step():
    def loss(model, batch):
        values = F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
        weights = torch.softmax(values, 0)
        return (values * weights).sum() / weights.sum()

    checks.check_gradient_of_whole_step(rig.make, [toys.Focus()], loss)


def test_neighbour_is_the_gradient_of_the_whole_step():
    def loss(model, batch):
        logits = model(batch["x"])
        found = torch.tanh(logits)
        apart = (found[:, None] - found[None]).square().sum(-1)
        apart = apart + torch.eye(len(found), dtype=found.dtype) * 1e9
        return F.cross_entropy(logits, batch["labels"]) + 0.5 * apart.min(1).values.mean()

    checks.check_gradient_of_whole_step(rig.make, [toys.Neighbour()], loss)


def test_packed_rows_train_as_unpacked_ones():
    packed = rig.trained(rig.language([toys.Pack(), toys.Note()], micro=4, steps=4))
    plain = rig.trained(rig.language([toys.Note()], steps=4))
    checks.same(checks.values(packed), checks.values(plain), 1e-9, "weights")
    for a, b in zip(rig.notes(packed).seen, rig.notes(plain).seen):
        assert a.ids == b.ids and len(a.values) == 16
        torch.testing.assert_close(a.values, b.values)
    assert packed.context.meter.totals["tokens"] == plain.context.meter.totals["tokens"]
    assert packed.context.meter.totals["examples"] == 64


def test_a_term_that_is_not_one_a_position_cannot_be_packed():
    class Rows(toys.Plain):
        def forward(self, model, batch, step):
            logits = model(input_ids=batch["input_ids"], mixing=batch["mixing"])
            values = logits.square().mean((1, 2))
            return Losses({"task": Term(values, torch.ones_like(values))}, "task")

        def weight_sums(self, batch):
            return {"task": float(len(batch["input_ids"]))}

    run = rig.make(
        [toys.Pack()], model=toys.filled(toys.Language()), rows=toys.sentences(), objective=Rows
    )
    with pytest.raises(Conflict, match="packed"):
        rig.trained(run)


def test_everything_masked_gives_zero_and_moves_nothing():
    run = rig.language([toys.Note()], rows=toys.sentences(masked=True), micro=4,
                       optimizer={"weight_decay": 0.0})  # fmt: skip
    before = checks.values(run)
    rig.trained(run)
    checks.same(before, checks.values(run), 0.0, "weights")
    assert all(seen.loss == 0.0 and not seen.values.any() for seen in rig.notes(run).seen)


def test_one_fully_masked_micro_batch_changes_nothing():
    rows = toys.sentences(16)
    for row in rows[:4]:
        row["labels"] = [-100] * len(row["labels"])
    checks.check_splits(lambda m, **more: rig.language(m, rows=rows, **more))


def test_a_term_without_weight_gives_zero():
    class Empty(toys.Plain):
        def forward(self, model, batch, step):
            losses = super().forward(model, batch, step)
            nothing = losses.outputs["logits"][:, :0]
            return losses.with_term("empty", Term(nothing, torch.zeros_like(nothing)))

        def weight_sums(self, batch):
            return {**super().weight_sums(batch), "empty": 0.0}

    for methods in ([], [toys.Focus()]):
        plain = rig.trained(rig.make(methods, micro=4))
        run = rig.trained(rig.make(methods, micro=4, objective=Empty))
        checks.same(checks.values(plain), checks.values(run), 0.0, "weights")


def test_weight_sums_are_held_to_their_promise():
    class Liar(toys.Plain):
        def weight_sums(self, batch):
            return {"task": 1.0}

    with pytest.raises(AssertionError, match="promised"):
        rig.trained(rig.make(objective=Liar))


# ---- what coupling costs -------------------------------------------------------------------------


def passes(methods, micro):
    calls = {"train": 0, "pass": 0}
    run = rig.make([*methods], micro=micro, steps=1)
    count = lambda *_: calls.__setitem__(run.live.phase, calls[run.live.phase] + 1)  # noqa: E731
    run.model.register_forward_hook(count)
    rig.trained(run)
    return calls, run.context.meter


def test_stacked_couplings_cost_two_passes():
    for methods in ([toys.Focus()], [toys.Focus(), toys.Neighbour(), toys.Reweight()]):
        calls, meter = passes(methods, 4)
        assert calls == {"train": 4, "pass": 4}
        assert meter.charges["coupling"]["flops"] > 0
        forward = meter.charges["coupling"]["flops"]
        own = meter.totals["flops"] - forward
        assert 2 * forward <= own <= 3 * forward


def test_one_micro_batch_couples_in_one_pass():
    calls, meter = passes([toys.Focus(), toys.Neighbour()], None)
    assert calls == {"train": 1, "pass": 0} and "coupling" not in meter.charges


def test_teacher_is_charged_by_name_and_looked_up():
    run = rig.trained(rig.make([toys.Distil()], micro=4, steps=3))
    plain = rig.trained(rig.make([], micro=4, steps=3))
    forward = 2 * 16 * (6 * 8 + 8 * 8 + 8 * 3) * 3
    assert run.context.meter.charges["teacher"]["flops"] == forward
    whole = run.context.meter.totals["flops"]
    assert whole == plain.context.meter.totals["flops"] + forward


def test_term_gradients_of_a_coupled_step():
    run = rig.make([toys.Neighbour(), toys.Focus(), toys.Note()], micro=4, steps=1,
                   optimizer={"clip": None})  # fmt: skip
    found = {}

    class Ask(toys.Notes):
        def before_forward(self, step, batches):
            found.update(run.live.term_gradients(batches, ["task", "near"]))

    run.loop.watchers = [Ask(run.live), *run.loop.watchers]
    rig.trained(run)
    whole = {n: found["task"][n] + 0.5 * found["near"][n] for n in found["task"]}
    checks.same(rig.notes(run).gradients[0], whole, 1e-12, "gradient")
    charge = run.context.meter.charges["term_gradients"]
    assert charge["flops"] > 0 and charge["passes"] == 4


def test_term_gradients_name_unknown_terms():
    run = rig.make([toys.Note()], steps=1)

    class Ask(toys.Notes):
        def before_forward(self, step, batches):
            self.live.term_gradients(batches, ["tusk"])

    run.loop.watchers = [Ask(run.live)]
    with pytest.raises(ConfigError, match="did you mean 'task'"):
        rig.trained(run)
    with pytest.raises(Conflict, match="outside a run"):
        run.live.term_gradients([])


def test_couple_names_a_missing_output():
    class Bare(toys.Plain):
        def forward(self, model, batch, step):
            losses = super().forward(model, batch, step)
            return Losses(losses.terms, "task", {})

    with pytest.raises(Conflict, match="'features'"):
        rig.trained(rig.make([toys.Neighbour()], objective=Bare, micro=4))


# ---- dropout, statistics, generators -------------------------------------------------------------


def test_dropout_is_replayed():
    checks.check_dropout_replay()


def test_statistics_are_untouched_by_passes_beside_the_step():
    """Running statistics count each micro-batch once, whoever else looks."""
    found = []
    for methods in ([], [toys.Focus()]):
        run = rig.make([*methods], model=toys.filled(toys.Net(norm=True)), micro=4, steps=2,
                       optimizer={"lr": 1e-9})  # fmt: skip

        class Ask(toys.Notes):
            def before_forward(self, step, batches):
                self.live.term_gradients(batches)

        run.loop.watchers = [Ask(run.live)] if methods else []
        rig.trained(run)
        found.append(run.model.body[1])
    assert int(found[0].num_batches_tracked) == int(found[1].num_batches_tracked) == 8
    torch.testing.assert_close(found[0].running_mean, found[1].running_mean, rtol=1e-6, atol=1e-8)


OUTSIDE = """
import random, sys, numpy, torch
sys.path.insert(0, sys.argv[1])
from contracts import rig, toys
model = toys.filled(toys.Net(dropout=0.3))
words = toys.filled(toys.Language())
torch.manual_seed(5)
def state():
    plain = numpy.random.get_state()[1].tolist()
    return torch.get_rng_state().tolist(), random.getstate(), plain
before = state()
methods = [toys.Insert(), toys.Focus(), toys.Mix()]
rig.trained(rig.make(methods, model=model, micro=4, prefetch=2))
methods = [toys.Shortest(), toys.Corrupt(), toys.Pack()]
more = {"rows": toys.sentences(), "objective": rig.CausalObjective}
rig.trained(rig.make(methods, model=words, micro=4, **more))
print("untouched" if state() == before else "touched")
"""


def test_the_callers_generators_are_untouched():
    """In a process of its own: the type checker of these tests draws random numbers itself."""
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, tests], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "untouched"


def test_what_methods_draw_when_they_adapt_comes_from_the_seed():
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(checks.values(rig.make([toys.Insert()])))
    checks.same(found[0], found[1], 0.0, "weights")
    other = checks.values(rig.make([toys.Insert()], seed=1))
    assert not torch.equal(other["body.1.weight"], found[0]["body.1.weight"])


# ---- teachers ------------------------------------------------------------------------------------


def test_a_loaded_teacher_stays_still_and_out_of_the_checkpoint(tmp_path):
    model = toys.filled(toys.Net(dropout=0.5, norm=True))
    run = rig.make([toys.Distil(), toys.Note()], model=model, steps=2)
    teacher = run.objective.teacher
    before = copy.deepcopy(teacher.state_dict())
    keeper = rig.keeper_of(run, tmp_path)
    rig.trained(run)
    assert not any(module.training for module in teacher.modules())
    assert all(not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    state = rig.checkpoint.capture(run.live, run.loop.marks)
    assert not any("teacher" in name for name in (*state["parameters"], *state["buffers"]))
    assert keeper.recipe is run.recipe


def test_a_mean_teacher_is_exported_and_follows_surgery():
    script = ((1, "widen"), (2, "split"))
    run = rig.trained(rig.make([toys.MeanTeacher(), toys.Operate(script=script)], steps=5))
    teacher = run.exported()
    assert teacher is run.objective.teacher and teacher is not run.model
    assert isinstance(teacher.body[4], toys.Factors)
    assert teacher.body[0].weight.shape == run.model.body[0].weight.shape == (10, 6)
    assert not any(p.requires_grad for p in teacher.parameters())


# ---- numbers that go wrong -----------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_update():
    rows = toys.vectors()
    rows[7] = {**rows[7], "x": rows[7]["x"] * float("nan")}
    for methods in ([], [toys.Focus()], [toys.Inside()]):
        run = rig.make(methods, rows=rows, steps=9, micro=4, optimizer={"clip": None})
        seen = []

        def look(step, run=run, seen=seen):
            seen.append(checks.values(run))
            return False

        run.loop.after_step = look
        with pytest.raises(NonFinite, match=r"step \d+: loss nan; first seen in body.0; rows"):
            rig.trained(run)
        last = seen[-1] if seen else checks.values(rig.make(methods, rows=rows))
        checks.same(last, checks.values(run), 0.0, "weights")


def test_seen_holds_the_term_before_anyone_shaped_it():
    plain = rig.trained(rig.make([toys.Note()], steps=1))
    shaped = rig.trained(rig.make([toys.Reweight(), toys.Focus(), toys.Note()], steps=1, micro=4))
    a, b = rig.notes(plain).seen[0], rig.notes(shaped).seen[0]
    torch.testing.assert_close(a.values, b.values)
    torch.testing.assert_close(a.weights, b.weights)
    assert abs(a.loss - b.loss) > 1e-4


def test_generators_of_a_step():
    step = Step(3, 0.1, 7)
    first = torch.rand(3, generator=step.generator("a"))
    assert torch.equal(first, torch.rand(3, generator=step.generator("a")))
    assert not torch.equal(first, torch.rand(3, generator=step.generator("b")))
    assert isinstance(toys.Net(), nn.Module)
