"""Every replication that is there: it opens, its arms are real, its claims can be judged."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from outlay import recipes, replications
from outlay.comparison.replicate import SIZES
from outlay.comparison.verdicts import VERDICTS
from outlay.core import registry
from outlay.core.errors import ConfigError

NAMES = replications.names()


def test_the_first_four_are_there():
    assert {"02_adalora", "03_lamda", "34_bone", "35_svfit"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_replication_is_that_of_its_paper(name):
    made = replications.load(name)
    assert made.stem == name
    methods = [e for e in registry.entries().values() if e.card.paper == made.paper]
    assert methods, f"no method has paper {made.paper}"
    assert methods[0].card.arxiv == made.arxiv and methods[0].card.title == made.title


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_arms_and_recipes_exist_at_every_size(name, size):
    made = replications.load(name)
    assert len(made.tasks) >= 2 and len({task.recipe for task in made.tasks}) >= 2
    for task in made.tasks:
        assert task.recipe in recipes.names()
        recipe = task.recipe_at(size)
        arms = task.arms_at(size)
        names = [arm.name for arm in arms]
        assert len(set(names)) == len(names) >= 4
        for arm in arms:
            changed = recipe.changed({"methods": arm.parts(), **arm.settings})
            assert changed.methods, arm.name
            assert set(arm.settings) == set(made.grid), f"{arm.name} starts untuned"
        assert {made.baseline, made.method} <= set(names)
        for claim in made.claims_on(task.name):
            assert set(claim.arms) <= set(names), claim.name


@pytest.mark.parametrize("name", NAMES)
def test_claims_can_be_judged(name):
    made = replications.load(name)
    tasks = {task.name for task in made.tasks}
    assert len({claim.name for claim in made.claims}) == len(made.claims)
    for claim in made.claims:
        assert claim.source and claim.text and set(claim.size) <= tasks, claim.name
    for task in tasks:
        roles = {claim.role for claim in made.claims_on(task)}
        assert "main" in roles and roles & {"control", "secondary"}
    known = {"adapter_parameters", "peak_memory_bytes", "seconds", "loss@0.1", *made.quantities}
    assert {c.quantity for c in made.claims if c.quantity} <= known
    for values in made.grid.values():
        steps = [math.log10(b / a) for a, b in itertools.pairwise(values)]
        assert len(values) >= 4 and all(0.3 < step < 0.7 for step in steps)
    assert made.limits


@pytest.mark.parametrize("name", NAMES)
def test_a_ledger_that_is_there_agrees_with_its_script(name):
    path = replications.folder() / f"{name}.json"
    if not path.exists():
        assert replications.recorded(int(name[:2]))["status"] == "untested"
        return
    made, ledger = replications.load(name), json.loads(path.read_text())
    assert ledger["verdict"] in VERDICTS and ledger["size"] in ("cpu", "gpu")
    assert set(ledger["tasks"]) == {task.name for task in made.tasks}
    for task, facts in ledger["tasks"].items():
        assert facts["verdict"] in VERDICTS
        judged = {claim["claim"] for claim in facts["claims"]}
        assert judged == {c.name for c in made.claims_on(task)} or not facts["noise"]["passed"]
    assert ledger["date"] and ledger["hardware"] and ledger["versions"]["outlay"]


@pytest.mark.parametrize("name", ["34", "bone", "34_bone", "34-bone", "Bone"])
def test_a_replication_is_found_by_any_of_its_names(name):
    assert replications.find(name) == "34_bone"


def test_an_unknown_name_is_met_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'bone'"):
        replications.find("bonne")
    with pytest.raises(ConfigError, match="34_bone"):
        replications.find("77")
