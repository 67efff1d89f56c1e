"""Recipes by name: functions that return a `Recipe`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ..training.recipe import Recipe

# Names are known without importing what a recipe needs.
_HOMES = {
    "digits-cnn": "digits_cnn",
    "digits-then-fashion": "digits_then_fashion",
    "digits-vit": "digits_vit",
    "glass-lm": "glass_lm",
    "pretrain-lm": "pretrain_lm",
    "minilm-questions": "minilm_questions",
    "minilm-questions-full": "minilm_questions_full",
    "minilm-reviews": "minilm_reviews",
}


def names() -> list[str]:
    """Names of all recipes, with dashes."""
    return sorted(_HOMES)


def function(name: str) -> Callable[[], Recipe]:
    """The function behind a name; dashes and underscores are the same.

    Raises:
        ConfigError: If no recipe has that name.
    """
    from . import usual

    plain = name.strip().lower().replace("_", "-")
    if plain not in _HOMES:
        raise ConfigError(
            f"no recipe is called {name!r}",
            f"{nearest(plain, _HOMES)}known: {', '.join(names())}, or give a YAML file",
        )
    return getattr(usual, _HOMES[plain])


def get(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ConfigError: If no recipe has that name.
    """
    return function(name)()


def summary(name: str) -> str:
    """First line of a recipe's description."""
    return (function(name).__doc__ or "").strip().splitlines()[0]
