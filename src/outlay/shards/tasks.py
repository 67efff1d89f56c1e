"""The two tasks a shard: a side table of scores, and the documents that are kept."""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..core.errors import DataError, OutlayError
from .deciding import Columns, Decision, random_scores
from .reading import Document, Quarantined, read
from .scorers import Scorer
from .sets import Fields, Shard
from .tables import Writer, chunks, score_schema, whole, written

_CLIPPED = 400  # characters of an example's text
_DRAW_SEED = 20_23


@dataclass(frozen=True)
class Scoring:
    """Arguments of `score_shard`."""

    shard: Shard
    fields: Fields
    scorers: tuple[Scorer, ...]
    folder: Path
    limit: int | None
    fingerprint: str

    @property
    def path(self) -> Path:
        """The side table."""
        return self.folder / f"{self.shard.label}.parquet"

    @property
    def quarantine(self) -> Path:
        """The rows that were set aside, written before the side table."""
        return self.folder / f"{self.shard.label}.quarantine.jsonl"


def score_shard(task: Scoring) -> tuple[int, dict[str, int]]:
    """Write a shard's side table.

    Returns:
        The shard's number and the counts of its rows.
    """
    counts = {"read": 0, "usable": 0, "quarantined": 0, "failed": 0}
    schema = score_schema([scorer.column for scorer in task.scorers])
    with (
        written(task.path, schema, task.fingerprint) as table,
        whole(task.quarantine) as draft,
        draft.open("w", encoding="utf-8") as aside,
    ):
        for batch in read(task.shard, task.fields, limit=task.limit):
            documents, scores, failed = _scored(batch.documents, task)
            for bad in sorted([*batch.quarantined, *failed], key=lambda bad: bad.line):
                aside.write(json.dumps(asdict(bad), ensure_ascii=False) + "\n")
            counts["usable"] += len(documents)
            counts["failed"] += len(failed)
            counts["quarantined"] += len(batch.quarantined) + len(failed)
            table.write({**_columns(documents), **scores})
        counts["read"] = counts["usable"] + counts["quarantined"]
        table.footer = {"counts": counts}
    return task.shard.number, counts


def _columns(documents: Sequence[Document]) -> dict[str, Any]:
    return {
        "row": [d.row for d in documents],
        "id": [d.id for d in documents],
        "key": np.asarray([d.key for d in documents], np.uint64),
        "characters": [len(d.text) for d in documents],
        "bytes": [d.bytes for d in documents],
        "tokens": [d.tokens for d in documents],
        "date": [d.date for d in documents],
        "domain": [d.domain for d in documents],
    }


def _scored(
    documents: list[Document], task: Scoring
) -> tuple[list[Document], dict[str, Any], list[Quarantined]]:
    """Scores by column; a document that a scorer fails on is set aside alone."""
    failures: dict[int, str] = {}
    found = {}
    for scorer in task.scorers:
        values = _values(scorer, [document.text for document in documents], failures)
        found[scorer.column] = values
    good = [index for index in range(len(documents)) if index not in failures]
    aside = [
        Quarantined(task.shard.name, documents[index].row, why) for index, why in failures.items()
    ]
    scores = {column: values[good] for column, values in found.items()}
    return [documents[index] for index in good], scores, aside


def _values(scorer: Scorer, texts: list[str], failures: dict[int, str]) -> Any:
    try:
        values = scorer.score(texts)
    except OutlayError:
        raise
    except Exception:
        values = np.full(len(texts), np.nan, np.float32)
        for index, text in enumerate(texts):
            try:
                values[index] = scorer.score([text])[0]
            except Exception as error:
                failures[index] = f"{scorer.column}: {type(error).__name__}: {error}"[:200]
    for index in np.flatnonzero(np.isnan(values)).tolist():
        failures.setdefault(index, f"{scorer.column}: the score is not a number")
    return values


@dataclass(frozen=True)
class Exporting:
    """Arguments of `export_shard`."""

    shard: Shard
    fields: Fields
    scores: Path
    decisions: tuple[Decision, ...]
    copies: tuple[int, ...]
    out: Path
    limit: int | None
    keep_dropped: bool
    examples: int
    fingerprint: str

    @property
    def path(self) -> Path:
        """The kept documents."""
        return self.out / "data" / f"{self.shard.label}.parquet"


def export_shard(task: Exporting) -> tuple[int, dict[str, int]]:
    """Write a shard's kept documents, and the dropped ones if asked for.

    Returns:
        The shard's number and the counts of its rows.

    Raises:
        DataError: If the shard is no longer what was scored.
    """
    import pyarrow.parquet as pq

    known = pq.read_schema(task.scores).names
    columns = [name for name in known if name not in score_schema([]).names]
    schema = pa.schema(_exported(columns))
    # The file of what was kept says that the shard is done, so it is put in place last.
    with written(task.path, schema, task.fingerprint) as table:
        if not task.keep_dropped:
            return _export(task, columns, table, None)
        schema = schema.append(pa.field("reason", pa.string()))
        with written(task.out / "dropped" / task.path.name, schema, task.fingerprint) as others:
            return _export(task, columns, table, others)


