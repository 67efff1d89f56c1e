"""Claims: what clashes, where, and that each clash of the table is real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from contracts import rig, toys

from outlay.core.card import Card
from outlay.core.claims import CLASHES, WORDS, Claim, check, find_clashes, words_of
from outlay.core.errors import ConfigError, Conflict
from outlay.core.method import Context, OnModel, OnObjective, OnReward, Step, mix_rewards


@dataclass(frozen=True, kw_only=True)
class Holder(OnModel):
    """Claims what its settings say."""

    card: ClassVar[Card] = Card(name="holder", title="toy")
    word: str = "mask"
    names: tuple[str, ...] = ()
    share: tuple[float, float] = (0.0, 1.0)

    def adapt(self, model, context=None):
        return model

    def claims(self, model):
        return [Claim(self.word, frozenset(self.names), self.share)]


@dataclass(frozen=True, kw_only=True)
class Other(Holder):
    card: ClassVar[Card] = Card(name="other", title="toy")


LATE = Step(9, 0.9, 0)
PAIRS = sorted(tuple(sorted(pair)) for pair in CLASHES)
PAIRS = [pair if len(pair) == 2 else pair * 2 for pair in PAIRS]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_clash_is_refused_with_both_names_the_place_and_the_way_out(pair):
    for first, second in (pair, pair[::-1]):
        with pytest.raises(Conflict) as error:
            check([Holder(word=first), Other(word=second)])
        for part in ("'holder'", "'other'", first, second, "the whole run"):
            assert part in error.value.problem
        assert "leave one of them out" in error.value.remedy and error.value.exit_code == 3


def test_every_word_is_used():
    used = {word for pair in CLASHES for word in pair}
    # Losses that are weighted twice are weighted by the product: nothing to refuse.
    assert set(WORDS) - used == {"objective.weights"}
    assert used <= set(WORDS)
    assert words_of(["mask", "router"]) == ("mask", "router")
    with pytest.raises(ConfigError, match="unknown claim 'musk'"):
        Claim("musk")
    with pytest.raises(ConfigError, match="shares"):
        Claim("mask", share=(0.5, 0.2))


def test_what_stacks_is_not_refused():
    free = [
        ("delta.additive", "delta.additive"), ("delta.additive", "mask"),
        ("objective.weights", "objective.weights"), ("weight.initial", "delta.additive"),
        ("weight.initial", "mask"), ("optimizer", "schedule"), ("data.order", "data.weights"),
    ]  # fmt: skip
    for first, second in free:
        check([Holder(word=first), Other(word=second)])


def test_names_meet_by_prefix_and_identity():
    model = toys.Language()
    net = toys.Net()

    def clash(first, second, on):
        return bool(find_clashes([Holder(names=first), Other(names=second)], on))

    assert clash(("body.4",), ("body.4.weight",), net)
    assert clash(("body",), ("body.4.weight",), net)
    assert not clash(("body.4",), ("body.0.weight",), net)
    assert not clash(("body.4.weight",), ("body.4.bias",), net)
    # Two names of one tied weight are one place.
    assert clash(("embed.weight",), ("out.weight",), model)
    assert not clash(("embed.weight",), ("mix.weight",), model)
    # Without a model names meet by prefix alone.
    assert clash(("body.4",), ("body.4.weight",), None)
    assert not clash(("body.4",), ("body.44.weight",), None)
    # Run-wide against some: every weight.
    assert clash((), ("body.4",), net)


def test_shares_of_the_budget():
    early, late = Holder(share=(0.0, 0.5)), Other(share=(0.5, 1.0))
    check([early, late])
    with pytest.raises(Conflict):
        check([early, Other(share=(0.4, 1.0))])


def test_one_object_twice_is_two_holders():
    one = Holder()
    with pytest.raises(Conflict, match="'holder' holds 'mask'"):
        check([one, one])


def test_places_imply_their_word():
    @dataclass(frozen=True, kw_only=True)
    class Bare(toys.Sign):
        card: ClassVar[Card] = Card(name="bare", title="toy")

    with pytest.raises(Conflict, match="'bare' holds 'optimizer'"):
        check([Bare(), toys.Sign()])

    @dataclass(frozen=True, kw_only=True)
    class Silent(OnReward):
        card: ClassVar[Card] = Card(name="silent", title="toy")

        def weigh(self, live):
            raise NotImplementedError

    with pytest.raises(Conflict, match=r"reward\.weights"):
        check([Silent(), toys.Weigh()])


# ---- each clash is real: what two holders would do to each other ---------------------------------


def body_weight(seed):
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=toys.F64)


def order_matters(first, second):
    """Two functions of one tensor that do not commute: whoever comes last undoes the other."""
    start = body_weight(0)
    return not torch.allclose(first(second(start)), second(first(start)))


KEEP = body_weight(9) > 0
ACTS = {
    "weight.replaced": lambda w: body_weight(1) @ body_weight(2),
    "weight.initial": lambda w: body_weight(3),
    "delta.multiplicative": lambda w: w * 1.5 + w @ body_weight(4),
    "delta.additive": lambda w: w + body_weight(5),
    "mask": lambda w: w * KEEP,
    "structure": lambda w: w.flip(0) @ w,
}


@pytest.mark.parametrize("pair", [p for p in PAIRS if set(p) <= set(ACTS)], ids="+".join)
def test_clashes_on_a_weight_are_real(pair):
    first, second = (ACTS[word] for word in pair)
    if pair[0] != pair[1]:
        assert order_matters(first, second)
        return
    others = {
        "weight.replaced": lambda w: body_weight(6) @ body_weight(7),
        "weight.initial": lambda w: body_weight(8),
        "delta.multiplicative": lambda w: w @ body_weight(6),
        "mask": lambda w: torch.where(w.abs() > w.abs().median(), w, 0.0),
        "structure": lambda w: w @ body_weight(6),
    }
    assert order_matters(first, others[pair[0]])


def test_two_structures_collide_in_a_run():
    script = toys.Operate(script=((0, "split"),))

    @dataclass(frozen=True, kw_only=True)
    class Second(toys.Operate):
        card: ClassVar[Card] = Card(name="second", title="toy", claims=("structure",))

    with pytest.raises(Conflict, match="'structure'"):
        rig.make([script, Second(script=((1, "reset"),))])
    run = rig.make([script], steps=3)
    run.loop.watchers = [*run.watchers, toys.Surgeon(run.live, {1: "reset"})]
    with pytest.raises(ConfigError, match=r"no parameter 'body\.4\.weight'"):
        rig.trained(run)
    run = rig.make([toys.Operate(script=((0, "hard"), (1, "widen")))], steps=3)
    with pytest.raises(Conflict, match="does not fit the mask"):
        rig.trained(run)


def test_clashes_over_the_whole_run_are_real():
    """Two holders of one function: the second silently wins, or a refusal further down says so."""
    # optimizer, batch.layout, update.inside: refused again where they meet.
    for methods, more in (
        ([toys.Sign(), toys.Sign()], {}),
        ([toys.Pack(), toys.Pack()], {}),
        ([toys.Inside(), toys.Note()], {"optimizer": {"clip": None}}),
    ):
        with pytest.raises(Conflict):
            rig.language(methods, **more)
    # data.weights: the second set of weights replaces the first.
    pool = rig.make().live.pool
    pool.set_weights({"a": 1.0})
    pool.set_weights({"b": 1.0})
    assert pool.domain_weights["a"] == 0.0
    # example.corruption: two of them do not commute.
    one, two = toys.Corrupt(rate=1.0, new=10), toys.Corrupt(rate=1.0, new=11)
    example = {"id": 0, "input_ids": [1, 2], "labels": [1, 2]}
    draw = lambda example, name: torch.Generator().manual_seed(0)  # noqa: E731

    def both(a, b):
        return b.transform(a.transform(example, draw, None, None), draw, None, None)["input_ids"]

    assert both(one, two) != both(two, one)
    # schedule: a re-warming of a re-warming has the factor of neither.
    base = lambda step: 1.0  # noqa: E731
    once = toys.Rewarm().schedule(base, None)
    assert once(LATE) == 0.1 and toys.Rewarm().schedule(once, None)(LATE) == pytest.approx(0.01)
    # reward.weights: the second mix overwrites the first.
    batch = {"rewards": {"a": torch.ones(2), "b": torch.zeros(2)}}
    mix_rewards([batch], {"a": 1.0, "b": 0.0})
    before = batch["advantages"]
    mix_rewards([batch], {"a": 0.0, "b": 1.0})
    assert not torch.equal(before, batch["advantages"])


@dataclass(frozen=True, kw_only=True)
class Replaces(OnObjective):
    card: ClassVar[Card] = Card(name="replaces", title="toy", claims=("objective.token",))
    power: float = 2.0

    def shape(self, objective, model, context):
        power = self.power

        class Replaced(toys.Shaped):
            def forward(self, model, batch, step):
                losses = self.inner(model, batch, step)
                term = losses.terms["task"]
                return losses.with_term("task", toys.Term(term.values**power + 1, term.weights))

        return Replaced(objective)


def test_two_token_losses_and_two_exports_do_not_commute():
    pairs = [
        (Replaces(power=2.0), Replaces(power=3.0)),
        (toys.MeanTeacher(rate=0.1), toys.MeanTeacher(rate=0.9)),
    ]
    for first, second in pairs:
        with pytest.raises(Conflict):
            rig.make([first, second])
        found = []
        for order in ((first, second), (second, first)):
            run = rig.make([order[0]], steps=1)
            run.objective = run.live.objective = order[1].shape(run.objective, run.model, Context())
            rig.trained(run)
            source = run.objective.export_source(run.model)
            losses = run.objective(source, _batch(run), None)
            found.append(losses.terms["task"].values.detach())
        assert not torch.allclose(*found)


def _batch(run):
    x = torch.stack([row["x"] for row in toys.vectors(4)])
    return {"x": x, "labels": torch.tensor([0, 1, 2, 0]), "ids": (0, 1, 2, 3)}
