"""The command put together: verbs, help, and one style of error."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from .._version import __version__
from . import (
    bench,
    catalogue,
    compare,
    doctor,
    export,
    fit,
    inputs,
    plan,
    predict,
    probe,
    recipe,
    replicate,
    report,
    run,
    select,
    study,
)
from .errors import complain

_LOOK, _PREPARE, _RUN, _USE, _HERE = (
    "What there is", "Before a run", "Running", "With finished runs", "This machine",
)  # fmt: skip


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"outlay {__version__}")
        raise typer.Exit
    return asked


def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Spend a training budget well: methods that stack, plans before the run, equal budgets.

    Start with `outlay list`, then `outlay run digits-vit`.
    """


def _bench() -> None:
    """Measure inference on data of your own."""


def build_app() -> typer.Typer:
    """All verbs under one command."""
    settings: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(
        name="outlay", add_completion=False, context_settings=settings, rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )  # fmt: skip
    app.callback()(_start)
    for panel, name, verb in (
        (_LOOK, "list", catalogue.list_methods),
        (_LOOK, "show", catalogue.show),
        (_LOOK, "cite", catalogue.cite),
        (_PREPARE, "plan", plan.plan),
        (_PREPARE, "select", select.select),
        (_RUN, "run", run.run),
        (_RUN, "compare", compare.compare),
        (_RUN, "replicate", replicate.replicate),
        (_RUN, "study", study.study),
        (_RUN, "fit", fit.fit),
        (_RUN, "probe", probe.probe),
        (_USE, "evaluate", predict.evaluate),
        (_USE, "predict", predict.predict),
        (_USE, "export", export.export),
        (_USE, "report", report.report),
        (_HERE, "doctor", doctor.doctor),
    ):
        app.command(name, help=_unwrapped(verb), rich_help_panel=panel)(verb)
    recipes = typer.Typer(help="Copy, check and describe recipes.")
    for name, verb in (
        ("list", recipe.list_recipes),
        ("copy", recipe.copy),
        ("check", recipe.check),
        ("schema", recipe.schema),
    ):
        recipes.command(name, help=_unwrapped(verb))(verb)
    app.add_typer(recipes, name="recipe", rich_help_panel=_PREPARE)
    benches = typer.Typer()
    benches.callback()(_bench)
    benches.command("prefill", help=_unwrapped(bench.prefill))(bench.prefill)
    app.add_typer(benches, name="bench", rich_help_panel=_HERE)
    return app


def _unwrapped(verb: Callable[..., None]) -> str:
    """A verb's docstring, its paragraphs as single lines: the terminal wraps them."""
    return "\n\n".join(
        " ".join(part.split()) for part in (verb.__doc__ or "").strip().split("\n\n")
    )


def run_app(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; nothing is raised.

    Args:
        arguments: What was typed after `outlay`; the process's own by default.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in typed
    words = [_dashed(word) for word in typed]
    if words in ([], ["recipe"], ["bench"]):
        words.append("--help")
    inputs.TYPED.set(shlex.join(["outlay", *typed]))
    command = typer.main.get_command(build_app())
    try:
        with warnings.catch_warnings():
            if arguments is None:
                warnings.showwarning = _show_warning(debug)
            with command.make_context("outlay", words) as context:
                command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as end:
        return end.exit_code
    except BrokenPipeError:
        # The reader went away, as `head` does: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        return complain(error, debug)


def _dashed(word: str) -> str:
    """`--no_progress` is `--no-progress`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _show_warning(debug: bool) -> Any:
    """Warnings of outlay as one line each; those of other packages only with --debug."""
    home, said = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), set()

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
        text = " ".join(str(message).split())
        if text not in said and (debug or os.path.abspath(filename).startswith(home)):
            said.add(text)
            print(f"note: {text}", file=sys.stderr)

    return show
