"""Language models that no run trains, on the same rows and with the same metrics as a run's."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core import registry
from ..core.errors import Conflict
from ..core.method import Example
from ..training.checkpoint import write_json
from ..training.evaluate import Columns, language_metrics
from ..training.materials import Materials
from ..training.models.load import token_bytes
from ..training.objectives import IGNORED
from ..training.recipe import Recipe
from ..training.result import Result

TASK = "causal-language-modeling"


def fit_language_arm(estimator: Any, materials: Materials, recipe: Recipe, folder: Path) -> Result:
    """Fit on the training rows and measure every split that the recipe names.

    Raises:
        Conflict: If the task is not causal language modeling.
    """
    name = estimator.card.name
    if recipe.task != TASK:
        raise Conflict(f"{name!r} models text and the task is {recipe.task}", "leave this arm out")
    started = time.perf_counter()
    if estimator.takes == "tokens":
        rows = [example["input_ids"] for example in materials.train]
        estimator.fit(rows, len(materials.tokenizer))
    seconds = time.perf_counter() - started
    metrics: dict[str, float] = {}
    for split in recipe.evaluate.splits:
        if len(materials.splits[split]):
            measured = _measured(estimator, materials, split)
            metrics |= {f"{split}/{key}": value for key, value in measured.items()}
    size = getattr(estimator, "num_parameters", 0)
    meter = {
        "steps": 0, "tokens": 0, "examples": len(materials.train), "flops": 0,
        "effective_flops": 0, "dense_flops": 0, "seconds": seconds,
        "trainable_parameters": size, "total_parameters": size,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()
    note = f"{name} is fitted once, outside the steps and tokens that the other arms share"
    return Result(folder.name, str(folder), metrics, meter, digest, seconds, "done", 0, [note])


def references(recipe: Recipe, materials: Materials, folder: Path) -> dict[str, dict[str, float]]:
    """Metrics of the recipe's reference models, kept in `references.json` of the run's folder.

    Args:
        recipe: Names them in `evaluate.references`.
        materials: The run's rows and tokens.
        folder: The run's folder.
    """
    kept = folder / "references.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    found = {}
    for spec in recipe.evaluate.references:
        found[spec] = fit_language_arm(registry.build(spec), materials, recipe, folder).metrics
    write_json(kept, found)
    return found


def _measured(estimator: Any, materials: Materials, split: str) -> dict[str, float]:
    table = _table(materials.splits[split], token_bytes(materials.tokenizer))
    if estimator.takes == "tokens":
        nats = estimator.nats([example["input_ids"] for example in materials.splits[split]])
        sums = [float(part[kept].sum()) for part, kept in zip(nats, table.pop("kept"))]
    else:
        sums = _spread(estimator, materials, split, table)
        table.pop("kept")
    table["loss"] = [nats / max(1, n) for nats, n in zip(sums, table["tokens"])]
    total = math.fsum(sums)
    return {"loss": total / max(1, sum(table["tokens"])), **language_metrics(table)}


def _table(examples: Sequence[Example], sizes: Any) -> Columns:
    """Domain, scored tokens, their bytes and where they are, of every example."""
    table: Columns = {"domain": [], "tokens": [], "bytes": [], "kept": []}
    for example in examples:
        labels = np.asarray(example["labels"][1:], np.int64)
        kept = labels != IGNORED
        table["domain"].append(example["domain"])
        table["tokens"].append(int(kept.sum()))
        table["bytes"].append(int(sizes[labels[kept]].sum()))
        table["kept"].append(kept)
    return table


def _spread(estimator: Any, materials: Materials, split: str, table: Columns) -> list[float]:
    """Nats of every example, where only those of a whole domain are known: shared by bytes."""
    texts: dict[str, list[str]] = {}
    for row in materials.rows[split]:
        if "text" not in row:
            raise Conflict(
                f"{estimator.card.name!r} packs plain text", "leave it out with prompts or messages"
            )
        texts.setdefault(row["domain"], []).append(row["text"])
    packed = {domain: estimator.bits(some) * math.log(2) for domain, some in texts.items()}
    sizes = {domain: len("\n".join(some).encode()) for domain, some in texts.items()}
    return [
        packed[domain] / sizes[domain] * count
        for domain, count in zip(table["domain"], table["bytes"])
    ]
