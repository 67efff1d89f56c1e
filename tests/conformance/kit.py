"""Tiny stages of the supported model shapes, put together as `run` does."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from conformance import settings
from torch import Tensor, nn

from outlay.core import registry
from outlay.core.meter import Flops, FlopTable
from outlay.core.method import OnBatch, Step, Watcher
from outlay.training.assemble import Assembly
from outlay.training.backend import OneDevice
from outlay.training.keeper import Silent
from outlay.training.materials import Materials, load_materials
from outlay.training.recipe import Recipe
from outlay.training.specs import StageSpec
from outlay.training.stages import Runner

WORDS = ("apple", "pear", "plum", "fig", "wave", "salt", "fish", "tide", "saw", "file", "drill")

# Small enough to be quick, wide enough for every rank in the table; ragged rows everywhere.
SHAPES: dict[str, dict[str, Any]] = {
    "bert": {"task": "sequence-classification", "model": {"config": "bert"}},
    "gpt2": {"task": "causal-language-modeling", "model": {"config": "gpt2"}},
    "llama": {"task": "causal-language-modeling", "model": {"config": "llama"}},
    "t5": {"task": "sequence-to-sequence", "model": {"config": "t5"}},
}
AUTO = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "causal-language-modeling": transformers.AutoModelForCausalLM,
    "sequence-to-sequence": transformers.AutoModelForSeq2SeqLM,
}


@functools.cache
def folder() -> Path:
    """A folder of this process with the data of both kinds; gone with the process."""
    keeper = tempfile.TemporaryDirectory(prefix="conformance-")
    folder.keeper = keeper  # type: ignore[attr-defined]
    place = Path(keeper.name)
    draw = random.Random(0)

    def text(words: tuple[str, ...]) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, 4)))

    rows = [{"text": text(WORDS[4 * k : 4 * k + 4]), "label": "abc"[k]} for k in [0, 1, 2] * 14]
    pairs = [{"prompt": text(WORDS[:8]), "completion": f" {text(WORDS[8:])}"} for _ in range(42)]
    for name, table in (("rows", rows), ("pairs", pairs)):
        lines = "".join(json.dumps(row) + "\n" for row in table)
        (place / f"{name}.jsonl").write_text(lines)
    return place


def recipe(shape: str = "", methods: Any = (), **more: Any) -> Recipe:
    """A small recipe; `model` entries are merged, everything else is the recipe's own field.

    Without a shape it is the one that the methods are at home on. `tasks` makes two tasks of the
    data; by default where one of the methods follows tasks.
    """
    facts = SHAPES[shape or settings.home(methods)]
    labeled = facts["task"] == "sequence-classification"
    data = {"path": str(folder() / "rows.jsonl"), "text": "text", "label": "label"}
    if not labeled:
        data = {
            "path": str(folder() / "pairs.jsonl"), "prompt": "prompt", "completion": "completion",
        }  # fmt: skip
    if more.pop("tasks", settings.needs_tasks(methods)):
        path = data.pop("path")
        # The second of three steps begins the second task: its last one is pulled back.
        data["tasks"] = [{"path": path, "name": "one"}, {"path": path, "name": "two", "weight": 2}]
    model = {"layers": 2, "width": 32, "heads": 2, "dropout": 0.0} | facts["model"]
    fields = {
        "task": facts["task"],
        "data": data,
        "methods": methods,
        "batch": {"size": 8, "length": 48},
        "optimizer": {"lr": 0.01, "weight_decay": 0.01},
        "budget": "3steps",
    } | more
    fields["model"] = model | (more.get("model") or {})
    if any(registry.build(method).spec() in settings.INSIDE for method in methods):
        fields["optimizer"] = fields["optimizer"] | {"clip": None}
    return Recipe(**fields)


class Uncounted(FlopTable):
    """Counts nothing: the first meeting with a shape costs ten passes otherwise."""

    def run(self, key: Any, function: Callable[[], Any], *_: Any) -> tuple[Any, Flops]:
        return function(), Flops(0, 0, 0)


_MATERIALS: dict[str, Materials] = {}


def materials(of: Recipe) -> Materials:
    """Data and tokenizer, shared by recipes that agree on them."""
    if any(isinstance(method, OnBatch) for method in of.methods):
        return load_materials(of)
    key = repr((of.data, of.model, of.task, of.batch.length))
    if key not in _MATERIALS:
        _MATERIALS[key] = load_materials(of)
    return _MATERIALS[key]


def stage(of: Recipe, **changes: Any) -> Assembly:
    """One stage, adapted and not yet trained."""
    own = materials(of)
    if changes:
        own = Materials(**{**vars(own), **changes})
    backend = OneDevice("cpu", of.precision)
    runner = Runner(of, own, Path("."), backend, Silent(), (), Uncounted(), {})
    return runner.assembled(StageSpec(name="main", start="original"), of, 0, None)


def trained(assembly: Assembly) -> Assembly:
    try:
        assembly.loop.run()
    finally:
        assembly.loop.drawer.close()
    return assembly


class Grab(Watcher):
    """Keeps the gradients of the first step."""

    def __init__(self, assembly: Assembly) -> None:
        self.live, self.gradients = assembly.live, {}
        self.loss = float("nan")

    def after_backward(self, step: Step, seen: Any) -> None:
        if step.index == 0:
            self.loss = seen.loss
            self.gradients = {
                n: p.grad.detach().clone()
                for n, p in self.live.named_parameters()
                if p.grad is not None
            }


def gradients(assembly: Assembly) -> Grab:
    """Jitter the start, take one step and hand back what it saw."""
    jitter(assembly.live)
    grab = Grab(assembly)
    loop = assembly.loop
    loop.watchers = [*loop.watchers, grab]
    assembly.live.engine = loop
    assembly.model.train()
    try:
        with torch.random.fork_rng([]):
            loop.step(Step(0, 0.0, assembly.recipe.seed, total=3), assembly.context.meter)
    finally:
        assembly.live.engine = None
        loop.drawer.close()
    return grab


def jitter(live: Any, scale: float = 0.05) -> None:
    """Noise on whatever trains, so that zero starts do not hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(live.named_parameters(), key=lambda item: item[0]):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((noise * scale).to(parameter.dtype))


def inputs(assembly: Assembly, split: str = "validation") -> dict[str, Tensor]:
    """What the model is called with for one evaluation batch."""
    batch = next(iter(assembly.batches(split)))
    found = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
    if assembly.recipe.task == "sequence-to-sequence":
        found["labels"] = batch["labels"]
    return found


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    training = model.training
    with torch.no_grad():
        found = model.eval()(**batch).logits
    model.train(training)
    return found


def close(first: Tensor, second: Tensor, tolerance: float, what: str) -> None:
    """Largest difference at most `tolerance` times the largest value."""
    gap = float((first - second).abs().max())
    assert gap <= tolerance * float(second.abs().max()), f"{what}: differs by {gap:.3g}"


def weights(assembly: Assembly) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in assembly.live.named_parameters()}
