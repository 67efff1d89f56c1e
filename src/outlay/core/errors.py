"""Every refusal and failure: one line that says what is wrong, one that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OutlayError(Exception):
    """Base of all errors that a user can meet.

    Args:
        problem: What is wrong, with the value that was given.
        remedy: What to do about it.

    Attributes:
        exit_code: What the command exits with: 1 failed, 2 wrong usage, 3 refused.
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}\n{remedy}" if remedy else problem)


class ConfigError(OutlayError, ValueError):
    """A setting, recipe or call string has a wrong key, type or value."""

    exit_code = 2


class DataError(ConfigError):
    """Rows, columns or labels are not what the task needs."""


class MissingAsset(OutlayError, FileNotFoundError):
    """A packaged model or data set is not installed."""

    exit_code = 2


class MissingExtra(OutlayError, ImportError):
    """An optional dependency is not installed."""

    exit_code = 2


class Conflict(OutlayError, ValueError):
    """Two methods, or a method and the model, cannot work together."""

    exit_code = 3


class DoesNotFit(OutlayError, RuntimeError):
    """The run needs more than the machine or the cap allows."""

    exit_code = 3


class NoEffect(OutlayError, RuntimeError):
    """A method matched nothing, or its hook was never called."""

    exit_code = 3


class CheckpointError(OutlayError, RuntimeError):
    """No usable checkpoint, or one that belongs to another run."""


class NonFinite(OutlayError, FloatingPointError):
    """A loss or gradient is NaN or infinite."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return "did you mean 'x'? " for the closest spelling, or an empty string."""
    known = {name.casefold(): name for name in allowed}
    match = difflib.get_close_matches(word.casefold(), list(known), n=1, cutoff=0.6)
    return f"did you mean {known[match[0]]!r}? " if match else ""


def require(module: str, extra: str) -> object:
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: Dotted module name.
        extra: Name of outlay's extra that installs it.

    Raises:
        MissingExtra: If the module cannot be imported.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{module!r} is needed here and is not installed",
            f'pip install "outlay[{extra}]"',
        ) from error
