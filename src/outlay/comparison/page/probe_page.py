"""The page of a probe: audit, heads, accuracy after each task, the matrix as a heat map."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from .heat_map import heat_map

_WIDE = 920
_MARKS = ("circle", "square", "diamond", "triangle", "cross")
_STYLE = """
svg { max-width: 100%; height: auto; display: block; font: 12px/1.3 var(--sans); }
svg text { fill: var(--soft); } svg .value { fill: var(--ink); }
svg .grid { stroke: var(--rule); stroke-width: 1; } svg .mark { fill: var(--c); }
svg .line { stroke: var(--c); fill: none; stroke-width: 2; }
table { border-collapse: collapse; font: 0.875rem/1.45 var(--sans); width: 100%; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--rule); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 0 0 40px; overflow-x: auto; }
.finding-warning { color: var(--warn); font-weight: 600; }
"""


def probe_page(found: Mapping[str, Any]) -> str:
    """One self-contained HTML file.

    Args:
        found: As from `probe`.
    """
    css = (resources.files("outlay.comparison.page") / "assets" / "report.css").read_text("utf-8")
    title = f"What {_last(found['model'])} is worth on {_data_name(found)}"
    parts = [
        (f'<header class="top"><p class="kicker">Probe of a frozen model</p><h1>{_e(title)}</h1>'
        f'<p class="verdict">{_e(sentence(found))}</p>{_facts(found)}'
        f'<ul class="remarks"><li>{_e(found["caution"])}</li></ul></header>'),
        _section("What the model is given", _table(("check", "", "found"), [
            (f["check"], f["status"], f["text"]) for f in found["audit"]
        ], status=1)),
        _section("Heads", _head_figure(found["heads"]) + _table(
            ("head", "inputs", "test accuracy", "95 % interval", "seconds", "bytes"),
            [(h["head"], h["inputs"], _percent(h["accuracy"]),
              f"{_percent(h['interval'][0])} to {_percent(h['interval'][1])}",
              f"{h['seconds']:.3f}", f"{h['bytes']:,}") for h in found["heads"]], numbers=(2, 4, 5),
        )),
    ]  # fmt: skip
    for protocol in dict.fromkeys(stream["protocol"] for stream in found["streams"]):
        streams = [s for s in found["streams"] if s["protocol"] == protocol]
        parts.append(_section(f"Tasks in sequence: {protocol}", _protocol(streams, found)))
    body = "\n".join(parts)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{_e(title)}</title>'
        f"<style>{css}{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def sentence(found: Mapping[str, Any]) -> str:
    """What the probe says, in one or two sentences."""
    best = max((h for h in found["heads"] if h["inputs"] == "model"), key=lambda h: h["accuracy"])
    raw = max((h for h in found["heads"] if h["inputs"] == "raw"), key=lambda h: h["accuracy"])
    twins = [h for h in found["heads"] if h["inputs"] == "random weights"]
    text = (
        f"On the model's features {best['head']} reaches {_percent(best['accuracy'])} of "
        f"{found['rows']['test']:,} test rows; on raw inputs the best head, {raw['head']}, "
        f"reaches {_percent(raw['accuracy'])}."
    )
    if best["interval"][0] <= raw["accuracy"]:
        text += " These rows do not show that the features are better than raw inputs."
    if twins:
        twin = max(twins, key=lambda h: h["accuracy"])
        text += (
            f" With random weights the same network reaches {_percent(twin['accuracy'])} "
            f"({twin['head']})."
        )
    warnings = sum(f["status"] == "warning" for f in found["audit"])
    if warnings:
        text += f" The audit of the inputs has {warnings} warning{'s' if warnings > 1 else ''}."
    return text


def probe_markdown(found: Mapping[str, Any]) -> str:
    """The same as Markdown tables."""
    lines = [f"# Probe of {_last(found['model'])} on {_data_name(found)}", "", sentence(found), ""]
    lines += ["| check | | found |", "|---|---|---|"]
    lines += [f"| {f['check']} | {f['status']} | {f['text']} |" for f in found["audit"]]
    lines += ["", "| head | inputs | test accuracy | 95 % interval |", "|---|---|---|---|"]
    for head in found["heads"]:
        low, high = map(_percent, head["interval"])
        accuracy = _percent(head["accuracy"])
        lines.append(f"| {head['head']} | {head['inputs']} | {accuracy} | {low} to {high} |")
    for protocol in dict.fromkeys(stream["protocol"] for stream in found["streams"]):
        streams = [s for s in found["streams"] if s["protocol"] == protocol]
        names = list(found["formulas"])
        lines += ["", f"{protocol}, mean of {len(streams)} orders", ""]
        lines += [f"| learner | {' | '.join(n.replace('_', ' ') for n in names)} |"]
        lines += ["|---" * (len(names) + 1) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in metric_rows(streams, names)]
    lines += ["", found["caution"], ""]
    return "\n".join(lines)


def metric_rows(
    streams: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[tuple[str, ...]]:
    """Each learner's metrics, as means over orders with the range."""
    rows = []
    for learner in streams[0]["learners"]:
        cells = [learner]
        for name in names:
            values = [s["learners"][learner]["metrics"][name] for s in streams]
            if None in values:
                cells.append("-")
                continue
            text = _percent(statistics.fmean(values))
            low, high = (f"{100 * value:.1f}" for value in (min(values), max(values)))
            if low != high:
                text += f" ({low} to {high})"
            cells.append(text)
        rows.append(tuple(cells))
    return rows


