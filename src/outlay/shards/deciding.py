"""From columns to what is kept: tests row by row, a cut at a budget, inverses and random twins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError
from .cut import Chunk, Threshold, find_threshold

Unit = Literal["tokens", "characters", "bytes", "documents"]
Twin = Literal["random", "length"]
Columns = Mapping[str, NDArray[Any]]
Reasons = NDArray[np.object_]


@dataclass(frozen=True)
class AtMost:
    """Keeps rows whose score is not above a limit."""

    column: str
    limit: float
    reason: str

    def keeps(self, rows: Columns) -> NDArray[np.bool_]:
        """Shape (rows,)."""
        return rows[self.column] <= np.float32(self.limit)


@dataclass(frozen=True)
class Dated:
    """Keeps rows from `after` on and before `before`, as far as their dates are known.

    Both are a year, month or day. A date that is coarser than the limit is taken at its start.
    """

    after: str | None = None
    before: str | None = None
    reason: str = "date"

    def keeps(self, rows: Columns) -> NDArray[np.bool_]:
        """Shape (rows,)."""
        dates = rows["date"].astype(str)
        kept = dates != ""
        if self.after is not None:
            kept &= _day(dates) >= _day(np.asarray([self.after]))
        if self.before is not None:
            kept &= _day(dates) < _day(np.asarray([self.before]))
        return kept


def _day(dates: NDArray[Any]) -> NDArray[Any]:
    """Years and months as their first day."""
    lengths = np.char.str_len(dates)
    return np.char.add(dates, np.where(lengths == 4, "-01-01", np.where(lengths == 7, "-01", "")))


@dataclass(frozen=True)
class InDomains:
    """Keeps rows of the named domains, or of all others."""

    names: tuple[str, ...]
    drop: bool = False
    reason: str = "domain"

    def keeps(self, rows: Columns) -> NDArray[np.bool_]:
        """Shape (rows,)."""
        return np.isin(rows["domain"].astype(str), self.names) != self.drop


Test = AtMost | Dated | InDomains


@dataclass(frozen=True)
class Rule:
    """What one method keeps.

    Attributes:
        name: The method's, in front of its reasons.
        tests: A row that fails one is dropped for the first one's reason.
        share: Share of what passes that is kept, counted in `unit`; None cuts nothing.
        column: Score that orders the cut, highest first; empty for a random order.
        unit: See `weights_of`.
        inverse: Keep the same share from the other end of the order; without a share, exactly the
            rows that the tests drop.
        twin: Keep random rows instead, as many tokens as the rule would: over all, or within each
            doubling of length.
        seed: Of random orders.
    """

    name: str
    tests: tuple[Test, ...] = ()
    share: float | None = None
    column: str = ""
    unit: Unit = "tokens"
    inverse: bool = False
    twin: Twin | None = None
    seed: int = 0


def weights_of(rows: Columns, unit: Unit) -> NDArray[np.int64]:
    """What each row costs of a budget. Shape (rows,)."""
    return np.ones(len(rows["key"]), np.int64) if unit == "documents" else rows[unit]


def random_scores(keys: NDArray[np.uint64], seed: int) -> NDArray[np.float32]:
    """Uniform in [0, 1), from the id and the seed alone. Shape (rows,)."""
    mixed = keys ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & (2**64 - 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


@dataclass(frozen=True)
class Decision:
    """A rule with its thresholds: what is kept is now a matter of each row alone.

    Attributes:
        rule: The rule.
        threshold: Where its cut ends.
        twins: Where the random order ends in each class of length.
    """

    rule: Rule
    threshold: Threshold | None = None
    twins: Mapping[int, Threshold] = field(default_factory=dict)

    def apply(self, rows: Columns) -> Reasons:
        """Why each row is dropped; empty for those that are kept. Shape (rows,)."""
        if self.rule.twin is None:
            return self._own(rows)
        classes, kept = _classes(rows, self.rule.twin), np.zeros(len(rows["key"]), bool)
        order = random_scores(rows["key"], self.rule.seed)
        for number, threshold in self.twins.items():
            among = classes == number
            kept[among] = threshold.keeps(order[among], rows["key"][among])
        return _reasons(kept, f"{self.rule.name}: not drawn")

    def _own(self, rows: Columns) -> Reasons:
        rule = self.rule
        reasons = tested(rule, rows)
        if rule.inverse and rule.share is None:
            return _reasons(reasons != "", f"{rule.name}: inverse")
        if self.threshold is not None:
            above = self.threshold.keeps(order_column(rule, rows), rows["key"])
            reasons[(reasons == "") & ~above] = f"{rule.name}: beyond the share"
        return reasons


def tested(rule: Rule, rows: Columns) -> Reasons:
    """Reasons of the rule's tests alone. Shape (rows,)."""
    reasons = _reasons(np.ones(len(rows["key"]), bool), "")
    for test in rule.tests:
        reasons[(reasons == "") & ~test.keeps(rows)] = f"{rule.name}: {test.reason}"
    return reasons


