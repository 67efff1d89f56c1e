"""outlay's loop against a bare torch loop that does the same, and what metering and logging cost.

Both sides train Bone in the top two layers of the packaged encoder on the questions, 16 rows of
24 tokens, AdamW, clipping, a linear schedule, every batch made from the same encoded rows. They
take turns, a block of steps each, in one process; reported is the median of the paired ratio
outlay / bare with its 95 % interval (order statistics).

    python benchmarks/loop_overhead.py --rounds 24
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from outlay import Meter, recipes
from outlay.comparison.machine import hardware, versions
from outlay.core import registry
from outlay.core.method import Step
from outlay.training.assemble import assemble
from outlay.training.backend import OneDevice
from outlay.training.data.batch import example_count, padded, token_count
from outlay.training.log import Log
from outlay.training.materials import load_materials

RESULTS = Path(__file__).parent / "results" / "loop_overhead.json"
STEPS = 8


def interval(values: list[float]) -> list[float]:
    """95 % interval of the median from order statistics."""
    ordered, n = sorted(values), len(values)
    low = max(0, int(n / 2 - 0.98 * n**0.5))
    return [ordered[low], ordered[n - 1 - low]]


def bare_block(model: nn.Module, rows: list, optimizer, start: int) -> Callable[[], None]:
    """A hand-written loop: draw, pad, forward, backward, clip, update, schedule, clear."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    place = [start]

    def run() -> None:
        for _ in range(STEPS):
            index = place[0]
            place[0] += 1
            chunk = [rows[(index * 16 + i) % len(rows)] for i in range(16)]
            batch = padded(chunk, 0, 0, 24)
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - index / 10_000)
            logits = model(**inputs).logits
            loss = nn.functional.cross_entropy(logits, batch["labels"])
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            float(loss.detach()), float(norm)

    return run


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=24)
    rounds = parser.parse_args().rounds
    recipe = recipes.get("minilm-questions").changed(
        {
            "methods": ["bone(r=8, layers_to_transform=(-2, -1))"],
            "budget": "10000steps",
            "batch.pad_to": 0,
            "model.cache_frozen": False,
            "schedule.warmup": 0.0,
        }
    )
    materials = load_materials(recipe)
    rows = materials.train
    hand = registry.build(recipe.methods[0]).adapt(materials.model(recipe)).train()
    optimizer = torch.optim.AdamW([p for p in hand.parameters() if p.requires_grad], lr=1e-3)
    bare = bare_block(hand, rows, optimizer, 0)
    assembly = assemble(
        recipe,
        model=materials.model(recipe),
        tokenizer=materials.tokenizer,
        objective=lambda requests: materials.objective(recipe, requests),
        train=copy.copy(rows),
        splits={},
        meter=Meter(),
        backend=OneDevice("cpu"),
    )
    assembly.model.train()
    loop, meter = assembly.loop, assembly.context.meter
    log = Log(Path(tempfile.mkdtemp()) / "metrics.jsonl")
    loop.on_step = lambda step, values: log.log(values, step.index)
    loop.live.engine = loop

    def ours() -> None:
        for _ in range(STEPS):
            index = int(meter.totals["steps"])
            loop.step(Step(index, index / 10_000, 0, total=10_000), meter)

    for block in (bare, ours):
        block()
    ratios = []
    for turn in range(rounds):
        pair = {}
        for name, block in (
            (("bare", bare), ("ours", ours)) if turn % 2 else (("ours", ours), ("bare", bare))
        ):
            started = time.perf_counter()
            block()
            pair[name] = (time.perf_counter() - started) / STEPS
        ratios.append(pair["ours"] / pair["bare"])
    log.close()
    # In place: what one step's metering takes, as a share of the step.
    batch = padded(rows[:16], 0, 0, 24)
    started = time.perf_counter()
    for _ in range(2_000):
        Meter().add(steps=1, micro_batches=1, flops=1, seconds=0.1,
                    examples=example_count(batch), tokens=token_count(batch))  # fmt: skip
    metering = (time.perf_counter() - started) / 2_000 / pair["bare"]
    path = Path(tempfile.mkdtemp()) / "points.jsonl"
    points = Log(path)
    started = time.perf_counter()
    for index in range(100_000):
        points.log({"loss": 0.5}, index)
    handed = time.perf_counter() - started
    points.close()
    written = time.perf_counter() - started
    results = {
        "loop / bare loop": {"median": statistics.median(ratios), "interval": interval(ratios),
                             "rounds": rounds, "target": 1.03},
        "metering / step": {"share": metering, "target": 0.01},
        "logging": {"points per second": 100_000 / written, "handed over per second":
                    100_000 / handed, "bytes per point": path.stat().st_size / 100_000,
                    "target": 100_000},
        "hardware": hardware(),
        "versions": versions(),
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
