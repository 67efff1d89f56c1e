"""`list`, `show` and `cite`: what there is, read from cards without importing a method."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..core.errors import ConfigError, nearest
from . import screen
from .options import AsJson, Debug, Quiet

if TYPE_CHECKING:
    from ..core.registry import Entry
    from .settings import Described

Name = Annotated[str, typer.Argument(metavar="NAME", help="A method, as `outlay list` shows it.")]
Group = Annotated[
    Optional[str],  # noqa: UP045 - evaluated by Typer
    typer.Option(help="Only one group, as adapters."),
]


def verdict(paper: int | None) -> dict[str, Any]:
    """What the replication of a paper found; status "untested" if there is none."""
    from ..replications import recorded

    return recorded(paper)


def row(entry: Entry) -> dict[str, Any]:
    """One line of `outlay list --json`."""
    card, seen = entry.card, verdict(entry.card.paper)
    return {
        "name": card.name, "paper": card.paper, "title": card.title, "arxiv": card.arxiv or None,
        "group": card.group, "places": list(entry.places), "claims": sorted(card.claims),
        "saves": sorted(card.saves), "status": seen["status"],
        "sentence": seen.get("sentence"), "date": seen.get("date"),
        "summary": card.summary, "kind": entry.kind,
    }  # fmt: skip


def list_methods(
    group: Group = None, as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """List every method, where it acts, what it saves, and whether its claim was seen again."""
    from ..core import registry

    rows = [row(entry) for entry in registry.entries().values()]
    groups = sorted({r["group"] for r in rows}, key=lambda g: (g == "baselines", g))
    if group is not None:
        wanted = group.replace("-", "_")
        if wanted not in groups:
            raise ConfigError(
                f"there is no group {group!r}",
                f"{nearest(wanted, groups)}groups are {', '.join(groups)}",
            )
        groups = [wanted]
    rows = sorted(
        (r for r in rows if r["group"] in groups),
        key=lambda r: (groups.index(r["group"]), r["name"]),
    )
    if as_json:
        screen.put_json(rows)
        return
    lines: list[tuple[Any, ...]] = []
    for name in groups:
        members = [r for r in rows if r["group"] == name]
        lines += [(f"{name}:", "", "", "", "")] + [
            (f"  {r['name']}", r["summary"] or r["title"], _places(r["places"]), r["arxiv"],
             " ".join(filter(None, (r["status"], r["date"]))))
            for r in members
        ]  # fmt: skip
    columns = ("method", "what it does", "acts on", "arXiv", "status")
    screen.console().print(screen.table("", columns, lines))
    for r in rows:
        if r["sentence"]:
            screen.console().print(f"{r['name']}: {r['sentence']}", markup=False)
    screen.note("`outlay show NAME` explains one; `outlay cite NAME` gives its BibTeX.", quiet)


def _places(places: Iterable[str]) -> str:
    return ", ".join(place.removeprefix("On").lower() for place in places)


def show(
    name: Name, as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False
) -> None:  # fmt: skip
    """Explain one method: its paper, where it acts, its settings, and what was measured."""
    from ..core import registry
    from ..core.claims import WORDS
    from .settings import described

    entry = registry.find(name)
    about, seen = described(entry), verdict(entry.card.paper)
    whole = {
        **row(entry),
        "description": about.summary,
        "settings": [
            {"name": s.name, "type": s.type, "default": s.default, "allowed": s.allowed,
             "text": s.text}
            for s in about.settings
        ],
        "example": example(entry, about),
        "verdict": seen,
    }  # fmt: skip
    if as_json:
        screen.put_json(whole)
        return
    card, out = entry.card, screen.console()
    out.print(
        screen.facts(
            [
                ("name", card.name),
                (
                    "paper" if card.arxiv else "what it is",
                    f"{card.title}{f' ({card.year})' if card.year else ''}",
                ),
                ("authors", card.authors),
                ("arXiv", card.arxiv and f"{card.arxiv}  https://arxiv.org/abs/{card.arxiv}"),
                ("group", card.group),
                ("acts on", _places(entry.places)),
                ("claims", "; ".join(f"{word} ({WORDS[word]})" for word in whole["claims"])),
                ("saves", ", ".join(card.saves)),
                ("splitting", card.scope == "micro" and "a step's micro-batches change the result"),
                ("status", _status(seen)),
                ("example", whole["example"]),
            ]
        )
    )
    out.print()
    out.print(about.summary, markup=False)
    if about.settings:
        out.print(
            screen.table(
                "Settings",
                ("name", "type", "default", "allowed", "meaning"),
                [
                    (s.name, s.type, s.default or "required", s.allowed, s.text)
                    for s in about.settings
                ],
            )
        )
    sentences = seen.get("sentences") or ([seen["sentence"]] if seen.get("sentence") else [])
    for sentence in sentences:
        out.print(str(sentence), markup=False)


def _status(seen: dict[str, Any]) -> str:
    """The verdict, and at which size and when it was found."""
    when = ", ".join(str(seen[key]) for key in ("size", "date") if seen.get(key))
    return f"{seen['status']} ({when})" if when else str(seen["status"])


def example(entry: Entry, about: Described) -> str:
    """A call string that works: the docstring's own, else one with the first plain setting."""
    name, settings = entry.card.name, about.settings
    if entry.kind == "estimator":
        return f'--arm "{name}"'
    if own := re.search(rf"`({name}\([^`]+\))`", about.summary):
        return f'--method "{own[1]}"'
    numbers = [s for s in settings if s.default and s.default.replace(".", "", 1).isdigit()]
    others = [s for s in settings if s.default and s.default[0] in "'\"0123456789"]
    picked = numbers[:1] or others[:1]
    parts = [f"{s.name}={s.default}" for s in picked]
    return f'--method "{name}({", ".join(parts)})"' if parts else f'--method "{name}"'


def cite(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Methods, as `outlay list` shows them.")
    ],
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Give BibTeX for the papers behind methods."""
    from ..core import registry

    entries = [registry.find(name) for name in names]
    cited = {e.card.name: bibtex(e) for e in entries if e.card.arxiv}
    if as_json:
        screen.put_json({e.card.name: cited.get(e.card.name) for e in entries})
        return
    for entry in entries:
        if entry.card.name not in cited:
            screen.note(f"{entry.card.name} has no paper of its own: {entry.card.title}", quiet)
    text = "\n\n".join(dict.fromkeys(cited.values()))
    if text:
        typer.echo(text)


def bibtex(entry: Entry) -> str:
    """One BibTeX entry."""
    card = entry.card
    first = card.authors.split(",")[0].split(" and ")[0].split() or ["anonymous"]
    key = f"{first[-1].lower()}{card.year or ''}{card.name.replace('_', '')}"
    year = card.year or f"20{card.arxiv[:2]}"
    authors = " and ".join(
        part.strip() for chunk in card.authors.split(",") for part in chunk.split(" and ")
        if part.strip()
    )  # fmt: skip
    fields = {
        "title": f"{{{card.title}}}", "author": authors, "year": str(year),
        "eprint": card.arxiv, "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{card.arxiv}",
    }  # fmt: skip
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@misc{{{key},\n{body}\n}}"
