"""Typed budgets: `60steps`, `2e6tokens`, `1e15flops`, `90s`; caps in parameters and bytes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import ConfigError, nearest

UNITS = ("steps", "tokens", "examples", "flops", "effective_flops", "seconds")
CAPS = ("trainable_parameters", "bytes")
_ALIASES = {
    "step": "steps", "token": "tokens", "tok": "tokens", "example": "examples", "ex": "examples",
    "flop": "flops", "s": "seconds", "sec": "seconds", "second": "seconds", "params": CAPS[0],
    "parameters": CAPS[0], "b": "bytes", "byte": "bytes",
}  # fmt: skip
_SCALES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_PATTERN = re.compile(
    r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*([A-Za-z_ ]+?)\s*$", re.I
)


@dataclass(frozen=True)
class Budget:
    """An amount of one unit.

    Attributes:
        amount: > 0, finite.
        unit: One of `UNITS` (what ends a run) or `CAPS` (what a run must not exceed).
    """

    amount: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in UNITS + CAPS:
            raise ConfigError(
                f"unknown budget unit {self.unit!r}",
                f"{nearest(self.unit, UNITS + CAPS)}use one of {', '.join(UNITS + CAPS)}",
            )
        number = isinstance(self.amount, (int, float)) and not isinstance(self.amount, bool)
        if not (number and math.isfinite(self.amount) and self.amount > 0):
            raise ConfigError(f"budget amount {self.amount!r} is not positive", "give a number > 0")
        if self.unit in ("steps", "examples", *CAPS) and self.amount != int(self.amount):
            raise ConfigError(
                f"budget of {self.amount} {self.unit} is not whole", f"give whole {self.unit}"
            )

    @classmethod
    def parse(cls, text: str | Budget) -> Budget:
        """Read `60steps`, `2e6tokens`, `1.5e15flops`, `90s`, `10k steps`.

        Raises:
            ConfigError: If it is not a number followed by a unit.
        """
        if isinstance(text, Budget):
            return text
        match = _PATTERN.match(str(text))
        if not match:
            raise ConfigError(
                f"cannot read budget {text!r}", "write a number and a unit, as 60steps or 2e6tokens"
            )
        number, word = float(match[1].replace("_", "")), match[2].strip().lower().replace(" ", "_")
        if word not in UNITS + CAPS and word not in _ALIASES and word[:1] in _SCALES:
            rest = word[1:].lstrip("_")
            # "5ms" must not become five million seconds.
            counted = rest in UNITS + CAPS or rest in _ALIASES
            if counted and _ALIASES.get(rest, rest) != "seconds":
                number, word = number * _SCALES[word[0]], rest
        return cls(number, _ALIASES.get(word, word))

    @property
    def reproducible(self) -> bool:
        """False for seconds: another machine stops at another step."""
        return self.unit != "seconds"

    def __str__(self) -> str:
        amount = float(self.amount)
        if amount.is_integer() and amount < 1e7:
            return f"{int(amount)}{self.unit}"
        short = f"{amount:g}"
        if float(short) != amount:
            short = str(int(amount)) if amount.is_integer() and amount < 1e16 else repr(amount)
        return f"{short}{self.unit}"
