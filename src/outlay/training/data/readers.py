"""Files into rows: JSONL, JSON, CSV, Parquet, text and `datasets` folders; every row knows where
it stood, so that a complaint names file and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import DataError, nearest

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".arrow")
_NOT_DATA = ("manifest.json", "quarantine.jsonl", "run.json", "dataset_info.json",
             "dataset_infos.json", "dataset_dict.json", "state.json",
             "LICENSE.txt", "README.txt", "requirements.txt")  # fmt: skip


@dataclass
class Table:
    """Rows as they were read.

    Attributes:
        name: File or data set, as it is shown.
        rows: One dict a row.
        places: Line (or row) number of each row.
        unit: What the numbers count: "line" or "row".
        classes: Class names of columns that hold class numbers.
        keyed: True if columns called id and domain are used without being named: for packaged
            data and rows in memory.
        ids: Id of each row, once `rows_of` has read them.
        parts: The tables that this one was joined from.
    """

    name: str
    rows: list[dict[str, Any]]
    places: Sequence[int]
    unit: str = "row"
    classes: dict[str, list[str]] = field(default_factory=dict)
    keyed: bool = False
    ids: list[str] = field(default_factory=list)
    parts: list[Table] = field(default_factory=list)

    def where(self, index: int) -> str:
        """File and line of a row."""
        for part in self.parts:
            if index < len(part.rows):
                return part.where(index)
            index -= len(part.rows)
        return f"{self.name} {self.unit} {self.places[index]}"

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def table_of(rows: Iterable[Any], name: str = "data") -> Table:
    """A table of rows in memory; the class names of a `datasets.Dataset` are kept.

    Raises:
        DataError: If something is not a mapping.
    """
    plain: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{name} row {index} is {type(row).__name__}, not a mapping of columns",
                "give dicts such as {'text': ..., 'label': ...}",
            )
        plain.append({str(key): value for key, value in row.items()})
    features = getattr(rows, "features", None)
    classes = {
        str(key): [str(n) for n in feature.names]
        for key, feature in (features.items() if isinstance(features, Mapping) else ())
        if getattr(feature, "names", None)
    }
    return Table(name, plain, range(len(plain)), "row", classes, keyed=True)


def read_splits(path: Path) -> dict[str, Table]:
    """The splits that a file or folder holds; a file is all "train".

    Raises:
        DataError: If it does not exist, is of an unknown kind, or cannot be read.
    """
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"data file {str(path)!r} does not exist",
            f"{nearest(path.name, near)}give a file or a `datasets` folder",
        )
    if path.is_file():
        return {"train": read_table(path)}
    if (path / "dataset_dict.json").is_file():
        found = {
            split: read_table(path / name)
            for split, names in SPLIT_NAMES.items()
            for name in names
            if (path / name).is_dir()
        }
    elif (path / "state.json").is_file():
        return {"train": _arrow_folder(path)}
    else:
        found = _loose_files(path)
    if "train" not in found and len(found) == 1:
        found = {"train": next(iter(found.values()))}
    if "train" not in found:
        raise DataError(
            f"folder {str(path)!r} holds no training split",
            "name a file in it, or save one with dataset.save_to_disk(folder)",
        )
    return found


def _loose_files(path: Path) -> dict[str, Table]:
    """Files named after splits (`train-00000-of-00001.parquet`, `test.jsonl`), also in data/.

    Where no file is named after a split, all of them together are the training rows.
    """
    files = [p for base in (path, path / "data") if base.is_dir() for p in sorted(base.iterdir())]
    files = [p for p in files if p.is_file() and _kind(p) in _KINDS and p.name not in _NOT_DATA]
    by_split: dict[str, list[Path]] = {}
    for file in files:
        stem = file.name.split(".")[0].lower()
        word = stem.replace("_", "-").split("-")[0]
        split = next((s for s, names in SPLIT_NAMES.items() if word in names), None)
        if split is not None:
            by_split.setdefault(split, []).append(file)
    if not by_split and files:
        by_split = {"train": files}
    return {split: _joined([read_table(p) for p in found]) for split, found in by_split.items()}


def _joined(tables: list[Table]) -> Table:
    if len(tables) == 1:
        return tables[0]
    rows = [row for table in tables for row in table.rows]
    name = f"{tables[0].name} and {len(tables) - 1} more"
    return Table(name, rows, range(len(rows)), "row", tables[0].classes, parts=tables)


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_table(path: Path) -> Table:
    """All rows of one file or `datasets` folder.

    Raises:
        DataError: Names file and line of what cannot be read.
    """
    if path.is_dir():
        return _arrow_folder(path)
    kind = _kind(path)
    if kind not in _KINDS:
        raise DataError(
            f"{path.name}: files of kind {kind or 'without ending'!r} are not read",
            f"use one of {', '.join(_KINDS)} (also .gz)",
        )
    try:
        if kind in (".parquet", ".arrow"):
            table = _columnar(path, kind)
        else:
            data = _bytes(path)
            reader = {
                ".csv": _csv, ".tsv": _csv, ".txt": _text, ".json": _json,
            }.get(kind, _json_lines)  # fmt: skip
            table = reader(path.name, data)
    except OSError as error:
        raise DataError(
            f"{path.name} cannot be read ({error.strerror or error})", "check the file"
        ) from None
    if not table.rows:
        raise DataError(f"{path.name} holds no rows", "give a file with at least one row")
    return table


def _bytes(path: Path) -> bytes:
    """The file's content, unpacked, without a UTF-8 byte order mark, free of NUL."""
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise DataError(
                f"{path.name} is not a complete gzip file", "pack it again, or give it unpacked"
            ) from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path.name} line 1: the file is in UTF-16", "save it as UTF-8")
    data = data.removeprefix(b"\xef\xbb\xbf")
    nul = data.find(b"\0")
    if nul >= 0:
        raise DataError(
            f"{path.name} line {_line(data, nul)}: NUL byte, this is no text file",
            "save it as UTF-8 text",
        )
    return data


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _decoded(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} line {_line(data, error.start)}: byte 0x{data[error.start]:02x} is not UTF-8",
            "save the file as UTF-8",
        ) from None


