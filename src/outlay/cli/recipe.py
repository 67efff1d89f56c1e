"""`recipe copy`, `recipe check` and `recipe schema`, and `recipe list`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from . import screen
from .inputs import free_place, open_recipe
from .options import AsJson, Debug, Force, Quiet, RecipeName

File = Annotated[
    Optional[Path],  # noqa: UP045 - evaluated by Typer
    typer.Argument(metavar="FILE", help="Where to write it; NAME.yaml by default, - for stdout."),
]


def list_recipes(as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the packaged recipes."""
    from .. import recipes

    rows = [{"name": name, "summary": recipes.summary(name)} for name in recipes.names()]
    if as_json:
        screen.put_json(rows)
        return
    screen.console().print(
        screen.table("", ("name", "what it is"), [(r["name"], r["summary"]) for r in rows])
    )


def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A packaged recipe.")],
    file: File = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a packaged recipe as a YAML file to change."""
    from .. import recipes

    recipe = recipes.get(name)
    head = f"# {recipes.summary(name)}\n# Every field and its default: `outlay recipe schema`.\n"
    text = head + recipe.to_yaml()
    if file is not None and str(file) == "-":
        typer.echo(text, nl=False)
        return
    target = file or Path(f"{recipe.name}.yaml")
    if target.is_dir():
        target = target / f"{recipe.name}.yaml"
    free_place(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    spare = target.with_name(f".{target.name}.part")
    spare.write_text(text, encoding="utf-8")
    os.replace(spare, target)
    if as_json:
        screen.put_json({"recipe": recipe.name, "file": str(target)})
    elif not quiet:
        typer.echo(f"wrote {target}; check it with `outlay recipe check {target}`")


def check(
    recipe: RecipeName, as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Check a recipe: every key, type and value, and whether its methods can share a run."""
    from ..core.claims import check as refuse_clashes
    from ..training.stages import stage_recipes

    read = open_recipe(recipe)
    for _, stage in stage_recipes(read):
        refuse_clashes(stage.methods)
    plain = read.resolved()
    if as_json:
        screen.put_json({"ok": True, "recipe": plain})
        return
    if quiet:
        return
    model = {k: v for k, v in _mapping(plain["model"]).items() if v not in (None, "", False)}
    data = {k: v for k, v in _mapping(plain["data"]).items() if v not in (None, "", False)}
    out = screen.console()
    out.print("ok")
    out.print(
        screen.facts(
            [
                ("name", read.name),
                ("task", read.task),
                ("model", _listed(model)),
                ("data", _listed(data)),
                ("methods", ", ".join(plain["methods"]) or "none: every parameter trains"),
                ("optimizer", _listed(plain["optimizer"])),
                ("schedule", _listed(plain["schedule"])),
                ("batch", _listed(plain["batch"])),
                ("budget", plain["budget"]),
                ("stages", ", ".join(stage["name"] for stage in plain["stages"])),
                ("seed", str(read.seed)),
            ]
        )
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"live": value}


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def schema(quiet: Quiet = False, debug: Debug = False) -> None:
    """Print the JSON schema of recipes, the settings of every method included."""
    from .schema import recipe_schema

    screen.put_json(recipe_schema())
