"""The error of a plan: what it said against what the run took, over shapes, methods and lengths.

Four architectures, three methods, two lengths. Every cell has a process of its own and compares a
plan, without and with `--measure`, with a run of the same recipe:

- parameters: those of the adapted model, counted one by one; they must agree exactly.
- FLOPs: torch's own counter (`torch.utils.flop_counter.FlopCounterMode`, not outlay's) over a real
  forward and backward of every batch that the run draws, with attention forced to plain matrix
  products, because that counter gives 0 for attention on CPU; within 1 %.
- peak bytes: tensors that are held, plus the largest running sum of the profiler's memory events,
  of every step of the run, watchers and update included; within 10 %. Beside it, without a bound:
  growth of the resident set over the same steps, which sees libraries and the allocator as well.
- seconds: those of `run`, in turns with the plan; the median ratio, within 20 %. It does not
  decide the exit code: it says as much about the machine's other work as about the plan.

    OMP_NUM_THREADS=1 python benchmarks/plan_error.py

Exits with 1 if parameters, FLOPs or bytes are out of bounds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan_error.json"
METHODS = {
    "full": "full",
    "bone": "bone(r=8)",
    "adalora": "adalora(init_r=6, target_r=4)",
}
TASKS = {
    "bert": "sequence-classification",
    "gpt2": "causal-language-modeling",
    "llama": "causal-language-modeling",
    "t5": "sequence-to-sequence",
}
LENGTHS = (32, 512)
ROWS_A_STEP = {32: 8, 512: 2}
STEPS = {32: 40, 512: 8}
BOUNDS = {
    "parameters": 0.0,
    "flops": 0.01,
    "bytes": 0.10,
    "bytes measured": 0.10,
    "seconds": 0.20,
}
DECIDING = ("parameters", "flops", "bytes", "bytes measured")


def rows_of(length: int) -> list[dict[str, str]]:
    """Rows of half to all of the length in bytes, the same ones in every process."""
    draw = random.Random(length)
    words = ("apple", "pear", "plum", "wave", "salt", "tide", "saw", "file")

    def text() -> str:
        wanted, made = draw.randint(length // 2, length), ""
        while len(made) < wanted:
            made += f"{draw.choice(words)} "
        return made[:wanted]

    return [
        {"text": text(), "label": "abc"[i % 3], "prompt": text(), "completion": text()}
        for i in range(48)
    ]


def recipe_of(architecture: str, method: str, length: int, steps: int) -> Any:
    """One cell's recipe. T5's prompt and completion have the whole length each."""
    from outlay import Recipe

    columns = {"text": "text", "label": "label"}
    if TASKS[architecture] == "sequence-to-sequence":
        columns = {"prompt": "prompt", "completion": "completion"}
    elif TASKS[architecture] == "causal-language-modeling":
        columns = {"text": "text"}
    path = Path(tempfile.gettempdir()) / f"plan-error-{os.getpid()}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(length)))
    return Recipe(
        name="cell",
        model={"config": architecture, "layers": 2, "width": 256, "vocabulary": 2048},
        task=TASKS[architecture],
        data={"path": str(path), **columns},
        methods=[METHODS.get(method, method)],
        batch={"size": ROWS_A_STEP[length], "length": length},
        budget=f"{steps}steps",
    )


# ---- what the run took ---------------------------------------------------------------------------


def assembled(recipe: Any, materials: Any) -> Any:
    """The run put together as `run` does it, not yet started."""
    from outlay.core.meter import FlopTable
    from outlay.training.backend import OneDevice
    from outlay.training.keeper import Silent
    from outlay.training.specs import StageSpec
    from outlay.training.stages import Runner

    runner = Runner(recipe, materials, Path("."), OneDevice("cpu"), Silent(), (), FlopTable(), {})
    return runner.assembled(StageSpec(name="main", start="original"), recipe, 0, None)


def parameters_of(recipe: Any, materials: Any) -> dict[str, int]:
    """Parameters of the real adapted model, counted one by one."""
    model = recipe.methods[0].adapt(materials.model(recipe))
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"total": sum(n for n, _ in counts), "trainable": sum(n for n, on in counts if on)}


def flops_of(recipe: Any, materials: Any) -> int:
    """FLOPs of every batch that the run draws, by torch's counter over real passes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from outlay.core.losses import model_inputs
    from outlay.core.method import Step

    model = recipe.methods[0].adapt(materials.model(recipe)).train()
    drawer = assembled(recipe, materials).loop.drawer
    known: dict[Any, int] = {}
    total = 0
    for index in range(int(recipe.budget.amount)):
        for batch in drawer.draw(Step(index, 0.0, recipe.seed)):
            inputs = model_inputs(batch) | {"labels": batch["labels"]}
            key = tuple((name, tuple(value.shape)) for name, value in inputs.items())
            if key not in known:
                counter = FlopCounterMode(display=False)
                with sdpa_kernel(SDPBackend.MATH), counter:
                    model(**inputs).loss.backward()
                known[key] = counter.get_total_flops()
                model.zero_grad(set_to_none=True)
            total += known[key]
    drawer.close()
    return total


