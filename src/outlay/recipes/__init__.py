"""Recipes by name: functions that return a `Recipe`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ..training.recipe import Recipe

# Module and function by name, known without importing what a recipe needs.
_HOMES = {
    "digits-cnn": ("usual", "digits_cnn"),
    "digits-self-distillation": ("self_distillation", "digits_self_distillation"),
    "digits-then-fashion": ("usual", "digits_then_fashion"),
    "digits-vit": ("usual", "digits_vit"),
    "glass-lm": ("usual", "glass_lm"),
    "pretrain-lm": ("usual", "pretrain_lm"),
    "minilm-questions": ("usual", "minilm_questions"),
    "minilm-questions-full": ("usual", "minilm_questions_full"),
    "minilm-reviews": ("usual", "minilm_reviews"),
    "minilm-self-distillation": ("self_distillation", "minilm_self_distillation"),
}


def names() -> list[str]:
    """Names of all recipes, with dashes."""
    return sorted(_HOMES)


def function(name: str) -> Callable[[], Recipe]:
    """The function behind a name; dashes and underscores are the same.

    Raises:
        ConfigError: If no recipe has that name.
    """
    plain = name.strip().lower().replace("_", "-")
    if plain not in _HOMES:
        raise ConfigError(
            f"no recipe is called {name!r}",
            f"{nearest(plain, _HOMES)}known: {', '.join(names())}, or give a YAML file",
        )
    module, called = _HOMES[plain]
    return getattr(importlib.import_module(f"{__name__}.{module}"), called)


def get(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ConfigError: If no recipe has that name.
    """
    return function(name)()


def summary(name: str) -> str:
    """First line of a recipe's description."""
    return (function(name).__doc__ or "").strip().splitlines()[0]
