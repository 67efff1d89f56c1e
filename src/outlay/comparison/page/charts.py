"""Figures as numbers in px, which the page's templates turn into SVG.

Each figure is made twice, wide and narrow, so that its text stays readable on a phone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..formats import MINUS, between, signed, significant
from .axes import (
    CHARACTER,
    Box,
    Scale,
    clipped,
    clipped_pair,
    linear_ticks,
    log_ticks,
    padded,
    place_labels,
    tick_text,
)
from .meters import MeterText

WIDE, NARROW = 920, 340
MOST_ROWS = 120


def forest(
    pairs: Sequence[Mapping[str, Any]], margin: float | None, higher: bool, width: int
) -> dict[str, Any]:
    """Forest plot: paired differences with simultaneous intervals, largest first.

    Args:
        pairs: As from `judge`; those without a difference are left to the table.
        margin: Drawn as a band around zero.
        higher: Whether higher is better.
        width: px.
    """
    shown = [pair for pair in pairs if pair.get("difference") is not None]
    shown = sorted(shown, key=lambda pair: -pair["difference"])[:MOST_ROWS]
    narrow = width < 600
    names = [f"{pair['a']} {MINUS} {pair['b']}" for pair in shown]
    longest = max((len(name) for name in names), default=0)
    left = 12.0 if narrow else min(300.0, longest * CHARACTER + 20)
    texts = [_difference_text(pair) for pair in shown]
    written = max((len(text) for text in texts), default=0)
    right = width - (12.0 if narrow else written * CHARACTER + 14)
    row, top = (40.0, 30.0) if narrow else (26.0, 30.0)
    low, high = _difference_range(shown, margin)
    scale = Scale(low, high, left, right)
    rows = []
    for number, (pair, name, text) in enumerate(zip(shown, names, texts)):
        middle = top + row * (number + 0.5) + (8 if narrow else 0)
        interval = pair.get("interval")
        ends = None
        if interval:
            inside = [min(max(end, low), high) for end in interval]
            ends = {
                "x1": scale(inside[0]), "x2": scale(inside[1]),
                "more_left": interval[0] < low, "more_right": interval[1] > high,
            }  # fmt: skip
        rows.append(
            {
                "y": round(middle, 1),
                "label_y": round(middle - 15, 1) if narrow else round(middle + 4, 1),
                "label": clipped_pair(
                    pair["a"], pair["b"], right - left - 70 if narrow else left - 16
                ),
                "x": scale(min(max(pair["difference"], low), high)),
                "ends": ends,
                "outcome": pair.get("outcome", ""),
                "text": signed(pair["difference"]) if narrow else text,
                "title": pair.get("sentence") or f"{name}: {text}",
            }
        )
    bottom = top + row * len(rows) + 8
    ticks = linear_ticks(low, high, 4 if narrow else 7)
    return {
        "width": width, "height": round(bottom + 46), "left": left, "right": right, "top": top,
        "bottom": bottom, "rows": rows, "zero": scale(0.0), "narrow": narrow,
        "band": [scale(max(low, -margin)), scale(min(high, margin))] if margin else None,
        "ticks": [{"x": scale(t), "text": tick_text(t, ticks, plus=True)} for t in ticks],
        "left_better": "second better" if higher else "first better",
        "right_better": "first better" if higher else "second better",
        "dropped": max(0, sum(p.get("difference") is not None for p in pairs) - MOST_ROWS),
    }  # fmt: skip


def _difference_text(pair: Mapping[str, Any]) -> str:
    interval = pair.get("interval")
    ends = f" [{signed(interval[0])}, {signed(interval[1])}]" if interval else ""
    return signed(pair["difference"]) + ends


def _difference_range(
    pairs: Sequence[Mapping[str, Any]], margin: float | None
) -> tuple[float, float]:
    """Axis that holds all differences, and all intervals but absurdly wide ones."""
    differences = [pair["difference"] for pair in pairs] + [0.0]
    intervals = [pair["interval"] for pair in pairs if pair.get("interval")]
    ends = list(differences)
    if intervals:
        half = statistics.median((high - low) / 2 for low, high in intervals)
        floor, ceiling = min(differences) - 4 * half, max(differences) + 4 * half
        ends += [max(low, floor) for low, _ in intervals]
        ends += [min(high, ceiling) for _, high in intervals]
    if margin:
        ends += [-margin, margin]
    return padded(ends, 0.04)


def pareto(
    arms: Sequence[Mapping[str, Any]],
    amounts: Mapping[str, float],
    meter: MeterText,
    higher: bool,
    width: int,
) -> dict[str, Any] | None:
    """Quality against one meter, with the arms that no other arm dominates joined by a line.

    Args:
        arms: As from `judge`, with `number` (for color and marker).
        amounts: Arm to its amount of the meter.
        meter: Its text.
        higher: Whether a higher metric is better.
        width: px.

    Returns:
        None if no arm has both a mean and an amount.
    """
    shown = [a for a in arms if a["name"] in amounts and a.get("mean") is not None]
    if not shown:
        return None
    narrow = width < 600
    frame = Box(50.0, 16.0, width - 14.0, (340.0 if narrow else 400.0))
    xs = [float(amounts[arm["name"]]) for arm in shown]
    x_scale, ticks, zero = _amount_axis(xs, meter, frame, narrow)
    ends = [end for arm in shown for end in arm.get("interval") or [arm["mean"]]]
    y_low, y_high = padded([*ends, *(arm["mean"] for arm in shown)], 0.08)
    y_scale = Scale(y_low, y_high, frame.bottom, frame.top)
    y_ticks = linear_ticks(y_low, y_high, 5)
    centers = [
        (zero if zero is not None and x <= 0 else x_scale(x), y_scale(arm["mean"]))
        for x, arm in zip(xs, shown)
    ]
    bars = [[y_scale(end) for end in arm["interval"]] if arm.get("interval") else None
            for arm in shown]  # fmt: skip
    obstacles = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in centers]
    obstacles += [Box(x - 4, b[1], x + 4, b[0]) for (x, _), b in zip(centers, bars) if b]
    front = _front(centers, higher, frame)
    obstacles += [
        Box(min(a, c) - 2, min(b, d) - 2, max(a, c) + 2, max(b, d) + 2)
        for (a, b), (c, d) in pairwise(front)
    ]
    texts = [clipped(arm["name"], 130 if narrow else 220) for arm in shown]
    points = []
    for arm, amount, (x, y), bar, text, label in zip(
        shown, xs, centers, bars, texts, place_labels(centers, texts, obstacles, frame)
    ):
        points.append(
            {
                "number": arm["number"], "x": x, "y": y, "bar": bar, "label": text,
                "label_x": label.x, "label_y": label.y,
                "leader": _leader(x, y, label.box) if label.leader else None,
                "title": f"{arm['name']}: {significant(arm['mean'])}"
                f"{' (' + between(arm['interval']) + ')' if arm.get('interval') else ''}"
                f" at {meter.write(amount)}",
            }
        )  # fmt: skip
    return {
        "width": width, "height": round(frame.bottom + 50), "frame": frame, "points": points,
        "ticks": ticks, "x_label": meter.label + (", logarithmic" if x_scale.logarithmic else ""),
        "y_ticks": [{"y": y_scale(t), "text": tick_text(t, y_ticks)} for t in y_ticks],
        "front": " ".join(f"{x},{y}" for x, y in front), "higher": higher,
        "absent": [arm["name"] for arm in arms if arm["name"] not in amounts],
    }  # fmt: skip


def _amount_axis(
    xs: Sequence[float], meter: MeterText, frame: Box, narrow: bool
) -> tuple[Scale, list[dict[str, Any]], float | None]:
    """Logarithmic if amounts differ by more than 8 times; then zeros get a place of their own."""
    positive = [x for x in xs if x > 0]
    count = 4 if narrow else 6
    if positive and max(positive) > 8 * min(positive):
        zero = frame.left + 22 if len(positive) < len(xs) else None
        decades = math.log10(max(positive) / min(positive))
        pad = 10 ** (0.07 * decades)
        start = frame.left + (54 if zero else 0)
        low, high = min(positive) / pad, max(positive) * pad
        scale = Scale(low, high, start, frame.right, logarithmic=True)
        ticks = [{"x": scale(t), "text": _short(meter, t)} for t in log_ticks(low, high, count)]
        if zero is not None:
            ticks.insert(0, {"x": zero, "text": "0"})
        return scale, ticks, zero
    low, high = padded(xs, 0.1)
    low = 0.0 if min(xs) >= 0 > low else low
    scale = Scale(low, high, frame.left, frame.right)
    return (
        scale,
        [{"x": scale(t), "text": _short(meter, t)} for t in linear_ticks(low, high, count)],
        None,
    )


def _short(meter: MeterText, value: float) -> str:
    """A tick in the meter's unit, without the zeros that carry nothing: 1.00 M is 1 M."""
    number, _, unit = meter.write(value).partition(" ")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return f"{number} {unit}".strip()


