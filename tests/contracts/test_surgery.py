"""Parameters replaced, split, masked, frozen and thawed while the run goes on, and resumed."""

from __future__ import annotations

import pytest
import torch
from contracts import checks, rig, toys
from torch import nn

from outlay.core.errors import CheckpointError, ConfigError, Conflict
from outlay.core.method import Watcher
from outlay.training import checkpoint

SCRIPTS = {
    "replaced": ((0, "keep"), (1, "reset"), (2, "widen")),
    "masked": ((0, "soft"), (1, "hard"), (2, "held"), (4, "lift")),
    "frozen": ((0, "freeze"), (1, "drop"), (3, "thaw")),
    "split": ((1, "split"), (2, "freeze"), (3, "thaw")),
    "bias taken away": ((1, "wrap"), (2, "keep")),
    "tied": ((1, "tie"), (3, "reset")),
    "everything": (
        (0, "held"), (1, "widen"), (2, "split"), (3, "freeze"), (4, "thaw"), (5, "tie"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_resume_after_surgery_gives_the_same_bits(name, precision):
    def make():
        model = toys.filled(toys.Net(dropout=0.2))
        methods = [toys.MeanTeacher()] if name in ("replaced", "split", "frozen") else []
        methods += [toys.Operate(script=SCRIPTS[name])]
        return rig.make(methods, model=model, steps=7, micro=4, precision=precision)

    checks.check_resume(make)


METHODS = {
    "coupled": [toys.Focus(), toys.Distil(), toys.Anchor()],
    "mean teacher": [toys.MeanTeacher()],
    "mixing": [toys.Mix()],
    "foreign optimizer": [toys.Sign(), toys.Rewarm()],
    "adapter": [toys.Scale()],
}


@pytest.mark.parametrize("name", METHODS)
def test_resume_of_methods_gives_the_same_bits(name):
    def make():
        model = toys.filled(toys.Net(dropout=0.3, norm=True))
        return rig.make(
            METHODS[name], model=model, steps=5, micro=4, precision="float32", prefetch=2
        )

    checks.check_resume(make)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_resume_with_tied_weights_and_packing(precision):
    def make():
        return rig.language(
            [toys.Corrupt(), toys.Pack()], dropout=0.3, micro=4, steps=5, precision=precision
        )

    checks.check_resume(make)


def test_resume_of_updates_inside_backward():
    script = ((0, "held"), (1, "split"), (3, "freeze"))
    methods = [toys.Inside(), toys.Operate(script=script)]
    checks.check_resume(lambda: rig.make(methods, micro=4, steps=5, optimizer={"clip": None}))


# ---- state, masks, names -------------------------------------------------------------------------


def test_optimizer_state_follows():
    checks.check_state_follows()


def test_masks_hold():
    checks.check_mask_holds("hard")
    checks.check_mask_holds("held")


def test_a_soft_mask_lets_entries_return():
    run = rig.make([toys.Operate(script=((0, "soft"),))], steps=1)
    rig.trained(run)
    weight = run.live.parameter("body.0.weight")
    assert bool((weight == 0).any()) and not run.live.masks
    again = rig.trained(rig.make([toys.Operate(script=((0, "soft"),))], steps=3))
    assert not bool((again.live.parameter("body.0.weight") == 0).any())


def test_masked_entries_count_in_no_norm():
    keep = torch.zeros(3, 8, dtype=torch.bool)
    run = rig.make([toys.Note()], steps=1, optimizer={"clip": 1e-3})
    run.live.mask("head.weight", keep, "held")
    frozen = rig.make([toys.Note()], steps=1, optimizer={"clip": 1e-3})
    frozen.live.freeze(["head.weight"])
    rig.trained(run)
    rig.trained(frozen)
    checks.same(checks.values(run), checks.values(frozen), 1e-14, "weights")
    assert bool(rig.notes(run).gradients[0]["head.weight"].any()), "watchers see dense gradients"


def test_a_mask_follows_or_refuses_a_replace():
    live = rig.make().live
    keep = torch.rand(3, 8) > 0.5
    live.mask("head.weight", keep)
    with pytest.raises(Conflict, match="does not fit the mask"):
        live.replace("head.weight", torch.zeros(2, 8))
    fresh = live.replace("head.weight", torch.ones(3, 8, dtype=toys.F64))
    assert bool((fresh[~keep] == 0).all()) and bool((fresh[keep] == 1).all())
    with pytest.raises(Conflict, match="masked and was taken away"):
        live.edit("", lambda model: setattr(model, "head", nn.Identity()))


def test_bad_masks_and_states_are_named():
    live = rig.make().live
    with pytest.raises(ConfigError, match="kind 'hart'"):
        live.mask("head.weight", torch.ones(3, 8, dtype=torch.bool), "hart")
    with pytest.raises(ConfigError, match=r"did you mean 'head\.weight'"):
        live.mask("head.weigth", None)
    with pytest.raises(ConfigError, match="'kept'"):
        live.replace("head.weight", torch.ones(3, 8, dtype=toys.F64), state="kept")


def test_factored_states_refuse_to_follow():
    run = rig.trained(rig.make(steps=1))
    parameter = run.live.parameter("head.weight")
    run.live.optimizers[0].state[parameter]["row"] = torch.zeros(3)
    with pytest.raises(Conflict, match="factored"):
        run.live.replace("head.weight", parameter.detach() * 2, state="keep")
    run.live.replace("head.weight", parameter.detach() * 2)


def test_the_state_of_a_frozen_parameter_follows_too():
    run = rig.trained(rig.make(steps=2))
    live = run.live
    before = live.optimizers[0].state[live.parameter("head.weight")]["exp_avg"].clone()
    live.freeze(["head.weight"], state="keep")
    live.replace("head.weight", torch.zeros(2, 8, dtype=toys.F64), state=lambda m: m[:2])
    live.thaw(["head.weight"])
    state = live.optimizers[0].state[live.parameter("head.weight")]
    assert torch.equal(state["exp_avg"], before[:2])


def test_ties_are_followed():
    run = rig.language()
    live = run.live
    fresh = live.replace("out.weight", run.model.embed.weight.detach() * 2)
    assert run.model.embed.weight is fresh and run.model.out.weight is fresh
    assert live.resolve("out.weight") == live.resolve("embed.weight") == "embed.weight"
    live.mask("out.weight", torch.ones(12, 8, dtype=torch.bool))
    assert list(live.masks) == ["embed.weight"]


def test_names_resolve_to_originals():
    live = rig.make([toys.Scale()]).live
    assert live.resolve("body.4.weight") == "body.4.base.weight"
    assert live.resolve("body.4.scale") == "body.4.scale"
    assert live.resolve(live.parameter("head.bias")) == "head.bias"


def test_a_name_with_two_meanings_is_refused():
    run = rig.make([toys.Insert()])
    live = run.live
    assert live.resolve("body.4.bias") == "body.5.bias"
    # Now the inserted layer; on the original model a parameterless one.
    assert live.resolve("body.1.weight") == "body.1.weight"
    two = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    names = {n: id(p) for n, p in two.named_parameters()}
    wider = nn.Sequential(two[0], nn.Linear(6, 6), two[1])
    moved = checks.copy.copy(live)
    moved.model = wider
    moved.alias_originals(names)
    with pytest.raises(ConfigError, match="was another on the original model"):
        moved.resolve("1.weight")
    assert moved.resolve(wider[1].weight) == "1.weight"
    assert moved.resolve(two[1].weight) == "2.weight"


# ---- when structure may change -------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["after_backward", "before_forward"])
@pytest.mark.parametrize("change", [
    lambda live: live.replace("head.bias", torch.zeros(3, dtype=toys.F64)),
    lambda live: live.freeze(["head.bias"]),
    lambda live: live.thaw(["head.bias"]),
    lambda live: live.edit("", lambda model: None),
], ids=["replace", "freeze", "thaw", "edit"])  # fmt: skip
def test_structure_may_not_change_while_gradients_are_pending(moment, change):
    run = rig.make(steps=1)

    class Late(Watcher):
        pass

    setattr(Late, moment, lambda self, *_: change(run.live))
    run.loop.watchers = [Late()]
    with pytest.raises(Conflict, match="while gradients are pending"):
        rig.trained(run)


def test_a_module_that_cannot_be_made_again_is_refused_at_once():
    live = rig.make().live
    with pytest.raises(Conflict, match=r"GRU at 'head' cannot be made again"):
        live.edit("", lambda model: setattr(model, "head", nn.GRU(8, 3)))


def test_edit_moves_parameters_into_the_group_that_they_replace():
    run = rig.trained(rig.make([toys.Operate(script=((0, "split"),))], steps=2))
    names = {n for g in run.live.optimizers[0].param_groups for n in g["names"]}
    assert {"body.4.u", "body.4.v", "body.4.bias"} <= names and "body.4.weight" not in names
    held = {id(p) for g in run.live.optimizers[0].param_groups for p in g["params"]}
    assert held == {id(p) for p in run.model.parameters()}


def test_modules_that_move_are_found_again():
    def make():
        model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)], nn.Linear(6, 3))
        run = rig.make(model=toys.filled(model), steps=1, objective=lambda: Rows())
        return run

    class Rows(toys.Plain):
        def forward(self, model, batch, step):
            batch = {**batch, "input": batch["x"]}
            return super().forward(lambda x, input: model(x), batch, step)

    run = make()
    with torch.no_grad():
        run.live.edit("", lambda model: model.__delitem__(1))
    state = checkpoint.capture(run.live, {})
    again = make()
    checkpoint.restore(again.live, state)
    assert len(again.model) == 4
    checks.same(checks.values(run), checks.values(again), 0.0, "weights")
    again.loop._rewire()
    groups = again.live.optimizers[0].param_groups
    assert {n for g in groups for n in g["names"]} == {n for n, _ in again.live.named_parameters()}


