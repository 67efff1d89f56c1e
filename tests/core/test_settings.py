"""Settings, call strings, budgets and the allocator: what is allowed, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch
from annotated_types import Ge, Gt, Lt
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.core import callspec
from outlay.core.allocate import allocate, cubic, one_shot, share
from outlay.core.budget import CAPS, UNITS, Budget
from outlay.core.card import Card
from outlay.core.errors import ConfigError
from outlay.core.method import OnStep, Watcher

LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True).filter(
    lambda name: name not in __import__("keyword").kwlist
)


# ---- call strings --------------------------------------------------------------------------------


@given(NAMES, st.dictionaries(NAMES, LITERALS, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_rendered_is_read_back(name, wanted):
    text = callspec.render(name, wanted)
    assert callspec.parse(text) == (name, wanted)
    assert callspec.split_sum(f"{text}+{text} + last") == [text, text, "last"]


@given(st.text(max_size=60) | st.text("bone(r=16,'[{}])+-*._1e9\"\\\n#:;", max_size=40))
@settings(max_examples=400, deadline=None)
def test_any_string_is_read_or_refused(text):
    for part in [text, *callspec.split_sum(text)]:
        try:
            name, found = callspec.parse(part)
        except ConfigError as error:
            assert error.problem and error.remedy and "\n" not in error.problem
        else:
            assert name.isidentifier()
            assert callspec.parse(callspec.render(name, found)) == (name, found)


@pytest.mark.parametrize("text", [
    "", "bone(", "bone(16)", "bone(r=16", "bone(r=x)", "bone(r=__import__('os'))", "a.b(c=1)",
    "bone(r=1, r=2)", "bone(**{'r': 1})", "bone(r=1)(s=2)", "lambda: 0", "bone(r=1 if 1 else 2)",
    "bone(r=...)", "bone(r=b'x')", "bone(r=1j)", "bone(r=1e999)", "bone(r={[]: 1})", "bone;rm",
    "bone(r=" + "(" * 500 + ")" * 500 + ")", "bone(r=" + "9" * 9000 + ")", "b\0ne",
    "bone(r=1if 2else 3)",
    "bone(r=[i for i in (1,)])", "bone(r=f'{1}')", "\ud800(r=1)", "bone(r='\\d')" + ")",
])  # fmt: skip
def test_hostile_call_strings(text):
    with pytest.raises(ConfigError):
        callspec.parse(text)


def test_sums_are_split_outside_quotes_and_brackets():
    assert callspec.split_sum(r"a(x='1+1')+b(y=[1, 2+3])+c(z='it\'s+1')") == [
        "a(x='1+1')", "b(y=[1, 2+3])", r"c(z='it\'s+1')",
    ]  # fmt: skip
    assert callspec.parse("stage-sharing") == ("stage_sharing", {})


def test_long_values_are_shortened():
    assert callspec.shown("x" * 500).endswith("…") and len(callspec.shown("x" * 500)) == 80
    assert callspec.shown(16 ** (10**4)) == "a int too large to show"


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dial(OnStep):
    card: ClassVar[Card] = Card(name="dial", title="toy")
    r: Annotated[int, Ge(1)] = 4
    rate: Annotated[float, Gt(0), Lt(1)] = 0.5
    kind: Literal["one", "two"] = "one"
    names: tuple[str, ...] = ()
    table: dict[str, float] | None = None
    weights: Mapping[str, int] = ()  # type: ignore[assignment]
    only: tuple[tuple[str, Annotated[int, Ge(1)]], ...] = ()
    flag: bool = False

    def validate(self) -> None:
        if self.flag and self.kind == "two":
            raise ConfigError("dial.flag goes with kind one", "set flag to False")

    def watch(self, live: Any) -> Watcher:
        return Watcher()


GOOD = st.fixed_dictionaries({}, optional={
    "r": st.integers(1, 10**9), "rate": st.floats(1e-6, 0.999), "kind": st.sampled_from(["one"]),
    "names": st.lists(st.text(max_size=5), max_size=3), "flag": st.booleans(),
    "table": st.none() | st.dictionaries(st.text(max_size=3), st.floats(-9, 9), max_size=3),
    "weights": st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
    "only": st.dictionaries(st.text(max_size=3), st.integers(1, 5), max_size=3),
})  # fmt: skip


@given(GOOD)
@settings(max_examples=150, deadline=None)
def test_settings_are_hashable_and_their_spec_makes_them_again(values):
    made = Dial(**values)
    assert hash(made) == hash(Dial(**values))
    name, found = callspec.parse(made.spec())
    assert name == "dial" and Dial(**found) == made
    assert set(found) <= set(values)


ANY = LITERALS | st.sets(st.integers() | st.text(max_size=2), max_size=3) | st.floats()


@given(st.sampled_from(["r", "rate", "kind", "names", "table", "weights", "only", "flag"]), ANY)
@settings(max_examples=400, deadline=None)
def test_any_value_is_taken_or_refused_by_name(name, value):
    try:
        made = Dial(**{name: value})
    except ConfigError as error:
        assert f"dial.{name}" in error.problem and error.remedy
        assert "\n" not in error.problem + error.remedy
    else:
        hash(made)


@pytest.mark.parametrize("values", [
    {"r": 0}, {"r": True}, {"r": 2.0}, {"r": "4"}, {"r": None}, {"rate": 1.0}, {"rate": math.nan},
    {"rate": math.inf}, {"kind": "three"}, {"names": "abc"}, {"names": (1,)}, {"flag": 1},
    {"table": {"a": "b"}}, {"weights": {"a": 0.5}}, {"only": {"a": 0}}, {"r": 16 ** (10**4 )* -1},
])  # fmt: skip
def test_bad_settings(values):
    with pytest.raises(ConfigError, match=f"dial.{next(iter(values))}"):
        Dial(**values)


def test_settings_that_do_not_go_together():
    with pytest.raises(ConfigError, match="goes with kind one"):
        Dial(kind="two", flag=True)
    assert Dial().settings()["r"] == 4 and Dial.places() == ("OnStep",)
    assert Dial(rate=0.25).spec() == "dial(rate=0.25)" and Dial().spec() == "dial"


# ---- budgets -------------------------------------------------------------------------------------


@given(st.sampled_from(UNITS + CAPS), st.integers(1, 10**18) | st.floats(1e-9, 1e300))
@settings(max_examples=300, deadline=None)
def test_a_budget_is_written_exactly(unit, amount):
    if unit in ("steps", "examples", *CAPS):
        amount = math.ceil(amount)
    budget = Budget(float(amount), unit)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(("text", "amount", "unit"), [
    ("60steps", 60, "steps"), ("2e6tokens", 2e6, "tokens"), ("10k steps", 1e4, "steps"),
    ("1.5 Mtokens", 1.5e6, "tokens"), ("1_000 examples", 1000, "examples"), ("90s", 90, "seconds"),
    ("3 pflops", 3e15, "flops"), ("300000 trainable_parameters", 3e5, "trainable_parameters"),
    ("10MB", 1e7, "bytes"), ("1 STEP", 1, "steps"),
])  # fmt: skip
def test_budgets(text, amount, unit):
    assert Budget.parse(text) == Budget(amount, unit)


@pytest.mark.parametrize("text", [
    "", "steps", "60", "-5steps", "0steps", "1.5steps", "60stepz", "5ms", "infsteps", "1e999steps",
    "nan tokens", "60 steps 3", "6 0steps", "1e400tokens", "٣steps", None, 5,
])  # fmt: skip
def test_bad_budgets(text):
    with pytest.raises(ConfigError):
        Budget.parse(text)


@given(st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_budget_is_read_or_refused(text):
    try:
        found = Budget.parse(text)
    except ConfigError as error:
        assert error.remedy
    else:
        assert Budget.parse(str(found)) == found


@pytest.mark.parametrize("amount", [True, math.nan, math.inf, -1])
def test_bad_amounts(amount):
    with pytest.raises(ConfigError):
        Budget(amount, "tokens")
    assert Budget(1, "steps").reproducible and not Budget(1, "seconds").reproducible


# ---- the allocator -------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30), st.floats(-1, 40))
@settings(max_examples=150, deadline=None)
def test_allocate_is_exact_top_k(scores, budget):
    keep = allocate(torch.tensor(scores), None, budget)
    count = max(0, min(len(scores), int(budget + 1e-9)))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert keep.nonzero().flatten().tolist() == sorted(order[:count])


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 3)), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_allocate_never_overspends(units):
    scores, costs = (torch.tensor(column, dtype=torch.float64) for column in zip(*units))
    budget = float(costs.sum()) / 2
    keep = allocate(scores, costs, budget)
    left = budget - float(costs[keep].sum())
    assert left >= -1e-6
    assert bool((costs[~keep] > left - 1e-6).all()), "what is passed over does not fit"


def test_allocate_at_its_edges():
    scores = torch.tensor([1.0, float("nan"), 1.0, -math.inf])
    assert allocate(scores, None, 2).tolist() == [True, False, True, False]
    assert allocate(scores).all() and not allocate(scores, None, -math.inf).any()
    assert allocate(torch.zeros(0)).shape == (0,)
    for costs, budget in (([1.0, 0.0], 1), ([1.0, -1.0], 1), ([1.0, math.nan], 1),
                          ([1.0, math.inf], 1), ([1.0, 1.0], math.nan)):  # fmt: skip
        with pytest.raises(ConfigError):
            allocate(torch.ones(2), torch.tensor(costs), budget)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=10), st.floats(0.01, 50), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_shares_sum_to_one_and_keep_the_floor(scores, temperature, part):
    floor = part / len(scores)
    found = share(torch.tensor(scores, dtype=torch.float64), temperature, floor)
    assert float(found.sum()) == pytest.approx(1.0) and bool((found >= floor - 1e-12).all())
    order = torch.argsort(torch.tensor(scores, dtype=torch.float64), stable=True)
    assert bool((found[order].diff() >= -1e-12).all())


@pytest.mark.parametrize(("temperature", "floor", "score"), [
    (0.0, 0.0, 1.0), (-1.0, 0.0, 1.0), (math.nan, 0.0, 1.0), (1.0, 0.6, 1.0), (1.0, -0.1, 1.0),
    (1.0, 0.0, math.nan),
])  # fmt: skip
def test_bad_shares(temperature, floor, score):
    with pytest.raises(ConfigError):
        share(torch.tensor([score, 1.0]), temperature, floor)


def test_schedules_over_the_share_of_the_budget():
    assert cubic(0, 10, 2) == 10 and cubic(1, 10, 2) == 2 and cubic(7, 10, 2) == 2
    assert cubic(0.5, 10, 2) == 2 + 8 / 8
    assert one_shot(0.4, 1.0, 0.1) == 1.0 and one_shot(0.5, 1.0, 0.1) == 0.1
