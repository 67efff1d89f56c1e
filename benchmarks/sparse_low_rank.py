"""Time and bytes of SLTrain's layer beside the dense linear layer, in one process.

Time: forward and backward of one layer in float32, all arms one after the other in every round.
Reported: the median over rounds of each arm's time over the dense layer's of the same round with
its 95 % interval (order statistics), and beside "materialize" the bound 1.1 (1 + 4 r / (3 t)) that
it should stay below. Bytes: weights and gradients in bfloat16 and moments in float32 of a
LLaMA-shaped model after one step, measured as the storages that are there, against the formula;
and beside it the dense model under AdamW, GaLore and APOLLO, each measured in the same run.

    python benchmarks/sparse_low_rank.py --rounds 30
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from adapter_step import CLOCKS, hardware, interval
from torch import Tensor, nn

from outlay import Apollo, GaLore, LowRank, SLTrain
from outlay.core.context import Context
from outlay.nn.sparse_low_rank import LowRankLinear, SparseLowRankLinear

RESULTS = Path(__file__).parent / "results" / "sparse_low_rank.json"
SHAPES = ((1376, 512, 128), (512, 512, 128))
TOKENS = (16, 256, 2048)
DENSITIES = (0.03, 0.1)
SETTINGS = SimpleNamespace(betas=(0.9, 0.999), eps=1e-8)
# Width, feed-forward width, blocks, rank, density of the paper's shapes.
MODELS = {"9M": (128, 352, 4, 32, 0.03), "60M": (512, 1376, 8, 128, 0.03)}


# ---- time ----------------------------------------------------------------------------------------


def layers(m: int, n: int, r: int, density: float) -> dict[str, nn.Module]:
    def sparse(mode: Any) -> nn.Module:
        return SparseLowRankLinear(n, m, r, density, 32.0, False, seed=0, mode=mode)

    return {
        "dense": nn.Linear(n, m, bias=False),
        "materialize": sparse("materialize"),
        "factored": sparse("factored"),
        "auto": sparse("auto"),
        "low_rank": LowRankLinear(n, m, r, bias=False, seed=0),
    }


def pass_of(layer: nn.Module, x: Tensor, pull: Tensor) -> Callable[[], Any]:
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, pull)


def timings(shape: tuple[int, int, int], tokens: int, density: float, rounds: int, clock: Any):
    m, n, r = shape
    x, pull = torch.randn(tokens, n, requires_grad=True), torch.randn(tokens, m)
    work = {name: pass_of(layer, x, pull) for name, layer in layers(m, n, r, density).items()}
    calls = max(1, 256 // tokens)
    times: dict[str, list[float]] = {name: [] for name in work}
    order = list(work)
    for index in range(-2, rounds):
        # Turned every round, so that no arm always comes after the same one.
        turn = index % len(order)
        for name in order[turn:] + order[:turn]:
            started = clock()
            for _ in range(calls):
                work[name]()
            if index >= 0:
                times[name].append((clock() - started) / calls)
    rows = {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["dense"], strict=True)]
        rows[name] = {"ms": 1e3 * statistics.median(values), "over dense": interval(ratios)}
    return {
        "shape": shape, "tokens": tokens, "density": density,
        "bound": 1.1 * (1 + 4 * r / (3 * tokens)), "arms": rows,
    }  # fmt: skip


def shown(found: dict[str, Any]) -> Iterator[str]:
    m, n, r = found["shape"]
    yield f"{m} x {n}, r = {r}, density {found['density']}, {found['tokens']} tokens"
    for name, row in found["arms"].items():
        middle, low, high = row["over dense"]
        bound = f"  bound {found['bound']:.3f}" if name == "materialize" else ""
        yield f"  {name:12s} {row['ms']:8.3f} ms  x{middle:.3f} [{low:.3f}, {high:.3f}]{bound}"


# ---- bytes ---------------------------------------------------------------------------------------


class WideAdamW(torch.optim.Optimizer):
    """AdamW with float32 moments beside parameters of any type: what the formula counts."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 1e-3, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.grad.float()
                if not state:
                    state |= {k: torch.zeros_like(gradient) for k in ("exp_avg", "exp_avg_sq")}
                state["exp_avg"].lerp_(gradient, 0.1)
                state["exp_avg_sq"].lerp_(gradient.square(), 0.001)
                update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])


