"""Nearest class mean and streaming LDA against what bounds them, and against scikit-learn.

Both sides of a ratio run in turn on the same memory-mapped float32 features, in one process and on
one thread; a ratio is the median over rounds of the two times of a round. Above 1 outlay is faster.

    python benchmarks/nearest_class_mean.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize

import outlay
from outlay.estimators import NearestClassMean, StreamingLDA

RESULTS = Path(__file__).parent / "results" / "nearest_class_mean.json"
TARGETS = {"sum": 0.6, "product": 0.8, "NearestCentroid": 1.0}


def hardware() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    ) if Path("/proc/cpuinfo").exists() else platform.processor()  # fmt: skip
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "outlay": outlay.__version__,
    }


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def product(features: np.ndarray) -> np.ndarray:
    """The bound of a full covariance: one product in float64, converted block by block."""
    width = features.shape[1]
    total, step = np.zeros((width, width)), max(1, (1 << 19) // width)
    buffer = np.empty((step, width))
    for start in range(0, len(features), step):
        block = buffer[: len(features[start : start + step])]
        np.copyto(block, features[start : start + step])
        total += block.T @ block
    return total


def measure(rows: int, width: int, classes: int, rounds: int, folder: Path) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, rows)
    centers = generator.normal(size=(classes, width)).astype(np.float32)
    place = folder / "features.npy"
    noise = generator.standard_normal((rows, width), dtype=np.float32)
    np.save(place, centers[labels] + noise)
    features = np.load(place, mmap_mode="r")
    unit = normalize(features)
    arms: dict[str, Callable[[], Any]] = {
        "sum": lambda: features.sum(),
        "sum in float64": lambda: features.sum(axis=0, dtype=np.float64),
        "nearest class mean": lambda: NearestClassMean().fit(features, labels),
        "nearest class mean, not normalized": lambda: NearestClassMean(normalize=False).fit(
            features, labels
        ),
        "NearestCentroid": lambda: NearestCentroid().fit(features, labels),
        "normalize and NearestCentroid": lambda: NearestCentroid().fit(normalize(features), labels),
        "product": lambda: product(features),
        "streaming lda": lambda: StreamingLDA().fit(features, labels),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for index in range(rounds):
        order = list(arms) if index % 2 == 0 else list(arms)[::-1]
        for name in order:
            times[name].append(seconds(arms[name]))
    ratios = {
        "nearest class mean / sum": ratio(times, "sum", "nearest class mean"),
        "nearest class mean, not normalized / sum": ratio(
            times, "sum", "nearest class mean, not normalized"
        ),
        "nearest class mean / sum in float64": ratio(times, "sum in float64", "nearest class mean"),
        "streaming lda / product": ratio(times, "product", "streaming lda"),
        "nearest class mean, not normalized / NearestCentroid": ratio(
            times, "NearestCentroid", "nearest class mean, not normalized"
        ),
        "nearest class mean / normalize and NearestCentroid": ratio(
            times, "normalize and NearestCentroid", "nearest class mean"
        ),
    }
    sample = features[:2000]
    ours, peer = NearestClassMean().fit(features, labels), NearestCentroid().fit(unit, labels)
    return {
        "rows": rows, "width": width, "classes": classes,
        "seconds": {name: statistics.median(found) for name, found in times.items()},
        "ratios": ratios,
        "predictions equal to NearestCentroid": bool(
            (ours.predict(sample) == peer.predict(unit[:2000])).all()
        ),
        "largest difference of means": float(np.abs(ours.means_ - peer.centroids_).max()),
    }  # fmt: skip


def ratio(times: dict[str, list[float]], other: str, ours: str) -> dict[str, float]:
    found = sorted(a / b for a, b in zip(times[other], times[ours], strict=True))
    return {
        "median": statistics.median(found),
        "low": found[len(found) // 10],
        "high": found[-1 - len(found) // 10],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for width, classes in ((512, 10), (768, 100)):
            row = measure(options.rows, width, classes, options.rounds, Path(folder))
            found.append(row)
            print(f"{options.rows} x {width}, {classes} classes")
            for name, value in row["ratios"].items():
                print(f"  {name}: {value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]")
            equal = row["predictions equal to NearestCentroid"]
            print(f"  predictions equal: {equal}; means differ by at most "
                  f"{row['largest difference of means']:.1e}")  # fmt: skip
    report = {
        "hardware": hardware(),
        "load_average": os.getloadavg(),
        "rounds": options.rounds,
        "targets": TARGETS,
        "results": found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
