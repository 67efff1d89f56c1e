"""What a student's step costs over its parts, in one process.

A student's step with `feature_distillation` is compared with the sum of what it cannot do without:
one training step without the method, one forward and backward pass of the student on the clean
input, and one forward pass of the teacher on it. All four are timed in turn on the same batches,
round after round. Reported: the median over rounds of the paired ratio with its 95 % interval
(order statistics), and the median time of each part. Steps go through the training loop, drawing
and updating included.

    python benchmarks/self_distillation_step.py --rounds 30
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

from outlay import Recipe
from outlay.core.losses import model_inputs
from outlay.core.meter import FlopTable
from outlay.core.method import Step
from outlay.core.still import still
from outlay.training.assemble import Assembly
from outlay.training.backend import OneDevice
from outlay.training.keeper import Silent
from outlay.training.materials import load_materials
from outlay.training.specs import StageSpec
from outlay.training.stages import Runner

RESULTS = Path(__file__).parent / "results" / "self_distillation_step.json"
TARGET = 1.05
METHOD = "feature_distillation(teacher='original')"
WORKLOADS: dict[str, dict[str, Any]] = {
    "vit 32x(16 patches)": {
        "task": "masked-image-modeling",
        "model": {"config": "vit", "layers": 4, "width": 128},
        "data": {"asset": "digits"},
        "batch": {"size": 32},
    },
    "minilm 16x24": {
        "task": "masked-language-modeling",
        "model": {"asset": "minilm", "dropout": 0.0},
        "data": {"asset": "questions", "limit": 500},
        "batch": {"size": 16, "length": 24, "pad_to": 0},
    },
}


def assembled(fields: dict[str, Any], *methods: str) -> Assembly:
    recipe = Recipe(methods=methods, budget="1000000steps", **fields)
    runner = Runner(
        recipe, load_materials(recipe), Path("."), OneDevice("cpu", "float32"), Silent(), (),
        FlopTable(), {},
    )  # fmt: skip
    stage = runner.assembled(StageSpec(name="main", start="original"), recipe, 0, None)
    stage.live.engine = stage.loop
    stage.model.train()
    return stage


def parts(fields: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """The student's step and its three parts."""
    plain, student = assembled(fields), assembled(fields, METHOD)
    alone = copy.deepcopy(plain.model)
    teacher = still(copy.deepcopy(plain.model))
    clean = model_inputs(student.loop.drawer.draw(Step(0, 0.0, 0))[0]["clean"])

    def step(stage: Assembly) -> None:
        meter = stage.context.meter
        stage.loop.step(Step(int(meter.totals["steps"]), 0.0, 0, total=10**6), meter)

    def extra_pass() -> None:
        states = alone(**clean, output_hidden_states=True).hidden_states[-1]
        states[:, 0].square().sum().backward()
        alone.zero_grad(set_to_none=True)

    def look() -> None:
        with torch.no_grad():
            teacher(**clean, output_hidden_states=True)

    return {
        "student step": lambda: step(student),
        "plain step": lambda: step(plain),
        "extra pass": extra_pass,
        "teacher": look,
    }


def measured(fields: dict[str, Any], rounds: int) -> dict[str, Any]:
    works = parts(fields)
    for work in works.values():
        for _ in range(3):
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    ratios = sorted(
        whole / sum(rest) for whole, *rest in zip(*(times[name] for name in works), strict=True)
    )
    cut = max(0, round(rounds / 2 - 0.98 * rounds**0.5))
    return {
        "ratio": round(statistics.median(ratios), 4),
        "interval": [round(ratios[cut], 4), round(ratios[-1 - cut], 4)],
        "milliseconds": {n: round(1000 * statistics.median(t), 2) for n, t in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="feature_distillation")
    found = {}
    for name, fields in WORKLOADS.items():
        entry = found[name] = measured(fields, options.rounds)
        low, high = entry["interval"]
        print(f"{name}: {entry['ratio']} ({low} to {high}); {entry['milliseconds']}", flush=True)
    options.out.parent.mkdir(exist_ok=True)
    facts = {"rounds": options.rounds, "target": TARGET, "torch": torch.__version__,
             "machine": platform.machine(), "threads": 1, "clock": "process CPU time"}  # fmt: skip
    options.out.write_text(json.dumps(facts | {"workloads": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
