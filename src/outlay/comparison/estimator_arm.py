"""An estimator as an arm: the same rows and the same metrics, outside the training budget."""

from __future__ import annotations

import hashlib
import inspect
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.errors import Conflict
from ..core.meter import FlopCounter
from ..core.method import Step
from ..training.data.batch import padded
from ..training.evaluate import classification_metrics
from ..training.materials import Materials
from ..training.recipe import Recipe
from ..training.result import Result

_ROWS = 64  # rows of one forward pass


def fit_arm(estimator: Any, materials: Materials, recipe: Recipe, folder: Path) -> Result:
    """Fit on the training rows and measure every split that the recipe names.

    Raises:
        Conflict: If the estimator is not made for the task.
    """
    if estimator.takes in ("tokens", "stream"):
        from .language_arm import fit_language_arm

        return fit_language_arm(estimator, materials, recipe, folder)
    name = estimator.card.name
    if recipe.task != "sequence-classification":
        raise Conflict(
            f"{name!r} classifies text and the task is {recipe.task}", "leave this arm out"
        )
    started = time.perf_counter()
    inputs, flops = _inputs(estimator.takes, materials, recipe)
    index = materials.labels.label2id
    targets = {s: [index[row["label"]] for row in rows] for s, rows in materials.rows.items()}
    held_out = (inputs["validation"], targets["validation"])
    tuned = (held_out,) if "validation" in inspect.signature(estimator.fit).parameters else ()
    estimator.fit(inputs["train"], targets["train"], *tuned)
    seconds = time.perf_counter() - started
    metrics: dict[str, float] = {}
    for split in recipe.evaluate.splits:
        if targets[split]:
            found = [int(k) for k in estimator.predict(inputs[split])]
            measured = classification_metrics(found, targets[split])
            metrics |= {f"{split}/{key}": value for key, value in measured.items()}
    weights = np.ascontiguousarray(estimator.linear_form()[0], dtype="<f8").tobytes()
    meter = {
        "steps": 0, "tokens": 0, "examples": len(targets["train"]), "flops": flops,
        "seconds": seconds, "trainable_parameters": estimator.num_parameters,
        "total_parameters": estimator.num_parameters,
    }  # fmt: skip
    digest = hashlib.sha256(weights).hexdigest()
    note = f"{name} is fitted once, outside the steps and tokens that the other arms share"
    return Result(folder.name, str(folder), metrics, meter, digest, seconds, "done", 0, [note])


def _inputs(kind: str, materials: Materials, recipe: Recipe) -> tuple[dict[str, Any], int]:
    """What an estimator is fitted on, by split, and the FLOPs of making it for training."""
    if kind == "text":
        return {s: [row["text"] for row in rows] for s, rows in materials.rows.items()}, 0
    model = materials.model(recipe).eval()
    objective = materials.objective(recipe, {"features"})
    pad = getattr(materials.tokenizer, "pad_token_id", None) or 0
    made, flops = {}, 0
    for split, examples in {"train": materials.train, **materials.splits}.items():
        parts = []
        with torch.no_grad(), FlopCounter() as counter:
            for start in range(0, len(examples), _ROWS):
                chunk = examples[start : start + _ROWS]
                batch = padded(chunk, pad, recipe.batch.pad_to, recipe.batch.length)
                parts.append(objective(model, batch, Step(0, 0.0, 0)).outputs["features"])
        flops += counter.total if split == "train" else 0
        made[split] = torch.cat(parts).numpy() if parts else np.zeros((0, 0))
    return made, flops
