"""Files of features into a matrix and labels: Parquet, CSV, JSONL, NPZ."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import DataError, nearest
from .readers import read_table


@dataclass(frozen=True)
class FeatureTable:
    """Features and, where there are any, labels.

    Attributes:
        features: float32 or float64. Shape (rows, width).
        labels: One a row, whole numbers or text; None if the file holds no target.
        names: Column of each feature; empty where the file has none.
    """

    features: np.ndarray
    labels: np.ndarray | None
    names: tuple[str, ...]


def read_features(
    path: Path, target: str, labeled: bool = True, names: tuple[str, ...] = ()
) -> FeatureTable:
    """Read features and labels.

    Columns other than the target are features: numbers, or lists of numbers of one length (a
    column of embeddings). An NPZ file holds one array of labels, named as the target, and one
    matrix.

    Args:
        path: A .parquet, .csv, .tsv, .jsonl or .npz file.
        target: Column or array of the labels.
        labeled: False if the target may be missing.
        names: Columns that are wanted, in this order; all but the target by default.

    Raises:
        DataError: If a column is missing or no number, naming file and line.
    """
    if path.suffix.lower() == ".npz":
        return _from_npz(path, target, labeled)
    if path.suffix.lower() == ".parquet" and path.is_file():
        return _from_parquet(path, target, labeled, names)
    if not path.exists():
        raise DataError(f"data file {str(path)!r} does not exist", "give a file of features")
    table = read_table(path)
    columns = _chosen(path.name, table.columns, target, labeled, names)
    parts = [_column([row.get(c) for row in table.rows], c, table.where) for c in columns]
    features = np.concatenate(parts, axis=1)
    labels = None
    if target in table.columns:
        labels = _labels([row.get(target) for row in table.rows], target, table.where)
    return FeatureTable(features, labels, _wide_names(columns, parts))


def _chosen(
    file: str, present: list[str], target: str, labeled: bool, names: tuple[str, ...]
) -> list[str]:
    missing = [name for name in (*([target] if labeled else []), *names) if name not in present]
    if missing:
        raise DataError(
            f"{file} has no column {missing[0]!r}",
            f"{nearest(missing[0], present)}columns: {', '.join(present[:12]) or 'none'}",
        )
    columns = list(names) or [name for name in present if name != target]
    if not columns:
        raise DataError(f"{file} has no column beside {target!r}", "give columns of features")
    return columns


def _wide_names(columns: list[str], parts: list[np.ndarray]) -> tuple[str, ...]:
    """Feature names; none where a column holds several features."""
    return tuple(columns) if all(part.shape[1] == 1 for part in parts) else ()


def _column(values: list[Any], name: str, where: Any) -> np.ndarray:
    """One column as float64. Shape (rows, features of the column)."""
    try:
        found = np.array(values, dtype=np.float64)
        if found.ndim in (1, 2):
            return found.reshape(len(values), -1)
    except (TypeError, ValueError):
        pass
    width = len(values[0]) if isinstance(values[0], (list, tuple)) else 0
    for index, value in enumerate(values):
        try:
            number = np.array(value, dtype=np.float64)
            fits = number.ndim == (1 if width else 0) and number.size == (width or 1)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise DataError(
                f"{where(index)}: {str(value)[:40]!r} in column {name!r} is no feature",
                f"give {f'lists of {width} numbers' if width else 'numbers'}, or leave the column "
                "out with --features",
            )
    raise DataError(f"column {name!r} holds nested lists", "give one list of numbers a row")


def _labels(values: list[Any], target: str, where: Any) -> np.ndarray:
    for index, value in enumerate(values):
        if value is None or value == "":
            raise DataError(f"{where(index)}: no label in {target!r}", "give every row a label")
    if all(isinstance(value, (int, np.integer)) for value in values):
        return np.array(values, dtype=np.int64)
    if any(isinstance(value, (float, list, dict)) for value in values):
        raise DataError(
            f"column {target!r} holds {type(values[0]).__name__} values, which are no classes",
            "give whole numbers or text",
        )
    return np.array([str(value) for value in values])


def _from_parquet(path: Path, target: str, labeled: bool, names: tuple[str, ...]) -> FeatureTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(f"{path.name} cannot be read ({reason})", "write the file again") from None
    if not table.num_rows:
        raise DataError(f"{path.name} holds no rows", "give a file with at least one row")
    columns = _chosen(path.name, table.column_names, target, labeled, names)

    def where(index: int) -> str:
        return f"{path.name} row {index}"

    kinds = [table.schema.field(name).type for name in columns]
    single = all(kind == pa.float32() or _list_of_float32(kind) for kind in kinds)
    parts = [_arrow_column(table[name], name, where) for name in columns]
    features = np.concatenate(parts, axis=1, dtype=np.float32 if single else np.float64)
    labels = None
    if target in table.column_names:
        labels = _labels(table[target].to_pylist(), target, where)
    return FeatureTable(features, labels, _wide_names(columns, parts))


def _list_of_float32(kind: Any) -> bool:
    return getattr(kind, "value_type", None) == "float"


def _arrow_column(column: Any, name: str, where: Any) -> np.ndarray:
    """A column of numbers or of lists of one length, without a Python object a value."""
    import pyarrow as pa

    kind = column.type
    if (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and not column.null_count:
        return column.to_numpy().reshape(-1, 1)
    listed = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)
    if listed and pa.types.is_floating(kind.value_type) and not column.null_count:
        array = column.combine_chunks()
        flat = array.flatten().to_numpy(zero_copy_only=False)
        lengths = set(np.unique(array.value_lengths().to_numpy(zero_copy_only=False)).tolist())
        if len(lengths) == 1 and lengths != {0}:
            return flat.reshape(len(array), -1)
    return _column(column.to_pylist(), name, where)


def _from_npz(path: Path, target: str, labeled: bool) -> FeatureTable:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path.name} cannot be read ({str(error)[:120]})",
            "write it with numpy.savez, without objects",
        ) from None
    if labeled and target not in arrays:
        raise DataError(
            f"{path.name} has no array {target!r}",
            f"{nearest(target, arrays)}arrays: {', '.join(arrays) or 'none'}",
        )
    matrices = [name for name, array in arrays.items() if array.ndim == 2 and name != target]
    if len(matrices) != 1 or arrays[matrices[0]].dtype.kind not in "iuf":
        raise DataError(
            f"{path.name} holds {len(matrices)} matrices", "give one numeric matrix of features"
        )
    features, labels = arrays[matrices[0]], arrays.get(target)
    if labels is not None:
        if labels.ndim != 1 or len(labels) != len(features):
            raise DataError(
                f"{target!r} has shape {labels.shape}, {matrices[0]!r} {features.shape}",
                "give one label a row",
            )
        labels = _labels(labels.tolist(), target, lambda index: f"{path.name} row {index}")
    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float64)
    return FeatureTable(features, labels, ())