def steps_of(assembly: Any) -> Iterator[Any]:
    """The run's steps as functions to call, one after the other."""
    from outlay.core.method import Step

    loop, meter = assembly.loop, assembly.context.meter
    count = int(assembly.recipe.budget.amount)
    assembly.live.engine = loop
    assembly.model.train()
    for index in range(count):
        step = Step(index, index / count, assembly.recipe.seed, total=count)
        yield lambda step=step: loop.step(step, meter)
    loop.drawer.close()


def held_by(assembly: Any) -> list[Any]:
    """Every tensor that outlives a step: model, optimizer, objective and watchers."""
    import torch

    kept = [*assembly.model.parameters(), *assembly.model.buffers()]
    kept += [*assembly.objective.parameters(), *assembly.objective.buffers()]
    stack = [watcher.state_dict() for watcher in assembly.watchers]
    stack += [state for o in assembly.live.optimizers for state in o.state.values()]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            kept.append(item)
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, (list, tuple)):
            stack += item
    return kept


def peak_of(recipe: Any, materials: Any) -> int:
    """Peak bytes over every step of the run."""
    from outlay.training.planning.memory import measured_peak

    assembly = assembled(recipe, materials)
    return max(
        measured_peak(step, assembly.loop.backend, held_by(assembly)) for step in steps_of(assembly)
    )


def resident_growth(recipe: Any, materials: Any) -> int | None:
    """What the same steps add to the process's resident set at most; None where unknown."""
    resettable = Path("/proc/self/clear_refs")
    try:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        gc.collect()
        resettable.write_text("5")
        before = _status("VmRSS")
        assembly = assembled(recipe, materials)
        for step in steps_of(assembly):
            step()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise OSError(f"no {name} in /proc/self/status")
    return int(found[1]) * 1024


# ---- one cell ------------------------------------------------------------------------------------


def cell(architecture: str, method: str, length: int, steps: int, repeats: int) -> dict[str, Any]:
    """Plan and run of one recipe; with no repeats nothing is timed."""
    from outlay.training.materials import load_materials
    from outlay.training.planning.plan import plan
    from outlay.training.runs import run

    recipe = recipe_of(architecture, method, length, steps)
    materials = load_materials(recipe)
    # First of all, while the process holds nothing that it could use again.
    grown = resident_growth(recipe, materials) if repeats else None
    planned = plan(recipe, device="cpu")
    measured = plan(recipe, device="cpu", measure=True)
    seconds = []
    for turn in range(repeats):
        foreseen = plan(recipe, device="cpu", measure=True).seconds if turn else measured.seconds
        with tempfile.TemporaryDirectory() as folder:
            took = run(recipe, out=folder, device="cpu", materials=materials).meter["seconds"]
        seconds.append((foreseen, took))
    real = parameters_of(recipe, materials)
    flops, peak = flops_of(recipe, materials), peak_of(recipe, materials)
    off = sum(abs(planned.params[name] - real[name]) for name in real)
    ratios = {
        "parameters": 1 + off / real["total"],
        "flops": planned.flops / flops,
        "bytes": planned.memory_bytes["peak"] / peak,
        "bytes measured": measured.memory_bytes["peak"] / peak,
    }
    if repeats:
        ratios["seconds"] = statistics.median(a / b for a, b in seconds)
    return {
        "architecture": architecture,
        "method": method,
        "length": length,
        "parameters": real,
        "flops": flops,
        "bytes": peak,
        "resident bytes": grown,
        "seconds": statistics.median(b for _, b in seconds) if seconds else None,
        "ratios": ratios,
        "seconds ratios": [a / b for a, b in seconds],
    }


