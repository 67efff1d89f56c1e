"""Call strings: `adalora(target_r=2)` means a name and literal keyword settings, nothing else."""

from __future__ import annotations

import ast
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
        node = ast.parse(name.replace("-", "_") + bracket + rest, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(f"cannot read method {text!r}", remedy) from None
    if isinstance(node, ast.Name):
        return node.id, {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return _refuse(text, remedy)
    if node.args:
        raise ConfigError(f"method {text!r} has a setting without a name", remedy)
    settings: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in settings:
            return _refuse(text, remedy)
        try:
            settings[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise ConfigError(
                f"setting {keyword.arg!r} of {text!r} is not a literal",
                "give a number, string, True, False, None, list, tuple or dict",
            ) from None
    return node.func.id, settings


def _refuse(text: str, remedy: str) -> Any:
    raise ConfigError(f"cannot read method {text!r}", remedy)


def split_sum(text: str) -> list[str]:
    """Split `bone(r=16)+loss_weights` at its top-level plus signs."""
    parts, depth, current, quote = [], 0, "", ""
    for character in text:
        if quote:
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
