"""What a recipe is made of: rows, labels, tokenizer, encoded examples, and fresh models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..core.errors import ConfigError
from ..core.losses import Objective
from ..core.method import Example, OnBatch
from .data.blocks import blocks
from .data.corruption import Corruption, corruption_for
from .data.dataset import Row, Splits, encode, load
from .data.labels import Labels
from .frozen import PrefixStore
from .models.export import fingerprint
from .models.load import load_model, patches_of
from .models.tokens import tokenizer_of, train_tokenizer
from .objectives import objective_for
from .recipe import Recipe
from .specs import MASKED_TEXT, ModelSpec

MASK_TOKEN = "[MASK]"  # added where a masked task's tokenizer has none
_MODEL_SEED = 0  # the fingerprint is of the pre-trained weights, whatever the run's seed


@dataclass
class Materials:
    """Data and model of a recipe, loaded once and shared by runs that agree on them.

    Attributes:
        train: Encoded training examples.
        splits: Encoded examples of "validation" and "test".
        rows: The rows behind them, by split.
        labels: Label space.
        tokenizer: The run's tokenizer, methods' tokens included; None for images.
        added: Names of the tokens that methods added.
        fingerprint: Content hash of the data.
        model_fingerprint: Content hash of the plain model; empty if only planned.
        counts: Rows read, kept and dropped.
        prefixes: What frozen lower layers gave, shared by the runs.
        patches: Patches that the model cuts an image into; 0 if it reads none.
        trained_tokenizer: The tokenizer that was trained for this run, as text, before methods
            added tokens; empty if the model brought one.
    """

    train: Sequence[Example]
    splits: dict[str, Sequence[Example]]
    rows: dict[str, list[Row]]
    labels: Labels
    tokenizer: Any
    added: tuple[str, ...]
    fingerprint: str
    model_fingerprint: str
    counts: dict[str, Any] = field(default_factory=dict)
    prefixes: dict[str, PrefixStore] = field(default_factory=dict)
    trained_tokenizer: str = ""
    patches: int = 0

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that methods added."""
        return tuple(self.tokenizer.convert_tokens_to_ids(list(self.added))) if self.added else ()

    def model(self, recipe: Recipe, hollow: bool = False) -> nn.Module:
        """A fresh plain model, as loaded, with rows for the run's new tokens.

        Args:
            recipe: Names the model and the seed of its head.
            hollow: On the meta device: shapes without values.
        """
        if isinstance(recipe.model, nn.Module):
            return copy.deepcopy(recipe.model)
        model, _ = load_model(
            recipe.model,
            recipe.task,
            self.labels,
            tokenizer=self.tokenizer,
            added=self.added,
            seed=recipe.seed,
            precision=recipe.precision,
            length=recipe.batch.length,
            meta=hollow,
        )
        return model

    def objective(self, recipe: Recipe, requests: set[str]) -> Objective:
        """The task's objective, or the live one that the recipe holds."""
        return objective_for(recipe.task, recipe.objective, self.labels, requests)

    def corruption(self, recipe: Recipe) -> Corruption | None:
        """How the recipe's task corrupts an example, if it does."""
        return corruption_for(recipe.task, recipe.objective, self.tokenizer, self.patches)


def shown_length(recipe: Recipe) -> int:
    """Tokens of an example before methods show it, so that it fits `batch.length`."""
    length = recipe.batch.length
    for method in _on_batch(recipe.methods):
        length = method.shown_length(length)
    return length


def raw_length(recipe: Recipe) -> int:
    """Tokens of a training example before methods show and rewrite it to fit `batch.length`."""
    length = recipe.batch.length
    for method in _on_batch(recipe.methods):
        length = method.raw_length(length, recipe.task)
    for method in _on_batch(recipe.methods):
        length = method.shown_length(length)
    return length


def _on_batch(methods: Sequence[Any]) -> list[OnBatch]:
    """From the last to the first: what comes out of all must fit."""
    return [method for method in reversed(methods) if isinstance(method, OnBatch)]


def _add_tokens(recipe: Recipe, tokenizer: Any) -> tuple[str, ...]:
    """Add what the methods of all stages ask for, in their order, and say what was missing."""
    stages = (stage.methods or () for stage in recipe.stages)
    methods = [*recipe.methods, *(method for some in stages for method in some)]
    added: list[str] = []
    tasks = {recipe.task, *(stage.task for stage in recipe.stages)}
    if MASKED_TEXT in tasks and getattr(tokenizer, "mask_token_id", 0) is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        added.append(MASK_TOKEN)
    for method in methods:
        # A method sees the tokens of those before it, of earlier stages too.
        wanted = method.tokens(tokenizer) if isinstance(method, OnBatch) else ()
        if wanted and tokenizer is None:
            raise ConfigError(
                f"{method.card.name!r} adds tokens, and {recipe.task} has none", "leave it out"
            )
        missing = [token for token in wanted if token not in tokenizer.get_vocab()]
        if missing:
            tokenizer.add_tokens(missing, special_tokens=True)
            added += missing
    return tuple(added)


def load_materials(
    recipe: Recipe,
    run: Materials | None = None,
    hollow: bool = False,
    splits: Splits | None = None,
    tokenizer_text: str = "",
) -> Materials:
    """Load and encode everything that a recipe names.

    Args:
        recipe: The recipe (or one stage's).
        run: Materials of the whole run, for a stage: its tokenizer and tokens are the run's.
        hollow: Leave the model's weights unread.
        splits: Rows and labels in place of those that the recipe names.
        tokenizer_text: The tokenizer that was trained for a finished run.

    Raises:
        DataError: Rows, columns or labels are wrong.
        ConfigError: The model folder is unusable.
    """
    splits = splits or load(recipe.data, recipe.task)
    trained = "" if run is None else run.trained_tokenizer
    tokenizer: Any = run.tokenizer if run is not None else None
    if run is None and isinstance(recipe.model, ModelSpec) and recipe.model.trains_tokenizer:
        trained = tokenizer_text or train_tokenizer(splits.train, recipe.model.vocabulary)
        tokenizer = tokenizer_of(trained)
    digest, patches = "", 0
    if isinstance(recipe.model, ModelSpec):
        model, own = load_model(
            recipe.model,
            recipe.task,
            splits.labels,
            tokenizer=tokenizer,
            seed=_MODEL_SEED,
            length=recipe.batch.length,
            meta=hollow,
        )
        tokenizer = tokenizer or own
        digest = "" if hollow else fingerprint(model)
        patches = patches_of(model.config)
    elif isinstance(recipe.model, nn.Module):
        digest = fingerprint(recipe.model)
        patches = patches_of(getattr(recipe.model, "config", None))
    added: tuple[str, ...] = () if run is None else run.added
    added = (*added, *_add_tokens(recipe, tokenizer))

    def encoded(rows: list[Row], length: int) -> Sequence[Example]:
        if getattr(recipe.data, "blocks", False):
            return blocks(rows, tokenizer, length, recipe.task)
        return encode(rows, recipe.task, tokenizer, length, splits.labels)

    length = shown_length(recipe)
    return Materials(
        train=encoded(splits.train, raw_length(recipe)),
        splits={
            "validation": encoded(splits.validation, length),
            "test": encoded(splits.test, length),
        },
        rows={"train": splits.train, "validation": splits.validation, "test": splits.test},
        labels=splits.labels,
        tokenizer=tokenizer,
        added=added,
        fingerprint=splits.fingerprint,
        model_fingerprint=digest,
        counts=splits.counts,
        trained_tokenizer=trained,
        patches=patches,
    )
