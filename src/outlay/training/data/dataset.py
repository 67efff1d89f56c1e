"""The user's rows, or packaged ones, into train, validation and test with one label space."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, DataError, nearest
from ..specs import MASKED, DataSpec
from .columns import CLASSES, Columns, Row, find_columns, rows_of
from .encode import encode
from .labels import Labels, sorted_names
from .readers import SPLIT_NAMES, Table, read_splits, read_table, table_of
from .splits import content, rows_fingerprint, strata, stratified
from .tasks import load_tasks

__all__ = ["Splits", "encode", "load", "load_rows"]

_LANGUAGE = ("causal-language-modeling", "sequence-to-sequence")
_UNLABELED = (*_LANGUAGE, *MASKED)


@dataclass(frozen=True)
class Splits:
    """Rows by split, and what they have in common.

    Attributes:
        train: Dicts with id, domain, inputs and label.
        validation: The same; empty if there is none.
        test: The same; empty if there is none.
        labels: Label space of the training rows.
        fingerprint: SHA-256 of all rows in order, the columns and the label names.
        counts: Rows read, dropped (and why) and kept; rows of each class.
        sources: File, data set or share that each split came from.
        columns: Which column held what.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: Labels
    fingerprint: str
    counts: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    columns: Columns = field(default_factory=Columns)

    def __getitem__(self, split: str) -> list[Row]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


def load(
    spec: DataSpec | Iterable[Any] | Mapping[str, Iterable[Any]],
    task: str,
    *,
    base: Path | None = None,
    settings: DataSpec | None = None,
) -> Splits:
    """Read, check and split.

    A split that is not given is taken from the training rows: stratified, and decided by
    (split_seed, row number) alone. Test rows are taken first.

    Args:
        spec: Which data; or rows in memory, or splits of rows by name.
        task: One of `recipe.TASKS`.
        base: Folder that relative paths start from.
        settings: Columns and shares for rows in memory.

    Raises:
        DataError: Names file and line of what does not fit, and what to do.
        ConfigError: If shares or class weights are impossible.
        MissingAsset: If a packaged data set is not installed.
    """
    if isinstance(spec, DataSpec) and spec.tasks:
        return Splits(**load_tasks(spec, task, load, base))
    if isinstance(spec, DataSpec):
        tables, sources = _tables(spec, base)
    else:
        tables, sources = _from_memory(spec)
        spec = settings or DataSpec(asset="memory")
    columns = find_columns(spec, task, tables["train"])
    counts: dict[str, Any] = {"read": sum(len(table.rows) for table in tables.values())}
    found: dict[str, list[Row]] = {}
    for split, table in tables.items():
        here = columns if split == "train" else find_columns(spec, task, table)
        prefix = "" if split == "train" else f"{split}:"
        found[split] = rows_of(table, here, task, prefix=prefix)
    if task in _LANGUAGE:
        _drop(found, counts, "empty", _is_empty)
    if spec.deduplicate:
        _deduplicate(found, counts)
    if not found["train"]:
        raise DataError(f"{tables['train'].name} leaves no training row", "give more rows")
    _share_out(found, spec, task, sources)
    labels = _labels(found, tables, spec, task, columns)
    if spec.limit is not None and spec.limit < len(found["train"]):
        train = found["train"]
        gone = stratified(
            strata(train, task), len(train) - spec.limit, spec.split_seed, "beyond the limit"
        )
        counts["beyond_limit"] = len(gone)
        found["train"] = [row for index, row in enumerate(train) if index not in gone]
    labels = _with_statistics(labels, found["train"], spec, task)
    for split in SPLIT_NAMES:
        counts[split] = len(found[split])
    if task in CLASSES:
        counts["classes"] = dict(sorted(Counter(row["label"] for row in found["train"]).items()))
    fingerprint = rows_fingerprint(found.items(), [task, columns.named(), labels.names])
    return Splits(
        found["train"], found["validation"], found["test"], labels, fingerprint, counts, sources,
        columns,
    )  # fmt: skip


