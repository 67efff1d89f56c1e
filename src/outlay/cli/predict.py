"""`evaluate` and `predict`: what a finished run says about rows."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..core.errors import ConfigError
from . import screen
from .inputs import free_place, run_folder
from .options import AsJson, Debug, Device, Force, Quiet, RunFolder, Threads
from .progress import progress_for

Split = Annotated[
    Optional[list[str]],  # noqa: UP045 - evaluated by Typer
    typer.Option("--split", help="validation or test; both by default; may be repeated."),
]
Labeled = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--data", help="Labeled rows of your own in place of the run's splits."),
]
Rows = Annotated[
    Path,
    typer.Option("--data", help="Rows as the recipe's, labels not needed.", show_default=False),
]
Target = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", metavar="FILE", help="A .jsonl or .csv file; stdout by default."),
]
SUFFIXES = (".jsonl", ".csv")


def evaluate(
    run: RunFolder,
    split: Split = None,
    data: Labeled = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a finished run again, on its own splits or on rows of yours."""
    folder = run_folder(run)
    known = ("validation", "test")
    unknown = [name for name in split or () if name not in known]
    if unknown:
        raise ConfigError(f"there is no split {unknown[0]!r}", f"use {' or '.join(known)}")
    with progress_for(quiet).waiting("measuring"):
        from ..training.finished import open_run

        finished = open_run(folder, rows=data is None, device=device, threads=threads)
        if data is not None:
            metrics = {f"data/{k}": v for k, v in finished.evaluate_rows(data).items()}
        else:
            metrics = finished.evaluate(tuple(split or known))
    if as_json:
        screen.put_json({"run": folder.name, "folder": str(folder), "metrics": metrics})
    else:
        rows = [(name, screen.amount(value)) for name, value in metrics.items()]
        screen.console().print(screen.facts(rows))


def predict(
    run: RunFolder,
    data: Rows,
    out: Target = None,
    force: Force = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Predict rows with a finished run: class and probabilities, values, or scores of text."""
    folder = run_folder(run)
    if out is not None:
        if out.suffix.lower() not in SUFFIXES:
            raise ConfigError(
                f"--out {str(out)!r} ends in neither of {', '.join(SUFFIXES)}",
                "name the file predictions.jsonl or predictions.csv",
            )
        free_place(out, force)
    with progress_for(quiet).waiting("predicting"):
        from ..training.finished import open_run

        finished = open_run(folder, rows=False, device=device, threads=threads)
        rows = list(finished.predict(data))
    if out is None:
        # Rows are the data here, with --json too: one object a line either way.
        sys.stdout.write(as_jsonl(rows))
        return
    write_whole(out, as_csv(rows) if out.suffix.lower() == ".csv" else as_jsonl(rows))
    if as_json:
        screen.put_json({"run": folder.name, "rows": len(rows), "out": str(out)})
    elif not quiet:
        typer.echo(f"{len(rows):,} rows in {out}")


def as_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(
        json.dumps(screen.finite(dict(row)), ensure_ascii=False, allow_nan=False) + "\n"
        for row in rows
    )


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line a row; a mapping becomes a column for each of its keys, a list `a|b`."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            single = {"probabilities": "probability"}.get(key, key)
            found |= {f"{single}_{name}": entry for name, entry in value.items()}
        elif isinstance(value, (list, tuple)):
            found[key] = "|".join(map(str, value))
        else:
            found[key] = value
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spare = path.with_name(f".{path.name}.part")
    try:
        spare.write_text(text, encoding="utf-8")
        os.replace(spare, path)
    except BaseException:
        spare.unlink(missing_ok=True)
        raise
