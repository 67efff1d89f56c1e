"""The LZMA compressor as a language model: how small the held-out text itself gets."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..core.card import Card
from ..core.errors import ConfigError


@dataclass
class Xz:
    """Bits that `xz` needs for a text, with nothing known beforehand.

    Attributes:
        preset: 0 to 9, as on xz's command line; the extreme variant is used.
    """

    card: ClassVar[Card] = Card(
        name="xz",
        title="XZ Utils (LZMA2)",
        group="baselines",
        summary="Size of the held-out text after xz: a floor that needs no training.",
        saves=("FLOPs",),
    )
    takes: ClassVar[str] = "stream"
    preset: int = 9

    def __post_init__(self) -> None:
        if not 0 <= self.preset <= 9:
            raise ConfigError(f"xz.preset = {self.preset} is not allowed", "give 0 to 9")

    def bits(self, texts: Sequence[str]) -> int:
        """Bits of all texts together, a line break between two."""
        packed = lzma.compress(
            "\n".join(texts).encode(),
            format=lzma.FORMAT_ALONE,
            preset=self.preset | lzma.PRESET_EXTREME,
        )
        return 8 * len(packed)
