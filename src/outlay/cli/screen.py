"""Where things are shown: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPED_WIDTH = 120  # columns where there is no terminal to ask


def console(stderr: bool = False) -> Console:
    """A console on stdout or stderr as they are now."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def put_json(value: Any, indent: int | None = 2) -> None:
    """Print one JSON document on stdout; what is not finite becomes null."""
    text = json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def finite(value: Any) -> Any:
    """Plain JSON values; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [finite(entry) for entry in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return finite(value.item()) if hasattr(value, "item") else str(value)


def note(text: str, quiet: bool = False) -> None:
    """One line for people, on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[str] = ()
) -> Table:
    """A plain table; columns named in `right` hold numbers."""
    from rich import box
    from rich.table import Table

    made = Table(
        title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        pad_edge=False,
    )  # fmt: skip
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*("" if cell is None else _escaped(cell) for cell in row))
    return made


def _escaped(cell: Any) -> Any:
    """Text as it is: a bracket in a call string is no markup."""
    from rich.markup import escape

    return escape(cell) if isinstance(cell, str) else str(cell)


def facts(rows: Sequence[tuple[str, Any]]) -> Table:
    """Two columns: what, and its value."""
    from rich.table import Table

    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        if value not in (None, "", (), False):
            made.add_row(name, _escaped(value))
    return made


def amount_bytes(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def amount(value: float | None) -> str:
    """A number for people: whole with separators, else four significant digits."""
    if value is None:
        return "-"
    if abs(value) >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """`0:06` or `1:02:03`."""
    if seconds is None:
        return "-:--"
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
