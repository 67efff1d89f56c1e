"""What a frozen backbone is worth: heads that train nothing or little, and tasks in sequence.

The backbone's input contract is audited first; the same heads on raw inputs stand beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..assets.sources import cache_folder
from ..core.errors import DataError
from ..training.backbone import IMAGE, Backbone, open_backbone
from ..training.continual import (
    FORMULAS,
    Task,
    class_incremental,
    domain_incremental,
    run_stream,
)
from ..training.contract import audit
from ..training.data.dataset import Splits, load
from ..training.feature_cache import FeatureSet, cached_features, files_fingerprint
from ..training.specs import DataSpec
from .probe_heads import heads, learners

SPLITS = ("train", "validation", "test")
_RAW_WORDS = 1024  # buckets of the hashed words that stand for raw text
_RAW_SIDE = 32  # raw images are averaged down to this many pixels a side


@dataclass(frozen=True)
class ProbeSettings:
    """What `probe` does.

    Attributes:
        layer: Hidden state of the model; -1 is the last.
        pooling: How tokens or places become one vector.
        length: Most tokens of a text.
        tasks: Tasks of the class-incremental stream; None for five, or fewer where classes are
            few; 1 leaves it out.
        orders: Random orders of classes or domains.
        domains: True to learn domain after domain too; the data names them.
        seed: Decides the orders.
        random_twin: Fit the heads on the same network with random weights too.
    """

    layer: int = -1
    pooling: str = "auto"
    length: int = 128
    tasks: int | None = None
    orders: int = 3
    domains: bool = False
    seed: int = 0
    random_twin: bool = False


def probe(
    model: str, data: DataSpec, settings: ProbeSettings | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Audit a backbone's inputs, cache its features, fit heads on them, run tasks in sequence.

    Args:
        model: A transformers folder, a packaged model or an ONNX file.
        data: Labeled rows; text or images, as the model reads.
        settings: What to do.
        say: Told what is being done.

    Returns:
        Plain JSON: `audit`, `features`, `heads`, `streams` with the whole matrix of each learner,
        `formulas`, and what they come from.

    Raises:
        ConfigError: If the model cannot be used or there are too few classes for the tasks.
        DataError: If the rows are not what the model reads.
    """
    settings = settings or ProbeSettings()
    say("reading rows")
    backbone = open_backbone(model, settings.layer, settings.pooling, settings.length)
    splits = load(data, backbone.task)
    if not splits.test:
        raise DataError("there is no test row", "give a test split or a share of the rows")
    started = time.perf_counter()
    say("features")
    found = backbone_features(backbone, splits)
    seconds = time.perf_counter() - started
    labels = {split: np.array([row["label"] for row in splits[split]]) for split in SPLITS}
    sets = {"model": found.splits, "raw": raw_inputs(backbone, splits)}
    if settings.random_twin:
        say("features of the random twin")
        twin = replace(backbone, random_seed=settings.seed, _loaded=None)
        sets["random weights"] = backbone_features(twin, splits).splits
    measured, strength, neighbours = [], 0.1, 5
    for source, features in sets.items():
        for name, made in heads().items():
            say(name if source == "model" else f"{name} on {source}")
            head = _measured(name, source, made(), features, labels)
            measured.append(head)
            if source == "model":
                strength = head["settings"].get("strength", strength)
                neighbours = head["settings"].get("neighbours", neighbours)
    streams = []
    for kind, index, tasks in _streams(splits, labels, settings):
        say(f"{kind}, order {index + 1}")
        streams.append(_stream(kind, index, tasks, found.splits, labels, strength, neighbours))
    return {
        "model": str(model),
        "data": splits.sources,
        "task": backbone.task,
        "settings": asdict(settings),
        "rows": {split: len(splits[split]) for split in SPLITS},
        "classes": list(splits.labels.names),
        "audit": found.facts["notes"]["audit"],
        "features": {
            "width": int(found.splits["train"].shape[1]), "cached": not found.fresh,
            "folder": str(found.folder), "seconds": seconds, "depends": found.facts["depends"],
        },
        "heads": measured,
        "streams": streams,
        "formulas": FORMULAS,
        "caution": "If the model's pre-training saw these classes, the figures measure that "
        "overlap too.",
    }  # fmt: skip


