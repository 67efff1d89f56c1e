"""plan: the promised keys, and an exit code that scripts can use."""

from __future__ import annotations

import dataclasses

import pytest

from outlay.training.planning import plan as planning

MEMORY = {"weights", "gradients", "optimizer", "activations", "peak"}


@pytest.fixture
def found() -> planning.Plan:
    return planning.Plan(
        params={"total": 1000, "trainable": 10, "head": 4},
        memory_bytes=dict.fromkeys(MEMORY, 2048),
        flops=3e12, seconds=None, fits=True, steps=60, notes=["a bound"],
        chain=[{"method": "bone(r=4)", "places": ["OnModel"], "claims": ["delta.additive"]}],
    )  # fmt: skip


def test_plan_has_the_promised_shape(outlay, work):
    plan = outlay("plan", "mine.yaml", "--json").json
    assert set(plan) >= {"params", "memory_bytes", "flops", "seconds", "fits", "chain"}
    assert set(plan["params"]) == {"total", "trainable", "head"}
    assert set(plan["memory_bytes"]) == MEMORY
    assert plan["seconds"] is None and plan["fits"] is True and plan["flops"] > 0
    assert plan["chain"][0]["method"] == "bone(r=4)"
    assert not (work / "runs").exists()


def test_plan_counts_what_the_run_counts(outlay, work):
    plan = outlay("plan", "mine.yaml", "--json").json
    meter = outlay("run", "mine.yaml", "--json", "--quiet").last["meter"]
    assert plan["params"]["trainable"] == meter["trainable_parameters"]
    assert plan["flops"] == pytest.approx(meter["flops"], rel=0.01)


def test_people_see_parts_chain_and_notes(outlay, work, found, monkeypatch):
    asked = {}

    def fake(recipe, **settings):
        asked.update(settings)
        return found

    monkeypatch.setattr(planning, "plan", fake)
    answer = outlay("plan", "mine.yaml", "--measure", "--device", "cpu")
    assert asked == {"measure": True, "device": "cpu"}
    for words in ("10 (1.00%)", "2.0 KiB", "bone(r=4)", "delta.additive", "note: a bound"):
        assert words in answer.out
    assert answer.code == 0


def test_what_does_not_fit_exits_3(outlay, work, found, monkeypatch):
    small = dataclasses.replace(found, fits=False)
    monkeypatch.setattr(planning, "plan", lambda *_, **__: small)
    answer = outlay("plan", "mine.yaml", "--json")
    assert answer.code == 3 and answer.json["fits"] is False
    assert outlay("plan", "mine.yaml", "--quiet").out == ""
