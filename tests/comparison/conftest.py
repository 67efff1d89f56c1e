"""Made-up comparisons that look like real ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from outlay.comparison.judge import judge

ARMS = {
    # name: (shift of the metric, trainable parameters, seconds, adapter bytes)
    "Bone r=16": (0.082, 98_304, 8.3, 393_216),
    "LoRA r=8": (0.079, 26_118, 8.9, 104_472),
    "AdaLoRA": (0.078, 31_540, 9.6, 126_160),
    "SVFit": (0.066, 9_222, 8.1, 36_888),
    "frozen probe": (0.0, 2_310, 4.2, 9_240),
    "TF-IDF + logistic regression": (-0.03, 0, 0.9, 0),
}
RECIPE = """\
name: {name}
model: {{asset: minilm}}
task: sequence-classification
methods: ["{method}"]
optimizer: {{name: adamw, lr: {rate}, weight_decay: 0.01}}
batch: {{size: 16, length: 24}}
budget: 150steps
"""


def curve(generator: Any, points: int, arm: tuple, start: float, end: float) -> list[list[float]]:
    steps = np.linspace(1, 150 if points <= 150 else 10 * points, points).round()
    share = steps / steps[-1]
    value = end + (start - end) * np.exp(-5 * share) + generator.normal(0, 0.012, points)
    seconds = np.cumsum(generator.uniform(0.8, 1.2, points)) * arm[2] / points
    return np.stack([steps, steps * 384, steps * 3.1e10, seconds, value], axis=1).tolist()


def make(
    arms: dict[str, tuple] | None = None, seeds: int = 6, points: int = 150, curves: int = 2
) -> dict[str, Any]:
    """A comparison of arms that share hard and easy seeds, judged."""
    arms = ARMS if arms is None else arms
    generator = np.random.default_rng(11)
    hard = generator.normal(0, 0.009, seeds)
    metric = "test accuracy"
    runs = []
    for name, arm in arms.items():
        for seed in range(seeds):
            accuracy = float(np.round(0.78 + arm[0] + hard[seed] + generator.normal(0, 0.004), 3))
            drawn = {
                f"curve {number}": curve(generator, points, arm, 0.3, accuracy)
                for number in range(curves - 2)
            }
            drawn["validation accuracy"] = curve(generator, points, arm, 0.18, accuracy)
            if curves > 1:
                drawn["training loss"] = curve(generator, points, arm, 1.8, 0.9 - arm[0])
            meter = {
                "steps": 150, "micro_batches": 150, "tokens": 57_600, "examples": 2_400,
                "flops": 4.6e12 + arm[1] * 1.2e6, "seconds": arm[2] + generator.normal(0, 0.2),
                "trainable_parameters": arm[1], "total_parameters": 22_713_216 + arm[1],
                "adapter_bytes": arm[3], "peak_bytes": 180_000_000 + 900 * arm[1],
            }  # fmt: skip
            if name == "AdaLoRA":
                meter["importance/flops"] = 2.2e10
            runs.append(
                {
                    "arm": name, "seed": seed, "status": "done", "meter": meter, "curves": drawn,
                    "metrics": {metric: accuracy, "test macro-F1": accuracy - 0.02},
                }
            )  # fmt: skip
    table: dict[str, dict[int, float]] = {}
    for run in runs:
        table.setdefault(run["arm"], {})[run["seed"]] = run["metrics"][metric]
    trainable = {name: arm[1] for name, arm in arms.items()}
    judged = (
        judge(table, metric=metric, trainable=trainable, margin=0.02, resamples=200)
        if seeds > 1
        else {"metric": metric, "higher_is_better": True}
    )
    return {
        **judged,
        "title": "Adapters for question classification at 150 steps",
        "budget": "150 steps of 16 × 24 tokens",
        "runs": runs,
        "recipes": {
            name: RECIPE.format(name=name, method=name.split()[0].lower(), rate=10 ** -(3 + i % 2))
            for i, name in enumerate(arms)
        },
        "versions": {"outlay": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": "2 cores of an x86-64 server, 8 GB, Linux 6.1",
        "command": "outlay compare minilm-questions --arms bone,lora,adalora,svfit --seeds 6 "
        "--budget 150steps --margin 0.02 --out runs/questions",
        "notes": ["Learning rates come from a grid on the validation split; not tuned here."],
        "arm_notes": {"TF-IDF + logistic regression": "no encoder"},
    }


@pytest.fixture
def comparison() -> Callable[..., dict[str, Any]]:
    """Function that makes the data of a report."""
    return make
