"""What a recipe is made of: rows, labels, tokenizer, encoded examples, and fresh models."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..core.losses import Objective
from ..core.method import Example, OnBatch
from .data.dataset import Row, Splits, encode, load
from .data.labels import Labels
from .frozen import PrefixStore
from .models.export import fingerprint
from .models.load import load_model
from .objectives import objective_for
from .recipe import Recipe
from .specs import ModelSpec

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
    """

    train: list[Example]
    splits: dict[str, list[Example]]
    rows: dict[str, list[Row]]
    labels: Labels
    tokenizer: Any
    added: tuple[str, ...]
    fingerprint: str
    model_fingerprint: str
    counts: dict[str, Any] = field(default_factory=dict)
    prefixes: dict[str, PrefixStore] = field(default_factory=dict)

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


def load_materials(
    recipe: Recipe, tokenizer: Any = None, hollow: bool = False, splits: Splits | None = None
) -> Materials:
    """Load and encode everything that a recipe names.

    Args:
        recipe: The recipe (or one stage's).
        tokenizer: The run's tokenizer if an earlier stage fixed it.
        hollow: Leave the model's weights unread.
        splits: Rows and labels in place of those that the recipe names.

    Raises:
        DataError: Rows, columns or labels are wrong.
        ConfigError: The model folder is unusable.
    """
    splits = splits or load(recipe.data, recipe.task)
    digest = ""
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
    elif isinstance(recipe.model, nn.Module):
        digest = fingerprint(recipe.model)
    wanted = dict.fromkeys(
        token for m in recipe.methods if isinstance(m, OnBatch) for token in m.tokens(tokenizer)
    )
    added: tuple[str, ...] = ()
    if wanted:
        known = tokenizer.get_vocab()
        added = tuple(token for token in wanted if token not in known)
        tokenizer.add_tokens(list(added), special_tokens=True)

    def encoded(rows: list[Row]) -> list[Example]:
        return encode(rows, recipe.task, tokenizer, recipe.batch.length, splits.labels)

    return Materials(
        train=encoded(splits.train),
        splits={"validation": encoded(splits.validation), "test": encoded(splits.test)},
        rows={"train": splits.train, "validation": splits.validation, "test": splits.test},
        labels=splits.labels,
        tokenizer=tokenizer,
        added=added,
        fingerprint=splits.fingerprint,
        model_fingerprint=digest,
        counts=splits.counts,
    )
