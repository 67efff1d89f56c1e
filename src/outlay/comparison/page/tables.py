"""The tables of a report, once: the page, its downloads and the Markdown all print these."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..formats import MISSING, between, probability, signed, significant
from .meters import meter_text, varies


@dataclass(frozen=True)
class Column:
    """A column: what it is called, what it means, and how its values are written.

    Attributes:
        key: Name in downloads.
        label: Heading.
        explanation: One sentence, shown on hover and below the table.
        write: From value to text.
        numeric: Right-aligned if True.
    """

    key: str
    label: str
    explanation: str
    write: Callable[[Any], str] = str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Columns, and for each row one value per column (full precision, or None)."""

    key: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]

    def cells(self) -> list[list[tuple[Column, Any, str]]]:
        """Rows of (column, value, text); a missing value is a dash."""
        return [
            [(c, v, MISSING if v is None else c.write(v)) for c, v in zip(self.columns, row)]
            for row in self.rows
        ]

    def records(self) -> list[dict[str, Any]]:
        """Rows as dicts at full precision, intervals split into `_low` and `_high`."""
        records = []
        for row in self.rows:
            record: dict[str, Any] = {}
            for column, value in zip(self.columns, row):
                if column.write is between or column.write is _between_signed:
                    low, high = value if value else (None, None)
                    record |= {f"{column.key}_low": low, f"{column.key}_high": high}
                else:
                    record[column.key] = value
            records.append(record)
        return records


