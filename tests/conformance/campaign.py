"""Runs a recipe again and again in children that are killed for real, and goes on with it.

Reads {"recipe": YAML, "out": folder, "kills": [{"share": of the time that a whole run takes} or
{"sync": count}]} and prints what the last, unkilled, start gave. The parent never trains, so its
children start clean.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

import outlay
from outlay.training import folders
from outlay.training.materials import Materials, load_materials
from outlay.training.recipe import Recipe


def child(
    recipe: Recipe, materials: Materials, out: str, kill: dict[str, Any], answer: int
) -> None:
    """Train in this process, which may kill itself inside the nth sync of a save."""
    torch.set_num_threads(1)
    if "sync" in kill:
        real, left = folders._sync, [kill["sync"]]

        def sync(path: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path)

        folders._sync = sync
    result = outlay.run(recipe, out=out, materials=materials)
    with os.fdopen(answer, "w") as file:
        json.dump(asdict(result), file)


def start(
    recipe: Recipe, materials: Materials, out: str, kill: dict[str, Any], whole: float = 0.0
) -> tuple[bool, str]:
    """One start: whether it was killed, and what it said."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        try:
            child(recipe, materials, out, kill, writing)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(0)
    os.close(writing)
    if "share" in kill:
        time.sleep(kill["share"] * whole)
        os.kill(process, signal.SIGKILL)
    with os.fdopen(reading) as file:
        said = file.read()
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a start failed instead of going on")
    return os.WIFSIGNALED(status), said


if __name__ == "__main__":
    given = json.load(sys.stdin)
    recipe = Recipe.from_yaml(given["recipe"])
    # Read and imported once: the children inherit it and come to their first step at once.
    materials = load_materials(recipe)
    whole = 0.0
    if any("share" in kill for kill in given["kills"]):
        began = time.monotonic()
        start(recipe, materials, f"{given['out']}-whole", {})
        whole = time.monotonic() - began
    killed = [start(recipe, materials, given["out"], kill, whole)[0] for kill in given["kills"]]
    began = time.monotonic()
    _, said = start(recipe, materials, given["out"], {})
    took = time.monotonic() - began
    print(json.dumps({"killed": killed, "result": json.loads(said), "seconds": took}))
