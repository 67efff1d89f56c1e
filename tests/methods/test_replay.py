"""The memory of earlier examples, and how much of it comes back."""

from __future__ import annotations

from collections import Counter

import pytest
from conformance import kit

from outlay import Replay
from outlay.core import registry
from outlay.core.errors import ConfigError, Conflict
from outlay.training.data.tasks import TaskPool


def pool(counts=(40, 30, 20), steps=(12, 6, 10), size=4):
    examples = [
        {"id": f"{task}:{i}", "task": task} for task, n in enumerate(counts) for i in range(n)
    ]
    starts = [0]
    for count in steps:
        starts.append(starts[-1] + count)
    return TaskPool(examples, 5, starts, size)


def drawn(some, count=28):
    return [some.draw(some.step_size) for _ in range(count)]


def test_a_share_of_each_later_task_comes_from_memory_evenly():
    steps = drawn(Replay(size=10, share=0.25).select(pool()))
    assert all(example["task"] == 0 for step in steps[:12] for example in step)
    for index, step in enumerate(steps[12:], start=12):
        task = 1 if index < 18 else 2
        assert sum(example["task"] < task for example in step) == 1
    whole = drawn(Replay(size=10, share=0.6).select(pool()))
    old = sum(e["task"] < (1 if i < 18 else 2) for i, s in enumerate(whole) if i >= 12 for e in s)
    assert old == pytest.approx(0.6 * 64, abs=1)


def test_the_memory_is_a_reservoir_of_what_was_trained_on():
    some = Replay(size=10, share=0.25).select(pool())
    method = Replay(size=10, share=0.25)
    first, second = method.memory(some, 1), method.memory(some, 2)
    seen = {e["id"] for step in drawn(some)[:12] for e in step}
    assert {some.ids[i] for i in first} <= seen and len(first) == len(set(first)) == 10
    later = set(some.seen_of(1))
    assert set(second) <= set(first) | later, "what was dropped never comes back"
    assert set(second) & later and set(second) & set(first)
    assert len(some.seen_of(1)) == 18, "a quarter of the task's 24 draws were memories"


def test_every_example_is_as_likely_to_stay():
    counts: Counter[int] = Counter()
    for seed in range(300):
        some = pool()
        some.seed = seed
        counts.update(Replay(size=8).memory(some, 1))
    expected = 300 * 8 / 40
    assert len(counts) == 40
    assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values())


def test_every_visit_of_an_example_has_a_number_of_its_own():
    some = Replay(size=3, share=0.5).select(pool(counts=(4, 4, 4)))
    visits = Counter((e["id"], e["visit"]) for step in drawn(some) for e in step)
    assert set(visits.values()) == {1}


def test_it_goes_on_from_any_cursor_and_selectors_may_follow():
    whole = Replay(size=10, share=0.25).select(pool())
    cursors, steps = [], []
    for _ in range(28):
        cursors.append(whole.cursor())
        steps.append(whole.draw(4))
    for at in (27, 3, 13, 19):
        other = Replay(size=10, share=0.25).select(pool())
        other.seek(cursors[at])
        assert [other.draw(4) for _ in range(at, 28)] == steps[at:]
    kept = whole.keep(lambda example: not example["id"].endswith("3"))
    ids = {e["id"] for step in drawn(kept) for e in step}
    assert not any(name.endswith("3") for name in ids) and kept.rehearsed_share == 0.25


def test_in_a_run_the_budget_stays_the_same():
    stage = kit.trained(kit.stage(kit.recipe(methods=["replay(size=5, share=0.5)"])))
    assert stage.context.meter.totals["examples"] == 24
    assert stage.live.pool.rehearsed_share == 0.5


def test_what_it_refuses():
    assert registry.build("replay(size=7)") == Replay(size=7)
    with pytest.raises(ConfigError, match=r"replay\.share"):
        registry.build("replay(share=1.0)")
    with pytest.raises(Conflict, match="'replay' keeps examples of earlier tasks"):
        kit.stage(kit.recipe(methods=["replay"], tasks=False))
