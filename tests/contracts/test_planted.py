"""Every contract check catches a wrong implementation that is planted here on purpose."""

from __future__ import annotations

import pytest
import torch
from contracts import checks, rig, toys

from outlay.core.live import Live
from outlay.core.losses import Rows
from outlay.training import checkpoint, gradients, loop
from outlay.training.backend import OneDevice
from outlay.training.data import batch as batches
from outlay.training.data.pool import Pool


def focus_loss(model, batch):
    values = torch.nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
    weights = torch.softmax(values, 0)
    return (values * weights).sum() / weights.sum()


def ragged(methods, micro=16, **settings):
    return rig.language(methods, micro=max(2, micro), **settings)


def mean_of_means(monkeypatch):
    def reduced(losses, sums):
        value = 0.0
        for term in losses.terms.values():
            weight = term.weights.sum().clamp(min=1e-30)
            value = value + term.coefficient * term.row_sums().sum() / weight
        return value

    monkeypatch.setattr(gradients, "_reduced", reduced)
    return lambda: checks.check_splits(ragged, [], steps=2)


def weight_sums_of_a_micro_batch(monkeypatch):
    whole = gradients.Gradients.weight_sums
    monkeypatch.setattr(
        gradients.Gradients, "weight_sums", lambda self, found: whole(self, found[:1])
    )
    monkeypatch.setattr(gradients, "_check_sums", lambda *_: None)
    return lambda: checks.check_splits(ragged, [], steps=2)


def coupling_within_a_micro_batch(monkeypatch):
    def pulled(rows, pull, losses):
        factors = torch.softmax(rows.sums["task"].detach(), 0) * len(rows.sums["task"])
        return rows.scaled(factors).loss()

    monkeypatch.setattr(gradients, "_pulled", pulled)
    return lambda: checks.check_splits(rig.make, [toys.Focus()], steps=2)


def surrogate_without_chain_rule(monkeypatch):
    """Coupled factors are taken as constants: right where they are, wrong in their gradient."""
    scaled = Rows.scaled
    monkeypatch.setattr(
        Rows, "scaled", lambda self, factors, term=None: scaled(self, factors.detach(), term)
    )
    return lambda: checks.check_gradient_of_whole_step(rig.make, [toys.Focus()], focus_loss)


def outputs_carry_no_gradient(monkeypatch):
    real = gradients._gradients_of
    monkeypatch.setattr(gradients, "_gradients_of", lambda leaf: {**real(leaf), "outputs": {}})
    return lambda: checks.check_splits(rig.make, [toys.Neighbour()], steps=2)


def penalties_of_every_micro_batch(monkeypatch):
    real = gradients._reduced
    state = {}
    forward = gradients.Gradients._forward

    def remember(self, batch, step):
        state["live"], state["step"] = self.live, step
        return forward(self, batch, step)

    def reduced(losses, sums):
        live = state["live"]
        extra = sum(live.objective.penalties(live.model, state["step"]).values())
        return real(losses, sums) + extra

    monkeypatch.setattr(gradients.Gradients, "_forward", remember)
    monkeypatch.setattr(gradients, "_reduced", reduced)
    return lambda: checks.check_splits(rig.make, [toys.Anchor(strength=0.5)], steps=2)


def dropout_is_not_replayed(monkeypatch):
    monkeypatch.setattr(OneDevice, "seed", lambda self, value: None)
    return checks.check_dropout_replay


def dropout_is_not_seeded(monkeypatch):
    monkeypatch.setattr(OneDevice, "seed", lambda self, value: None)

    def make():
        return rig.make(model=toys.filled(toys.Net(dropout=0.4)), steps=3, micro=4)

    return lambda: checks.check_resume(make)


def mask_on_the_gradient_alone(monkeypatch):
    monkeypatch.setattr(Live, "after_update", lambda self, name, parameter: None)
    return lambda: checks.check_mask_holds("hard")


def held_entries_become_zero(monkeypatch):
    real = Live.after_update

    def forget(self, name, parameter):
        if name in self.masks:
            self.masks[name].held = torch.zeros_like(parameter)
        real(self, name, parameter)

    monkeypatch.setattr(Live, "after_update", forget)
    return lambda: checks.check_mask_holds("held")


def moments_of_masked_entries_live_on(monkeypatch):
    def only_value(self, name, parameter):
        mask = self.masks.get(name)
        if mask is not None:
            with torch.no_grad():
                parameter.mul_(mask.keep)

    monkeypatch.setattr(Live, "after_update", only_value)
    monkeypatch.setattr(Live, "before_update", lambda *_: None)
    return lambda: checks.check_mask_holds("hard")


def state_does_not_follow(monkeypatch):
    real = Live.replace
    monkeypatch.setattr(
        Live, "replace", lambda self, name, new, state="reset": real(self, name, new, "reset")
    )
    return checks.check_state_follows