def test_a_checkpoint_makes_no_class_but_loaded_modules():
    run = rig.make([toys.Operate(script=((0, "split"),))], steps=1)
    rig.trained(run)
    state = checkpoint.capture(run.live, {})
    for name in (
        "subprocess:Popen",
        "os:system",
        "antigravity:Nothing",
        "contracts.toy_steps:nowhere",
    ):
        state["manifest"]["modules"]["added"]["body.4"]["class"] = name
        with pytest.raises(CheckpointError, match="no loaded module class"):
            checkpoint.restore(rig.make().live, state)


def test_a_checkpoint_of_another_model_is_refused():
    run = rig.make()
    state = checkpoint.capture(run.live, {})
    state["parameters"]["body.0.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        checkpoint.restore(rig.make().live, state)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        checkpoint.restore(rig.make([toys.Inside()], optimizer={"clip": None}).live, state)


# ---- frozen means frozen -------------------------------------------------------------------------


def test_statistics_of_frozen_norms_hold_through_train():
    run = rig.make([toys.Scale()], model=toys.filled(toys.Net(norm=True)), steps=2)
    before = run.model.body[1].running_mean.clone()
    rig.trained(run)
    run.model.train()
    run.model(torch.ones(4, 6, dtype=toys.F64))
    assert torch.equal(before, run.model.body[1].running_mean) and not run.model.body[1].training


def test_freezing_a_norm_mid_run_holds_its_statistics_until_thawed():
    run = rig.make(model=toys.filled(toys.Net(norm=True)))
    norm, live = run.model.body[1], run.live
    run.model.train()
    live.freeze(["body.1.weight"])
    assert norm.training, "its bias still trains"
    live.freeze(["body.1.bias"])
    run.model.train()
    assert not norm.training
    live.thaw(["body.1.bias"])
    assert norm.training


def test_new_rows_train_while_the_embedding_stays():
    run = rig.language([toys.Corrupt(new=11)], new_tokens=(11,), steps=3)
    assert not run.live.masks, "a trained embedding needs no mask"
    base = toys.filled(toys.Language())
    base.embed.weight.requires_grad_(False)
    run = rig.make(
        [toys.Corrupt(new=11)], model=base, rows=toys.sentences(), new_tokens=(11,), steps=3,
        objective=rig.CausalObjective,
    )  # fmt: skip
    before = run.model.embed.weight.detach().clone()
    rig.trained(run)
    after = run.model.embed.weight.detach()
    assert torch.equal(before[:11], after[:11]) and not torch.equal(before[11], after[11])