def load_rows(
    source: str | Path | Iterable[Any],
    spec: DataSpec,
    task: str,
    labels: Labels,
    *,
    labeled: bool = True,
    base: Path | None = None,
) -> list[Row]:
    """Rows of one more file, for `evaluate` and `predict`, under the columns of a recipe.

    Args:
        source: File or folder, or rows in memory.
        spec: Columns by name.
        task: One of `recipe.TASKS`.
        labels: Label space of the run; other labels are refused.
        labeled: False if labels may be missing.
        base: Folder that a relative path starts from.
    """
    if isinstance(source, (str, Path)):
        place = _path(str(source), base)
        tables = read_splits(place)
        table = tables.get("test", tables["train"])
    else:
        table = table_of(source)
    rows = rows_of(table, find_columns(spec, task, table, labeled), task, labeled)
    _known_labels({"rows": rows}, {"rows": table}, labels.names, task)
    _one_shape({"rows": rows}, {"rows": table}, labels.image)
    return rows


def _path(text: str, base: Path | None) -> Path:
    path = Path(text).expanduser()
    return path if path.is_absolute() or base is None else base / path


def _tables(spec: DataSpec, base: Path | None) -> tuple[dict[str, Table], dict[str, str]]:
    if spec.asset is not None:
        from ... import assets

        tables = {"train": table_of(assets.rows(spec.asset), spec.asset)}
        sources = {"train": f"asset {spec.asset}"}
    else:
        path = _path(str(spec.path), base)
        tables = read_splits(path)
        sources = {split: f"{path} ({table.name})" for split, table in tables.items()}
    for split in ("validation", "test"):
        given = getattr(spec, split)
        if given is not None:
            path = _path(given, base)
            tables[split] = read_table(path) if path.is_file() else read_splits(path)["train"]
            sources[split] = str(path)
    return tables, sources


def _from_memory(data: Any) -> tuple[dict[str, Table], dict[str, str]]:
    if not isinstance(data, Mapping):
        data = {"train": data}
    tables = {}
    for name, rows in data.items():
        split = next((s for s, names in SPLIT_NAMES.items() if name in names), None)
        if split is None:
            raise DataError(
                f"unknown split {name!r}",
                f"{nearest(str(name), SPLIT_NAMES)}use {', '.join(SPLIT_NAMES)}",
            )
        tables[split] = table_of(rows, f"{name} rows")
    if not tables.get("train") or not tables["train"].rows:
        raise DataError("the data holds no training row", "give at least one row")
    return tables, dict.fromkeys(tables, "memory")


def _is_empty(row: Row) -> bool:
    return not any(row.get(key, " ").strip() for key in ("text", "completion") if key in row) and (
        "messages" not in row
    )


def _drop(found: dict[str, list[Row]], counts: dict[str, Any], why: str, test: Any) -> None:
    dropped = 0
    for split, rows in found.items():
        found[split] = [row for row in rows if not test(row)]
        dropped += len(rows) - len(found[split])
    if dropped:
        counts[why] = dropped


def _deduplicate(found: dict[str, list[Row]], counts: dict[str, Any]) -> None:
    """Keep the first of equal rows; a training row that is held out elsewhere goes."""
    seen: dict[str, Any] = {}
    duplicates = conflicting = 0
    for split in ("test", "validation", "train"):
        kept = []
        for row in found.get(split, ()):
            key = content(row)
            if key in seen:
                duplicates += 1
                conflicting += row.get("label") != seen[key]
            else:
                seen[key] = row.get("label")
                kept.append(row)
        if split in found:
            found[split] = kept
    counts["duplicates"] = duplicates
    if conflicting:
        counts["duplicates_with_another_label"] = conflicting


def _share_out(
    found: dict[str, list[Row]], spec: DataSpec, task: str, sources: dict[str, str]
) -> None:
    """Take the splits that are not given from the training rows, test first."""
    total = len(found["train"])
    for split, share in (("test", spec.test_share), ("validation", spec.validation_share)):
        if split in found:
            continue
        count = 0 if share == 0 else max(1, round(share * total)) if share < 1 else int(share)
        if share >= 1 and share != count:
            raise ConfigError(
                f"data.{split}_share = {share} is not allowed",
                "give a share below 1 or a whole number of rows",
            )
        rows = found["train"]
        if count >= len(rows):
            raise DataError(
                f"{count:,} rows for the {split} split leave none of {len(rows):,} to train on",
                f"give more rows, or a smaller data.{split}_share",
            )
        chosen = stratified(strata(rows, task), count, spec.split_seed, split) if count else set()
        found[split] = [rows[i] for i in sorted(chosen)]
        found["train"] = [row for i, row in enumerate(rows) if i not in chosen]
        sources[split] = f"{count:,} rows of the training data, seed {spec.split_seed}"