def group_letters(data: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Groups of arms that are not separated, each under a letter (compact letter display).

    Arms in no tie group that took part in a tested pair stand in a group of their own. Letters
    follow the best mean of a group.
    """
    tested = {
        pair[side] for pair in data["pairs"] if pair.get("p_holm") is not None for side in "ab"
    }
    groups = [list(group) for group in data["ties"]]
    grouped = {name for group in groups for name in group}
    groups += [[a["name"]] for a in data["arms"] if a["name"] in tested - grouped]
    sign = -1 if data["higher_is_better"] else 1
    mean = {a["name"]: sign * a["mean"] for a in data["arms"] if a["mean"] is not None}
    for group in groups:
        group.sort(key=lambda name: mean.get(name, float("inf")))
    groups.sort(key=lambda group: [mean.get(name, float("inf")) for name in group])
    return [(_letter(number), group) for number, group in enumerate(groups)]


def _letter(number: int) -> str:
    letters = string.ascii_lowercase
    return letters[number] if number < 26 else letters[number // 26 - 1] + letters[number % 26]


def arms_table(data: Mapping[str, Any], meters: Mapping[str, Mapping[str, float]]) -> Table:
    """Arms by mean, best first, with the meters that tell them apart."""
    names = [arm["name"] for arm in data["arms"]]
    level = f"{100 * (1 - data['alpha']):g}%"
    better = "higher" if data["higher_is_better"] else "lower"
    letters = group_letters(data)
    shown = [key for key in meters if varies(meters[key], names)] if len(names) > 1 else []
    columns = [Column("arm", "Arm", "What was compared.", numeric=False)]
    if letters:
        columns.append(
            Column(
                "groups", "Group", "Arms that share a letter are not separated by these seeds; "
                "letters are not ranks.", numeric=False,
            )
        )  # fmt: skip
    several = any(arm["seeds"] > 1 for arm in data["arms"])
    order = " Rows are sorted by it, which is not a ranking." if len(names) > 1 else ""
    columns += [
        Column(
            "mean", f"{'Mean ' if several else ''}{data['metric']}",
            f"{'Mean over seeds' if several else 'Final value'}; {better} is better.{order}",
            significant,
        )
    ]  # fmt: skip
    intervals = any(arm.get("interval") for arm in data["arms"])
    if intervals:
        columns.append(
            Column(
                "interval", f"{level} interval", "t interval of the mean over seeds, simultaneous "
                f"for all arms at {level}. For telling arms apart use the paired differences: "
                "arms share seeds.", between,
            )
        )  # fmt: skip
    columns.append(Column("seeds", "Seeds", "Runs that finished.", str))
    for key in shown:
        text = meter_text(key)
        columns.append(Column(key, text.label, text.explanation, text.write))
    rows = []
    for arm in sorted_arms(data):
        row: list[Any] = [arm["name"]]
        if letters:
            row.append(
                " ".join(letter for letter, group in letters if arm["name"] in group) or None
            )
        row += [arm["mean"], *([arm.get("interval")] if intervals else []), arm["seeds"]]
        rows.append(row + [meters[key].get(arm["name"]) for key in shown])
    return Table("arms", columns, rows)


def sorted_arms(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Arms by mean, best first; those without a mean last."""
    sign = -1 if data["higher_is_better"] else 1
    return sorted(data["arms"], key=lambda arm: (arm["mean"] is None, sign * (arm["mean"] or 0.0)))


def _between_signed(value: Any) -> str:
    return between(value, plus=True)


_OUTCOMES = {
    "separated": "separated",
    "equal_within_margin": "equal within margin",
    "not_separated": "not separated",
    "identical": "identical",
    "constant_difference": "no spread",
    "unequal_budget": "budgets differ",
    "failed_run": "a run failed",
    "too_few_seeds": "too few seeds",
}


def _outcome_text(key: str) -> str:
    return _OUTCOMES.get(key, key)


def pairs_table(data: Mapping[str, Any]) -> Table:
    """Paired differences, largest first, with all that was computed for them."""
    level = f"{100 * (1 - data['alpha']):g}%"
    columns = [
        Column("a", "First", "The arm from which is subtracted.", numeric=False),
        Column("b", "Second", "The arm that is subtracted.", numeric=False),
        Column("difference", "Difference", "First minus second, mean over shared seeds.", signed),
        Column(
            "interval", f"{level} interval", "Paired t interval, simultaneous for all pairs "
            "(Bonferroni).", _between_signed,
        ),
        Column(
            "p_holm", "p (Holm)", "Paired t test, adjusted for all pairs by Holm's procedure; a "
            f"pair is separated only below {data['alpha']:g}.", probability,
        ),
        Column(
            "p_sign_flip", "p (sign flip)", "Exact sign-flip test of this pair alone; it assumes "
            "no distribution and is not adjusted.", probability,
        ),
        Column(
            "p_floor", "Floor", "Smallest sign-flip p that so many seeds can give.", probability
        ),
        Column(
            "detectable", "Detectable", "True difference that would have been found with "
            f"probability {data.get('power', 0.8):g}, from this pair's own spread.", significant,
        ),
        Column(
            "outcome", "Outcome", "What follows from p, margin and budgets.", _outcome_text,
            numeric=False,
        ),
    ]  # fmt: skip
    if any(pair.get("interval_items") for pair in data["pairs"]):
        columns.insert(
            4,
            Column(
                "interval_items", "over items", "Percentile bootstrap over test items and seeds "
                "together: another test set of the same kind.", _between_signed,
            ),
        )  # fmt: skip
    ordered = sorted(
        data["pairs"], key=lambda p: (p["difference"] is None, -(p["difference"] or 0.0))
    )
    return Table("differences", columns, [[p.get(c.key) for c in columns] for p in ordered])


def runs_table(data: Mapping[str, Any], meters: Mapping[str, Any]) -> Table:
    """Every run with its metrics and meters."""
    metrics = list(dict.fromkeys(name for run in data["runs"] for name in run["metrics"]))
    metrics.sort(key=lambda name: name != data["metric"])
    columns = [
        Column("arm", "Arm", "What was compared.", numeric=False),
        Column("seed", "Seed", "Runs with the same seed are paired.", str),
        Column("status", "Status", "done, stopped or failed.", numeric=False),
    ]
    counted = [key for key in meters if any(key in run["meter"] for run in data["runs"])]
    taken = {"arm", "seed", "status", *counted}
    columns += [
        Column(f"metric {name}" if name in taken else name, name, "Final value.", significant)
        for name in metrics
    ]
    for key in counted:
        text = meter_text(key)
        columns.append(Column(key, text.label, text.explanation, text.write))
    rows = [
        [run["arm"], run["seed"], run["status"], *(run["metrics"].get(name) for name in metrics),
         *(run["meter"].get(key) for key in counted)]
        for run in data["runs"]
    ]  # fmt: skip
    return Table("runs", columns, rows)


def settings_table(recipes: Mapping[str, str]) -> Table | None:
    """Settings in which the recipes differ, one row each; None if there are none to show."""
    flat: dict[str, dict[str, str]] = {}
    for arm, text in recipes.items():
        try:
            flat[arm] = _flattened(yaml.safe_load(text))
        except yaml.YAMLError:
            return None
    fields = list(dict.fromkeys(field for settings in flat.values() for field in settings))
    fields = [field for field in fields if field != "name"]  # a label, different by intent
    differing = [f for f in fields if len({settings.get(f) for settings in flat.values()}) > 1]
    if len(flat) < 2 or not differing:
        return None
    columns = [Column("setting", "Setting", "Path in the recipe.", numeric=False)]
    columns += [
        Column(f"arm {arm}" if arm == "setting" else arm, arm, "Value in this arm's recipe.",
               numeric=False)
        for arm in flat
    ]  # fmt: skip
    rows = [[field, *(flat[arm].get(field) for arm in flat)] for field in differing]
    return Table("settings", columns, rows)


def _flattened(tree: Any, path: str = "") -> dict[str, str]:
    """Leaves of a tree by dotted path; lists of plain values stay on one line."""
    if isinstance(tree, Mapping) and tree:
        leaves: dict[str, str] = {}
        for key, value in tree.items():
            leaves |= _flattened(value, f"{path}.{key}" if path else str(key))
        return leaves
    if isinstance(tree, list) and any(isinstance(entry, (Mapping, list)) for entry in tree):
        return _flattened(dict(enumerate(tree)), path)
    if isinstance(tree, list):
        return {path: ", ".join(str(entry) for entry in tree) or "[]"}
    return {path: str(tree)}
