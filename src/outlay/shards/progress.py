"""Who hears how far a selection is."""

from __future__ import annotations

from collections.abc import Mapping


class Silent:
    """Hears of a selection's progress; shows nothing."""

    def phase(self, name: str, total: int, size: int) -> None:
        """A phase over `total` shards of `size` bytes begins."""

    def shard(self, size: int, counts: Mapping[str, int]) -> None:
        """A shard of `size` bytes is done; `counts` are its rows by what became of them."""

    def note(self, text: str) -> None:
        """Something the user should know."""
