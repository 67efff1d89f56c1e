"""What a model is worth on rows it was not trained on: named metrics, a table per item, and
predictions with probabilities.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, DataError, nearest
from ..core.losses import Batch, Objective, model_inputs
from ..core.method import Step
from .data.labels import Labels
from .objectives import IGNORED
from .specs import MASKED, MASKED_IMAGES, MASKED_TEXT

Around = Callable[[Batch], contextlib.AbstractContextManager[Any]]
Columns = dict[str, list[Any]]

_CLASSES = ("sequence-classification", "image-classification")
_LANGUAGE = ("causal-language-modeling", "sequence-to-sequence")
# The metric that decides, and whether more of it is better.
_MAIN = {
    "sequence-classification": ("accuracy", True),
    "image-classification": ("accuracy", True),
    "multi-label-classification": ("micro_f1", True),
    "regression": ("rmse", False),
    "causal-language-modeling": ("loss", False),
    "sequence-to-sequence": ("loss", False),
    MASKED_TEXT: ("loss", False),
    MASKED_IMAGES: ("loss", False),
}
_LOWER = ("loss", "rmse", "mae", "perplexity", "bits_per_byte")
METRICS = {
    "sequence-classification": ("loss", "accuracy", "macro_f1"),
    "image-classification": ("loss", "accuracy", "macro_f1"),
    "multi-label-classification": ("loss", "micro_f1", "macro_f1", "exact_match"),
    "regression": ("loss", "rmse", "mae", "r2", "pearson"),
    "causal-language-modeling": ("loss", "perplexity", "bits_per_byte", "next_token_accuracy"),
    "sequence-to-sequence": ("loss", "perplexity", "bits_per_byte", "next_token_accuracy"),
    MASKED_TEXT: ("loss", "perplexity", "masked_token_accuracy"),
    MASKED_IMAGES: ("loss",),
}


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and a table with one entry an item in every column.

    Attributes:
        metrics: `loss` in nats (per token in language modeling; the squared error of a hidden patch
            of an image), and the task's own.
        table: Columns `id`, `domain`, `loss` and `weight`; with classes `prediction`, `target`
            and `correct`; with targets `prediction` and `target` in the target's unit; with
            tokens `tokens`, `correct` (both counts) and `bytes` where they are known.
    """

    metrics: dict[str, float]
    table: Columns


def main_metric(task: str, name: str | None = None) -> tuple[str, bool]:
    """The metric that decides, and True if higher is better.

    Args:
        task: One of `recipe.TASKS`.
        name: A metric in place of the task's own.

    Raises:
        ConfigError: If the task has no metric of that name.
    """
    if name is None:
        return _MAIN[task]
    if name not in METRICS[task]:
        raise ConfigError(
            f"evaluate.metric = {name!r} is not measured for {task}",
            f"{nearest(name, METRICS[task])}use one of {', '.join(METRICS[task])}",
        )
    return name, name not in _LOWER


def evaluate(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    task: str,
    labels: Labels | None = None,
    *,
    step: Step | None = None,
    around: Around | None = None,
    token_bytes: Tensor | None = None,
) -> Evaluation:
    """Measure a model: evaluation mode, no gradient, nothing left changed.

    The loss is the objective's primary term before anyone shaped it, weighted as in training:
    rows and tokens without weight, padding among them, count nowhere.

    Args:
        model: The model; its modules' modes and torch's CPU generator are put back.
        objective: The objective of the run; outputs "logits" and "targets" are read.
        batches: What to measure, on the model's device.
        task: One of `recipe.TASKS`.
        labels: Label space.
        step: Where the run is; step 0 by default.
        around: A context entered around every call, for what depends on the batch.
        token_bytes: Bytes of each token id, for `bits_per_byte`. Shape (vocabulary,).

    Raises:
        DataError: If there is nothing to measure.
    """
    labels = labels or Labels()
    step = step or Step(index=0, share=0.0, seed=0)
    table: Columns = {}
    loss = weight = 0.0
    with _measuring(model, objective):
        for batch in batches:
            with around(batch) if around is not None else contextlib.nullcontext():
                losses = objective(model, batch, step)
            assert losses.plain is not None
            sums = losses.plain.row_sums().double().cpu()
            weights = losses.plain.row_weights().double().cpu()
            loss += float(sums.sum())
            weight += float(weights.sum())
            part: Columns = {
                "id": list(batch["ids"]),
                "domain": list(batch.get("domains", [""] * len(batch["ids"]))),
                "loss": (sums / weights.clamp(min=1e-300)).tolist(),
                "weight": weights.tolist(),
            }
            logits, targets = losses.outputs["logits"], losses.outputs["targets"]
            part |= _items(task, logits.detach(), targets, labels, token_bytes)
            for key, values in part.items():
                table.setdefault(key, []).extend(values)
    if weight == 0:
        raise DataError("there is nothing to measure: no row has a label that counts", "label rows")
    return Evaluation({"loss": loss / weight, **_metrics(task, table, labels, loss)}, table)


