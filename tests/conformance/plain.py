"""Checks that need a process without the tests' type checker: it draws numbers and refuses first.

Reads {"recipes": [YAML], "settings": {method: call string}} and prints one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import tempfile
from typing import Any

import numpy
import torch

import outlay
from outlay.core import registry
from outlay.core.errors import ConfigError
from outlay.training.recipe import Recipe

BAD: tuple[Any, ...] = (b"bytes", float("nan"), -7, 10.5, "no such value", {"no": {"such": ()}})


def refusals(name: str, spec: str) -> dict[str, Any]:
    """Which fields refuse something, and what is wrong with how they say it."""
    cls = registry.find(name).load()
    good = registry.build(spec).settings()
    refused, complaints = [], []
    for field in [f.name for f in dataclasses.fields(cls)] + ["no_such_setting"]:
        count = 0
        for value in BAD:
            try:
                registry.construct(cls, {**good, field: value})
            except ConfigError as error:
                count += 1
                lines = str(error).splitlines()
                named = field in lines[0] or "'no'" in lines[0]
                if len(lines) != 2 or not named or error.exit_code != 2:
                    complaints.append([field, repr(value), str(error)])
            except Exception as error:
                complaints.append([field, repr(value), f"{type(error).__name__}: {error}"])
        refused += [field] * bool(count)
    fields = [f.name for f in dataclasses.fields(cls)] + ["no_such_setting"]
    return {"fields": fields, "refused": refused, "complaints": complaints}


def _states() -> list[Any]:
    numbers = numpy.random.get_state(legacy=False)
    return [torch.get_rng_state().tolist(), repr(numbers), random.getstate()]


def moved(texts: list[str]) -> list[Any]:
    """Runs after which one of the process's generators stood elsewhere."""
    found = []
    for text in texts:
        recipe = Recipe.from_yaml(text)
        before = _states()
        with tempfile.TemporaryDirectory() as folder:
            outlay.run(recipe, out=folder)
        for kind, first, second in zip(("torch", "numpy", "random"), before, _states()):
            if first != second:
                found.append([kind, [m.spec() for m in recipe.methods]])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(3)
    numpy.random.seed(3)
    random.seed(3)
    given = json.load(sys.stdin)
    answer = {
        "refusals": {name: refusals(name, spec) for name, spec in given["settings"].items()},
        "moved": moved(given["recipes"]),
    }
    print(json.dumps(answer))
