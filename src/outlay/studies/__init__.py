"""Studies: plain functions over many runs, and the laws that are fitted to them."""

from __future__ import annotations

from ..core.errors import ConfigError, nearest

# Names and what they ask, known without importing what a study needs.
STUDIES = {
    "average_parameters": "does the average parameter count predict the loss of pruned runs, and "
    "where in the compute should pruning be",
}


def known(name: str) -> str:
    """The study of a name; dashes and underscores are equal.

    Raises:
        ConfigError: If there is none.
    """
    key = name.strip().lower().replace("-", "_")
    if key not in STUDIES:
        raise ConfigError(
            f"no study is called {name!r}", f"{nearest(key, STUDIES)}known: {', '.join(STUDIES)}"
        )
    return key
