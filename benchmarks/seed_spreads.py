"""Seed spreads of the packaged recipes, which `compare` plans with before it starts.

Each recipe is compared with itself under a few usual arms at its own budget; for every metric the
spreads of the paired differences between arms are pooled. Interrupted, it goes on where it was.

    python benchmarks/seed_spreads.py --out runs/spreads
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np

from outlay import compare, recipes
from outlay.comparison.machine import hardware, versions
from outlay.comparison.spreads import pooled
from outlay.recipes.arms import SUGGESTIONS

TARGET = Path(__file__).parents[1] / "src" / "outlay" / "comparison" / "spreads.json"
_LORA = "peft(type='LORA', r=8, lora_alpha=16)"
_TOP = "layers_to_transform=(-2, -1)"
ARMS: dict[str, tuple[str, ...]] = {
    "digits-cnn": ("all weights=full", "slower=full @ optimizer.lr=1e-3", "head=probe"),
    "digits-vit": SUGGESTIONS["digits-vit"].arms,
    # Without the arms that are fitted once and have no spread.
    "minilm-questions": SUGGESTIONS["minilm-questions"].arms[2:],
    "glass-lm": SUGGESTIONS["glass-lm"].arms,
    "minilm-reviews": (
        f"lora={_LORA[:-1]}, layers_to_transform=[4, 5]) @ optimizer.lr=3e-3",
        f"svfit=svfit(rank=64, {_TOP}) @ optimizer.lr=3e-1",
        "head=probe",
    ),
    "minilm-questions-full": (f"lora={_LORA}", "bone=bone(r=8)"),
    "digits-then-fashion": ("adagrad=full", "slower=full @ optimizer.lr=0.01", "ewc=ewc"),
}
SEEDS = {"digits-then-fashion": 4, "glass-lm": 4, "minilm-reviews": 4, "minilm-questions-full": 4}
"""Fewer where a run takes minutes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/spreads")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--store", help="folder of runs to share with other comparisons")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    found = json.loads(TARGET.read_text()) if TARGET.exists() else {"recipes": {}}
    for name, arms in ARMS.items():
        seeds = SEEDS.get(name, arguments.seeds)
        compared = compare(
            recipes.get(name), arms, seeds=seeds, out=arguments.out, store=arguments.store,
            threads=arguments.threads, device="cpu",
        )  # fmt: skip
        runs = compared.results
        spreads = {}
        for metric in sorted(runs[next(iter(runs))][0].metrics):
            values = {a: np.array([r.metrics[metric] for r in by.values()])
                      for a, by in runs.items()}  # fmt: skip
            pairs = [(values[a] - values[b]).std(ddof=1) for a, b in combinations(values, 2)]
            spread = pooled((seeds, float(s)) for s in pairs)
            if spread:
                spreads[metric] = float(f"{spread:.4g}")
        found["recipes"][name] = {
            "budget": str(recipes.get(name).budget), "seeds": seeds, "arms": list(arms),
            "spreads": spreads, "hardware": hardware(),
        }  # fmt: skip
        found["how"] = (
            "benchmarks/seed_spreads.py: standard deviation between seeds of the paired "
            "differences of the arms, pooled over their pairs"
        )
        found["versions"] = versions()
        TARGET.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(name, spreads, flush=True)


if __name__ == "__main__":
    main()
