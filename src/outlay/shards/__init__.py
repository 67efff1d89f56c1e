"""Data larger than memory: shards, scorers, narrow side tables, the exact cut, engines.

Names resolve lazily, so that the command starts without Arrow.
"""

from __future__ import annotations

from typing import Any

_HOMES = {
    "FastText": "scorers",
    "Fields": "sets",
    "HashedLinear": "scorers",
    "Overlap": "scorers",
    "Rule": "deciding",
    "Scorer": "scorers",
    "Selecting": "selector",
    "Selection": "job",
    "ShardSet": "sets",
    "WordList": "scorers",
    "find_threshold": "cut",
    "load_scorer": "scorers",
    "open_shards": "sets",
    "select": "job",
    "select_top": "cut",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'outlay.shards' has no attribute {name!r}")
    return getattr(importlib.import_module(f"outlay.shards.{_HOMES[name]}"), name)
