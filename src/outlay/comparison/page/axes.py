"""Axes and labels of the drawn figures: round ticks, scales, and labels that do not collide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..formats import MINUS

CHARACTER = 6.4
"""Mean width of a character of the figures' 12 px sans, in px; errs on the wide side."""


def clipped(text: str, width: float) -> str:
    """Text cut with an ellipsis so that it fits into `width` px."""
    room = max(3, int(width / CHARACTER))
    return text if len(text) <= room else text[: room - 1].rstrip() + "…"


def clipped_pair(first: str, second: str, width: float) -> str:
    """`first − second` in `width` px, cutting the longer name first so that both stay known."""
    room = int(width / CHARACTER) - 3
    if len(first) + len(second) > room:
        half = room // 2
        keep = max(half, room - min(len(first), len(second)))
        first, second = (clipped(name, keep * CHARACTER + 0.1) for name in (first, second))
    return f"{first} {MINUS} {second}"


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) + 0.0 for number in range(first, last + 1)]


def tick_text(value: float, ticks: Sequence[float], plus: bool = False) -> str:
    """A tick with as many decimals as the distance of the ticks needs."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{abs(value):.{decimals}f}"
    sign = MINUS if value < 0 else "+" if plus and value > 0 else ""
    return sign + text


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Powers of ten within [low, high]; 1, 2 and 5 times them if there are too few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [f * 10.0**e for e in exponents for f in factors]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= min(3, count):
            break
    return ticks[:: max(1, math.ceil(len(ticks) / count))]


@dataclass(frozen=True)
class Scale:
    """Maps values to px, linearly or by logarithm.

    Attributes:
        low: Value at `start`.
        high: Value at `stop`.
        start: px.
        stop: px; smaller than `start` for an axis that points upwards.
        logarithmic: True for a logarithmic axis, whose values must be > 0.
    """

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Position of a value in px."""
        turn: Callable[[float], float] = math.log10 if self.logarithmic else float
        share = (turn(value) - turn(self.low)) / (turn(self.high) - turn(self.low))
        return round(self.start + share * (self.stop - self.start), 2)


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """Smallest and largest value, widened on both sides by a share of their distance."""
    low, high = min(values), max(values)
    pad = (high - low) * share or abs(high) * share or 1.0
    return low - pad, high + pad


@dataclass(frozen=True)
class Box:
    """A rectangle in px."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area in square px."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True)
class Label:
    """Where a point's label goes: baseline start in px, and its box."""

    x: float
    y: float
    box: Box
    leader: bool


def place_labels(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    obstacles: Sequence[Box],
    frame: Box,
) -> list[Label]:
    """Put each label near its point where it covers least.

    Greedy: labels are placed one after the other; each takes, of 24 places on three rings
    around its point, the one that overlaps labels, obstacles and the outside of the frame
    least, nearer rings first. A label that does not touch its point gets a leader line.

    Args:
        points: Centers in px.
        texts: One for each.
        obstacles: What labels should not cover: markers, error bars.
        frame: Where labels may be.
    """
    labels: list[Label] = []
    for (x, y), text in zip(points, texts):
        width, height = len(text) * CHARACTER + 2, 14.0
        best: tuple[float, Label] | None = None
        for ring, reach in enumerate((11.0, 26.0, 44.0)):
            for dx, dy in ((1, 0), (-1, 0), (1, -1), (1, 1), (-1, -1), (-1, 1), (0, -1), (0, 1)):
                left = x + dx * reach - (width if dx < 0 else width / 2 if dx == 0 else 0)
                middle = y + dy * (reach if dx == 0 else reach * 0.8)
                box = Box(left, middle - height / 2, left + width, middle + height / 2)
                inside = box.overlap(frame)
                outside = width * height - inside
                cost = 4 * outside + 60 * ring
                cost += sum(3 * box.overlap(label.box) for label in labels)
                cost += sum(box.overlap(obstacle) for obstacle in obstacles)
                if best is None or cost < best[0] - 1e-9:
                    best = cost, Label(round(left, 1), round(middle + 4, 1), box, ring > 0)
        assert best is not None
        labels.append(best[1])
    return labels