def _json_lines(name: str, data: bytes) -> Table:
    rows, places = [], []
    for number, line in enumerate(_decoded(name, data).split("\n"), start=1):
        if not line.strip():
            continue
        rows.append(_object(line, f"{name} line {number}"))
        places.append(number)
    return Table(name, rows, places, "line")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise DataError(
            f"{where}: not JSON ({reason})", "write one JSON object a line, or give a .csv file"
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: {type(row).__name__} instead of an object", 'write {"text": ..., ...}'
        )
    return row


def _json(name: str, data: bytes) -> Table:
    """A list of objects; otherwise one object a line."""
    if not data.lstrip().startswith(b"["):
        return _json_lines(name, data)
    text = _decoded(name, data)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(
            f"{name} line {line}: not JSON ({getattr(error, 'msg', 'nested too deeply')})",
            "write a list of objects, or one object a line",
        ) from None
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"{name} row {index}: {type(row).__name__} instead of an object",
                'write {"text": ..., ...}',
            )
    return Table(name, rows, range(len(rows)), "row")


def _csv(name: str, data: bytes) -> Table:
    text = _decoded(name, data)
    head = text.split("\n", 1)[0]
    delimiter = "\t" if ".tsv" in name.lower() else max(",;\t", key=head.count)
    # One process-wide limit in the csv module: raised here only, and put back.
    before = csv.field_size_limit(max(131_072, len(text) + 1))
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        twice = {column for column in header if header.count(column) > 1}
        if twice or "" in header:
            raise DataError(
                f"{name} line 1: "
                + (
                    f"column {sorted(twice)[0]!r} is there twice"
                    if twice - {""}
                    else "a column has no name"
                ),
                "give every column its own name in the first line",
            )
        start = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{name} line {start}: {len(cells)} fields, the first line has {len(header)}",
                    "put fields that hold the delimiter or a line break in double quotes",
                )
            if cells:
                rows.append(dict(zip(header, cells)))
                places.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name} line {reader.line_num}: {error}", "check the quotes around its fields"
        ) from None
    finally:
        csv.field_size_limit(before)
    return Table(name, rows, places, "line")


def _text(name: str, data: bytes) -> Table:
    """Paragraphs, where blank lines part them; otherwise lines."""
    lines = _decoded(name, data).replace("\r\n", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    if all(line.strip() for line in lines):
        return Table(name, [{"text": x} for x in lines], range(1, len(lines) + 1), "line")
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            block.append(line)
        elif block:
            rows.append({"text": "\n".join(block)})
            places.append(number - len(block))
            block = []
    return Table(name, rows, places, "line")


def _columnar(path: Path, kind: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path) if kind == ".parquet" else _arrow_file(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError, OSError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(f"{path.name} cannot be read ({reason})", "write the file again") from None
    return _from_arrow(path.name, table)


def _arrow_file(path: Path) -> Any:
    """A file in Arrow's stream format, as `datasets` writes it, or in its file format."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_file(source).read_all()


def _from_arrow(name: str, table: Any) -> Table:
    classes = {}
    for key, value in (table.schema.metadata or {}).items():
        if key == b"huggingface":
            info = json.loads(value).get("info", {})
            classes = _class_names(info.get("features") or {})
    rows = table.to_pylist()
    return Table(name, rows, range(len(rows)), "row", classes)


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of `ClassLabel` columns, alone or as the items of a list."""
    found = {}
    for column, feature in features.items():
        inner = feature
        while isinstance(inner, (list, dict)):
            if isinstance(inner, list):
                inner = inner[0] if inner else None
            elif inner.get("_type") == "ClassLabel":
                found[column] = [str(name) for name in inner.get("names") or []]
                break
            else:
                inner = inner.get("feature")
    return found


def _arrow_folder(path: Path) -> Table:
    """What `Dataset.save_to_disk` wrote; `datasets` itself is not needed."""
    import pyarrow as pa

    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{str(path)!r} is no `datasets` folder", "save one with dataset.save_to_disk(folder)"
        ) from None
    if state.get("_indices_data_files"):
        raise DataError(
            f"{str(path)!r} holds a selection of another data set's rows",
            "call dataset.flatten_indices() before saving it",
        )
    tables = []
    for file in files:
        if Path(file).name != file:
            raise DataError(f"{str(path)!r} names a file outside the folder", "save it again")
        try:
            tables.append(_arrow_file(path / file))
        except (pa.ArrowInvalid, OSError):
            raise DataError(
                f"{str(path / file)!r} cannot be read", "save the data set again"
            ) from None
    table = _from_arrow(path.name, pa.concat_tables(tables))
    if not table.rows:
        raise DataError(f"{path.name} holds no rows", "give a data set with at least one row")
    try:
        info = json.loads((path / "dataset_info.json").read_text(encoding="utf-8"))
        table.classes |= _class_names(info.get("features") or {})
    except (OSError, ValueError):
        pass
    return table
