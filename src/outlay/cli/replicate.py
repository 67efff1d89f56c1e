"""`replicate`: a paper's claims put to the test, and a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from . import screen
from .errors import INTERRUPTED
from .inputs import TYPED
from .options import AsJson, Debug, Device, NoProgress, Quiet, Runs, Threads
from .progress import progress_for

Name = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A method, a paper's number, or the script as 34_bone."),
]
SizeName = Annotated[
    str,
    typer.Option(
        "--size", help="smoke (minutes, no verdict), cpu (an hour a task on two cores), or gpu."
    ),
]
Record = Annotated[
    bool,
    typer.Option(
        "--record", help="Also write the verdict where `list` and `show` read it: in the package."
    ),
]
Minutes = Annotated[
    Optional[float],  # noqa: UP045 - evaluated by Typer
    typer.Option(min=0.0, help="Minutes a task, after which no more seeds are begun."),
]


def replicate(
    name: Name,
    size: SizeName = "cpu",
    record: Record = False,
    minutes: Minutes = None,
    out: Runs = Path("runs"),
    device: Device = "auto",
    threads: Threads = None,
    no_progress: NoProgress = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put a paper's claims to the test: arms and controls, tuned equally, seeds, and a verdict.

    Seed noise is measured first; seeds are raised while a claim is open and time is left.
    Interrupted, the same command goes on at the run it was in.
    """
    from .. import replications

    found_name = replications.find(name)
    progress = progress_for(quiet, no_progress)
    try:
        with progress.waiting("starting"):
            from ..comparison.replicate import replicate as run_replication

            chosen = replications.load(found_name)
        found = run_replication(
            chosen,
            size,
            out=out,
            record=replications.folder() if record else None,
            minutes=minutes,
            device=device,
            threads=threads,
            progress=progress,
            command=TYPED.get(),
        )
    except KeyboardInterrupt:
        progress.close()
        screen.note(f"stopped after a whole step and saved; to go on: {TYPED.get()}")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        progress.close()
    if as_json:
        reports = [str(path) for path in found.reports]
        screen.put_json({**found.ledger, "ledger": str(found.path), "reports": reports})
    elif not quiet:
        show(found.ledger)
        screen.console().print(f"ledger: {found.path}", markup=False, soft_wrap=True)
        for path in found.reports:
            screen.console().print(f"report: {path}", markup=False, soft_wrap=True)


def show(ledger: dict[str, Any]) -> None:
    """Print a verdict: the claims with their figures, then what they come to."""
    out = screen.console()
    out.print(
        screen.table(
            f"{ledger['title']} (arXiv {ledger['arxiv']})",
            ("task", "claim", "seeds", "gain or ratio", "interval", "claimed", "verdict"),
            [
                (task_name, claim["text"], claim.get("seeds"), *_figures(claim), claim["verdict"])
                for task_name, task in ledger["tasks"].items()
                for claim in task["claims"]
            ],
            right=("seeds", "gain or ratio", "claimed"),
        )
        if ledger["verdict"]
        else screen.table(
            f"{ledger['title']} (arXiv {ledger['arxiv']})",
            ("task", "arm", "trainable", "runs", "failed", "s a run"),
            [
                (name, arm["name"], screen.amount(arm["trainable_parameters"]), arm["seeds"],
                 arm["failed"], arm["seconds_a_run"])
                for name, task in ledger["tasks"].items()
                for arm in task["arms"]
            ],
            right=("trainable", "runs", "failed", "s a run"),
        )
    )  # fmt: skip
    out.print(ledger["sentence"], markup=False)


def _figures(claim: dict[str, Any]) -> tuple[str, str, str]:
    """Gain (or ratio), interval and claimed size of a claim, as text."""
    if claim.get("gain") is not None:
        low, high = claim["interval"]
        return f"{claim['gain']:+.4g}", f"[{low:+.4g}, {high:+.4g}]", f"{claim['size']:.4g}"
    if claim.get("ratio") is not None:
        low, high = claim["ratio_interval"]
        return f"x {claim['ratio']:.4g}", f"[{low:.4g}, {high:.4g}]", f"x {claim['at_most']:.4g}"
    return "-", claim.get("reason", "-"), "-"
