"""`report`: one page about runs that are finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..core.errors import ConfigError
from . import screen
from .compare import Margin, Metric
from .inputs import TYPED, free_place, run_folder
from .options import AsJson, Debug, Force, Quiet
from .progress import progress_for

Folders = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Folders of runs or comparisons, or names in runs/."),
]
Target = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder that the report goes to.")
]
Title = Annotated[Optional[str], typer.Option(help="Heading of the page.")]  # noqa: UP045


def report(
    runs: Folders,
    out: Target = Path("report"),
    metric: Metric = None,
    margin: Margin = None,
    title: Title = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write one self-contained page about finished runs; arms that share seeds are judged.

    Runs that differ in nothing but the seed are one arm.
    """
    folders = [folder for text in runs for folder in expanded(text)]
    free_place(out, force)
    with progress_for(quiet).waiting("reading runs"):
        from ..comparison.report import write_report
        from .reporting import load, report_of_runs

        loaded = [load(folder) for folder in dict.fromkeys(folders)]
        data = report_of_runs(
            loaded, metric=metric, margin=margin,
            title=title or ", ".join(dict.fromkeys(run.recipe.name for run in loaded))[:120],
            command=TYPED.get(),
        )  # fmt: skip
        page = write_report(data, out)
    if as_json:
        twin = json.loads((out / "report.json").read_text(encoding="utf-8"))
        keys = ("arms", "pairs", "verdicts", "ties", "outcome")
        screen.put_json(
            {"folder": str(out), "report": str(page), **{key: twin[key] for key in keys}}
        )
    elif not quiet:
        typer.echo(f"report: {page}")


def expanded(text: str) -> list[Path]:
    """The run folders that a name stands for: itself, or all runs of a comparison.

    Raises:
        ConfigError: If there is nothing of that name.
    """
    for place in (Path(text), Path("runs") / text):
        if (place / "comparison.json").is_file() or place.name.startswith("comparison-"):
            found = sorted(p.parent for p in place.glob("runs/*/recipe.yaml"))
            if not found:
                raise ConfigError(f"{str(place)!r} holds no runs", "give a folder that does")
            return found
    return [run_folder(text)]
