"""`select`: choose documents from shards, and show what became of them."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..core.errors import ConfigError
from ..shards.progress import Silent
from . import screen
from .options import AsJson, Debug, NoProgress, Quiet

if TYPE_CHECKING:
    from ..shards.job import Selection

Inputs = Annotated[
    list[str],
    typer.Argument(metavar="INPUT...", help="Parquet, JSONL (.gz, .zst), folders of them, globs."),
]
Call = Annotated[
    list[str],
    typer.Option(
        "--method", metavar="CALL", show_default=False,
        help='What chooses, as "random_selection(keep=0.1)"; repeated, each has what is left.',
    ),
]  # fmt: skip
Out = Annotated[Path, typer.Option("--out", help="Folder of the result.", show_default=False)]
TextColumn = Annotated[str, typer.Option(help="Column of the text.")]
IdColumn = Annotated[
    Optional[str],  # noqa: UP045 - evaluated by Typer
    typer.Option(help="Column of the id; file and line by default.", show_default=False),
]
DateColumn = Annotated[str, typer.Option(help="Column of a date or year, if there is one.")]
DomainColumn = Annotated[str, typer.Option(help="Column of the domain, if there is one.")]
TokensColumn = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Column of the token count; bytes / 4 by default.", show_default=False),
]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
Limit = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Rows that are read of each file.", show_default=False),
]
KeepDropped = Annotated[bool, typer.Option("--keep-dropped", help="Write dropped ones too.")]
EngineName = Annotated[
    str, typer.Option("--engine", help='"local", "ray", or "array" (with --shard, then --join).')
]
Part = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--shard", metavar="I/N", help="Score this part of the files, then stop."),
]
Join = Annotated[bool, typer.Option("--join", help="Finish what the parts scored.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of random choices.")]


def select(
    inputs: Inputs,
    method: Call,
    out: Out,
    text_column: TextColumn = "text",
    id_column: IdColumn = None,
    date_column: DateColumn = "date",
    domain_column: DomainColumn = "domain",
    tokens_column: TokensColumn = None,
    workers: Workers = 1,
    limit: Limit = None,
    keep_dropped: KeepDropped = False,
    engine: EngineName = "local",
    shard: Part = None,
    join: Join = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
    debug: Debug = False,
) -> None:
    """Choose documents to train on, from files much larger than memory.

    OUT/data holds what is kept, with scores; OUT/manifest.json every count; OUT/report.html shows
    both sides. Stopped, the same command goes on where it was, a file at a time.
    """
    local = _engine(engine, shard, join)
    from ..core import registry
    from ..shards import job
    from ..shards.sets import Fields

    progress = Silent() if quiet or no_progress else _Lines()
    found = job.select(
        inputs, [registry.build(call) for call in method], out,
        fields=Fields(text_column, id_column, date_column, domain_column, tokens_column),
        engine=local, workers=workers, limit=limit, keep_dropped=keep_dropped, seed=seed,
        part=shard, progress=progress,
    )  # fmt: skip
    if found is None:
        screen.note(f"part {shard} is scored; finish with --join when all parts are", quiet)
        return
    from ..comparison.page.selection_page import selection_page
    from ..shards.statistics import statistics_of
    from ..shards.tables import whole

    with whole(out / "report.html") as draft:
        page = selection_page(found.manifest, statistics_of(found), found.examples)
        draft.write_text(page, encoding="utf-8")
    if as_json:
        screen.put_json(found.manifest)
    elif not quiet:
        _show(found)


def _engine(name: str, shard: str | None, join: bool) -> Any:
    if name not in ("local", "ray", "array"):
        raise ConfigError(f"--engine {name!r} is unknown", "use local, ray or array")
    if shard is not None and join:
        raise ConfigError(f"--shard {shard} and --join exclude each other", "give one of them")
    if name == "array" and shard is None and not join:
        raise ConfigError(
            "--engine array needs a part", "give --shard 0/4 to 3/4, and --join afterwards"
        )
    return "ray" if name == "ray" else "local"


def _show(found: Selection) -> None:
    out = screen.console()
    counts, tokens = found.manifest["counts"], found.manifest["tokens"]
    rows = [("read", counts["read"], tokens.get("read", 0)),
            ("kept", counts["kept"], tokens.get("kept", 0))]  # fmt: skip
    cells = [(name, f"{n:,}", f"{t:,}") for name, n, t in rows]
    cells += [(reason, f"{n:,}", "") for reason, n in counts["dropped"].items()]
    cells.append(("quarantined", f"{counts['quarantined']:,}", ""))
    out.print(screen.table("", ("", "documents", "tokens"), cells, right=("documents", "tokens")))
    out.print(f"{found.folder}/report.html", markup=False, highlight=False)


class _Lines(Silent):
    """A line at intervals: share done, rate, time left, and what became of the rows."""

    def __init__(self) -> None:
        self.phase("", 0, 0)

    def phase(self, name: str, total: int, size: int) -> None:
        """A phase over `total` shards of `size` bytes begins."""
        self.name, self.of, self.whole = name, total, size
        self.done = self.files = 0
        self.counts: Counter[str] = Counter()
        self.began = self.last = time.perf_counter()

    def shard(self, size: int, counts: Mapping[str, int]) -> None:
        """A shard of `size` bytes is done."""
        self.done += size
        self.files += 1
        self.counts.update(counts)
        now = time.perf_counter()
        pause = 0.5 if sys.stderr.isatty() else 5.0
        if now - self.last < pause and (self.files < self.of or now - self.began < 2.0):
            return
        self.last = now
        rate = self.done / max(now - self.began, 1e-9)
        told = ", ".join(f"{name} {n:,}" for name, n in self.counts.items() if n)
        screen.note(
            f"{self.name} {self.files}/{self.of} files | {screen.amount_bytes(rate)}/s | "
            f"{screen.duration((self.whole - self.done) / rate if rate else None)} left"
            f"{f' | {told}' if told else ''}"
        )

    def note(self, text: str) -> None:
        """Something the user should know."""
        screen.note(text)
