"""What a recipe is made of: rows, labels, tokenizer, encoded examples, and fresh models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..core.losses import Objective
from ..core.method import Example, OnBatch
from . import models
from .data import Labels, encode, load
from .objectives import objective_for
from .recipe import ModelSpec, Recipe


@dataclass
class Materials:
    """Data and model of a recipe, loaded once and shared by runs that agree on them.

    Attributes:
        train: Encoded training examples.
        splits: Encoded examples of "validation" and "test".
        labels: Label space, or None.
        tokenizer: The run's tokenizer, methods' tokens included.
        new_tokens: Ids of the tokens that methods added.
        fingerprint: Content hash of the data.
        model_fingerprint: Content hash of the plain model.
        counts: Rows read, kept and dropped.
    """

    train: list[Example]
    splits: dict[str, list[Example]]
    labels: Labels | None
    tokenizer: Any
    new_tokens: tuple[int, ...]
    fingerprint: str
    model_fingerprint: str
    counts: dict[str, Any] = field(default_factory=dict)
    _models: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def model(self, recipe: Recipe) -> nn.Module:
        """A fresh plain model, as loaded, with rows for the run's new tokens."""
        return plain_model(recipe, self.labels, self.tokenizer, self.new_tokens)

    def objective(self, recipe: Recipe, requests: set[str]) -> Objective:
        """The task's objective."""
        return objective_for(recipe.task, recipe.objective, self.labels, requests)


def plain_model(
    recipe: Recipe, labels: Labels | None, tokenizer: Any, new_tokens: tuple[int, ...]
) -> nn.Module:
    """The recipe's model before any method: loaded or made, with rows for new tokens."""
    if isinstance(recipe.model, nn.Module):
        import copy

        return copy.deepcopy(recipe.model)
    model, _ = models.load_model(
        recipe.model, recipe.task, labels, tokenizer=tokenizer, seed=recipe.seed
    )
    if new_tokens:
        models.grow_rows(model, tokenizer, new_tokens, seed=recipe.seed)
    return model


def load_materials(recipe: Recipe, tokenizer: Any = None) -> Materials:
    """Load and encode everything that a recipe names.

    Args:
        recipe: The recipe (or one stage's).
        tokenizer: The run's tokenizer if an earlier stage fixed it.

    Raises:
        DataError: Rows, columns or labels are wrong.
        ConfigError: The model folder is unusable.
    """
    splits = load(recipe.data, recipe.task)
    if isinstance(recipe.model, ModelSpec):
        tokenizer = tokenizer or models.load_tokenizer(recipe.model)
    wanted = [
        token for m in recipe.methods if isinstance(m, OnBatch) for token in m.tokens(tokenizer)
    ]
    new_tokens = models.add_tokens(tokenizer, wanted) if wanted else ()

    def encoded(rows: Any) -> list[Example]:
        return encode(rows, recipe.task, tokenizer, recipe.batch.length, splits.labels)

    model = plain_model(recipe, splits.labels, tokenizer, new_tokens)
    return Materials(
        train=encoded(splits.train),
        splits={"validation": encoded(splits.validation), "test": encoded(splits.test)},
        labels=splits.labels,
        tokenizer=tokenizer,
        new_tokens=new_tokens,
        fingerprint=splits.fingerprint,
        model_fingerprint=models.fingerprint(model),
        counts=splits.counts,
    )
