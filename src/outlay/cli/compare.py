"""`compare`: several arms under one budget, paired by seed, judged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..core.errors import ConfigError
from ..recipes.arms import suggestion
from . import screen
from .errors import INTERRUPTED
from .inputs import TYPED, assignment, literal, open_recipe
from .options import (
    AsJson,
    BudgetText,
    Debug,
    Device,
    Methods,
    NoProgress,
    Quiet,
    RecipeName,
    Runs,
    Seed,
    Settings,
    Threads,
)
from .progress import progress_for

if TYPE_CHECKING:
    pass

OWN_GRID = "recipe"

Arms = Annotated[
    Optional[list[str]],  # noqa: UP045 - evaluated by Typer
    typer.Option(
        "--arm",
        metavar="NAME=CALLS",
        help='An arm, as "small=bone(r=4)+loss_weights", with settings of its own behind @, as '
        '"small=bone(r=4) @ optimizer.lr=3e-3"; give two or more.',
    ),
]
Seeds = Annotated[int, typer.Option(help="Seeds that every arm is run with.")]
Metric = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="split/metric that decides; the task's own on the test split by default."),
]
Margin = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(min=0.0, help="Call two arms equal if they differ by less than this for sure."),
]
Tune = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        metavar="KEY=A,B,C",
        help="Tune a setting over a grid, equally for every arm, on the validation split; "
        "the word recipe takes the recipe's own grid.",
    ),
]


def compare(
    recipe: RecipeName,
    arm: Arms = None,
    seeds: Seeds = 6,
    metric: Metric = None,
    margin: Margin = None,
    tune: Tune = None,
    budget: BudgetText = None,
    method: Methods = None,
    settings: Settings = None,
    seed: Seed = None,
    out: Runs = Path("runs"),
    device: Device = "auto",
    threads: Threads = None,
    no_progress: NoProgress = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare arms under one equal budget: paired intervals, ties as groups, and a report.

    Each arm adds its methods to the recipe's. Interrupted, the same command goes on at the run
    it was in.
    """
    suggested = suggestion(recipe)
    arms = list(arm or suggested.arms)
    notes = [suggested.note] if not arm and not tune and suggested.note else []
    if len(arms) < 2:
        raise ConfigError(
            f"{len(arms)} arm{'s are' if not arms else ' is'} given, a comparison needs two",
            'give --arm "NAME=bone(r=16)" twice or more',
        )
    grid = dict(map(_grid, (t for t in tune or () if t != OWN_GRID)))
    if tune and OWN_GRID in tune:
        grid |= {key: list(values) for key, values in suggested.grid.items()}
    chosen = open_recipe(recipe, seed=seed, budget=budget, methods=method, settings=settings)
    progress = progress_for(quiet, no_progress)
    try:
        with progress.waiting("starting"):
            from ..comparison.compare import compare as run_arms
        found = run_arms(
            chosen,
            arms,
            seeds=seeds,
            out=out,
            metric=metric,
            margin=margin,
            tune=grid or None,
            device=device,
            threads=threads,
            progress=progress,
            command=TYPED.get(),
            notes=notes,
        )
    except KeyboardInterrupt:
        progress.close()
        screen.note(f"stopped after a whole step and saved; to go on: {TYPED.get()}")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        progress.close()
    if as_json:
        screen.put_json(found.to_json())
    elif not quiet:
        show(found.to_json())


def _grid(text: str) -> tuple[str, list[Any]]:
    """Read `optimizer.lr=1e-3,3e-3` or `batch.size=[8, 16]`."""
    key, _ = assignment(text.partition("=")[0] + "=0")
    value = text.partition("=")[2].strip()
    values = literal(value if value.startswith("[") else f"[{value}]")
    values = [literal(v) if isinstance(v, str) else v for v in values]
    if len(values) < 2:
        raise ConfigError(
            f"--tune {text!r} holds {len(values)} value{'' if len(values) == 1 else 's'}",
            "write a grid of at least two, as optimizer.lr=1e-3,3e-3",
        )
    return key, values


def show(found: dict[str, Any]) -> None:
    """Print a comparison: arms, paired differences, groups, and where the report is."""
    out = screen.console()
    out.print(
        screen.table(
            "Arms",
            ("arm", "trainable", "seeds", "mean", "interval"),
            [
                (
                    a["name"],
                    screen.amount(a["trainable"]),
                    a["seeds"],
                    _figure(a["mean"]),
                    _interval(a["interval"]),
                )
                for a in _best_first(found)
            ],
            right=("trainable", "seeds", "mean"),
        )
    )
    if found["arms"]:
        out.print(f"metric: {found['arms'][0]['metric']}\n", markup=False)
    out.print(
        screen.table(
            "Paired differences (simultaneous intervals)",
            ("pair", "difference", "interval", "p (Holm)", "p (sign flip)", "could have seen"),
            [
                (
                    f"{p['a']} - {p['b']}",
                    _figure(p["difference"], True),
                    _interval(p["interval"], True),
                    _figure(p["p_holm"]),
                    _figure(p["p_sign_flip"]),
                    _figure(p["detectable"]),
                )
                for p in found["pairs"]
            ],
            right=("difference", "p (Holm)", "p (sign flip)", "could have seen"),
        )
    )
    for v in found["verdicts"]:
        out.print(
            f"{v['better']} is better than {v['worse']} by {_figure(v['difference'])} "
            f"{_interval(v['interval'])}",
            markup=False,
        )
    if not found["verdicts"]:
        out.print("No pair is separated by these seeds.")
    for names in found["ties"]:
        out.print(f"not told apart: {', '.join(names)}", markup=False)
    for sentence in found.get("sentences", ()):
        out.print(f"note: {sentence}", markup=False)
    out.print(f"report: {found['report']}", markup=False, soft_wrap=True)


def _best_first(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Arms by their mean, those without one last; an order to read in, not a ranking."""
    sign = -1 if found.get("higher_is_better", True) else 1
    return sorted(found["arms"], key=lambda a: (a["mean"] is None, sign * (a["mean"] or 0)))


def _figure(value: float | None, signed: bool = False) -> str:
    return "-" if value is None else f"{value:+.4g}" if signed else f"{value:.4g}"


def _interval(ends: Any, signed: bool = False) -> str:
    return "-" if not ends else f"[{_figure(ends[0], signed)}, {_figure(ends[1], signed)}]"