def out_of_bounds(found: dict[str, Any]) -> list[str]:
    """Names of the quantities that a cell has out of their bounds; time is not among them."""
    return [n for n in DECIDING if abs(found["ratios"][n] - 1) > BOUNDS[n]]


# ---- the table -----------------------------------------------------------------------------------


def in_own_process(architecture: str, method: str, length: int, given: Any) -> dict[str, Any]:
    """A cell in a fresh process, whose resident set holds nothing of other cells."""
    command = [
        sys.executable, __file__, "--cell", f"{architecture} {method} {length}",
        "--repeats", str(given.repeats),
    ]  # fmt: skip
    # Large blocks go back to the system at once, so that the resident set follows the tensors.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{architecture} {method} {length} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def line(found: dict[str, Any]) -> str:
    """One row of the printed table."""
    grown = found["resident bytes"]
    cells = [f"{found['architecture']:6}{found['method']:8}{found['length']:>4}"]
    cells += [f"{found['ratios'].get(name, float('nan')):>15.4f}" for name in BOUNDS]
    cells.append("" if grown is None else f"{grown / found['bytes']:>9.2f}")
    return "".join([*cells, f"  {' '.join(out_of_bounds(found))}"])


def main() -> None:
    """Measure every cell, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="plans and runs that are timed")
    parser.add_argument("--only", default="", help="cells whose name holds this text")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        warnings.simplefilter("ignore")
        architecture, method, length = given.cell.split()
        print(
            json.dumps(cell(architecture, method, int(length), STEPS[int(length)], given.repeats))
        )
        return
    from outlay.comparison.machine import hardware, versions

    print("plan / run" + " " * 8 + "".join(f"{name:>15}" for name in BOUNDS) + " resident")
    cells: list[dict[str, Any]] = []
    for architecture, method, length in itertools.product(TASKS, METHODS, LENGTHS):
        if given.only in f"{architecture} {method} {length}":
            cells.append(in_own_process(architecture, method, length, given))
            print(line(cells[-1]), flush=True)
    worst = worst_of(cells)
    print("worst".ljust(18) + "".join(f"{ratio:>15.4f}" for ratio in worst.values()))
    if not given.only:
        results = {
            "what": "plan over run; bytes measured and seconds are those of plan --measure",
            "bounds": BOUNDS,
            "worst": worst,
            "methods": METHODS,
            "steps": STEPS,
            "rows a step": ROWS_A_STEP,
            "repeats": given.repeats,
            "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count(),
            "cells": cells,
            "hardware": hardware(),
            "versions": versions(),
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if bad := [c for c in cells if out_of_bounds(c)]:
        sys.exit(f"{len(bad)} of {len(cells)} cells are out of bounds")


def worst_of(cells: list[dict[str, Any]]) -> dict[str, float]:
    """The ratio furthest from 1 of every quantity that was measured."""
    return {
        name: max((c["ratios"][name] for c in cells), key=lambda ratio: abs(ratio - 1))
        for name in BOUNDS
        if all(name in c["ratios"] for c in cells)
    }


if __name__ == "__main__":
    main()
