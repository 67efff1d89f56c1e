"""Two methods in one run: both matter, or they are refused by a typed refusal with both names."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from conformance import kit, settings

from outlay.core import registry
from outlay.core.errors import Conflict
from outlay.core.method import Method

# Every method acts at a place that some other one acts at; each meets every other one here, and
# itself.
ROWS = [spec for spec in settings.representatives() if spec not in settings.IDLE]
PAIRS = list(itertools.combinations_with_replacement(ROWS, 2))
_OUTCOMES: dict[tuple[Any, ...], Any] = {}
# A tokenizer from scratch has no mode token; no stage before this one can be the teacher.
pytestmark = pytest.mark.filterwarnings("ignore:mode_token", "ignore:feature_distillation")


def meets(first: Method, second: Method) -> bool:
    """True if they share a place, or claim anything at all.

    `full` says what a run does anyway where nothing freezes the base; a method without a place
    says when things are done and not what; what only looks changes none.
    """
    if not (first.places() and second.places()):
        return False
    if {first.card.name, second.card.name} & settings.OBSERVERS:
        return False
    others = [m for m in (first, second) if m.card.name != "full"]
    if len(others) == 1 and not others[0].card.freezes_base:
        return False
    words = [{claim.word for claim in m.claims(None)} for m in (first, second)]
    return bool(set(first.places()) & set(second.places())) or all(words)


def named(spec: str, name: str) -> Method:
    method = registry.build(spec)
    fields = {f.name for f in dataclasses.fields(method)}
    if "adapter_name" not in fields:
        return method
    return registry.construct(type(method), {**method.settings(), "adapter_name": name})


def outcome(shape: str, *methods: Method, tasks: bool) -> Any:
    """Logits after three steps, with the trained weights in place."""
    key = (shape, tasks, *(method.spec() for method in methods))
    if key not in _OUTCOMES:
        stage = kit.stage(kit.recipe(shape, methods, precision="float64", tasks=tasks))
        batch = kit.inputs(kit.trained(stage))
        _OUTCOMES[key] = kit.logits(stage.model, batch)
        kit.close(kit.logits(stage.exported(), batch), _OUTCOMES[key], 1e-10, "the export")
    return _OUTCOMES[key]


def check(first: Method, second: Method) -> None:
    shape, tasks = settings.home((first, second)), settings.needs_tasks((first, second))
    if shape != "bert" and {first.spec(), second.spec()} & settings.HEADS_ONLY:
        pytest.skip("one needs a head where the other has none")
    try:
        together = outcome(shape, first, second, tasks=tasks)
    except Conflict as refusal:
        for method in (first, second):
            assert repr(method.card.name) in refusal.problem, refusal.problem
        assert refusal.remedy and refusal.exit_code == 3
        return
    for left in (first, second):
        alone = outcome(shape, left, tasks=tasks)
        # A method may add tokens: those that both have are compared.
        width = min(together.shape[-1], alone.shape[-1])
        gap = float((together[..., :width] - alone[..., :width]).abs().max())
        gone = second if left is first else first
        assert gap > 1e-9, f"without {gone.spec()} nothing changes"


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_both_matter_or_one_is_refused(one, two):
    first, second = named(one, "first"), named(two, "second")
    if not meets(first, second):
        pytest.skip("they meet nowhere")
    check(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(("two", "one"), PAIRS)
def test_in_the_other_order(one, two):
    if not meets(registry.build(one), registry.build(two)):
        pytest.skip("they meet nowhere")
    check(named(one, "first"), named(two, "second"))


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_under_one_name_a_refusal_names_both(one, two):
    first, second = registry.build(one), registry.build(two)
    if not all(hasattr(method, "adapter_name") for method in (first, second)):
        pytest.skip("no adapter to name")
    try:
        kit.stage(kit.recipe(methods=[first, second]))
    except Conflict as refusal:
        for method in (first, second):
            assert repr(method.card.name) in refusal.problem


@pytest.mark.parametrize("shape", list(kit.SHAPES))
def test_a_second_adapter_finds_the_layers_that_the_first_found(shape):
    """The head and the output embedding stay out of "all-linear" on an adapted model too."""
    recipe = kit.recipe(shape)
    model = kit.materials(recipe).model(recipe)
    method = named("bone(r=4)", "second")
    first = set(method.targets(model))  # type: ignore[attr-defined]
    named("bone(r=4)", "first").adapt(model)  # type: ignore[attr-defined]
    assert set(method.targets(model)) == first  # type: ignore[attr-defined]
