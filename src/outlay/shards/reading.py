"""Files into documents, a bounded number at a time; what cannot be used is set aside by line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from .sets import Fields, Shard

ROW_LIMIT = 16 << 20  # bytes of one row
_ROWS, _BYTES = 512, 8 << 20  # of one batch
_DATE = re.compile(r"\s*(\d{4}(?:-\d\d(?:-\d\d)?)?)(?!\d)")


@dataclass(frozen=True)
class Document:
    """One usable row.

    Attributes:
        row: Its line in a JSONL file or its row in a columnar one, from 1.
        id: As given, or `shard:row`.
        text: Valid Unicode without NUL, not empty.
        domain: Empty if there is none.
        date: Year, month or day as in ISO 8601; empty if there is none.
        tokens: As given, or a quarter of the UTF-8 bytes.
        bytes: Of the text in UTF-8.
        rest: The other columns, if asked for.
    """

    row: int
    id: str
    text: str
    domain: str = ""
    date: str = ""
    tokens: int = 0
    bytes: int = 0
    rest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> int:
        """A 64-bit hash of the id: the order among equal scores, and what randomness is made of."""
        return key_of(self.id)


@dataclass(frozen=True)
class Quarantined:
    """A row that cannot be used, and why.

    Attributes:
        file: Name of the shard.
        line: Its line or row, from 1.
        reason: In a few words.
    """

    file: str
    line: int
    reason: str


@dataclass
class Batch:
    """Some rows of a shard in their order."""

    documents: list[Document] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    size: int = 0


class _Unusable(ValueError):
    """Its message is the reason."""


def key_of(identity: str) -> int:
    """A 64-bit hash of an id, equal on every machine."""
    found = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(found, "big")


def read(
    shard: Shard,
    fields: Fields,
    *,
    limit: int | None = None,
    row_limit: int = ROW_LIMIT,
    rest: bool = False,
) -> Iterator[Batch]:
    """The rows of a shard. Every row is in exactly one of a batch's two lists.

    Args:
        shard: The file.
        fields: Columns.
        limit: Rows to read at most.
        row_limit: Longer rows are set aside, in bytes.
        rest: Keep the columns that are not in `fields`.

    Raises:
        DataError: If a columnar file breaks off.
    """
    batch = Batch()
    for number, (line, raw) in enumerate(_raw(shard, fields, row_limit, rest), start=1):
        try:
            if isinstance(raw, str):
                raise _Unusable(raw)
            document = _document(shard, line, raw, fields, row_limit, rest)
            batch.documents.append(document)
            batch.size += document.bytes
        except _Unusable as why:
            batch.quarantined.append(Quarantined(shard.name, line, str(why)))
        full = len(batch.documents) + len(batch.quarantined) >= _ROWS or batch.size >= _BYTES
        if full:
            yield batch
            batch = Batch()
        if number == limit:
            break
    if batch.documents or batch.quarantined:
        yield batch


def _raw(
    shard: Shard, fields: Fields, row_limit: int, rest: bool
) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Line and either its columns or why it has none."""
    if shard.kind == "jsonl":
        yield from _json_lines(shard, row_limit)
    else:
        wanted = {fields.text, fields.id, fields.date, fields.domain, fields.tokens}
        yield from _columnar(shard, None if rest else wanted)


def _document(
    shard: Shard, line: int, raw: Mapping[str, Any], fields: Fields, row_limit: int, rest: bool
) -> Document:
    text = raw.get(fields.text)
    if text is None:
        raise _Unusable(f"no field {fields.text!r}")
    if not isinstance(text, str):
        raise _Unusable(f"{fields.text!r} is {type(text).__name__}, not text")
    if "\0" in text:
        raise _Unusable("NUL character")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise _Unusable("invalid UTF-8") from None
    if size > row_limit:
        raise _Unusable(f"longer than {row_limit:,} bytes")
    if not text.strip():
        raise _Unusable("empty text")
    identity = f"{shard.name}:{line}"
    if fields.id is not None:
        identity = _identity(raw.get(fields.id), fields.id)
    domain = raw.get(fields.domain)
    used = {fields.text, fields.id, fields.date, fields.domain, fields.tokens}
    return Document(
        line, identity, text, "" if domain is None else _safe(str(domain)),
        date_of(raw.get(fields.date)), _tokens(raw, fields, size), size,
        {k: v for k, v in raw.items() if k not in used} if rest else {},
    )  # fmt: skip


