"""Step time, memory and start-up of SVFit and LaMDA beside PEFT's LoRA, in one process.

All arms train the same base on the same batch with the same targets and AdamW, one after the
other in every round. Reported: the median over rounds of each arm's time over LoRA's of the same
round, with its 95 % interval (order statistics), the same over the bound (forward and input
gradient of the frozen base alone), the bytes that autograd keeps, the peak of a step, the frozen
bytes that stay resident, and the seconds that `adapt` takes with no decomposition cached, with
all of them in memory, and with all of them on disk.

    python benchmarks/spectral_step.py --rounds 30
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from adapter_step import (
    WORKLOADS,
    Arm,
    bound,
    hardware,
    interval,
    optimizer_of,
    peak_bytes,
    timed,
)
from torch import Tensor, nn

from outlay import LaMDA, SVFit
from outlay.nn.spectral import resident_bytes
from outlay.nn.svd import shared_cache

RESULTS = Path(__file__).parent / "results" / "spectral_step.json"
METHODS: dict[str, Any] = {
    "svfit r=8": SVFit(rank=8),
    "svfit full": SVFit(),
    "lamda r=8, B trains": LaMDA(r=8, dropout=0.0, freeze_fraction=None),
    "lamda r=8, B frozen": LaMDA(r=8, dropout=0.0, freeze_fraction=None),
    "lamda r=8 svd_zero, B frozen": LaMDA(r=8, dropout=0.0, init="svd_zero", freeze_fraction=0.0),
}
REFERENCE = "peft lora r=8"


def arm_of(model: nn.Module, batch: dict[str, Tensor]) -> Arm:
    optimizer = optimizer_of(model)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Arm(model, step)


def adapted(base: nn.Module, name: str) -> nn.Module:
    """The model as an arm trains it; "B frozen" is the state that the schedule leads to."""
    method = METHODS[name]
    model = method.adapt(copy.deepcopy(base)).eval()
    if name.endswith("B frozen"):
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".up"):
                parameter.requires_grad_(False)
    return model


def lora(base: nn.Module) -> nn.Module:
    task = "SEQ_CLS" if hasattr(base, "classifier") else "CAUSAL_LM"
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=list(SVFit().targets(base)), task_type=task
    )
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def saved_bytes(arm: Arm) -> int:
    """Bytes of the storages that autograd keeps; parameters and buffers, kept anyway, left out."""
    model = arm.model
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        arm.step()
    return sum(seen.values())


def start_up(base: nn.Module, method: Any) -> dict[str, float]:
    """Seconds of `adapt`: nothing cached, everything in memory, everything on disk."""

    def seconds() -> float:
        model = copy.deepcopy(base)
        started = time.perf_counter()
        method.adapt(model)
        return time.perf_counter() - started

    shared_cache().clear()
    found = {"cold": seconds(), "memory": seconds()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OUTLAY_SVD_CACHE"] = folder
        found["cold, writing to disk"] = seconds()
        shared_cache().clear()
        found["disk"] = seconds()
        found["disk_bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
    del os.environ["OUTLAY_SVD_CACHE"]
    return found


def measure(name: str, rounds: int, steps: int) -> dict[str, Any]:
    base, batch = WORKLOADS[name]()
    arms = {key: arm_of(adapted(base, key), batch) for key in METHODS}
    arms[REFERENCE] = arm_of(lora(base), batch)
    arms["bound"] = bound(base, batch)
    times: dict[str, list[float]] = {key: [] for key in arms}
    for arm in arms.values():
        timed(arm, 3)
    order = list(arms)
    for index in range(rounds):
        # Turned every round, so that no arm always comes after the same one.
        turn = index % len(order)
        turned = order[turn:] + order[:turn]
        for key in turned if index % 2 == 0 else turned[::-1]:
            times[key].append(timed(arms[key], steps))
    rows: dict[str, Any] = {}
    for key, arm in arms.items():
        row: dict[str, Any] = {"ms": 1e3 * statistics.median(times[key])}
        for other in (REFERENCE, "bound"):
            pairs = zip(times[key], times[other], strict=True)
            row[f"over {other}"] = interval([a / b for a, b in pairs])
        if key != "bound":
            row |= {
                "trainable": sum(p.numel() for p in arm.model.parameters() if p.requires_grad),
                "resident_frozen_bytes": resident_bytes(arm.model),
                "saved_bytes": saved_bytes(arm),
                "peak_bytes": peak_bytes(arm),
            }
        rows[key] = row
        print(line(name, key, row), flush=True)
    startup = {key: start_up(base, METHODS[key]) for key in ("svfit full", "lamda r=8, B trains")}
    for key, found in startup.items():
        parts = ", ".join(f"{k} {v:.2f} s" for k, v in found.items() if k != "disk_bytes")
        print(f"{name:14s} {key:29s} start-up: {parts}", flush=True)
    return {"workload": name, "arms": rows, "start_up_seconds": startup}


def line(workload: str, key: str, row: dict[str, Any]) -> str:
    middle, low, high = row[f"over {REFERENCE}"]
    text = (
        f"{workload:14s} {key:29s} {row['ms']:7.1f} ms  LoRA x{middle:.3f} [{low:.3f}, {high:.3f}]"
        f"  bound x{row['over bound'][0]:.2f}"
    )
    if "saved_bytes" in row:
        text += (
            f"  saved {row['saved_bytes'] / 2**20:.1f}, peak {row['peak_bytes'] / 2**20:.1f}, "
            f"frozen {row['resident_frozen_bytes'] / 2**20:.1f} MiB"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=3, help="steps an arm and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = [measure(name, options.rounds, options.steps) for name in options.workload or WORKLOADS]
    report = {
        "hardware": hardware(options.threads),
        "load_average": os.getloadavg(),
        "rounds": options.rounds,
        "steps_a_round": options.steps,
        "dtype": "float32",
        "methods": {name: method.spec() for name, method in METHODS.items()},
        "results": found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
