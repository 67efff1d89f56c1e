"""Prefill of ragged prompts: packed beside padded, length-sorted and one at a time.

The prompts have the lengths of real documents: docstrings of the Python standard library, their
characters over 4, from 2 to 1,024 tokens, in random order, with random tokens (the time of a dense
model does not depend on them). At least 64 prompts and two batches of each size, so that sorting by
length has something to sort. Reported: seconds a prompt (median over
rounds that run all arms in turn), the speed-up over padded prefill of the same round with its 95 %
interval (order statistics), that over the ratio of computed tokens, peak memory beside weights and
returned cache, and the largest difference of a next-token logit from that of the prompt alone.

    python benchmarks/prefill.py --batch 16 --batch 64
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import sysconfig
from pathlib import Path
from typing import Any

import torch
import transformers
from adapter_step import hardware, interval

from outlay.comparison.prefills import Prefills, measure_prefill

RESULTS = Path(__file__).parent / "results" / "prefill.json"
LONGEST, VOCABULARY = 1024, 8192


def docstring_lengths() -> list[int]:
    """Tokens of every docstring of the standard library, four characters a token."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        found += [min(LONGEST, max(2, len(text) // 4)) for text in texts if text]
    return found


def model_of(layers: int, width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers,
        intermediate_size=-(-8 * width // 24) * 8, num_attention_heads=width // 64,
        max_position_embeddings=LONGEST, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def prompts_of(lengths: list[int], count: int, seed: int) -> list[list[int]]:
    """Documents drawn at random; the longest possible one is among them."""
    draw = random.Random(seed)
    chosen = [LONGEST, *draw.sample(lengths, count - 1)]
    draw.shuffle(chosen)
    return [[draw.randrange(1, VOCABULARY) for _ in range(length)] for length in chosen]


def row_of(found: Prefills) -> dict[str, Any]:
    row = found.to_json()
    padded = found.arms["padded"]
    for name, arm in row["arms"].items():
        middle, low, high = interval(found.speedup(name))
        alone = interval(found.speedup(name, over="one by one"))
        peak_share = arm["peak_bytes"] / max(1, padded.peak_bytes)
        arm |= {
            "speedup_interval": [low, high],
            "speedup_over_token_ratio": middle / arm["token_ratio"],
            "speedup_over_one_by_one": list(alone),
            "peak_over_padded_times_token_ratio": peak_share * arm["token_ratio"],
        }
        milliseconds = 1e3 * arm["seconds_per_prompt"]
        print(
            f"batch {found.batch_size:4d} {name:12s} {milliseconds:7.2f} ms/prompt"
            f"  x{middle:.2f} [{low:.2f}, {high:.2f}] of x{arm['token_ratio']:.2f} tokens"
            f"  one by one x{alone[0]:.2f}  peak {arm['peak_bytes'] / 2**20:.0f} MiB"
            f"  gap {arm['logits_gap']:.1e}",
            flush=True,
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, action="append", help="16 and 64 by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=41)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, lengths = model_of(options.layers, options.width), docstring_lengths()
    report: dict[str, Any] = {
        "hardware": hardware(options.threads),
        "load_average": os.getloadavg(),
        "rounds": options.rounds,
        "dtype": "float32",
        "model": {"layers": options.layers, "width": options.width, "vocabulary": VOCABULARY},
        "documents": len(lengths),
        "results": [],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for batch in options.batch or [16, 64]:
        prompts = prompts_of(lengths, max(64, 2 * batch), options.seed)
        report["results"].append(row_of(measure_prefill(model, prompts, batch, options.rounds)))
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