def backbone_features(backbone: Backbone, splits: Splits, root: Path | None = None) -> FeatureSet:
    """Features of all splits, from the cache where they are there.

    The model is read only if they are not: its files are what the cache goes by.
    """
    depends = {
        "model": files_fingerprint(backbone.place),
        "data": splits.fingerprint,
        "task": backbone.task,
        **backbone.depends(),
    }
    counts = {split: len(splits[split]) for split in SPLITS}

    def compute() -> tuple[int, dict[str, Iterable[np.ndarray]], dict[str, Any]]:
        findings = [asdict(finding) for finding in audit(backbone, splits.train)]
        width = next(iter(backbone.features(splits.train[:1]))).shape[1]
        batches: dict[str, Iterable[np.ndarray]] = {
            split: backbone.features(splits[split]) for split in SPLITS
        }
        return width, batches, {"audit": findings}

    return cached_features(root or cache_folder() / "features", depends, counts, compute)


def raw_inputs(backbone: Backbone, splits: Splits) -> dict[str, np.ndarray]:
    """The control: pixels (averaged down if there are many), or hashed words. Shape (rows, D)."""
    if backbone.task != IMAGE:
        from sklearn.feature_extraction.text import HashingVectorizer

        words: Any = HashingVectorizer(n_features=_RAW_WORDS)
        texts = {split: [row["text"] for row in splits[split]] for split in SPLITS}
        empty = np.zeros((0, _RAW_WORDS), dtype=np.float32)
        return {
            split: words.transform(found).toarray().astype(np.float32) if found else empty
            for split, found in texts.items()
        }
    import torch

    made = {}
    for split in SPLITS:
        if not splits[split]:
            made[split] = np.zeros((0, made["train"].shape[1]), np.float32)
            continue
        pixels = torch.from_numpy(np.stack([row["pixel_values"] for row in splits[split]]))
        height, width = (min(_RAW_SIDE, side) for side in pixels.shape[2:])
        pixels = torch.nn.functional.adaptive_avg_pool2d(pixels, (height, width))
        made[split] = pixels.flatten(1).numpy()
    return made


def _measured(
    name: str, source: str, head: Any, features: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
) -> dict[str, Any]:  # fmt: skip
    started = time.perf_counter()
    head.fit(features["train"], labels["train"], (features["validation"], labels["validation"]))
    seconds = time.perf_counter() - started
    right = int((head.predict(features["test"]) == labels["test"]).sum())
    low, high = wilson(right, len(labels["test"]))
    return {
        "head": name, "inputs": source, "accuracy": right / len(labels["test"]),
        "interval": [low, high], "seconds": seconds, "bytes": int(head.bytes),
        "settings": head.settings(),
    }  # fmt: skip


def _streams(
    splits: Splits, labels: dict[str, np.ndarray], settings: ProbeSettings
) -> list[tuple[str, int, list[Task]]]:
    count = len(splits.labels.names)
    tasks = settings.tasks or min(5, max(1, count // 2))
    found = []
    for index in range(settings.orders):
        seed = settings.seed + index
        if tasks > 1:
            made = class_incremental(labels["train"], labels["test"], tasks, seed)
            found.append(("class-incremental", index, made))
        if settings.domains:
            train, test = ([row["domain"] for row in splits[s]] for s in ("train", "test"))
            found.append(("domain-incremental", index, domain_incremental(train, test, seed)))
    return found


def _stream(
    kind: str, index: int, tasks: list[Task], features: dict[str, np.ndarray],
    labels: dict[str, np.ndarray], strength: float, neighbours: int,
) -> dict[str, Any]:  # fmt: skip
    train, test = (features["train"], labels["train"]), (features["test"], labels["test"])
    found = {}
    classes = np.unique(labels["train"])
    for name, learner in learners(classes, strength, neighbours, index).items():
        result = run_stream(learner, tasks, train, test, future=kind == "domain-incremental")
        values = result.matrix.values
        found[name] = {
            "matrix": [[None if math.isnan(v) else float(v) for v in row] for row in values],
            "after_each_task": result.matrix.after_each_task.tolist(),
            "metrics": result.matrix.metrics(),
            "seconds": list(result.seconds),
            "bytes": list(result.bytes),
        }
    return {
        "protocol": kind, "order": index, "tasks": [task.name for task in tasks],
        "rows": [len(task.test) for task in tasks], "learners": found,
    }  # fmt: skip


def wilson(right: int, rows: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share = right / rows
    middle = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return (middle - half) / (1 + z * z / rows), (middle + half) / (1 + z * z / rows)
