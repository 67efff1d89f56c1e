"""`export`: a finished run as a plain transformers folder, or as an adapter folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..core.drafts import drafted
from . import screen
from .inputs import free_place, run_folder
from .options import AsJson, Debug, Device, Force, Quiet, RunFolder, Threads
from .progress import progress_for


class Format(str, Enum):  # noqa: UP042 - Typer shows the values of a str Enum
    """What is written."""

    transformers = "transformers"
    peft = "peft"


Target = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")]
Kind = Annotated[
    Format,
    typer.Option(
        "--format",
        case_sensitive=False,
        help="transformers: the whole model, methods merged, with tokenizer and label names. "
        "peft: the adapter alone.",
    ),
]


def export(
    run: RunFolder,
    out: Target,
    form: Kind = Format.transformers,
    force: Force = False,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a finished run's model where other programs can load it."""
    folder = run_folder(run)
    free_place(out, force)
    with progress_for(quiet).waiting("exporting"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        from ..training.finished import open_run

        finished = open_run(folder, rows=False, device=device, threads=threads)
        if form is Format.transformers:
            kind = write_folder(out, finished.save_model)
        else:
            from ..bridges.peft_runs import save_run_adapter

            kind = write_folder(out, lambda draft: save_run_adapter(finished, draft))
    for text in dict.fromkeys(str(warning.message) for warning in told):
        screen.note(f"note: {' '.join(text.split())}", quiet)
    files = sorted(p.name for p in out.iterdir())
    if as_json:
        screen.put_json(
            {"run": folder.name, "out": str(out), "format": form.value, "kind": kind,
             "files": files}
        )  # fmt: skip
    elif not quiet:
        typer.echo(f"wrote {out}: {', '.join(files)}")


def write_folder(target: Path, write: Callable[[Path], str]) -> str:
    """Have a folder written beside its place, then put it there: whole or not at all."""
    with drafted(target) as draft:
        return write(draft)
