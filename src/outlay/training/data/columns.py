"""Rows as they were read into rows as tasks want them: columns found, values checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...core.errors import DataError, nearest
from ..specs import IMAGES, MASKED, MASKED_TEXT, DataSpec
from .readers import Table

Row = dict[str, Any]
CLASSES = ("sequence-classification", "image-classification")
TEXT_TASKS = ("sequence-classification", "regression", "multi-label-classification")
_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Columns:
    """Which column holds what; "" where there is none.

    Attributes:
        labels: Columns of labels or targets; one column of lists if `listed`.
        listed: True if the one label column holds a list of labels.
    """

    text: str = ""
    text_pair: str = ""
    prompt: str = ""
    completion: str = ""
    messages: str = ""
    pixels: str = ""
    labels: tuple[str, ...] = ()
    listed: bool = False
    id: str = ""
    domain: str = ""
    date: str = ""

    def named(self) -> dict[str, Any]:
        """Only what there is."""
        return {key: value for key, value in asdict(self).items() if value}


def find_columns(spec: DataSpec, task: str, table: Table, labeled: bool = True) -> Columns:
    """The columns that a task reads: as the recipe names them, else under their usual names.

    Args:
        spec: The recipe's part.
        task: One of `recipe.TASKS`.
        table: What was read.
        labeled: False if labels may be missing altogether.

    Raises:
        DataError: If a column is missing, naming the nearest one.
    """
    present = table.columns

    def column(given: str | None, field: str, usual: str) -> str:
        name = given or usual
        if name in present:
            return name
        raise DataError(
            f"{table.name} has no column {name!r}",
            f"{nearest(name, present)}name it with data.{field}; columns: "
            f"{', '.join(present[:12]) or 'none'}",
        )

    def optional(given: str | None, field: str) -> str:
        return column(given, field, "") if given else ""

    shared: dict[str, Any] = {
        key: optional(getattr(spec, key), key) or (key if table.keyed and key in present else "")
        for key in ("id", "domain", "date")
    }
    if task in MASKED:
        # A class that is there is never learned, but it decides the splits: what another stage is
        # tested on must not be seen by this one.
        classes = () if spec.labels else _label_columns(spec, "label", column, False, present)
        shared = {**shared, "labels": classes}
    if task == MASKED_TEXT:
        return Columns(
            text=column(spec.text, "text", "text"),
            text_pair=optional(spec.text_pair, "text_pair"),
            **shared,
        )
    if task in IMAGES:
        usual = next(
            (n for n in ("pixel_values", "image", "pixels") if n in present), "pixel_values"
        )
        if task not in MASKED:
            shared |= {"labels": _label_columns(spec, "label", column, labeled, present)}
        return Columns(pixels=column(spec.text, "text", usual), **shared)
    if task in TEXT_TASKS:
        several = task == "multi-label-classification" or spec.labels is not None
        label = _label_columns(spec, "labels" if several else "label", column, labeled, present)
        return Columns(
            text=column(spec.text, "text", "text"),
            text_pair=optional(spec.text_pair, "text_pair"),
            labels=label,
            listed=task == "multi-label-classification" and not isinstance(spec.labels, tuple),
            **shared,
        )
    if spec.messages or (not (spec.text or spec.prompt) and "messages" in present):
        return Columns(messages=column(spec.messages, "messages", "messages"), **shared)
    paired = spec.prompt or spec.completion or {"prompt", "completion"} <= set(present)
    if (task == "sequence-to-sequence" and not spec.blocks) or (paired and not spec.text):
        return Columns(
            prompt=column(spec.prompt or spec.text, "prompt", "prompt"),
            completion=column(spec.completion or spec.label, "completion", "completion")
            if labeled or (spec.completion or "completion") in present
            else "",
            **shared,
        )
    return Columns(text=column(spec.text, "text", "text"), **shared)


def _label_columns(
    spec: DataSpec, kind: str, column: Any, labeled: bool, present: Sequence[str]
) -> tuple[str, ...]:
    given = spec.labels if kind == "labels" else spec.label
    if kind == "labels" and given is None:
        given = spec.label
    names = given if isinstance(given, tuple) else (given or kind,)
    if not labeled and any(name not in present for name in names):
        return ()
    return tuple(column(name, kind, kind) for name in names)


def rows_of(
    table: Table, columns: Columns, task: str, labeled: bool = True, prefix: str = ""
) -> list[Row]:
    """Checked rows: id, domain, the task's inputs, and `label` where there is one.

    A class label is a name, a real target a float (or a list of them), several labels a sorted
    list of names.

    Args:
        table: What was read.
        columns: Which column holds what.
        task: One of `recipe.TASKS`.
        labeled: True if every row must have a label.
        prefix: Put before ids, so that no two splits share one.

    Raises:
        DataError: Names file and line of the first row that does not fit.
    """
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for index, raw in enumerate(table.rows):
        where = table.where(index)
        given = raw.get(columns.id) if columns.id else index
        identity = prefix + _plain(given, where, columns.id)
        if identity in seen:
            raise DataError(
                f"{where}: the id {identity!r} was there before ({table.where(seen[identity])})",
                "give every row its own id, or leave data.id out",
            )
        seen[identity] = index
        domain = raw.get(columns.domain) if columns.domain else None
        row: Row = {"id": identity, "domain": "" if domain is None else str(domain)}
        if columns.date and raw.get(columns.date) is not None:
            row["date"] = str(raw[columns.date])
        row |= _inputs(raw, columns, where)
        if columns.labels:
            label = _label(raw, columns, task, table, where)
            if label is None and labeled and task not in MASKED:
                raise DataError(
                    f"{where}: no label in column {columns.labels[0]!r}",
                    "label the row or leave it out",
                )
            if label is not None:
                row["label"] = label
        rows.append(row)
    table.ids = list(seen)
    return rows


def _plain(value: Any, where: str, column: str) -> str:
    if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
        return str(value)
    raise DataError(
        f"{where}: id in column {column!r} is {value!r}", "give a number or text, or no data.id"
    )


def _inputs(raw: Mapping[str, Any], columns: Columns, where: str) -> Row:
    found: Row = {}
    for key in ("text", "text_pair", "prompt", "completion"):
        name = getattr(columns, key)
        if name:
            found[key] = _string(raw, name, where)
    if columns.messages:
        found["messages"] = _messages(raw.get(columns.messages), where, columns.messages)
    if columns.pixels:
        found["pixel_values"] = _pixels(raw.get(columns.pixels), where, columns.pixels)
    return found


def _string(raw: Mapping[str, Any], column: str, where: str) -> str:
    value = raw.get(column)
    if not isinstance(value, str):
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        raise DataError(
            f"{where}: column {column!r} "
            + (
                "is missing"
                if missing
                else f"is {type(value).__name__} ({str(value)[:40]}), not text"
            ),
            "fill it with text or leave the row out",
        )
    _readable(value, where, column)
    return value


def _readable(value: str, where: str, column: str) -> None:
    if "\0" in value:
        raise DataError(f"{where}: NUL character in column {column!r}", "remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: half a surrogate pair in column {column!r}", "save the text as UTF-8"
        ) from None


def _messages(value: Any, where: str, column: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    remedy = 'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{where}: column {column!r} holds no list of messages", remedy)
    messages = []
    for position, message in enumerate(value):
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}: message {position} of column {column!r} has "
                + (f"the role {role!r}" if role not in _ROLES else "no text as its content"),
                remedy,
            )
        _readable(content, where, column)
        messages.append({"role": role, "content": content})
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{where}: no message of the assistant to learn from", remedy)
    return messages


def _pixels(value: Any, where: str, column: str) -> Any:
    """Channels x height x width in float32; whole numbers are taken as 0 to 255."""
    import numpy as np

    try:
        array = np.asarray(value)
        whole = array.dtype.kind in "iu"
        array = array.astype(np.float32)
    except (TypeError, ValueError):
        array, whole = np.zeros((), np.float32), False
    shape: tuple[int, ...] = array.shape
    if len(shape) == 2:
        array = array[None]
    elif len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] not in (1, 3, 4):
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or not array.size or not np.isfinite(array).all():
        raise DataError(
            f"{where}: column {column!r} holds no image",
            "give nested lists of numbers, height x width or channels x height x width",
        )
    return np.ascontiguousarray(array / 255 if whole else array, dtype=np.float32)


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or (
        isinstance(value, str) and not value.strip()
    )  # fmt: skip


def _label(raw: Mapping[str, Any], columns: Columns, task: str, table: Table, where: str) -> Any:
    if task == "regression":
        numbers = [_number(raw.get(name), name, where) for name in columns.labels]
        if any(number is None for number in numbers):
            return None
        return numbers[0] if len(numbers) == 1 else numbers
    first = columns.labels[0]
    if task in MASKED:
        value = raw.get(first)
        real = isinstance(value, float) and not value.is_integer()
        return None if real else class_name(value, where, first, table.classes.get(first))
    if task in CLASSES:
        return class_name(raw.get(first), where, first, table.classes.get(first))
    if columns.listed:
        return _name_list(raw.get(first), where, first, table.classes.get(first))
    held = [_truth(raw.get(name), name, where) for name in columns.labels]
    if any(value is None for value in held):
        return None
    return sorted(name for name, value in zip(columns.labels, held) if value)


def class_name(
    value: Any, where: str, column: str, classes: Sequence[str] | None = None
) -> str | None:
    """A class label as a name; None if there is none."""
    if _absent(value):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        if classes is None:
            return str(value)
        if value == -1:
            return None
        if not 0 <= value < len(classes):
            raise DataError(
                f"{where}: class {value} in column {column!r}, there are {len(classes)} names",
                "check the data set's features",
            )
        return classes[value]
    if isinstance(value, str):
        _readable(value, where, column)
        return value.strip()
    raise DataError(
        f"{where}: label {str(value)[:40]!r} in column {column!r} is {type(value).__name__}, "
        "not a class",
        "give text or whole numbers, or set task: regression for real values",
    )


def _number(value: Any, column: str, where: str) -> float | None:
    if _absent(value):
        return None
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{where}: target {str(value)[:40]!r} in column {column!r} is no finite number",
            "give a number, or set task: sequence-classification for classes",
        )
    return number


def _name_list(
    value: Any, where: str, column: str, classes: Sequence[str] | None
) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                raise DataError(
                    f"{where}: column {column!r} holds no list of labels",
                    'write ["a", "b"] or a|b',
                ) from None
        else:
            mark = next((m for m in "|;," if m in text), "|")
            value = [part for part in text.split(mark) if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise DataError(
            f"{where}: column {column!r} is {type(value).__name__}, not a list of labels",
            'write ["a", "b"] or a|b, or name several columns in data.labels',
        )
    names = [class_name(item, where, column, classes) for item in value]
    return sorted({name for name in names if name is not None})


def _truth(value: Any, column: str, where: str) -> bool | None:
    if _absent(value):
        return None
    word = str(value).strip().lower()
    if word in ("1", "1.0", "true", "yes"):
        return True
    if word in ("0", "0.0", "false", "no"):
        return False
    raise DataError(
        f"{where}: {str(value)[:40]!r} in column {column!r} is neither 0 nor 1",
        "give 0 or 1 in every label column",
    )