def _exported(columns: Sequence[str]) -> list[Any]:
    """Fields of an exported document; columns of no part in the selection are one JSON text."""
    plain = ("id", "text", "date", "domain")
    return [
        *(pa.field(name, pa.string()) for name in plain), pa.field("tokens", pa.int64()),
        *(pa.field(name, pa.float32()) for name in columns),
        pa.field("metadata", pa.string()), pa.field("shard", pa.string()),
        pa.field("row", pa.int64()),
    ]  # fmt: skip


def _export(
    task: Exporting, columns: list[str], table: Writer, others: Writer | None
) -> tuple[int, dict[str, int]]:
    counts = {"read": 0, "kept": 0, "quarantined": 0}
    dropped: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    drawn: dict[str, list[Any]] = {"kept": [], "dropped": []}
    judged = _judged(task)
    following = next(judged, None)
    for batch in read(task.shard, task.fields, limit=task.limit, rest=True):
        counts["quarantined"] += len(batch.quarantined)
        kept, gone = [], []
        for document in batch.documents:
            if following is None or following[0] != document.row:
                counts["quarantined"] += 1  # a scorer failed on it
                continue
            row, why = following[1:]
            if row["id"] != document.id:
                raise _changed(task.shard)
            following = next(judged, None)
            if why is None:
                counts["quarantined"] += 1
                continue
            entry = _entry(task, document, row, columns)
            side = "dropped" if why else "kept"
            tokens["read"] += document.tokens
            tokens[side] += document.tokens
            if why:
                dropped[why] += 1
                gone.append({**entry, "reason": why})
            else:
                counts["kept"] += 1
                kept.append(entry)
            _draw(drawn[side], task.examples, entry, why, row["draw"], columns)
        table.write(_turned(kept, table.schema))
        if others is not None:
            others.write(_turned(gone, others.schema))
    if following is not None:
        raise _changed(task.shard)
    counts["read"] = counts["kept"] + counts["quarantined"] + sum(dropped.values())
    table.footer = {
        "counts": {**counts, **dropped}, "dropped": dict(dropped), "tokens": dict(tokens),
        "examples": {side: [e[2] for e in found] for side, found in drawn.items()},
    }  # fmt: skip
    return task.shard.number, {**counts, **dropped}


def _changed(shard: Shard) -> DataError:
    return DataError(
        f"{shard.name} changed since it was scored",
        "put it back, or select into another folder",
    )


def _judged(task: Exporting) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """Row, its columns, and why it is dropped: "" if it is kept, None if its id came before."""
    for rows in chunks(task.scores):
        reasons = _reasons(rows, task.decisions)
        copies = np.isin(rows["row"], task.copies)
        shown = {**rows, "draw": random_scores(rows["key"], _DRAW_SEED)}
        for index, row in enumerate(rows["row"].tolist()):
            values = {name: column[index] for name, column in shown.items()}
            yield row, values, None if copies[index] else str(reasons[index])


def _reasons(rows: Columns, decisions: Sequence[Decision]) -> Any:
    """The first method's reason that drops a row."""
    reasons = np.full(len(rows["key"]), "", object)
    for decision in decisions:
        alive = reasons == ""
        reasons[alive] = decision.apply({name: column[alive] for name, column in rows.items()})
    return reasons


def _entry(
    task: Exporting, document: Document, row: dict[str, Any], columns: Sequence[str]
) -> dict[str, Any]:
    rest = json.dumps(dict(document.rest), ensure_ascii=False, default=str) if document.rest else ""
    return {
        "id": document.id, "text": document.text, "date": document.date,
        "domain": document.domain, "tokens": document.tokens,
        **{name: float(row[name]) for name in columns},
        "metadata": rest.encode("utf-8", "replace").decode(), "shard": task.shard.name,
        "row": document.row,
    }  # fmt: skip


def _turned(entries: Sequence[dict[str, Any]], schema: Any) -> dict[str, list[Any]]:
    return {name: [entry[name] for entry in entries] for name in schema.names}


def _draw(
    drawn: list[Any], most: int, entry: dict[str, Any], why: str, draw: Any, columns: Sequence[str]
) -> None:
    """Keep the examples with the lowest draws."""
    key = (-float(draw), entry["id"])
    if len(drawn) == most and key < drawn[0][:2]:
        return
    shown = {
        "id": entry["id"], "text": entry["text"][:_CLIPPED], "domain": entry["domain"],
        "date": entry["date"], "tokens": entry["tokens"], "reason": why, "draw": float(draw),
        "scores": {name: _rounded(entry[name]) for name in columns},
    }  # fmt: skip
    if len(drawn) < most:
        heapq.heappush(drawn, (*key, shown))
    else:
        heapq.heapreplace(drawn, (*key, shown))


def _rounded(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
