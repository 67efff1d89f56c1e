"""The matrix R[t, j] of tasks in sequence as a heat map."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..formats import significant
from .axes import clipped

_CELL, _LEFT, _TOP = 84, 150, 34  # pixels
# How a run names an entry of the matrix among its metrics.
ENTRY = re.compile(r"(?P<metric>[^/]+/\S+) after (?P<after>.+) on (?P<on>.+)")


def heat_map(
    caption: str,
    matrix: Sequence[Sequence[float | None]],
    tasks: Sequence[str],
    write: Callable[[float], str],
) -> str:
    """A figure: a row after each task, a column a task; None is left blank.

    Args:
        caption: What it shows.
        matrix: Shape (T, T). The deepest color is the largest value, or 1 if none is larger.
        tasks: Names in order.
        write: A value as text.
    """
    full = max([1.0, *(value for row in matrix for value in row if value is not None)])
    soft = 'style="fill: var(--soft)"'
    drawn = [
        f'<text x="{_LEFT + _CELL * (j + 0.5)}" y="{_TOP - 10}" text-anchor="middle" {soft}>'
        f"{_escaped(clipped(task, _CELL - 6))}</text>"
        for j, task in enumerate(tasks)
    ]
    for t, row in enumerate(matrix):
        middle = _TOP + 30 * t + 19
        label = _escaped(clipped(f"after {tasks[t]}", _LEFT - 12))
        drawn.append(f'<text x="{_LEFT - 10}" y="{middle}" text-anchor="end" {soft}>{label}</text>')
        for j, value in enumerate(row):
            if value is None:
                continue
            where = (
                f'x="{_LEFT + _CELL * j + 1}" y="{_TOP + 30 * t + 1}" width="{_CELL - 2}" '
                'height="28"'
            )
            depth = max(0.04, value / full)
            ink = "var(--paper)" if depth > 0.55 else "var(--ink)"
            drawn.append(
                f'<rect {where} style="fill: var(--accent)" fill-opacity="{depth:.3f}"/>'
                f'<text x="{_LEFT + _CELL * (j + 0.5)}" y="{middle}" text-anchor="middle" '
                f'style="fill: {ink}">{_escaped(write(value))}</text>'
            )
    width, height = _LEFT + _CELL * len(tasks) + 8, _TOP + 30 * len(tasks) + 6
    size = f'viewBox="0 0 {width} {height}" style="width: {width}px; max-width: 100%"'
    return (
        f'<figure><svg {size} role="img" aria-label="{_escaped(caption)}">{"".join(drawn)}</svg>'
        f"<figcaption>{_escaped(caption)}</figcaption></figure>"
    )


def matrices_of(whole: Mapping[str, Any]) -> list[str]:
    """A figure for each arm whose runs learned tasks in sequence: means over its runs.

    The matrix shown is that of the split that the report judges.
    """
    wanted = f"{whole['metric'].partition('/')[0]}/"
    figures = []
    for arm in whole["arms"]:
        values: dict[tuple[str, str], list[float]] = {}
        metric, tasks, runs = "", [], 0
        for run in whole["runs"]:
            entries = [
                (match, value)
                for key, value in run["metrics"].items()
                if key.startswith(wanted) and value is not None and (match := ENTRY.fullmatch(key))
            ]
            if run["arm"] != arm["name"] or not entries:
                continue
            runs += 1
            for match, value in entries:
                metric = match["metric"]
                tasks += [match["after"]] if match["after"] not in tasks else []
                values.setdefault((match["after"], match["on"]), []).append(value)
        if not values:
            continue
        matrix = [[_mean(values.get((after, on))) for on in tasks] for after in tasks]
        over = f", mean of {runs} runs" if runs > 1 else ""
        caption = f"{arm['name']}: {metric} on each task (columns) after each task (rows){over}."
        figures.append(heat_map(caption, matrix, tasks, significant))
    return figures


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _escaped(text: Any) -> str:
    return html.escape(str(text), quote=True)
