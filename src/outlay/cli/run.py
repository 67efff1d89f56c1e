"""`run`: train a recipe, or go on where it stopped."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..core.errors import OutlayError
from . import screen
from .errors import FAILED, INTERRUPTED, describe
from .inputs import open_recipe
from .options import (
    AsJson,
    BudgetText,
    Debug,
    Device,
    Methods,
    NoProgress,
    Quiet,
    Runs,
    Seed,
    Settings,
    Threads,
)
from .progress import Hidden, progress_for

if TYPE_CHECKING:
    from ..training.result import Result

Resumed = Annotated[
    Optional[Path],  # noqa: UP045 - evaluated by Typer
    typer.Option(
        "--resume",
        metavar="DIR",
        help="Go on in this run's folder; a recipe that differs is refused by name. Without it "
        "the same command goes on by itself.",
    ),
]
Track = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        metavar="NAME",
        help="Show the curves in tensorboard, mlflow, wandb or trackio too; may be repeated.",
    ),
]
MaybeRecipe = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of a packaged recipe; with --resume its own by default.",
    ),
]


def run(
    recipe: MaybeRecipe = None,
    budget: BudgetText = None,
    method: Methods = None,
    settings: Settings = None,
    seed: Seed = None,
    resume: Resumed = None,
    track: Track = None,
    out: Runs = Path("runs"),
    device: Device = "auto",
    threads: Threads = None,
    no_progress: NoProgress = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a recipe: progress, checkpoints, metrics and a report in a folder of its own.

    Ctrl-C finishes the step, saves, and says how to go on. The same command goes on where it
    stopped; once done it shows what was recorded.
    """
    chosen = open_recipe(
        recipe, seed=seed, budget=budget, methods=method, settings=settings, resume=resume
    )
    progress = progress_for(quiet, no_progress)
    folder = None
    try:
        from ..bridges.trackers import tracking
        from ..training import runs
        from ..training.materials import load_materials

        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        with progress.waiting("reading data and model"):
            materials = load_materials(chosen)
        folder = resume or out / f"{chosen.name}-{runs.identity(chosen, materials)}"
        with tracking(
            track or (), folder, chosen.name, chosen.resolved(), progress.note
        ) as trackers:
            result = runs.run(
                chosen, out=out, device=device, threads=threads, resume=resume,
                progress=progress, trackers=trackers, materials=materials, plan=True,
            )  # fmt: skip
    except Exception as error:
        progress.close()
        if as_json and folder is not None and describe(error).code == FAILED:
            screen.put_json(_failed(folder, progress, error), indent=None)
        raise
    finally:
        progress.close()
    done = result.status == "done"
    report = write_run_report(result, chosen, quiet) if done else None
    beside = _beside(chosen, materials, result, progress) if done else {}
    if as_json:
        extra: dict[str, Any] = {"report": str(report)} if report else {}
        extra |= {"references": beside} if beside else {}
        screen.put_json(asdict(result) | extra, indent=None)
    elif not quiet:
        if any(_DOMAIN in name for name in result.metrics) or beside:
            screen.console().print(_by_domain(result.metrics, beside))
        screen.console().print(_shown(result, report))
    if result.status == "stopped":
        again = shlex.join(["outlay", "run", "--resume", result.folder])
        screen.note(f"stopped after a whole step and saved; to go on: {again}")
        raise typer.Exit(INTERRUPTED)


_DOMAIN = "bits_per_byte."  # what a metric of one domain is called


def _failed(folder: Path, progress: Hidden, error: Exception) -> dict[str, Any]:
    """The JSON of a run that broke down."""
    meter = progress.meter.summary() if progress.meter is not None else {}
    return {
        "run": folder.name, "folder": str(folder), "metrics": {}, "meter": meter,
        "weights_sha256": None, "seconds": meter.get("seconds"), "status": "failed",
        "failure": describe(error).problem,
    }  # fmt: skip


def write_run_report(result: Result, recipe: Any, quiet: bool) -> Path | None:
    """A report beside a finished run; a run is never lost for a report that fails."""
    from ..comparison.report import write_report
    from .reporting import report_of_run

    target = Path(result.folder) / "report.html"
    if target.is_file():
        return target
    try:
        return write_report(report_of_run(result, recipe), result.folder, records=False)
    except (OutlayError, OSError, ValueError, KeyError, TypeError) as error:
        screen.note(f"note: no report was written ({describe(error).problem})", quiet)
        return None


def _beside(
    recipe: Any, materials: Any, result: Result, progress: Any
) -> dict[str, dict[str, float]]:
    """What the recipe's reference models reach on the same rows."""
    if not recipe.evaluate.references:
        return {}
    from ..comparison.language_arm import references

    with progress.waiting("fitting reference models"):
        return references(recipe, materials, Path(result.folder))


def _by_domain(metrics: dict[str, float], beside: dict[str, dict[str, float]]) -> Any:
    """Bits per byte of the last split by domain, the run's and those of reference models."""
    names = [name for name in metrics if "/bits_per_byte" in name]
    split = names[-1].partition("/")[0]
    columns = {"this run": metrics, **beside}
    rows = [
        [
            name.partition("/")[2].partition(_DOMAIN)[2] or "all",
            *(screen.amount(found.get(name)) for found in columns.values()),
        ]
        for name in names
        if name.startswith(f"{split}/")
    ]
    title = f"Bits per byte, {split} split"
    return screen.table(title, ["domain", *columns], rows, right=list(columns))


def _shown(result: Result, report: Path | None) -> Any:
    meter = result.meter
    counts = [
        (key.replace("_", " "), screen.amount(meter[key]))
        for key in ("trainable_parameters", "total_parameters", "steps", "tokens", "examples",
                    "flops")
        if meter.get(key)
    ]  # fmt: skip
    metrics = [
        (name, screen.amount(value))
        for name, value in result.metrics.items()
        if _DOMAIN not in name
    ]
    return screen.facts(
        [
            *metrics, *counts,
            ("training time", screen.duration(meter.get("seconds"))),
            ("status", result.status),
            ("folder", result.folder),
            ("report", str(report) if report else None),
        ]
    )  # fmt: skip
