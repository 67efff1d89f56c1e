"""A finished run, opened again: measure it, predict with it, take its model out.

The run's folder holds its recipe, its label space and what was trained. The base model, and the
data where they are needed, are read from where the recipe says, and refused if they are not what
the run was trained on.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import CheckpointError, ConfigError, DataError
from ..core.losses import Batch
from ..core.meter import FlopTable
from ..core.method import OnData
from . import checkpoint
from .assemble import Assembly
from .backend import OneDevice
from .data.dataset import Splits, encode, load_rows
from .data.labels import Labels
from .data.pool import NoPool
from .evaluate import evaluate, predictions
from .keeper import Silent
from .materials import Materials, load_materials, shown_length
from .models.export import save_model
from .models.tokens import token_bytes
from .recipe import Recipe
from .result import Result
from .specs import ModelSpec
from .stages import Runner, stage_recipes

_TEXTS = ("causal-language-modeling", "sequence-to-sequence")


@dataclass
class Finished:
    """A finished run with its trained model.

    Attributes:
        folder: The run's folder.
        recipe: Recipe of its last stage.
        result: What the run recorded.
        materials: Its data, labels and tokenizer.
        assembly: The adapted model with the trained weights in it.
    """

    folder: Path
    recipe: Recipe
    result: Result
    materials: Materials
    assembly: Assembly

    @property
    def tokenizer(self) -> Any:
        """The run's tokenizer; None for images."""
        return self.materials.tokenizer

    @property
    def labels(self) -> Labels:
        """The run's label space."""
        return self.materials.labels

    @property
    def model(self) -> nn.Module:
        """The adapted model, or what the objective exports in its place (a teacher)."""
        return self.assembly.objective.export_source(self.assembly.model)

    def evaluate(self, splits: Iterable[str] = ("validation", "test")) -> dict[str, float]:
        """Metrics as `split/metric`, measured as at the end of the run.

        Raises:
            DataError: If the run has none of these splits.
        """
        wanted = [split for split in splits if self.assembly.splits.get(split)]
        if not wanted:
            raise DataError(
                f"run {self.folder.name} has no rows in {' or '.join(splits)}",
                "raise the recipe's shares, or give labeled rows with --data",
            )
        return {
            f"{split}/{name}": value
            for split in wanted
            for name, value in self._measured(self.assembly.batches(split)).items()
        }

    def evaluate_rows(self, source: str | Path | Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics of labeled rows: a file, a folder, or rows in memory."""
        return self._measured(self._batches(source, labeled=True))

    def predict(self, source: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Predictions of rows that need no labels, one a row; see `evaluate.predictions`."""
        found = predictions(
            self.model,
            self._batches(source, labeled=False),
            self.recipe.task,
            self.labels,
            objective=self.assembly.plain,
            around=self.assembly.loop.gradients.bound,
        )
        return _whole_texts(found) if self.recipe.task == _TEXTS[0] else found

    def exported(self) -> nn.Module:
        """The plain model, methods merged or taken out. The adapted model is used up by it."""
        return self.assembly.exported()

    def save_model(self, folder: Path) -> str:
        """Write a plain transformers folder with tokenizer and label names.

        Args:
            folder: An empty folder, or none yet.

        Returns:
            Class of the model that was written.
        """
        model = self.exported()
        save_model(model, self.tokenizer, folder, labels=self.labels, overwrite=True)
        return type(model).__name__

    def base_reference(self) -> str | None:
        """Where the base model is, for the adapter's config."""
        spec = self.recipe.model
        if not isinstance(spec, ModelSpec):
            return None
        if spec.asset is not None:
            from ..assets import model_folder

            return str(model_folder(spec.asset))
        return spec.path

    def _measured(self, batches: Iterable[Batch]) -> dict[str, float]:
        of_tokens = self.recipe.task in _TEXTS and self.tokenizer is not None
        return evaluate(
            self.model,
            self.assembly.plain,
            batches,
            self.recipe.task,
            self.labels,
            around=self.assembly.loop.gradients.bound,
            token_bytes=token_bytes(self.tokenizer) if of_tokens else None,
        ).metrics

    def _batches(self, source: Any, labeled: bool) -> Iterator[Batch]:
        recipe, tokenizer = self.recipe, self.tokenizer
        rows = load_rows(source, recipe.data, recipe.task, self.labels, labeled=labeled)
        if not labeled and recipe.task not in _TEXTS:
            # A label that is there is not needed, and may be missing in some rows.
            rows = [{k: v for k, v in row.items() if k != "label"} for row in rows]
        examples = encode(rows, recipe.task, tokenizer, shown_length(recipe), self.labels)
        yield from self.assembly.batches_of(examples)


def _whole_texts(windows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Put the windows of one long text together; their ids end in #1, #2 and so on."""
    held: dict[str, Any] | None = None
    for window in windows:
        stem, mark, number = str(window["id"]).rpartition("#")
        if held is not None and mark and number.isdigit() and stem == held["id"]:
            tokens = held["tokens"] + window["tokens"]
            nats = held["loss"] * held["tokens"] + window["loss"] * window["tokens"]
            mean = nats / max(1, tokens)
            held |= {"loss": mean, "tokens": tokens, "perplexity": math.exp(min(700.0, mean))}
            continue
        if held is not None:
            yield held
        held = dict(window)
    if held is not None:
        yield held


def open_run(
    folder: str | Path, *, rows: bool = True, device: str = "auto", threads: int | None = None
) -> Finished:
    """Rebuild the trained model of a finished run.

    Args:
        folder: Written by `run`.
        rows: Read the run's data too, for `evaluate`; without them the data may be gone, unless
            a method chose among the rows.
        device: "auto", "cpu", "cuda" or "mps".
        threads: Threads of torch.

    Raises:
        ConfigError: If it is no run's folder, the run is not finished, or it held live objects.
        CheckpointError: If its files are damaged, or data or base model changed since.
    """
    if threads is not None:
        torch.set_num_threads(max(1, threads))
    folder = Path(folder)
    facts, result = _records(folder)
    recipe = Recipe.read(folder / "recipe.yaml")
    stages = stage_recipes(recipe)
    needed = rows or len(stages) > 1 or any(isinstance(m, OnData) for m in recipe.methods)
    known = None if needed else Splits([], [], [], Labels.read(facts["labels"]), facts["data"])
    text = folder / "tokenizer.json"
    materials = load_materials(
        recipe, splits=known, tokenizer_text=text.read_text("utf-8") if text.is_file() else ""
    )
    for part, now in (("data", materials.fingerprint), ("model", materials.model_fingerprint)):
        if facts.get(part) != now:
            raise CheckpointError(
                f"the {part} of run {folder.name} changed since it was trained",
                f"put the {part} back, or run the recipe again",
            )
    backend = OneDevice(device, recipe.precision)
    stage, last = stages[-1]
    pools = {} if needed else {stage.name: NoPool()}
    runner = Runner(recipe, materials, folder, backend, Silent(), (), FlopTable(), pools)
    state = checkpoint.read_folder(folder / "trained" / stage.name)
    assembly = runner.assembled(stage, last, len(stages) - 1, state["kept"])
    checkpoint.restore_weights(assembly.live, state)
    # What frozen layers give is kept for rows that come again; here every row comes once.
    assembly.loop.gradients.prefix = None
    return Finished(folder, last, result, runner.materials_of(last), assembly)


def _records(folder: Path) -> tuple[dict[str, Any], Result]:
    """run.json and result.json of a run."""
    if not (folder / "run.json").is_file():
        raise ConfigError(
            f"{str(folder)!r} is not a run's folder", "give one that `outlay run` wrote"
        )
    if not (folder / "result.json").is_file():
        again = shlex.join(["outlay", "run", "--resume", str(folder)])
        raise ConfigError(f"run {folder.name} is not finished", f"go on with `{again}`")
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        result = Result(**json.loads((folder / "result.json").read_text(encoding="utf-8")))
        live = [k for k in ("model", "data") if isinstance(facts["recipe"][k], str)]
        Labels.read(facts["labels"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"the records of run {folder.name} are damaged ({type(error).__name__})",
            "run its recipe again in another --out",
        ) from None
    if live:
        raise ConfigError(
            f"run {folder.name} was given its {' and '.join(live)} as live objects",
            "use the Python objects that it was made with",
        )
    return facts, result