def order_column(rule: Rule, rows: Columns) -> NDArray[np.float32]:
    """What the cut is ordered by. Shape (rows,)."""
    return rows[rule.column] if rule.column else random_scores(rows["key"], rule.seed)


def _reasons(kept: NDArray[np.bool_], reason: str) -> Reasons:
    return np.where(kept, "", reason).astype(object)


def _classes(rows: Columns, twin: Twin) -> NDArray[np.int64]:
    if twin == "random":
        return np.zeros(len(rows["key"]), np.int64)
    return np.log2(np.maximum(rows["tokens"], 1)).astype(np.int64)


Source = Callable[[], Iterable[Columns]]


def decide(rule: Rule, source: Source) -> Decision:
    """Find the thresholds of one rule.

    Args:
        rule: The rule.
        source: Gives the rows that are left anew each time it is called, in any order and pieces.

    Raises:
        DataError: If nothing is left, or no row has the date that a test asks for.
    """
    _check_dates(rule, source)
    threshold = None
    if rule.share is not None:

        def passing() -> Iterable[Chunk]:
            for rows in source():
                good = tested(rule, rows) == ""
                weights = weights_of(rows, rule.unit)
                yield order_column(rule, rows)[good], rows["key"][good], weights[good]

        total = sum(int(weights.sum()) for _, _, weights in passing())
        threshold = find_threshold(passing, int(rule.share * total), not rule.inverse)
    decision = Decision(rule, threshold)
    return decision if rule.twin is None else Decision(rule, threshold, _twins(decision, source))


def _twins(decision: Decision, source: Source) -> dict[int, Threshold]:
    rule = decision.rule
    assert rule.twin is not None
    budgets: dict[int, int] = {}
    for rows in source():
        kept = decision._own(rows) == ""
        classes, tokens = _classes(rows, rule.twin), rows["tokens"]
        for number in np.unique(classes).tolist():
            among = kept & (classes == number)
            budgets[number] = budgets.get(number, 0) + int(tokens[among].sum())

    def drawn(number: int) -> Iterable[Chunk]:
        for rows in source():
            among = _classes(rows, rule.twin or "random") == number
            keys = rows["key"][among]
            yield random_scores(keys, rule.seed), keys, rows["tokens"][among]

    return {
        number: find_threshold(lambda number=number: drawn(number), budget)
        for number, budget in sorted(budgets.items())
    }


def _check_dates(rule: Rule, source: Source) -> None:
    if not any(isinstance(test, Dated) for test in rule.tests):
        return
    total = dated = 0
    for rows in source():
        total += len(rows["key"])
        dated += int((rows["date"].astype(str) != "").sum())
    if total and not dated:
        raise DataError(
            f"{rule.name} asks for a date and none of {total:,} documents has one",
            "name the column of dates, or leave the dates out of the settings",
        )


def kept_share_notes(name: str, kept: int, total: int) -> list[str]:
    """What a cut that keeps almost nothing or almost everything is told."""
    if total and not 0.01 <= kept / total <= 0.999:
        return [f"{name} keeps {kept / total:.2%} of {total:,} tokens"]
    return []
