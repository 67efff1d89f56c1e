"""Which files a selection reads, under names that do not depend on where they lie."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError, nearest

ENDINGS = {
    ".parquet": "parquet", ".arrow": "arrow", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl", ".ndjson.gz": "jsonl", ".jsonl.zst": "jsonl", ".ndjson.zst": "jsonl",
}  # fmt: skip
OWN_FILES = ("manifest.json", "quarantine.jsonl", "run.json")


@dataclass(frozen=True)
class Fields:
    """Which column holds what.

    Attributes:
        text: Column of the text.
        id: Column of the id; None makes ids as `shard:row`.
        date: Column of a date or year; read if it is there.
        domain: Column of the domain; read if it is there.
        tokens: Column of the token count; None takes a quarter of the UTF-8 bytes.
    """

    text: str = "text"
    id: str | None = None
    date: str = "date"
    domain: str = "domain"
    tokens: str | None = None


@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        path: Where it lies.
        name: Its path below the inputs' common folder.
        number: Its place among the sorted names.
        kind: "parquet", "arrow" or "jsonl".
        size: Bytes.
        modified: Nanoseconds since the epoch.
    """

    path: Path
    name: str
    number: int
    kind: str
    size: int
    modified: int

    @property
    def fingerprint(self) -> str:
        """Changes when the file does; its content is not read."""
        return digest(self.name, self.size, self.modified)

    @property
    def label(self) -> str:
        """Name of the files that are made from this one."""
        return f"{self.number:05d}-{Path(self.name).name.split('.')[0]}"


@dataclass(frozen=True)
class ShardSet:
    """Files in the order of their names, and their columns."""

    shards: tuple[Shard, ...]
    fields: Fields = Fields()

    @cached_property
    def fingerprint(self) -> str:
        """Of all files and the columns."""
        return digest(*(shard.fingerprint for shard in self.shards), asdict(self.fields))


def digest(*parts: Any) -> str:
    """A short hash of JSON values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def open_shards(
    inputs: str | Path | Sequence[str | Path],
    fields: Fields | None = None,
    without: Path | None = None,
) -> ShardSet:
    """Find the files of files, folders, globs and `datasets` folders.

    Args:
        inputs: Parquet, JSONL (also .gz and .zst) and Arrow files, or folders of them.
        fields: Columns; the usual names by default.
        without: A selection's folder whose files are left out: it may lie among its inputs.

    Raises:
        ConfigError: If an input does not exist or is no data.
        DataError: If a file cannot be opened, or a `datasets` folder is a view of another one.
    """
    if isinstance(inputs, (str, Path)):
        inputs = [inputs]
    paths = sorted({path for text in inputs for path in _files_of(Path(text).expanduser())})
    if without is not None and (without / "run.json").is_file():
        paths = [path for path in paths if not path.is_relative_to(without.resolve())]
    if not paths:
        raise ConfigError(
            f"no data in {', '.join(map(str, inputs))}", f"give files of {', '.join(ENDINGS)}"
        )
    base = Path(os.path.commonpath([path.parent for path in paths]))
    shards = []
    for number, path in enumerate(paths):
        kind, found = _kind(path), path.stat()
        _check(path, kind)
        name = path.relative_to(base).as_posix()
        shards.append(Shard(path, name, number, kind, found.st_size, found.st_mtime_ns))
    return ShardSet(tuple(shards), fields or Fields())


def _kind(path: Path) -> str:
    name = path.name.lower()
    return next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), "")


def _files_of(path: Path) -> Iterable[Path]:
    if any(sign in str(path) for sign in "*?["):
        base = Path(path.anchor) if path.is_absolute() else Path()
        found = base.glob(str(path.relative_to(path.anchor)))
        return [p.resolve() for p in found if p.is_file() and _kind(p)]
    if path.is_file():
        if not _kind(path):
            raise ConfigError(
                f"{str(path)!r} is no file of shards", f"give files of {', '.join(ENDINGS)}"
            )
        return [path.resolve()]
    if not path.is_dir():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(
            f"{str(path)!r} does not exist", f"{nearest(path.name, near)}give a file or a folder"
        )
    if (path / "manifest.json").is_file() and (path / "data").is_dir():
        path = path / "data"  # what an earlier selection kept
    _no_views(path)
    return [
        p.resolve()
        for p in path.rglob("*")
        if p.is_file() and _kind(p) and p.name not in OWN_FILES and not _hidden(p, path)
    ]


def _hidden(path: Path, base: Path) -> bool:
    """Hidden and cache files: what `datasets` and unfinished writers leave behind."""
    parts = path.relative_to(base).parts
    return any(part.startswith((".", "_")) for part in parts) or parts[-1].startswith("cache-")


def _no_views(folder: Path) -> None:
    for state in folder.rglob("state.json"):
        try:
            view = json.loads(state.read_text(encoding="utf-8")).get("_indices_data_files")
        except (ValueError, AttributeError):
            continue
        if view:
            raise DataError(
                f"{str(state.parent)!r} holds a selection of another data set's rows",
                "call dataset.flatten_indices() before saving it",
            )


def _check(path: Path, kind: str) -> None:
    """A columnar file without a readable footer is refused before anything runs."""
    if kind != "parquet":
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.ParquetFile(path).close()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{str(path)!r} is no whole Parquet file ({' '.join(str(error).split())[:80]})",
            "write it again or leave it out",
        ) from None