def _labels(
    found: dict[str, list[Row]], tables: dict[str, Table], spec: DataSpec, task: str,
    columns: Columns,
) -> Labels:  # fmt: skip
    train = found["train"]
    if task in _UNLABELED:
        names: tuple[str, ...] = ()
    elif task == "regression":
        names = columns.labels
    elif task == "multi-label-classification" and not columns.listed:
        names = tuple(sorted(columns.labels))
    elif task == "multi-label-classification":
        names = sorted_names({name for row in train for name in row["label"]})
    else:
        names = sorted_names({row["label"] for row in train})
    few = 2 if task in CLASSES else 1
    if task not in _UNLABELED and len(names) < few:
        raise DataError(
            f"{tables['train'].name} has {len(names)} kinds of label in column "
            f"{columns.labels[0]!r}",
            "give rows of at least two classes" if few == 2 else "give rows that have labels",
        )
    _known_labels(found, tables, names, task)
    shape = _one_shape(found, tables, ())
    return Labels(names=names, image=shape)


def _known_labels(
    found: Mapping[str, Sequence[Row]], tables: Mapping[str, Table], names: Sequence[str], task: str
) -> None:
    if task in (*_UNLABELED, "regression"):
        return
    known = set(names)
    for split, rows in found.items():
        for row in rows:
            label = row.get("label", [])
            for name in label if isinstance(label, list) else [label]:
                if name not in known:
                    table = tables.get(split, tables.get("train"))
                    assert table is not None
                    raise DataError(
                        f"{_place(table, row)}: label {name!r} does not occur in training",
                        f"{nearest(name, known)}known labels: {', '.join(list(names)[:12])}",
                    )


def _place(table: Table, row: Row) -> str:
    return table.where(table.ids.index(row["id"]))


def _one_shape(
    found: Mapping[str, Sequence[Row]], tables: Mapping[str, Table], shape: tuple[int, ...]
) -> tuple[int, ...]:
    for split, rows in found.items():
        for row in rows:
            if "pixel_values" not in row:
                return shape
            shape = shape or tuple(row["pixel_values"].shape)
            if tuple(row["pixel_values"].shape) != shape:
                table = tables.get(split, tables.get("train"))
                assert table is not None
                raise DataError(
                    f"{_place(table, row)}: the image is "
                    f"{'x'.join(map(str, row['pixel_values'].shape))}, others are "
                    f"{'x'.join(map(str, shape))}",
                    "give images of one size",
                )
    return shape


def _with_statistics(labels: Labels, train: Sequence[Row], spec: DataSpec, task: str) -> Labels:
    """Class weights, and mean and deviation of real targets, from the training rows alone."""
    if task == "regression":
        columns = [
            [row["label"][k] if isinstance(row["label"], list) else row["label"] for row in train]
            for k in range(len(labels))
        ]
        means = tuple(math.fsum(column) / len(column) for column in columns)
        spreads = tuple(
            math.sqrt(math.fsum((x - mean) ** 2 for x in column) / len(column)) or 1.0
            for column, mean in zip(columns, means)
        )
        labels = Labels(labels.names, (), spreads, means)
    wanted = spec.class_weights
    if wanted is None:
        return labels
    if task in _UNLABELED or task == "regression":
        raise ConfigError(f"data.class_weights does not go with {task}", "leave it out")
    if wanted == "balanced":
        weights = _balanced(labels, train, task)
    else:
        unknown = [name for name in wanted if name not in labels.names]
        if unknown:
            raise ConfigError(
                f"data.class_weights names the unknown class {unknown[0]!r}",
                f"{nearest(unknown[0], labels.names)}known: {', '.join(labels.names[:12])}",
            )
        weights = tuple(float(wanted.get(name, 1.0)) for name in labels.names)
        if min(weights) < 0 or max(weights) == 0:
            raise ConfigError(
                f"data.class_weights = {dict(wanted)} is not allowed",
                "give numbers >= 0, not all 0",
            )
    return Labels(labels.names, weights, labels.scale, labels.mean, labels.image)


def _balanced(labels: Labels, train: Sequence[Row], task: str) -> tuple[float, ...]:
    """Each class weighs the same in total; each label's positive side as much as its negative."""
    counts = Counter(
        name
        for row in train
        for name in (row["label"] if isinstance(row["label"], list) else [row["label"]])
    )
    if task == "multi-label-classification":
        return tuple(
            (len(train) - counts[n]) / counts[n] if counts[n] else 1.0 for n in labels.names
        )
    return tuple(len(train) / (len(labels) * counts[n]) if counts[n] else 1.0 for n in labels.names)