def _identity(value: Any, column: str) -> str:
    if value is None or value == "":
        raise _Unusable(f"no field {column!r}")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _Unusable(f"{column!r} is {type(value).__name__}, not an id")
    return _safe(str(value))


def _safe(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("\0", "?")


def _tokens(raw: Mapping[str, Any], fields: Fields, size: int) -> int:
    if fields.tokens is None:
        return max(1, size // 4)
    value = raw.get(fields.tokens)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 40:
        raise _Unusable(f"{fields.tokens!r} is no count of tokens")
    return value


def date_of(value: Any) -> str:
    """Year, month or day as in ISO 8601, from a date, a year or text that begins with one."""
    if isinstance(value, date):
        value = value.isoformat()
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return ""
    found = _DATE.match(str(value))
    return found[1] if found else ""


# ---- lines ---------------------------------------------------------------------------------------


def _json_lines(shard: Shard, row_limit: int) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    with _stream(shard.path) as stream:
        line = 0
        while True:
            line += 1
            try:
                data = stream.readline(row_limit + 1)
                too_long = len(data) > row_limit and not data.endswith(b"\n")
                if too_long:
                    _skip_line(stream, row_limit)
            except (EOFError, zlib.error, gzip.BadGzipFile, _BrokenZstd):
                # What was read before the break is good; the break itself counts as one row.
                yield line, "the compressed file ends early"
                return
            if not data:
                return
            if line == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if too_long:
                yield line, f"longer than {row_limit:,} bytes"
            elif data.strip():
                yield line, _parsed(data)


def _skip_line(stream: Any, piece: int) -> None:
    while (data := stream.readline(piece)) and not data.endswith(b"\n"):
        pass


def _parsed(data: bytes) -> Mapping[str, Any] | str:
    if b"\0" in data:
        return "NUL character"
    try:
        found = json.loads(data.decode())
    except UnicodeDecodeError:
        return "invalid UTF-8"
    except (ValueError, RecursionError):
        return "broken JSON"
    return found if isinstance(found, dict) else "not a JSON object"


class _BrokenZstd(ValueError):
    """A Zstandard stream that breaks off."""


class _Zstd(io.RawIOBase):
    """Arrow's Zstandard reader; its errors are told apart from those of the disk."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.inner = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Unpack into a buffer."""
        try:
            data = self.inner.read(len(buffer))
        except OSError as error:
            raise _BrokenZstd from error
        buffer[: len(data)] = data
        return len(data)


def _stream(path: Path) -> Any:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_Zstd(path), 1 << 20)
    return path.open("rb", buffering=1 << 20)


# ---- columns -------------------------------------------------------------------------------------


def _columnar(
    shard: Shard, wanted: set[Any] | None
) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    import pyarrow as pa

    line = 0
    try:
        for batch in _record_batches(shard, wanted):
            columns = [_values(column) for column in batch.columns]
            for values in zip(*columns) if columns else [()] * batch.num_rows:
                line += 1
                bad = any(value is _UNREADABLE for value in values)
                yield line, "invalid UTF-8" if bad else dict(zip(batch.schema.names, values))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{shard.name} cannot be read after row {line} ({' '.join(str(error).split())[:80]})",
            "write the file again or leave it out",
        ) from None


_UNREADABLE = object()


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(entry) for entry in column]


def _value(entry: Any) -> Any:
    try:
        return entry.as_py()
    except UnicodeDecodeError:
        return _UNREADABLE


def _record_batches(shard: Shard, wanted: set[Any] | None) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if shard.kind == "parquet":
        with pq.ParquetFile(shard.path, pre_buffer=False) as file:
            names = [n for n in file.schema_arrow.names if wanted is None or n in wanted]
            yield from file.iter_batches(batch_size=_ROWS, columns=names)
        return
    with pa.memory_map(str(shard.path)) as source:
        try:
            reader: Any = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            source.seek(0)
            file = pa.ipc.open_file(source)
            reader = (file.get_batch(n) for n in range(file.num_record_batches))
        for batch in reader:
            names = [n for n in batch.schema.names if wanted is None or n in wanted]
            for start in range(0, batch.num_rows, _ROWS):
                yield batch.select(names).slice(start, _ROWS)
