"""`study`: a question asked over many runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from . import screen
from .errors import INTERRUPTED
from .inputs import TYPED, open_recipe
from .options import AsJson, Debug, Device, NoProgress, Quiet, Runs, Settings, Threads
from .predict import write_whole
from .progress import progress_for

Name = Annotated[str, typer.Argument(metavar="NAME", help="A study, as average_parameters.")]
MaybeRecipe = Annotated[
    Optional[str],  # noqa: UP045 - evaluated by Typer
    typer.Argument(
        metavar="RECIPE", help="Data, optimizer and batch of its runs, if not the study's own."
    ),
]
SizeName = Annotated[
    str, typer.Option("--size", help="smoke (a minute, no verdict), cpu (two hours) or gpu.")
]


def study(
    name: Name,
    recipe: MaybeRecipe = None,
    size: SizeName = "cpu",
    settings: Settings = None,
    out: Runs = Path("runs"),
    device: Device = "auto",
    threads: Threads = None,
    no_progress: NoProgress = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Ask a question over many runs: a scaling law and its hold-out, a schedule and its places.

    Interrupted, the same command goes on at the run it was in.
    """
    from .. import studies

    key = studies.known(name)
    chosen = _recipe(recipe, settings)
    progress = progress_for(quiet, no_progress)
    try:
        with progress.waiting("starting"):
            from ..studies.average_parameters import average_parameters
        found = average_parameters(
            size, chosen, out=out, device=device, threads=threads, progress=progress
        )
    except KeyboardInterrupt:
        progress.close()
        screen.note(f"stopped after a whole step and saved; to go on: {TYPED.get()}")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        progress.close()
    target = out / f"{key}-{found['size']}.json"
    write_whole(target, json.dumps(found, indent=1, allow_nan=False) + "\n")
    if as_json:
        screen.put_json({**found, "study": key, "file": str(target)})
    elif not quiet:
        _show(found)
        screen.console().print(f"study: {target}", markup=False, soft_wrap=True)


def _recipe(recipe: str | None, settings: list[str] | None) -> Any:
    """The recipe that was named, or the study's own with the settings that were."""
    if recipe is not None:
        return open_recipe(recipe, settings=settings)
    from ..studies.average_parameters import base_recipe
    from .inputs import assignment

    return base_recipe().changed(dict(map(assignment, settings or ())))


def _show(found: dict[str, Any]) -> None:
    out, law = screen.console(), found["law"]
    intervals = law["intervals"]
    out.print(
        screen.table(
            f"Law of {law['runs']} dense runs: E + A / N^alpha + B / D^beta",
            ("constant", "value", "95 % interval"),
            [
                (key, f"{law[key]:.4g}", f"{low:.4g} to {high:.4g}")
                for key, (low, high) in intervals.items()
            ],
            right=("value", "95 % interval"),
        )
    )
    words = {"avg_params": "average", "params_final": "final", "params_initial": "first"}
    rows = [(f"{words[key]} parameters", f"{error:.2%}") for key, error in found["errors"].items()]
    rows.append(("dense runs left out", f"{found['dense_error']:.2%}"))
    columns = ("N", "error of the loss")
    out.print(screen.table("Pruned runs predicted by it", columns, rows, right=columns[1:]))
    if found["placements"]:
        columns = ("pruned at", "loss", "seeds")
        entries = [(p["window"], f"{p['loss']:.4f}", p["seeds"]) for p in found["placements"]]
        out.print(screen.table("Equal compute", columns, entries, right=columns[1:]))
    out.print(f"verdict: {found['verdict'] or 'none at this size'}", markup=False)
