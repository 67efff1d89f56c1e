"""Call strings: `adalora(target_r=2)` means a name and literal keyword settings, nothing else."""

from __future__ import annotations

import ast
import math
import warnings
from typing import Any

from .errors import ConfigError


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Split a call string into its name and settings.

    Args:
        text: `name` or `name(key=literal, ...)`; dashes and underscores in the name are equal.

    Raises:
        ConfigError: If it is not such a string.
    """
    remedy = 'write it as name or name(key=value), for example "bone(r=16)"'
    name, bracket, rest = text.strip().partition("(")
    try:
        with warnings.catch_warnings():
            # Odd literals ("1if 2") only warn; they are refused below or by the setting.
            warnings.simplefilter("ignore")
            node = ast.parse(name.replace("-", "_") + bracket + rest, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _refuse(text, remedy)
    if isinstance(node, ast.Name):
        return node.id, {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return _refuse(text, remedy)
    if node.args:
        raise ConfigError(f"method {shown(text)} has a setting without a name", remedy)
    settings: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in settings:
            return _refuse(text, remedy)
        try:
            value = ast.literal_eval(keyword.value)
            if not _is_plain(value):
                raise ValueError
            settings[keyword.arg] = value
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise ConfigError(
                f"setting {keyword.arg!r} of {shown(text)} is not a literal",
                "give a number, string, True, False, None, list, tuple or dict",
            ) from None
    return node.func.id, settings


def _refuse(text: str, remedy: str) -> Any:
    raise ConfigError(f"cannot read method {shown(text)}", remedy) from None


def _is_plain(value: Any) -> bool:
    """True for finite numbers, strings, booleans, None and containers of them."""
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str))


def shown(value: Any, limit: int = 80) -> str:
    """A value as it stands in a message: on one line and not longer than `limit`."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def split_sum(text: str) -> list[str]:
    """Split `bone(r=16)+loss_weights` at its top-level plus signs."""
    parts, depth, current, quote, escaped = [], 0, "", "", False
    for character in text:
        if escaped:
            escaped = False
        elif quote:
            escaped = character == "\\"
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "+" and depth == 0 and not quote:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    parts.append(current.strip())
    return [part for part in parts if part]


def render(name: str, settings: dict[str, Any]) -> str:
    """Write a call string that `parse` reads back to the same thing."""
    if not settings:
        return name
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"
