"""`plan`: what a recipe will cost, before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import screen
from .inputs import open_recipe
from .options import (
    AsJson,
    BudgetText,
    Debug,
    Device,
    Methods,
    Quiet,
    RecipeName,
    Seed,
    Settings,
    Threads,
)
from .progress import progress_for

if TYPE_CHECKING:
    from ..training.planning.plan import Plan

REFUSED = 3
Measure = Annotated[
    bool,
    typer.Option("--measure", help="Load it and take a few steps: time, and the peak as it is."),
]


def plan(
    recipe: RecipeName,
    measure: Measure = False,
    budget: BudgetText = None,
    method: Methods = None,
    settings: Settings = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say what a recipe costs: parameters, memory by part, FLOPs, time, and whether it fits.

    Exits with 3 if it does not fit, so that `outlay plan X && outlay run X` is safe.
    """
    chosen = open_recipe(recipe, seed=seed, budget=budget, methods=method, settings=settings)
    progress = progress_for(quiet)
    with progress.waiting("taking a few steps" if measure else "counting"):
        from ..training.planning.plan import plan as work_out

        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        found = work_out(chosen, measure=measure, device=device)
    if as_json:
        screen.put_json(found.to_json())
    elif not quiet:
        show(found)
    if not found.fits:
        raise typer.Exit(REFUSED)


def show(found: Plan) -> None:
    """Print a plan for people."""
    out = screen.console()
    params, memory = found.params, found.memory_bytes
    total = params["total"] or 1
    trainable = f"{params['trainable']:,} ({params['trainable'] / total:.2%})"
    rows: list[tuple[str, Any]] = [
        ("parameters", f"{params['total']:,}"),
        ("trainable", f"{trainable}, of which head {params['head']:,}"),
        ("steps", None if getattr(found, "steps", None) is None else f"{found.steps:,}"),
        ("FLOPs", screen.amount(found.flops)),
        ("time", "unknown without --measure" if found.seconds is None
         else screen.duration(found.seconds)),
        ("peak memory", screen.amount_bytes(memory["peak"])),
        *((f"  {part}", screen.amount_bytes(memory[part]))
          for part in ("weights", "gradients", "optimizer", "activations")),
        ("fits", "yes" if found.fits else "no"),
    ]  # fmt: skip
    out.print(screen.facts(rows))
    lines = [
        (link["method"], ", ".join(p.removeprefix("On").lower() for p in link["places"]),
         ", ".join(link["claims"]))
        for link in found.chain
    ]  # fmt: skip
    out.print(screen.table("What acts, in order", ("method", "acts on", "claims"), lines))
    for sentence in found.notes:
        out.print(f"note: {sentence}", markup=False)
