"""An estimator as an arm: the same rows and the same metrics, outside the training budget."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import Conflict
from ..training.evaluate import classification_metrics
from ..training.materials import Materials
from ..training.recipe import Recipe
from ..training.runs import Result


def fit_arm(estimator: Any, materials: Materials, recipe: Recipe, folder: Path) -> Result:
    """Fit on the training rows and measure every split that the recipe names.

    Raises:
        Conflict: If the task is not text classification.
    """
    name = estimator.card.name
    if recipe.task != "sequence-classification":
        raise Conflict(
            f"{name!r} classifies text and the task is {recipe.task}", "leave this arm out"
        )
    texts, labels = _text_rows(materials, "train")
    started = time.perf_counter()
    estimator.fit(texts, labels, _text_rows(materials, "validation"))
    seconds = time.perf_counter() - started
    metrics: dict[str, float] = {}
    for split in recipe.evaluate.splits:
        rows, truth = _text_rows(materials, split)
        if rows:
            measured = classification_metrics(list(estimator.predict(rows)), truth)
            metrics |= {f"{split}/{key}": value for key, value in measured.items()}
    weights = np.ascontiguousarray(estimator.model_.coef_, dtype="<f8").tobytes()
    meter = {
        "steps": 0, "tokens": 0, "examples": len(texts), "flops": 0, "seconds": seconds,
        "trainable_parameters": estimator.num_parameters,
        "total_parameters": estimator.num_parameters,
    }  # fmt: skip
    digest = hashlib.sha256(weights).hexdigest()
    note = f"{name} is fitted once, outside the steps and tokens that the other arms share"
    return Result(folder.name, str(folder), metrics, meter, digest, seconds, "done", 0, [note])


def _text_rows(materials: Materials, split: str) -> tuple[list[str], list[int]]:
    rows = materials.rows[split]
    index = materials.labels.label2id
    return [row["text"] for row in rows], [index[row["label"]] for row in rows]
