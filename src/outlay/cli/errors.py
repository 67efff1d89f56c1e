"""Every error as two lines on stderr: what is wrong, and what to do about it."""

from __future__ import annotations

import re
import sys
from typing import Any, NamedTuple

import typer

from ..core.errors import OutlayError, nearest

FAILED, USAGE, INTERRUPTED = 1, 2, 130
# typer carries its own copy of click or uses the installed one: the base class tells.
UsageError: Any = typer.BadParameter.__mro__[1]
ClickError: Any = typer.BadParameter.__mro__[2]


class Complaint(NamedTuple):
    """An error as the command shows it.

    Attributes:
        problem: What is wrong, one line.
        remedy: What to do, one line.
        code: What the command exits with.
    """

    problem: str
    remedy: str
    code: int


def describe(error: BaseException) -> Complaint:
    """Put any error into two lines and an exit code."""
    if isinstance(error, OutlayError):
        remedy = error.remedy or "see `outlay --help`"
        return Complaint(_line(error.problem), _line(remedy), error.exit_code)
    if isinstance(error, ClickError):
        return _usage(error)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Complaint("interrupted", "the same command goes on from what was saved", INTERRUPTED)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        remedy = "lower batch.micro or batch.length; `outlay plan` says what fits"
        return Complaint(f"out of memory: {_line(str(error))[:200]}", remedy, FAILED)
    if isinstance(error, OSError) and error.strerror:
        where = f"{str(error.filename)!r}: " if error.filename else ""
        user = isinstance(error, (FileExistsError, NotADirectoryError, PermissionError))
        remedy = (
            "give a path that can be read and written"
            if user or isinstance(error, FileNotFoundError)
            else "mend the disk or give another --out"
        )
        return Complaint(f"{where}{error.strerror}", remedy, USAGE if user else FAILED)
    return Complaint(
        f"{type(error).__name__}: {_line(str(error))[:300] or 'no message'}",
        "this was not foreseen: run it again with --debug and report the traceback",
        FAILED,
    )


def complain(error: BaseException, debug: bool = False) -> int:
    """Print an error on stderr and return the exit code."""
    complaint = describe(error)
    if debug and not isinstance(error, ClickError):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    print(f"error: {complaint.problem}\n  {complaint.remedy}", file=sys.stderr)
    return complaint.code


def _usage(error: Any) -> Complaint:
    """A usage error of the command line, with the nearest right spelling."""
    text = _line(error.format_message()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "outlay"
    hint = ""
    command = getattr(context, "command", None)
    if (name := re.match(r"No such command '([^']*)'", text)) and command is not None:
        text = name[0]
        hint = nearest(name[1], command.list_commands(context))
    if command is not None and type(error).__name__ == "NoSuchOption":
        known = [o for p in command.params for o in getattr(p, "opts", ()) if o[:2] == "--"]
        text = f"No such option {error.option_name}"
        hint = nearest(error.option_name, known)
    return Complaint(
        f"{path}: {text[:1].lower()}{text[1:]}", f"{hint}see `{path} --help`", error.exit_code
    )


def _line(text: str) -> str:
    return " ".join(str(text).split())
