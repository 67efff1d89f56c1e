"""One step of CLASSP beside torch's AdaGrad (foreach) on the same parameters and gradients.

Every round takes one step of each optimizer, in turn, on tensors shaped like a small transformer's.
Reported: the median over rounds of each arm's process time over AdaGrad's of the same round, with
its 95 % interval (order statistics), and the bytes of state a parameter. The thresholds let about
half of the elements move.

    python benchmarks/classp_step.py --rounds 60
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from adapter_step import interval
from torch import nn

from outlay import CLASSPOptimizer
from outlay.comparison.machine import hardware, versions

RESULTS = Path(__file__).parent / "results" / "classp_step.json"
REFERENCE = "torch adagrad"
# Blocks of width 384 with a feed-forward part of 1536, and an embedding.
BLOCK = ((384, 384),) * 4 + ((1536, 384), (384, 1536)) + ((384,),) * 8 + ((1536,),)
SHAPES = BLOCK * 4 + ((8192, 384),)
SETTINGS: dict[str, dict[str, Any]] = {
    "p=1": {},
    "p=2": {"p": 2},
    "p=1, threshold": {"threshold": 5e-5},
    "p=2, threshold": {"p": 2, "threshold": 5e-5},
    "p=1, no decay": {"apply_decay": False},
    "p=1.5": {"p": 1.5},
    "p=1, quantile": {"threshold": "quantile:0.5"},
}
LIMIT = {"p=1", "p=2", "p=1, threshold", "p=2, threshold"}  # held to 1.2 times AdaGrad


def parameters(device: str) -> list[nn.Parameter]:
    """The same values and gradients for every arm."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in SHAPES:
        parameter = nn.Parameter(torch.randn(shape, generator=generator).to(device))
        parameter.grad = (torch.randn(shape, generator=generator) * 1e-2).to(device)
        found.append(parameter)
    return found


def seconds(optimizer: torch.optim.Optimizer, device: str) -> float:
    """Time of one step: the process's own on a CPU, the clock's after the device is done."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    started = clock()
    optimizer.step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - started


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state a parameter."""
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return held / sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = options.device
    arms: dict[str, torch.optim.Optimizer] = {
        REFERENCE: torch.optim.Adagrad(parameters(device), lr=1e-2, foreach=True)
    }
    for name, settings in SETTINGS.items():
        arms[name] = CLASSPOptimizer(parameters(device), lr=1e-2, **settings)
    for optimizer in arms.values():
        optimizer.step()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, optimizer in arms.items():
            times[name].append(seconds(optimizer, device))
    found: dict[str, Any] = {}
    for name, optimizer in arms.items():
        ratios = [a / b for a, b in zip(times[name], times[REFERENCE], strict=True)]
        found[name] = {
            "milliseconds": 1e3 * statistics.median(times[name]),
            "over_adagrad": statistics.median(ratios),
            "interval": interval(ratios),
            "state_bytes_a_parameter": state_bytes(optimizer),
        }
        if isinstance(optimizer, CLASSPOptimizer):
            found[name]["moved"] = optimizer.update_density()
        print(f"{name:16s} {found[name]['milliseconds']:8.2f} ms  "
              f"{found[name]['over_adagrad']:.2f} x")  # fmt: skip
    slow = [name for name in LIMIT if found[name]["over_adagrad"] > 1.2]
    facts = {
        "device": device, "rounds": options.rounds, "hardware": hardware(),
        "versions": versions(), "parameters": sum(p.numel() for p in parameters("cpu")),
        "arms": found, "above_1.2": slow,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print("above 1.2:", ", ".join(slow) or "none")


if __name__ == "__main__":
    main()