def _protocol(streams: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> str:
    names = list(found["formulas"])
    definitions = "; ".join(f"{n.replace('_', ' ')}: {t}" for n, t in found["formulas"].items())
    table = _table(
        ("learner", *(n.replace("_", " ") for n in names)), metric_rows(streams, names),
        numbers=tuple(range(1, len(names) + 1)),
    )  # fmt: skip
    maps = "".join(
        heat_map(
            f"{name}, first order: accuracy on each task (columns) after each task (rows).",
            result["matrix"],
            streams[0]["tasks"],
            _percent,
        )
        for name, result in streams[0]["learners"].items()
    )
    return (
        f"{_curves(streams)}{table}<p class='caption'>Means of {len(streams)} orders, and their "
        f"range. {_e(definitions)}.</p>{maps}"
    )


def _curves(streams: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy after each task on the tasks so far: mean over orders."""
    count = len(streams[0]["tasks"])
    left, right, top, bottom = 48, 640, 16, 280
    x = [left + (right - left) * t / max(1, count - 1) for t in range(count)]

    def y(value: float) -> float:
        return bottom - (bottom - top) * value

    drawn = [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{height}" y2="{height}"/>'
        f'<text x="{left - 8}" y="{height + 4}" text-anchor="end">{share:.0%}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
        for height in (y(share),)
    ]
    drawn += [f'<text x="{v:.1f}" y="{bottom + 20}" text-anchor="middle">{t + 1}</text>'
              for t, v in enumerate(x)]  # fmt: skip
    drawn.append(f'<text x="{(left + right) / 2}" y="{bottom + 40}" text-anchor="middle">'
                 "tasks learned</text>")  # fmt: skip
    for number, name in enumerate(streams[0]["learners"]):
        curves = [s["learners"][name]["after_each_task"] for s in streams]
        means = [statistics.fmean(c[t] for c in curves) for t in range(count)]
        points = " ".join(f"{a:.1f},{y(b):.1f}" for a, b in zip(x, means))
        marks = "".join(_mark(number, a, y(b)) for a, b in zip(x, means))
        height = top + 22 * number + 8
        legend = _mark(number, right + 24, height - 4)
        drawn.append(
            f'<g class="c{number}"><polyline class="line" points="{points}"/>{marks}{legend}'
            f'<text class="value" x="{right + 38}" y="{height}">{_e(name)}</text></g>'
        )
    return _figure(f'viewBox="0 0 {_WIDE} {bottom + 50}"', "".join(drawn),
                   "Accuracy after each task on the held-out rows of all tasks so far; mean over "
                   f"{len(streams)} orders.")  # fmt: skip


def _mark(number: int, x: float, y: float) -> str:
    """A point whose shape tells the learner without color."""
    shape = _MARKS[number % len(_MARKS)]
    if shape == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -5), (5, 0), (0, 5), (-5, 0)),
        "triangle": ((0, -5), (5, 4), (-5, 4)),
        "cross": ((-5, -1.5), (5, -1.5), (5, 1.5), (-5, 1.5)),
    }[shape]
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    return f'<polygon class="mark" points="{points}"/>'


def _head_figure(heads: Sequence[Mapping[str, Any]]) -> str:
    """Test accuracy of heads with intervals."""
    left, right, row = 260, 840, 28

    def x(value: float) -> float:
        return left + (right - left) * value

    bottom = 10 + row * len(heads)
    drawn = [f'<line class="grid" x1="{x(v)}" x2="{x(v)}" y1="6" y2="{bottom}"/>'
             f'<text x="{x(v)}" y="{bottom + 18}" text-anchor="middle">{v:.0%}</text>'
             for v in (0, 0.25, 0.5, 0.75, 1)]  # fmt: skip
    for number, head in enumerate(heads):
        middle = 10 + row * (number + 0.5)
        low, high = head["interval"]
        kind = ("model", "raw", "random weights").index(head["inputs"])
        label = head["head"] + ("", ", raw inputs", ", random weights")[kind]
        drawn.append(
            f'<g class="c{kind}"><text class="value" x="{left - 12}" y="{middle + 4}" '
            f'text-anchor="end">{_e(label)}</text><line class="line" x1="{x(low):.1f}" '
            f'x2="{x(high):.1f}" y1="{middle}" y2="{middle}"/>'
            f"{_mark(kind, x(head['accuracy']), middle)}</g>"
        )
    caption = (
        "Test accuracy with 95 % intervals over rows; squares are raw inputs, diamonds random "
        "weights."
    )
    return _figure(f'viewBox="0 0 {_WIDE} {bottom + 28}"', "".join(drawn), caption)


def _figure(attributes: str, drawn: str, caption: str) -> str:
    return (
        f'<figure><svg {attributes} role="img" aria-label="{_e(caption)}">{drawn}</svg>'
        f"<figcaption>{_e(caption)}</figcaption></figure>"
    )


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (),
    status: int | None = None,
) -> str:  # fmt: skip
    def cells(row: Sequence[str], tag: str) -> str:
        made = []
        for place, cell in enumerate(row):
            kind = "number" if place in numbers else ""
            if place == status and tag == "td":
                kind = f"finding-{cell}"
            made.append(f'<{tag} class="{kind}">{_e(cell)}</{tag}>')
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(cells(row, "td") for row in rows)
    return f"<table><thead>{cells(columns, 'th')}</thead><tbody>{body}</tbody></table>"


def _facts(found: Mapping[str, Any]) -> str:
    features = found["features"]
    facts = {
        "Model": found["model"],
        "Data": _data_name(found),
        "Classes": str(len(found["classes"])),
        "Rows": ", ".join(f"{n:,} {split}" for split, n in found["rows"].items()),
        "Features": f"{features['width']}, layer {found['settings']['layer']}, "
        + ("from the cache" if features["cached"] else f"computed in {features['seconds']:.1f} s"),
    }
    inner = "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{inner}</dl>'


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{_e(title)}</h2>{inner}</section>"


def _data_name(found: Mapping[str, Any]) -> str:
    return _last(found["data"].get("train", "data").removeprefix("asset ").partition(" (")[0])


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _e(text: Any) -> str:
    return html.escape(str(text), quote=True)
