"""One replication per paper: the script `NN_slug.py`, and `NN_slug.json`, what was measured.

Names are read from the files, so nothing heavy is imported until a replication is opened.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import registry
from ..core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ..comparison.replicate import Replication


def folder() -> Path:
    """Where scripts and ledger files lie."""
    return registry.ROOT / "replications"


def names() -> list[str]:
    """`NN_slug` of every replication, by paper."""
    return sorted(path.stem for path in folder().glob("[0-9][0-9]_*.py"))


def find(name: str) -> str:
    """`NN_slug` of a replication.

    Args:
        name: The number of a paper, a slug, both as `NN_slug`, or a method of the paper.

    Raises:
        ConfigError: With the nearest name if there is none.
    """
    plain = name.strip().lower().replace("-", "_")
    known = {stem: stem for stem in names()}
    known |= {stem.partition("_")[2]: stem for stem in names()}
    known |= {str(int(stem[:2])): stem for stem in names()} | {stem[:2]: stem for stem in names()}
    for entry in registry.entries().values():
        paper = entry.card.paper
        if paper is not None and str(paper) in known:
            known.setdefault(entry.card.name, known[str(paper)])
    if plain not in known:
        words = [word for word in known if not word.isdigit()]
        raise ConfigError(
            f"there is no replication {name!r}",
            f"{nearest(plain, words)}there are {', '.join(names())}",
        )
    return known[plain]


def load(name: str) -> Replication:
    """The replication of that name, see `find`.

    Raises:
        ConfigError: If there is none.
    """
    return importlib.import_module(f"{__name__}.{find(name)}").REPLICATION


def recorded(paper: int | None) -> dict[str, Any]:
    """The ledger of a paper, with its verdict as `status`; status "untested" if there is none."""
    found = [] if paper is None else sorted(folder().glob(f"{paper:02d}_*.json"))
    for path in found:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.get("verdict"):
            return {**content, "status": str(content["verdict"])}
    return {"status": "untested"}
