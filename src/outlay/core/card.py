"""The card of a method: facts that `list`, `show`, `plan`, `cite` and tests read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """Facts about a method, written as literals so that they can be read without importing it.

    Attributes:
        name: Name in call strings and on the command line.
        title: Title of the paper, or what the baseline is.
        paper: Number of the paper in outlay's catalogue; None for baselines and bridges.
        arxiv: arXiv identifier, or an empty string.
        group: Room under `methods/`.
        summary: One sentence for lists.
        authors: Authors as they stand in a citation.
        year: Year of first publication.
        claims: Words of `core.claims` that the method holds in a run.
        saves: Budgets that the method spends less of.
        scope: "step" if splitting a step changes nothing but rounding, "micro" if it does.
        freezes_base: True if the loop freezes the pre-trained parameters once for all.
    """

    name: str
    title: str
    paper: int | None = None
    arxiv: str = ""
    group: str = ""
    summary: str = ""
    authors: str = ""
    year: int | None = None
    claims: tuple[str, ...] = ()
    saves: tuple[str, ...] = ()
    scope: str = "step"
    freezes_base: bool = False