def the_optimizer_keeps_the_old_parameter(monkeypatch):
    def replace(self, name, new, state="reset"):
        old = self.parameter(name)
        fresh = torch.nn.Parameter(new.clone())
        for module, key in self.holders(old):
            module._parameters[key] = fresh
        return fresh

    monkeypatch.setattr(Live, "replace", replace)
    return checks.check_state_follows


def prefetched_batches_are_kept(monkeypatch):
    real = batches.Drawer._make

    def stale(self, step):
        drawn = real(self, step)
        drawn.version = _Any()
        return drawn

    monkeypatch.setattr(batches.Drawer, "_make", stale)
    return checks.check_prefetch


class _Any:
    def __eq__(self, other):
        return True

    __hash__ = None  # type: ignore[assignment]


def prefetched_positions_are_saved(monkeypatch):
    def consumed(self, step):
        drawn = self._make(step) if self._worker is None else self._from_ahead(step)
        self.consumed, self.counts = self.pool.cursor(), drawn.counts
        return drawn.batches

    monkeypatch.setattr(batches.Drawer, "draw", consumed)
    return lambda: checks.check_resume(lambda: rig.make(steps=4, prefetch=3))


def visits_start_again_with_weights(monkeypatch):
    monkeypatch.setattr(Pool, "_visits_before_weights", lambda self, index: 0)
    return checks.check_visits


def corruption_by_position(monkeypatch):
    count = iter(range(10**9))
    monkeypatch.setattr(
        batches.Drawer,
        "_stream",
        lambda self, example, name: torch.Generator().manual_seed(next(count)),
    )
    return checks.check_corruption_is_per_example


def updates_before_the_last_micro_batch(monkeypatch):
    real = loop.Loop._rewire

    def eager(self):
        real(self)
        for hook in self._hooks:
            hook.remove()
        if self.inside:
            for name, parameter, optimizer in self._homes:
                self._hooks.append(
                    parameter.register_post_accumulate_grad_hook(
                        lambda p, n=name, o=optimizer: self._update_one(n, p, o)
                    )
                )

    monkeypatch.setattr(loop.Loop, "_rewire", eager)
    return checks.check_inside_equals_ordinary


def masks_are_ignored_inside(monkeypatch):
    real = loop.Loop._update_one

    def bare(self, name, parameter, optimizer):
        masks, self.live.masks = self.live.masks, {}
        real(self, name, parameter, optimizer)
        self.live.masks = masks

    monkeypatch.setattr(loop.Loop, "_update_one", bare)
    methods = [toys.Operate(script=((1, "held"),))]
    return lambda: checks.check_inside_equals_ordinary(methods)


def moving_averages_are_not_saved(monkeypatch):
    monkeypatch.setattr(
        checkpoint,
        "_written",
        lambda marks, key, tensor: not isinstance(tensor, torch.nn.Parameter),
    )
    return lambda: checks.check_resume(lambda: rig.make([toys.MeanTeacher()], steps=3))


def moments_are_not_saved(monkeypatch):
    monkeypatch.setattr(checkpoint, "_load_optimizer", lambda *_: None)
    return lambda: checks.check_resume(lambda: rig.make(steps=3))


def buffers_are_trusted_by_version(monkeypatch):
    monkeypatch.setattr(checkpoint, "_small_digest", lambda tensor: "")
    model = toys.filled(toys.Net(norm=True))
    return lambda: checks.check_resume(lambda: rig.make(model=model, steps=3))


def masks_are_not_rebuilt(monkeypatch):
    real = checkpoint.restore

    def forget(live, state):
        real(live, state)
        live.masks = {}

    monkeypatch.setattr(checkpoint, "restore", forget)
    script = ((0, "hard"),)
    return lambda: checks.check_resume(lambda: rig.make([toys.Operate(script=script)], steps=3))


PLANTED = [
    mean_of_means, weight_sums_of_a_micro_batch, coupling_within_a_micro_batch,
    surrogate_without_chain_rule, outputs_carry_no_gradient, penalties_of_every_micro_batch,
    dropout_is_not_replayed, dropout_is_not_seeded, mask_on_the_gradient_alone,
    held_entries_become_zero, moments_of_masked_entries_live_on, state_does_not_follow,
    the_optimizer_keeps_the_old_parameter, prefetched_batches_are_kept,
    prefetched_positions_are_saved, visits_start_again_with_weights, corruption_by_position,
    updates_before_the_last_micro_batch, masks_are_ignored_inside,
    moving_averages_are_not_saved, moments_are_not_saved, buffers_are_trusted_by_version,
    masks_are_not_rebuilt,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted(plant, monkeypatch):
    check = plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
    monkeypatch.undo()
    check()
