"""`probe`: what a frozen model is worth on labeled rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..core.errors import ConfigError
from . import screen
from .inputs import free_place
from .options import AsJson, Debug, Force, Quiet, Threads
from .predict import write_whole
from .progress import progress_for

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A transformers folder, a packaged model or .onnx.")
]
Data = Annotated[
    str, typer.Option("--data", help="A file, folder or packaged data set.", show_default=False)
]
Text = Annotated[
    Optional[str],  # noqa: UP045 - evaluated by Typer
    typer.Option("--text", help="Column of the text or image."),
]
Label = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--label", help="Column of the class."),
]
Domain = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--domain", help="Column of the domain: learn domain after domain as well."),
]
Limit = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Most training rows."),
]
Deduplicate = Annotated[bool, typer.Option("--deduplicate", help="Drop rows with equal inputs.")]
Layer = Annotated[int, typer.Option(help="Hidden state; -1 is the last.")]
Pooling = Annotated[str, typer.Option(help="auto, mean, cls or flatten.")]
Length = Annotated[int, typer.Option(min=2, help="Most tokens of a text.")]
Tasks = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Tasks that classes are parted into; 1 leaves the stream out."),
]
Orders = Annotated[int, typer.Option(min=1, help="Random orders of classes or domains.")]
Twin = Annotated[
    bool, typer.Option("--random-twin", help="The same network with random weights beside it.")
]
Place = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the report.")]
Seed = Annotated[int, typer.Option(help="Decides the orders.")]


def probe(
    model: Model,
    data: Data,
    text: Text = None,
    label: Label = None,
    domain: Domain = None,
    limit: Limit = None,
    deduplicate: Deduplicate = False,
    layer: Layer = -1,
    pooling: Pooling = "auto",
    length: Length = 128,
    tasks: Tasks = None,
    orders: Orders = 3,
    random_twin: Twin = False,
    out: Place = Path("probe"),
    seed: Seed = 0,
    force: Force = False,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Judge a frozen model: audit of its inputs, heads on its features, tasks in sequence.

    Nearest class mean, streaming LDA, nearest neighbours and a linear probe, on the model's
    features and on raw inputs; features are cached, so another look costs seconds.
    """
    free_place(out, force)
    with progress_for(quiet).waiting("probing"):
        found = _probed(
            model, data, threads,
            {"text": text, "label": label, "domain": domain, "limit": limit,
             "deduplicate": deduplicate},
            {"layer": layer, "pooling": pooling, "length": length, "tasks": tasks,
             "orders": orders, "domains": domain is not None, "seed": seed,
             "random_twin": random_twin},
        )  # fmt: skip
        from ..comparison.page.probe_page import probe_markdown, probe_page, sentence

        write_whole(out / "report.html", probe_page(found))
        write_whole(out / "report.md", probe_markdown(found))
        plain = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(out / "probe.json", plain + "\n")
    if as_json:
        screen.put_json({**found, "out": str(out)})
    elif not quiet:
        _show(found, sentence(found), out)


def _probed(
    model: str, data: str, threads: int | None, columns: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    import torch

    from .. import assets
    from ..comparison.probe import ProbeSettings
    from ..comparison.probe import probe as run_probe
    from ..training.specs import DataSpec

    if threads is not None:
        torch.set_num_threads(threads)
    known = assets.names("data")
    if not Path(data).exists() and data not in known:
        raise ConfigError(
            f"{data!r} is neither a file nor a packaged data set", f"packaged: {', '.join(known)}"
        )
    source = {"path": data} if Path(data).exists() else {"asset": data}
    return run_probe(model, DataSpec(**source, **columns), ProbeSettings(**settings))


def _show(found: dict[str, Any], sentence: str, out: Path) -> None:
    from ..comparison.page.probe_page import metric_rows

    console = screen.console()
    for finding in found["audit"]:
        if finding["status"] != "ok":
            screen.note(f"warning: not so: {finding['check']} ({finding['text']})")
    rows = [
        (h["head"], h["inputs"], f"{h['accuracy']:.1%}",
         f"{h['interval'][0]:.1%} to {h['interval'][1]:.1%}")
        for h in found["heads"]
    ]  # fmt: skip
    columns = ("head", "inputs", "test accuracy", "95 % interval")
    console.print(screen.table("Heads", columns, rows, right=columns[2:]))
    names = list(found["formulas"])
    for protocol in dict.fromkeys(stream["protocol"] for stream in found["streams"]):
        streams = [s for s in found["streams"] if s["protocol"] == protocol]
        columns = ("learner", *(name.replace("_", " ") for name in names))
        title = f"{protocol}, {len(streams[0]['tasks'])} tasks, mean of {len(streams)} orders"
        table = screen.table(title, columns, metric_rows(streams, names), right=columns[1:])
        console.print(table)
    console.print(sentence, markup=False)
    typer.echo(f"report: {out / 'report.html'}")
