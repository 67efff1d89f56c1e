"""`compare`: several arms under one budget, paired by seed, judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    from ..training.recipe import Recipe

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
        metavar="KEY[=A,B,C]",
        help="Tune a setting, equally for every arm and charged to it, on the validation split; "
        "a key alone takes the recipe's own grid for it, or its value times 0.1, 0.3, 1, 3 and "
        "10; the word recipe takes the recipe's whole grid; several are tried in all "
        "combinations.",
    ),
]
TuningSeeds = Annotated[int, typer.Option(min=1, help="Runs of each point in tuning.")]
Halving = Annotated[
    int,
    typer.Option(
        min=1,
        help="In tuning, one point in so many gets the whole budget, the others a quarter of it; "
        "1 gives it to all.",
    ),
]
Detect = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        help="Difference that you want to see: says how many seeds it takes, and sets nothing."
    ),
]


def compare(
    recipe: RecipeName,
    arm: Arms = None,
    seeds: Seeds = 6,
    metric: Metric = None,
    margin: Margin = None,
    detect: Detect = None,
    tune: Tune = None,
    tuning_seeds: TuningSeeds = 1,
    halving: Halving = 3,
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

    Each arm adds its methods to the recipe's. Before the first run it says the smallest
    difference that the seeds can show. Interrupted, the same command goes on at the run it was in.
    """
    suggested = suggestion(recipe)
    arms = list(arm or suggested.arms)
    notes = [suggested.note] if not arm and not tune and suggested.note else []
    if len(arms) < 2:
        raise ConfigError(
            f"{len(arms)} arm{'s are' if not arms else ' is'} given, a comparison needs two",
            'give --arm "NAME=bone(r=16)" twice or more',
        )
    chosen = open_recipe(recipe, seed=seed, budget=budget, methods=method, settings=settings)
    progress = progress_for(quiet, no_progress)
    try:
        with progress.waiting("starting"):
            from ..comparison.compare import compare as run_arms
        grid = grids(tune or (), chosen, suggested.grid)
        found = run_arms(
            chosen,
            arms,
            seeds=seeds,
            out=out,
            metric=metric,
            margin=margin,
            detect=detect,
            tune=grid or None,
            tuning_seeds=tuning_seeds,
            halving=halving,
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


def grids(
    texts: Sequence[str], recipe: Recipe, own: Mapping[str, Sequence[Any]]
) -> dict[str, list[Any]]:
    """What `--tune` asks for.

    Args:
        texts: As typed: `recipe`, `KEY` or `KEY=A,B,C`; the last of one key counts.
        recipe: Whose value a key without a grid is scaled from.
        own: The recipe's own grids.

    Raises:
        ConfigError: If the recipe has no grid, or a key has no value to scale.
    """
    from ..comparison.tuning import ladder

    found: dict[str, list[Any]] = {}
    for text in texts:
        if text == OWN_GRID:
            if not own:
                raise ConfigError(
                    f"recipe {recipe.name} has no grid of its own",
                    "give --tune optimizer.lr, or --tune optimizer.lr=1e-3,3e-3",
                )
            found |= {key: list(values) for key, values in own.items()}
        elif "=" in text:
            key, values = _grid(text)
            found[key] = values
        else:
            found[text.strip()] = list(own.get(text.strip()) or ladder(recipe, text.strip()))
    return found


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
    tuned = any(a.get("tuning") for a in found["arms"])
    charged = ("tuning runs", "FLOPs with tuning") if tuned else ()
    out.print(
        screen.table(
            "Arms",
            ("arm", "trainable", "seeds", "mean", "interval", *charged),
            [
                (
                    a["name"],
                    screen.amount(a["trainable"]),
                    a["seeds"],
                    _figure(a["mean"]),
                    _interval(a["interval"]),
                    *(_charged(a) if tuned else ()),
                )
                for a in _best_first(found)
            ],
            right=("trainable", "seeds", "mean", *charged),
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


def _charged(arm: dict[str, Any]) -> tuple[str, str]:
    """Runs of an arm's tuning, and the FLOPs of one run and its tuning together."""
    runs = arm["tuning"]["trials"] if arm["tuning"] else None
    return (
        screen.amount(runs),
        _figure(arm["total"]["flops"] if arm["total"] else None),
    )


def _best_first(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Arms by their mean, those without one last; an order to read in, not a ranking."""
    sign = -1 if found.get("higher_is_better", True) else 1
    return sorted(found["arms"], key=lambda a: (a["mean"] is None, sign * (a["mean"] or 0)))


def _figure(value: float | None, signed: bool = False) -> str:
    return "-" if value is None else f"{value:+.4g}" if signed else f"{value:.4g}"


def _interval(ends: Any, signed: bool = False) -> str:
    return "-" if not ends else f"[{_figure(ends[0], signed)}, {_figure(ends[1], signed)}]"
