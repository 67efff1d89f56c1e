"""Options that verbs share, spelled and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

COMMON = "Common options"
CHANGES = "Changes to the recipe"

AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=COMMON)
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Nothing but errors and data.", rich_help_panel=COMMON),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=COMMON)
]
Device = Annotated[
    str, typer.Option(help='"auto", "cpu", "cuda" or "mps".', rich_help_panel=COMMON)
]
Threads = Annotated[
    Optional[int],  # noqa: UP045 - evaluated by Typer
    typer.Option(min=1, help="Threads of torch; resuming needs the same.", rich_help_panel=COMMON),
]
Runs = Annotated[
    Path, typer.Option("--out", help="Folder that run folders go to.", rich_help_panel=COMMON)
]
NoProgress = Annotated[
    bool, typer.Option("--no-progress", help="No progress shown.", rich_help_panel=COMMON)
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a packaged recipe.")
]
RunFolder = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder of a finished run, or its name in runs/.")
]

Seed = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Seed of everything random.", rich_help_panel=CHANGES),
]
BudgetText = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--budget", help="What ends the run: 60steps, 2e6tokens, 90s.", rich_help_panel=CHANGES
    ),
]
Methods = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--method",
        metavar="CALL",
        help='A method, as "bone(r=16)", after those of the recipe; may be repeated. '
        "`--set methods=[]` takes the recipe's own away first.",
        rich_help_panel=CHANGES,
    ),
]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the recipe, as optimizer.lr=3e-3; may be repeated.",
        rich_help_panel=CHANGES,
    ),
]