def _front(
    centers: Sequence[tuple[float, float]], higher: bool, frame: Box
) -> list[tuple[float, float]]:
    """Corners of the staircase along arms that none beats at equal or lower cost."""
    corners: list[tuple[float, float]] = []
    best = None
    for x, y in sorted(centers, key=lambda c: (c[0], c[1] if higher else -c[1])):
        if best is None or (y < best if higher else y > best):
            if best is not None:
                corners.append((x, best))
            corners.append((x, y))
            best = y
    return [*corners, (frame.right, best)] if best is not None else []


def _leader(x: float, y: float, box: Box) -> dict[str, float]:
    """Line from a point's marker to the nearest side of its label."""
    to_x = min(max(x, box.left), box.right)
    to_y = min(max(y, box.top + 2), box.bottom - 2)
    length = math.hypot(to_x - x, to_y - y) or 1.0
    start = 8 / length
    return {
        "x1": round(x + (to_x - x) * start, 1), "y1": round(y + (to_y - y) * start, 1),
        "x2": round(to_x, 1), "y2": round(to_y, 1),
    }  # fmt: skip


def lines(drawn: Mapping[str, Any], width: int) -> dict[str, Any] | None:
    """Mean lines of the first curve over steps: what a reader without JavaScript sees."""
    if not drawn["names"] or "step" not in drawn["meters"]:
        return None
    name = drawn["names"][0]
    series = [entry for entry in drawn["means"][name] if "step" in entry]
    if not series:
        return None
    frame = Box(56.0, 14.0, width - 14.0, 340.0)
    xs = [x for entry in series for x in entry["step"]]
    low, high = padded([y for entry in series for y in entry["mean"]])
    x_scale = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, 56.0, width - 14.0)
    y_scale = Scale(low, high, frame.bottom, frame.top)
    x_ticks, y_ticks = linear_ticks(x_scale.low, x_scale.high, 6), linear_ticks(low, high, 5)
    return {
        "name": name, "width": width, "height": 390, "frame": frame,
        "lines": [
            {
                "number": entry["arm"],
                "points": " ".join(
                    f"{x_scale(x)},{y_scale(y)}" for x, y in zip(entry["step"], entry["mean"])
                ),
            }
            for entry in series
        ],
        "ticks": [{"x": x_scale(t), "text": tick_text(t, x_ticks)} for t in x_ticks],
        "y_ticks": [{"y": y_scale(t), "text": tick_text(t, y_ticks)} for t in y_ticks],
    }  # fmt: skip
