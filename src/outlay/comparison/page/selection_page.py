"""The page of a selection: counts, scores, and what was kept and dropped, side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

_MOST = 30  # rows of a table by domain or year
_STYLE = """
svg { max-width: 100%; height: auto; display: block; font: 12px/1.3 var(--sans); }
svg text { fill: var(--soft); } svg .all { fill: var(--rule); } svg .kept { fill: var(--accent); }
table { border-collapse: collapse; font: 0.875rem/1.45 var(--sans); width: 100%; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; white-space: normal; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
figure { margin: 0 0 40px; overflow-x: auto; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 32px; }
.sides article { border-bottom: 1px solid var(--rule); padding: 10px 0; overflow-wrap: anywhere; }
.sides small { color: var(--soft); display: block; }
"""


def selection_page(
    manifest: Mapping[str, Any],
    statistics: Mapping[str, Any],
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """One self-contained HTML file.

    Args:
        manifest: As in `manifest.json`.
        statistics: Two counts, of all and of kept documents, by score, domain, year and length.
        examples: Documents of the sides "kept" and "dropped".
    """
    css = (resources.files("outlay.comparison.page") / "assets" / "report.css").read_text("utf-8")
    counts, tokens = manifest["counts"], manifest["tokens"]
    title = f"{counts['kept']:,} of {counts['read']:,} documents kept"
    calls = "".join(f"<li><code>{_e(c)}</code></li>" for c in manifest["settings"]["methods"])
    fates = [("kept", counts["kept"]), *counts["dropped"].items()]
    fates.append(("quarantined", counts["quarantined"]))
    share = tokens.get("kept", 0) / max(1, tokens.get("read", 0))
    lengths = {f"{2**n:,} to {2 ** (n + 1) - 1:,}": c for n, c in statistics["lengths"].items()}
    parts = [
        (f'<header class="top"><p class="kicker">Selection</p><h1>{_e(title)}</h1>'
        f'<p class="verdict">{tokens.get("kept", 0):,} of {tokens.get("read", 0):,} tokens, '
        f"{share:.1%}, counted as {_e(manifest['settings']['tokens'])}.</p>"
        f'<ol class="remarks">{calls}</ol></header>'),
        _section("What became of the rows", _table(
            ("", "documents", "share"),
            [(name, f"{n:,}", f"{n / max(1, counts['read']):.1%}") for name, n in fates])),
        *(_section(column, _bars(column, *sides)) for column, sides in
          statistics["scores"].items()),
        _kept_by("Domain", statistics["domains"]), _kept_by("Year", statistics["years"]),
        _kept_by("Tokens", lengths),
        _section("Documents drawn at random", '<div class="sides">'
                 f"{_side('Kept', examples['kept'])}{_side('Dropped', examples['dropped'])}</div>"),
    ]  # fmt: skip
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{_e(title)}</title>'
        f"<style>{css}{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _bars(column: str, everything: Sequence[int], kept: Sequence[int]) -> str:
    """Documents by score; the kept part of each bar in the accent color."""
    wide, top, bottom, left = 640, 10, 200, 10
    step = wide / len(everything)
    most = max([1, *everything])
    drawn = []
    for place, (total, chosen) in enumerate(zip(everything, kept)):
        for kind, count in (("all", total), ("kept", chosen)):
            height = (bottom - top) * count / most
            drawn.append(
                f'<rect class="{kind}" x="{left + place * step:.1f}" y="{bottom - height:.1f}" '
                f'width="{step - 1:.1f}" height="{height:.1f}"/>'
            )
    drawn += [
        f'<text x="{left + wide * v:.0f}" y="{bottom + 18}" text-anchor="middle">{v}</text>'
        for v in (0.0, 0.5, 1.0)
    ]
    caption = f"Documents by {column}; the kept ones in color. The highest bar is {most:,}."
    return (
        f'<figure><svg viewBox="0 0 {wide + 20} {bottom + 26}" role="img" '
        f'aria-label="{_e(caption)}">{"".join(drawn)}</svg>'
        f"<figcaption>{_e(caption)}</figcaption></figure>"
    )


def _kept_by(title: str, tally: Mapping[str, Sequence[int]]) -> str:
    """Nothing where every document has the same value."""
    if len(tally) < 2:
        return ""
    largest = sorted(tally, key=lambda name: -tally[name][0])[:_MOST]
    rows = [
        (name, f"{tally[name][0]:,}", f"{tally[name][1]:,}",
         f"{tally[name][1] / max(1, tally[name][0]):.1%}")
        for name in tally if name in largest
    ]  # fmt: skip
    rest = len(tally) - len(rows)
    note = f"<p class='caption'>{rest:,} smaller ones are left out.</p>" if rest else ""
    return _section(f"Kept by {title.lower()}", _table((title, "documents", "kept", "share"), rows)
                    + note)  # fmt: skip


def _side(title: str, found: Sequence[Mapping[str, Any]]) -> str:
    shown = []
    for example in found:
        scores = [f"{name} {value:.3f}" for name, value in example["scores"].items()]
        facts = [example["reason"], *scores, example["domain"], example["date"],
                 f"{example['tokens']:,} tokens", example["id"]]  # fmt: skip
        facts = " · ".join(_e(fact) for fact in facts if fact)
        shown.append(f"<article>{_e(example['text'])}<small>{facts}</small></article>")
    return f"<div><h3>{title}</h3>{''.join(shown) or '<p>None.</p>'}</div>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        made = "".join(
            f'<{tag} class="{"number" if place else ""}">{_e(cell)}</{tag}>'
            for place, cell in enumerate(row)
        )
        return f"<tr>{made}</tr>"

    body = "".join(cells(row, "td") for row in rows)
    return f"<table><thead>{cells(columns, 'th')}</thead><tbody>{body}</tbody></table>"


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{_e(title)}</h2>{inner}</section>"


def _e(text: Any) -> str:
    return html.escape(str(text), quote=True)