@contextlib.contextmanager
def _measuring(model: nn.Module, objective: nn.Module | None = None) -> Iterator[None]:
    """Evaluation mode and no gradient inside; every module's own mode is put back."""
    held = [*model.modules(), *(objective.modules() if objective is not None else ())]
    modes = [(module, module.training) for module in held]
    # Flags are set directly: a frozen norm layer refuses `train()`, as it should.
    for module in held:
        module.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _items(
    task: str, logits: Tensor, targets: Tensor, labels: Labels, token_bytes: Tensor | None
) -> Columns:
    if task in _CLASSES:
        found, aims = logits.argmax(-1).tolist(), targets.tolist()
        names = labels.id2label
        return {
            "prediction": [names.get(i, str(i)) for i in found],
            "target": [None if t == IGNORED else names.get(t, str(t)) for t in aims],
            "correct": [int(i == t) for i, t in zip(found, aims)],
        }
    if task == "multi-label-classification":
        held = (logits > 0).long()
        return {"prediction": held.tolist(), "target": targets.long().tolist()}
    if task == "regression":
        return {"prediction": _in_units(logits, labels), "target": _in_units(targets, labels)}
    if task == MASKED_IMAGES:
        return {}
    known = targets != IGNORED
    right = (logits.argmax(-1) == targets) & known
    columns: Columns = {"tokens": known.sum(1).tolist(), "correct": right.sum(1).tolist()}
    if token_bytes is not None:
        sizes = token_bytes.to(targets.device)[targets.clamp(min=0)]
        columns["bytes"] = (sizes * known).sum(1).tolist()
    return columns


def _in_units(values: Tensor, labels: Labels) -> list[Any]:
    values = values.double().cpu()
    if labels.scale:
        scale = torch.tensor(labels.scale, dtype=torch.float64)
        values = values * (scale if values.dim() == 2 else scale[0])
    return values.tolist()


def _metrics(task: str, table: Columns, labels: Labels, nats: float) -> dict[str, float]:
    if task in _CLASSES:
        return _class_metrics(table)
    if task == "multi-label-classification":
        return _label_metrics(table)
    if task == "regression":
        return _target_metrics(table)
    if task == MASKED_IMAGES:
        return {}
    metrics = language_metrics(table)
    if task == MASKED_TEXT:
        metrics["masked_token_accuracy"] = metrics.pop("next_token_accuracy")
    return metrics


def language_metrics(table: Columns) -> dict[str, float]:
    """Perplexity, accuracy and bits per byte, overall and by domain.

    Args:
        table: Columns `loss` (nats per token), `tokens`, `domain`, and where they are known
            `correct` and `bytes`.
    """
    tokens = sum(table["tokens"])
    # The loss may weigh sequences alike; what is said of tokens is always per token.
    total = math.fsum(l * t for l, t in zip(table["loss"], table["tokens"]))  # noqa: E741
    metrics = {"perplexity": math.exp(min(700.0, total / max(1, tokens)))}
    if "correct" in table:
        metrics["next_token_accuracy"] = sum(table["correct"]) / max(1, tokens)
    if sum(table.get("bytes", [])):
        metrics["bits_per_byte"] = total / math.log(2) / sum(table["bytes"])
        by_domain = _bits_by_domain(table)
        if len(by_domain) > 1:
            metrics |= {f"bits_per_byte.{name}": bits for name, bits in by_domain.items()}
    return metrics


def _bits_by_domain(table: Columns) -> dict[str, float]:
    nats: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for name, loss, tokens, size in zip(
        table["domain"], table["loss"], table["tokens"], table["bytes"]
    ):
        nats.setdefault(name, []).append(loss * tokens)
        sizes[name] = sizes.get(name, 0) + size
    return {
        name: math.fsum(parts) / math.log(2) / sizes[name]
        for name, parts in sorted(nats.items())
        if sizes[name]
    }


