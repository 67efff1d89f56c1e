"""Parquet files that are whole or not there, and say in their footer what they were made from."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..core.errors import DataError, OutlayError

_KEY = b"outlay"
_UNFINISHED = ".part"
_FIXED: tuple[tuple[str, Any], ...] = (
    ("row", pa.int64()), ("id", pa.string()), ("key", pa.uint64()), ("characters", pa.int64()),
    ("bytes", pa.int64()), ("tokens", pa.int64()), ("date", pa.string()), ("domain", pa.string()),
)  # fmt: skip


def score_schema(columns: list[str]) -> Any:
    """Schema of a side table: what a cut needs of each document, and one column a score."""
    return pa.schema([*_FIXED, *((name, pa.float32()) for name in columns)])


class Writer:
    """Appends columns; `footer` is what the file will say of itself."""

    def __init__(self, writer: Any, schema: Any) -> None:
        self.writer, self.schema = writer, schema
        self.footer: dict[str, Any] = {}

    def write(self, columns: dict[str, Any]) -> None:
        """One more piece of every column."""
        arrays = [pa.array(columns[field.name], field.type) for field in self.schema]
        self.writer.write_batch(pa.record_batch(arrays, schema=self.schema))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to; the file takes `path`'s place, synced, when the block ends well.

    Raises:
        OutlayError: If the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.{secrets.token_hex(4)}{_UNFINISHED}"
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OutlayError(
            f"{str(path)!r} cannot be written ({error.strerror or error})",
            "free some space or mend the disk; the same command goes on from what is finished",
        ) from error
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def written(path: Path, schema: Any, fingerprint: str) -> Iterator[Writer]:
    """A Parquet file under its own name once it is whole."""
    with whole(path) as draft, pq.ParquetWriter(draft, schema, compression="zstd") as file:
        writer = Writer(file, schema)
        yield writer
        facts = {**writer.footer, "fingerprint": fingerprint}
        file.add_key_value_metadata({_KEY: json.dumps(facts).encode()})


def footer(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What a finished file says of itself; None if it is not there or was made from other things.

    Raises:
        DataError: If a file of that name is damaged.
    """
    if not path.is_file():
        return None
    try:
        facts = json.loads((pq.read_metadata(path).metadata or {}).get(_KEY, b"{}"))
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise DataError(
            f"{str(path)!r} is damaged ({' '.join(str(error).split())[:80]})", "delete that file"
        ) from None
    return facts if facts.get("fingerprint") == fingerprint else None


def chunks(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, NDArray[Any]]]:
    """A side table's columns, a bounded number of rows at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1 << 16, columns=columns):
            yield {
                name: np.asarray(column.to_pylist(), object)
                if pa.types.is_string(column.type)
                else column.to_numpy(zero_copy_only=False)
                for name, column in zip(batch.schema.names, batch.columns)
            }


def sweep(folder: Path) -> None:
    """Remove what killed writers left behind."""
    for draft in folder.rglob(f".*{_UNFINISHED}"):
        draft.unlink(missing_ok=True)
