"""Numbers as people read them: three significant digits, units, SI prefixes."""

from __future__ import annotations

import math

MISSING = "–"
MINUS = "−"
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def significant(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits, in plain notation where it is short.

    A missing or non-finite number is a dash, a negative one has a true minus sign.

    Args:
        value: The number.
        digits: Significant digits kept; trailing zeros count.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    # Rounding first decides the exponent: 0.9996 becomes 1.00, not 0.9996 or 1.000.
    mantissa, exponent_text = f"{abs(value):.{digits - 1}e}".split("e")
    exponent = int(exponent_text)
    sign = MINUS if value < 0 else ""
    if -5 < exponent < digits + 3:
        return f"{sign}{float(f'{mantissa}e{exponent}'):.{max(0, digits - 1 - exponent)}f}"
    return f"{sign}{mantissa}e{exponent}"


def signed(value: float | None, digits: int = 3) -> str:
    """As `significant`, with a plus sign before a positive number."""
    text = significant(value, digits)
    return f"+{text}" if value is not None and math.isfinite(value) and value > 0 else text


def between(interval: list[float] | tuple[float, float] | None, plus: bool = False) -> str:
    """An interval as "low to high", or a dash."""
    if interval is None:
        return MISSING
    write = signed if plus else significant
    return f"{write(interval[0])} to {write(interval[1])}"


def probability(value: float | None) -> str:
    """A p-value with two significant digits, "< 0.0001" below that."""
    if value is None or not math.isfinite(value):
        return MISSING
    return "< 0.0001" if value < 1e-4 else significant(value, 2)


def prefixed(value: float | None, unit: str = "") -> str:
    """Three significant digits with an SI prefix: 12345 is "12.3 k", 1.5e9 bytes "1.50 GB"."""
    if value is None or not math.isfinite(value):
        return MISSING
    # Compare after rounding, so that 999,950 is 1.00 M and not 1000 k.
    rounded = float(f"{value:.2e}")
    if float(value).is_integer() and abs(value) < 1000:
        return f"{int(value)} {unit}".strip()
    for scale, prefix in _PREFIXES:
        if abs(rounded) >= scale:
            return f"{significant(value / scale)} {prefix}{unit}".strip()
    return f"{significant(value)} {unit}".strip()


def duration(seconds: float | None) -> str:
    """Seconds as s, min or h with three significant digits."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 120:
        return f"{significant(seconds)} s"
    if seconds < 7200:
        return f"{significant(seconds / 60)} min"
    return f"{significant(seconds / 3600)} h"


def counted(number: int, noun: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