def classification_metrics(found: Sequence[Any], aims: Sequence[Any]) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that were said or are there.

    Args:
        found: Predicted classes.
        aims: True classes, one for each prediction.
    """
    scores = []
    for name in {*found, *aims}:
        hits = sum(f == a == name for f, a in zip(found, aims))
        scores.append(2 * hits / (list(found).count(name) + list(aims).count(name)))
    return {
        "accuracy": sum(f == a for f, a in zip(found, aims)) / len(aims),
        "macro_f1": math.fsum(sorted(scores)) / len(scores),
    }


def _class_metrics(table: Columns) -> dict[str, float]:
    kept = [i for i, target in enumerate(table["target"]) if target is not None]
    return classification_metrics(
        [table["prediction"][i] for i in kept], [table["target"][i] for i in kept]
    )


def _label_metrics(table: Columns) -> dict[str, float]:
    found, aims = torch.tensor(table["prediction"]), torch.tensor(table["target"])
    known = aims != IGNORED
    hits = ((found == 1) & (aims == 1) & known).sum(0).double()
    # 2 hits / (predicted + true): 0 for a label that is nowhere, neither said nor there.
    sizes = (((found == 1) & known).sum(0) + ((aims == 1) & known).sum(0)).double()
    return {
        "micro_f1": float(2 * hits.sum() / sizes.sum().clamp(min=1)),
        "macro_f1": float((2 * hits / sizes.clamp(min=1)).mean()),
        "exact_match": float(((found == aims) | ~known).all(1).double().mean()),
    }


def _target_metrics(table: Columns) -> dict[str, float]:
    found = torch.tensor(table["prediction"], dtype=torch.float64).flatten()
    aims = torch.tensor(table["target"], dtype=torch.float64).flatten()
    kept = ~aims.isnan()
    found, aims = found[kept], aims[kept]
    error = found - aims
    spread = ((aims - aims.mean()) ** 2).sum()
    both = (((found - found.mean()) ** 2).sum() * spread).sqrt()
    shared = ((found - found.mean()) * (aims - aims.mean())).sum()
    return {
        "rmse": float((error**2).mean().sqrt()),
        "mae": float(error.abs().mean()),
        # Undefined where everything is equal; 0 says that nothing was explained.
        "r2": float(1 - (error**2).sum() / spread) if spread > 0 else 0.0,
        "pearson": float(shared / both) if both > 0 else 0.0,
    }


def predictions(
    model: nn.Module,
    batches: Iterable[Batch],
    task: str,
    labels: Labels | None = None,
    *,
    objective: Objective | None = None,
    step: Step | None = None,
    around: Around | None = None,
) -> Iterator[dict[str, Any]]:
    """Predictions one row after the other; the rows need no labels.

    Args:
        model: The model.
        batches: Rows, on the model's device.
        task: One of `recipe.TASKS`.
        labels: Label space.
        objective: Scores text in language modeling, where it is needed.
        step: Where the run is.
        around: A context entered around every call.

    Yields:
        `id` and: with classes `prediction` and `probabilities` by name; with several labels
        the list of those with a probability of at least 0.5, and all probabilities; with
        targets `prediction` in the target's unit (by name if there are several); with tokens
        `loss` (nats per token), `tokens` and `perplexity`; with masked images `loss`.

    Raises:
        ConfigError: If text is to be scored without an objective.
    """
    labels = labels or Labels()
    if task in (*_LANGUAGE, *MASKED):
        if objective is None:
            raise ConfigError("such rows are scored by an objective", "give the run's objective")
        table = evaluate(model, objective, batches, task, labels, step=step, around=around).table
        if task == MASKED_IMAGES:
            yield from ({"id": key, "loss": loss} for key, loss in zip(table["id"], table["loss"]))
            return
        for key, loss, tokens in zip(table["id"], table["loss"], table["tokens"]):
            yield {"id": key, "loss": loss, "tokens": tokens,
                   "perplexity": math.exp(min(700.0, loss))}  # fmt: skip
        return
    for batch in batches:
        with (
            _measuring(model),
            around(batch) if around is not None else contextlib.nullcontext(),
        ):
            output = model(**model_inputs(batch))
        logits = (output if isinstance(output, Tensor) else output.logits).detach()
        for key, row in zip(batch["ids"], _predicted(task, logits, labels)):
            yield {"id": key, **row}


def _predicted(task: str, logits: Tensor, labels: Labels) -> list[dict[str, Any]]:
    names = list(labels.names) or [str(i) for i in range(logits.shape[-1])]
    if task == "regression":
        values = _in_units(logits, labels)
        return [
            {"prediction": row[0] if len(row) == 1 else dict(zip(names, row))} for row in values
        ]
    if task == "multi-label-classification":
        chances = logits.double().sigmoid().tolist()
        return [
            {
                "prediction": [name for name, chance in zip(names, row) if chance >= 0.5],
                "probabilities": dict(zip(names, row)),
            }
            for row in chances
        ]
    chances = logits.double().softmax(-1)
    return [
        {"prediction": names[best], "probabilities": dict(zip(names, row))}
        for best, row in zip(chances.argmax(-1).tolist(), chances.tolist())
    ]
