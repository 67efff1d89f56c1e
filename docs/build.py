"""Assemble the documentation: hand-written pages, and one page a method from its card.

A method's page is its card, its docstring and its settings, followed by `docs/methods/NAME.md`,
which is written by hand. A method without that file fails the build.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from outlay.core import registry
from outlay.core.card import Card
from outlay.replications import recorded

DOCS = Path(__file__).resolve().parent
TARGET = DOCS.parent / "site_source"
# Where the README's links stand in the site.
MOVED = {"docs/methods": "methods.md", "CHANGELOG.md": "changelog.md", "LICENSE": "license.md"}


def verdict(card: Card) -> str:
    """Verdict of the method's replication, or "untested"."""
    return str(recorded(card.paper)["status"])


def ledger_lines(card: Card) -> list[str]:
    """What the method's replication found, with the figures behind it; nothing if untested."""
    found = recorded(card.paper)
    if found["status"] == "untested":
        return []
    sentences = found.get("sentences") or [found.get("sentence", "")]
    lines = ["## Was the claim seen again?", f"**{sentences[0]}**", *sentences[1:]]
    rows = [
        f"| {task} | {claim['text']} | {claim['role']} | {claim.get('seeds', '')} | "
        f"{_figure(claim)} | {claim['verdict']} |"
        for task, facts in found.get("tasks", {}).items()
        for claim in facts["claims"]
    ]
    if rows:
        head = [
            "| task | claim | role | seeds | gain or ratio | verdict |",
            "|---|---|---|---|---|---|",
        ]
        lines.append("\n".join([*head, *rows]))
    if limits := found.get("limits"):
        lines.append("Not done: " + "; ".join(limits) + ".")
    facts = [found.get(key, "") for key in ("date", "hardware", "command")]
    if any(facts):
        lines.append(f"{facts[0]}, {facts[1]}, `{facts[2]}`.")
    return lines


def _figure(claim: dict[str, Any]) -> str:
    """Gain or ratio of a claim with its interval."""
    value, interval = claim.get("gain"), claim.get("interval")
    if value is None:
        value, interval = claim.get("ratio"), claim.get("ratio_interval")
    if value is None or interval is None:
        return str(claim.get("reason", ""))
    return f"{value:.3g} ({interval[0]:.3g} to {interval[1]:.3g})"


def setting_lines(cls: type) -> list[str]:
    """A table of settings: name, type, default, meaning (from the docstring)."""
    meanings = attribute_texts(inspect.getdoc(cls) or "")
    for base in cls.__mro__[1:]:
        meanings = attribute_texts(inspect.getdoc(base) or "") | meanings
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field in fields(cls):
        kind = str(field.type).replace("|", "\\|")
        default = "required" if field.default is MISSING else repr(field.default)
        lines.append(
            f"| `{field.name}` | `{kind}` | `{default}` | {meanings.get(field.name, '')} |"
        )
    return lines


def attribute_texts(docstring: str) -> dict[str, str]:
    """The `Attributes:` section of a Google docstring as name -> text."""
    _, _, section = docstring.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line.strip() and not line.startswith(" "):
            break
        if line.startswith("    ") and not line.startswith("     ") and ":" in line:
            name, _, text = line.strip().partition(":")
            found[name] = text.strip()
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def page(entry: registry.Entry) -> str:
    """The page of one method."""
    card, cls = entry.card, entry.load()
    summary = (inspect.getdoc(cls) or "").split("Attributes:")[0].strip()
    # Formulas are shown as they are written: the site loads nothing from elsewhere.
    summary = re.sub(r"\$([^$]+)\$", r"`\1`", summary)
    source = f"arXiv [{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else ""
    facts = [
        f"**{card.title}** {source}",
        (
            f"Acts at: {', '.join(entry.places) or 'outside the loop'}. "
            f"Claims: {', '.join(card.claims) or 'nothing'}. "
            f"Saves: {', '.join(card.saves) or 'nothing by itself'}. "
            f"Replication: **{verdict(card)}**."
        ),
    ]
    body = DOCS / "methods" / f"{card.name}.md"
    if not body.exists():
        sys.exit(f"docs/methods/{card.name}.md is missing: every method has a page")
    table = setting_lines(cls) if entry.kind == "method" else []
    parts = [
        f"# {card.name}",
        *facts,
        summary,
        *(["## Settings", "\n".join(table)] if table else []),
        *ledger_lines(card),
    ]
    return "\n\n".join([*parts, body.read_text()]) + "\n"


def home() -> str:
    """The README, its links as they are in the site."""

    def moved(match: re.Match[str]) -> str:
        return f"]({MOVED.get(match[1], match[1].removeprefix('docs/'))})"

    return re.sub(r"\]\(([^)#]+)\)", moved, (DOCS.parent / "README.md").read_text())


def main(target: Path = TARGET) -> None:
    """Write the folder that mkdocs reads."""
    shutil.rmtree(target, ignore_errors=True)
    (target / "methods").mkdir(parents=True)
    for path in DOCS.rglob("*"):
        inside = path.relative_to(DOCS)
        if path.is_file() and path.suffix in (".md", ".png") and inside.parts[0] != "methods":
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / inside)
    (target / "index.md").write_text(home())
    license_text = (DOCS.parent / "LICENSE").read_text()
    (target / "license.md").write_text(f"# Licence\n\n```text\n{license_text}```\n")
    shutil.copy(DOCS.parent / "CHANGELOG.md", target / "changelog.md")
    rows = ["# Methods", "", "| method | paper | acts at | replication |", "|---|---|---|---|"]
    for name, entry in sorted(registry.entries().items()):
        (target / "methods" / f"{name}.md").write_text(page(entry))
        places = ", ".join(entry.places) or "outside the loop"
        title = entry.card.title
        rows.append(f"| [{name}](methods/{name}.md) | {title} | {places} | {verdict(entry.card)} |")
    (target / "methods.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