def llama(name: str) -> nn.Module:
    width, inner, blocks, *_ = MODELS[name]
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=max(4, width // 64), tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def bytes_of(tensors: Any) -> int:
    """Bytes of distinct storages."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes after one step on random gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()
    places = [b for n, b in model.named_buffers() if n.endswith("positions")]
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    found = {
        "weights": bytes_of(model.parameters()),
        "gradients": bytes_of(p.grad for p in model.parameters() if p.grad is not None),
        "moments": bytes_of(t for t in state if t.dim()),
        "places": bytes_of(places),
    }
    return found | {"total": sum(found.values())}


def formula(name: str, kind: str) -> int:
    """2 + 2 + 8 bytes a parameter, 4 a place; projections in float32."""
    width, inner, blocks, r, density = MODELS[name]
    outside = 2 * 32000 * width + width * (2 * blocks + 1)
    shapes = blocks * (4 * [(width, width)] + 2 * [(inner, width)] + [(width, inner)])
    dense = outside + sum(m * n for m, n in shapes)
    if kind in ("galore", "apollo"):
        small = sum(r * (2 * max(s) + min(s)) for s in shapes)
        return 4 * dense + 4 * (2 * outside + small)
    places = sum(int(density * m * n) for m, n in shapes) if kind == "sltrain" else 0
    low = outside + sum(r * (m + n) for m, n in shapes) + places
    return 12 * (dense if kind == "adamw" else low) + 4 * places


def memory(name: str) -> list[dict[str, Any]]:
    *_, r, density = MODELS[name]
    methods: dict[str, Any] = {
        "adamw": None,
        "low_rank": LowRank(rank=r),
        "sltrain": SLTrain(rank=r, density=density),
        "galore": GaLore(rank=r),
        "apollo": Apollo(rank=r),
    }
    rows = []
    for kind, method in methods.items():
        model = llama(name)
        if kind in ("low_rank", "sltrain"):
            model = method.adapt(model)
        names, parameters = zip(*model.named_parameters(), strict=True)
        groups = [{"params": list(parameters), "names": list(names), "lr": 1e-3}]
        if kind in ("galore", "apollo"):
            optimizer = method.build(groups, SETTINGS, Context())
        else:
            optimizer = WideAdamW(groups)
        found, expected = held(model, optimizer), formula(name, kind)
        row = {"model": name, "arm": kind, **found, "formula": expected}
        row["off"] = found["total"] / expected - 1
        rows.append(row)
        parts = ", ".join(f"{k} {found[k] / 2**20:.1f}" for k in found)
        print(
            f"{name:4s} {kind:9s} {parts} MiB; formula off by {100 * row['off']:+.2f} %", flush=True
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="process")
    parser.add_argument("--tokens", type=int, action="append", help="default: 16, 256, 2048")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    timed = []
    for shape in SHAPES:
        for density in DENSITIES:
            for tokens in options.tokens or TOKENS:
                clock = CLOCKS[options.clock]
                timed.append(timings(shape, tokens, density, options.rounds, clock))
                print("\n".join(shown(timed[-1])), flush=True)
    table = [row for name in options.model or MODELS for row in memory(name)]
    report = {
        "hardware": hardware(options.threads),
        "load_average": os.getloadavg(),
        "clock": options.clock,
        "rounds": options.rounds,
        "dtype": {"time": "float32", "bytes": "bfloat16 weights and gradients, float32 moments"},
        "time": timed,
        "bytes": table,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(report["hardware"])
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
