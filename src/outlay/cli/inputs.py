"""What is typed, as what it means: recipes by file or name, settings, folders of runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, Conflict, nearest

if TYPE_CHECKING:
    from ..training.recipe import Recipe

TYPED: ContextVar[str] = ContextVar("typed", default="outlay")
"""The command as it was typed, for reports and for going on."""

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")


def literal(text: str) -> Any:
    """A value as YAML means it; `1e-3` is a number too.

    Raises:
        ConfigError: If it is not YAML.
    """
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(
            f"cannot read the value {text!r}", "write a YAML literal, as 3, 0.5, text or [1, 2]"
        ) from None
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return value


def assignment(text: str) -> tuple[str, Any]:
    """Split `optimizer.lr=3e-3`; dashes in the key are underscores.

    Raises:
        ConfigError: If there is no key or no value.
    """
    key, equals, value = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not key:
        raise ConfigError(f"--set {text!r} is not key=value", "write it as optimizer.lr=3e-3")
    return key, literal(value)


def open_recipe(
    source: str | None,
    *,
    seed: int | None = None,
    budget: str | None = None,
    methods: Sequence[str] | None = None,
    settings: Sequence[str] | None = None,
    resume: Path | None = None,
) -> Recipe:
    """The recipe that was named, with everything that was changed on the command line.

    Settings are applied first, then methods are appended, then budget and seed.

    Args:
        source: A YAML file or the name of a packaged recipe; None takes that of `resume`.
        seed: Replaces the recipe's.
        budget: Replaces the recipe's.
        methods: Call strings that act after the recipe's own.
        settings: `key=value` strings.
        resume: Folder of a run to go on with.

    Raises:
        ConfigError: With the nearest spelling of what does not exist.
    """
    from ..training.recipe import Recipe

    if source is None:
        if resume is None:
            raise ConfigError("no recipe is given", "name a YAML file or a packaged recipe")
        recipe = Recipe.read(resume / "recipe.yaml")
    elif _is_file(source):
        recipe = Recipe.read(source)
    else:
        from .. import recipes

        recipe = recipes.get(source)
    changes = dict(map(assignment, settings or ()))
    recipe = recipe.changed(changes) if changes else recipe
    last: dict[str, Any] = {}
    if methods:
        last["methods"] = (*recipe.methods, *methods)
    if budget is not None:
        last["budget"] = budget
    if seed is not None:
        last["seed"] = seed
    return recipe.changed(last) if last else recipe


def _is_file(source: str) -> bool:
    """True for what can only be a path, and for a name that is one."""
    path = Path(source)
    return path.suffix in (".yaml", ".yml") or "/" in source or path.is_file()


def run_folder(text: str, base: Path = Path("runs")) -> Path:
    """Folder of a run: a path, a name in runs/, or the beginning of one name there.

    Raises:
        ConfigError: With the nearest name.
    """
    for place in (Path(text), base / text):
        if (place / "run.json").is_file():
            return place
    names = sorted(p.parent.name for p in base.glob("*/run.json")) if base.is_dir() else []
    begun = [name for name in names if name.startswith(text)]
    if len(begun) == 1:
        return base / begun[0]
    if len(begun) > 1:
        raise ConfigError(
            f"{text!r} is the beginning of {len(begun)} runs", f"name one of {', '.join(begun[:8])}"
        )
    if Path(text).is_dir():
        raise ConfigError(
            f"{text!r} is not a run's folder: it holds no run.json",
            "give a folder that `outlay run` wrote",
        )
    raise ConfigError(
        f"there is no run {text!r}", f"{nearest(text, names)}give a folder that `outlay run` wrote"
    )


def free_place(path: Path, force: bool) -> None:
    """Refuse to write over something, before any work is done.

    Raises:
        Conflict: If a file, or a folder that is not empty, is there and `force` is not given.
        ConfigError: If its parent cannot hold it.
    """
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not force:
        raise Conflict(f"{str(path)!r} is there already", "give another --out, or --force")
    parent = next((p for p in path.absolute().parents if p.exists()), None)
    if parent is not None and not parent.is_dir():
        raise ConfigError(f"{str(parent)!r} is a file, not a folder", "give another --out")
