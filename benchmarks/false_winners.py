"""How often `compare` names a winner where there is none, and finds one that was planted.

Real runs of one tiny recipe that differ in nothing but the seed are made once and their test
losses kept. Tables of arms are then drawn from them: the same arm under several names, every run
at most once in a table, so that no difference is real. The judge that `compare` uses judges each
table. A false winner is a table with at least one separated pair. Beside it stands the share of
tables in which a paired t test without correction for the number of pairs finds one.

For power, one arm is shifted by a known amount and the share of tables in which it is named the
better of a given other arm is put beside what the power of the paired t test promises. In tables
of several arms that promise is for the first step of Holm's procedure, so it is a lower bound.

Tables are independent draws given the pool of runs, so the Clopper-Pearson intervals are exact
for that pool. Fails if the lower 99 % bound of a false-winner rate lies above 5 %.

    python benchmarks/false_winners.py --runs 2000
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from outlay.comparison import statistics as st
from outlay.comparison.judge import judge

FOLDER = Path(__file__).parent / "results"
VALUES = FOLDER / "false_winners_runs.csv"
RESULTS = FOLDER / "false_winners.json"
SEEDS = (3, 5, 6, 10)
ARMS = (2, 7)
SHIFTS = (0.5, 1.0, 1.5, 2.0, 3.0)
METRIC = "test/loss"
ALPHA = 0.05
SETTINGS = {
    "model.width": 16,
    "model.layers": 2,
    "budget": "30steps",
    "optimizer.lr": 1e-2,
    "every.evaluate": None,
    "evaluate.splits": ("test",),
}


def recorded(path: Path = VALUES) -> dict[int, float]:
    """Test loss by seed; a last line that was cut off is left out."""
    if not path.exists():
        return {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    rows = [line.split(",") for line in whole.splitlines()[1:]]
    return {int(seed): float(value) for seed, value in rows}


def measure(runs: int, path: Path = VALUES) -> None:
    """Make the runs that are not recorded yet, one line each as they come."""
    known = recorded(path)
    missing = [seed for seed in range(runs) if seed not in known]
    if not missing:
        return
    import torch

    from outlay import recipes
    from outlay.core.meter import FlopTable
    from outlay.training.materials import load_materials
    from outlay.training.runs import run

    torch.set_num_threads(1)
    recipe = recipes.get("digits-cnn").changed(SETTINGS)
    materials, flops = load_materials(recipe), FlopTable()
    lines = ["seed,test/loss", *(f"{seed},{known[seed]!r}" for seed in sorted(known))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    began = time.perf_counter()
    for done, seed in enumerate(missing, 1):
        place = tempfile.mkdtemp()
        result = run(
            recipe.changed({"seed": seed}), out=place, device="cpu", threads=1,
            materials=materials, flops=flops,
        )  # fmt: skip
        shutil.rmtree(place)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{seed},{result.metrics[METRIC]!r}\n")
        if done % 200 == 0:
            print(f"{done}/{len(missing)} runs, {(time.perf_counter() - began) / done:.3f} s each")


def draw(
    pool: np.ndarray, arms: int, seeds: int, generator: np.random.Generator, shift: float = 0.0
) -> dict[str, dict[int, float]]:
    """A table of arms that no run is in twice; the first arm is `shift` lower, which is better."""
    values = generator.choice(pool, size=(arms, seeds), replace=False)
    values[0] -= shift
    return {f"arm {a}": dict(enumerate(map(float, row))) for a, row in enumerate(values)}


def interval(hits: int, tables: int, level: float = 0.99) -> list[float]:
    """Clopper-Pearson interval of a share."""
    found = stats.binomtest(hits, tables).proportion_ci(level, method="exact")
    return [round(float(found.low), 4), round(float(found.high), 4)]


def false_winners(
    pool: np.ndarray, arms: int, seeds: int, tables: int, generator: np.random.Generator
) -> dict[str, Any]:
    """Share of tables without a real difference in which a winner is named."""
    named = uncorrected = 0
    for _ in range(tables):
        judged = judge(
            draw(pool, arms, seeds, generator), metric=METRIC, higher_is_better=False, alpha=ALPHA
        )
        named += bool(judged["verdicts"])
        uncorrected += any(pair["p"] < ALPHA for pair in judged["pairs"])
    return {
        "arms": arms, "seeds": seeds, "tables": tables, "false_winners": named,
        "rate": named / tables, "interval": interval(named, tables),
        "uncorrected": uncorrected / tables, "uncorrected_interval": interval(uncorrected, tables),
    }  # fmt: skip


def planted(
    pool: np.ndarray,
    arms: int,
    seeds: int,
    shift: float,
    tables: int,
    generator: np.random.Generator,
) -> dict[str, Any]:
    """Share of tables in which a planted shift is found, beside what the test's power says.

    Args:
        pool: Metric of single runs.
        arms: Arms in a table.
        seeds: Seeds of every arm.
        shift: In units of the spread of paired differences.
        tables: How many.
        generator: Draws them.
    """
    spread = float(pool.std(ddof=1)) * 2**0.5
    found = wrong = 0
    for _ in range(tables):
        table = draw(pool, arms, seeds, generator, shift * spread)
        judged = judge(table, metric=METRIC, higher_is_better=False, alpha=ALPHA)
        pairs = {(v["better"], v["worse"]) for v in judged["verdicts"]}
        found += ("arm 0", "arm 1") in pairs
        wrong += ("arm 1", "arm 0") in pairs
    comparisons = arms * (arms - 1) // 2
    expected = st.t_test_power(shift * spread, spread, seeds, ALPHA, comparisons)
    bounds = interval(found, tables)
    return {
        "arms": arms, "seeds": seeds, "shift": shift, "tables": tables,
        "expected": round(expected, 4), "rate": found / tables, "interval": bounds, "wrong": wrong,
        "agrees": bounds[1] >= expected if arms > 2 else bounds[0] <= expected <= bounds[1],
    }  # fmt: skip


def campaign(
    pool: np.ndarray,
    tables: int,
    seeds: Sequence[int] = SEEDS,
    arms: Sequence[int] = ARMS,
    shifts: Sequence[float] = SHIFTS,
    start: int = 0,
) -> dict[str, Any]:
    """Both tables of the campaign; the same numbers for the same `start`."""
    generator = np.random.default_rng(start)
    return {
        "false_winners": [
            false_winners(pool, a, n, tables, generator) for a in arms for n in seeds
        ],
        "planted": [
            planted(pool, a, n, shift, tables, generator)
            for a in arms for n in seeds for shift in shifts
        ],
    }  # fmt: skip


def failures(found: dict[str, Any]) -> list[str]:
    """Rates that are above the level for sure."""
    return [
        f"{row['arms']} arms, {row['seeds']} seeds: false winners in {row['rate']:.1%} of tables, "
        f"at least {row['interval'][0]:.1%}"
        for row in found["false_winners"]
        if row["interval"][0] > ALPHA
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--tables", type=int, default=400)
    arguments = parser.parse_args()
    measure(arguments.runs)
    values = recorded()
    pool = np.array([values[seed] for seed in sorted(values)])
    found = campaign(pool, arguments.tables)
    from outlay.comparison.machine import hardware, versions

    spread = {"mean": float(pool.mean()), "standard_deviation": float(pool.std(ddof=1)),
              "skewness": float(stats.skew(pool)), "excess_kurtosis": float(stats.kurtosis(pool)),
              "distinct": len(set(pool.tolist())), "runs": len(pool)}  # fmt: skip
    whole = {"metric": METRIC, "recipe": {"name": "digits-cnn", **SETTINGS}, "pool": spread,
             **found, "hardware": hardware(), "versions": versions()}  # fmt: skip
    RESULTS.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for row in found["false_winners"]:
        low, high = row["interval"]
        print(f"{row['arms']} arms, {row['seeds']:2d} seeds: false winners {row['rate']:.3f} "
              f"[{low:.3f}, {high:.3f}], uncorrected {row['uncorrected']:.3f}")  # fmt: skip
    for row in found["planted"]:
        low, high = row["interval"]
        print(f"{row['arms']} arms, {row['seeds']:2d} seeds, shift {row['shift']}: expected "
              f"{row['expected']:.3f}, found {row['rate']:.3f} [{low:.3f}, {high:.3f}]"
              f"{'' if row['agrees'] else ' DIFFERS'}")  # fmt: skip
    if complaints := failures(found):
        raise SystemExit("\n".join(complaints))


if __name__ == "__main__":
    main()
