"""What a finished selection kept, by score, domain, year and length, from its side tables."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from .job import Selection
from .tables import chunks

BINS = 40


def statistics_of(found: Selection) -> dict[str, Any]:
    """Documents and how many of them are kept.

    Returns:
        `scores`: for each column two lists of `BINS` counts over [0, 1], all and kept; `domains`,
        `years` and `lengths` (tokens, as powers of two): for each value its two counts.
    """
    kept = {
        label.stem: {row for part in chunks(label, ["row"]) for row in part["row"].tolist()}
        for label in sorted((found.folder / "data").glob("*.parquet"))
    }
    scores: dict[str, list[list[int]]] = {}
    tallies: dict[str, dict[Any, list[int]]] = {"domains": {}, "years": {}, "lengths": {}}
    columns = list(found.manifest["scorers"])
    for path in sorted((found.folder / "scores").glob("*.parquet")):
        for rows in chunks(path):
            chosen = np.isin(rows["row"], list(kept.get(path.stem, ())))
            for column in columns:
                sums = scores.setdefault(column, [[0] * BINS, [0] * BINS])
                for side, among in zip(sums, (slice(None), chosen)):
                    counts, _ = np.histogram(rows[column][among], BINS, (0.0, 1.0))
                    side[:] = (np.asarray(side) + counts).tolist()
            years = [str(day)[:4] or "none" for day in rows["date"]]
            lengths = np.log2(np.maximum(rows["tokens"], 1)).astype(int).tolist()
            domains = [str(name) or "none" for name in rows["domain"]]
            for name, values in (("domains", domains), ("years", years), ("lengths", lengths)):
                _add(tallies[name], values, chosen.tolist())
    return {"scores": scores, **{k: dict(sorted(v.items())) for k, v in tallies.items()}}


def _add(tally: dict[Any, list[int]], values: list[Any], chosen: list[bool]) -> None:
    for value, count in Counter(values).items():
        tally.setdefault(value, [0, 0])[0] += count
    for value, count in Counter(v for v, kept in zip(values, chosen) if kept).items():
        tally[value][1] += count
