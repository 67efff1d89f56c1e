"""What a report is made from, and the checks that it gets before anything is written."""

# No postponed annotations here: TypedDict reads NotRequired from the annotations themselves.
import math
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from ...core.errors import ConfigError

COLUMNS = ("step", "tokens", "flops", "seconds", "value")
"""Columns of a curve's points, in order; all but the value are totals of the run so far."""


class RunData(TypedDict):
    """One run.

    Attributes:
        arm: Name of its arm.
        seed: Its seed.
        status: `done`, `stopped` (by the user) or `failed`.
        metrics: Final metrics by name; None where there is no finite number.
        meter: What it spent: `steps`, `micro_batches`, `tokens`, `examples`, `flops`, `seconds`
            (s), `trainable_parameters`, `total_parameters`, `adapter_bytes`, `peak_bytes` and
            any other cost under its own name, as `teacher/flops`.
        curves: Curve name to points `[step, tokens, flops, seconds, value]`; any column but
            step may be None.
        failure: Why it failed.
    """

    arm: str
    seed: int
    status: str
    metrics: Mapping[str, float | None]
    meter: Mapping[str, float | None]
    curves: NotRequired[Mapping[str, Sequence[Sequence[float | None]]]]
    failure: NotRequired[str]


class ReportData(TypedDict):
    """A report: of one run, or of many that `judge` has judged.

    Everything that `judge` returns can be merged in (`{**judge(...), "title": ...}`); without it
    the report describes and compares nothing.

    Attributes:
        title: Heading.
        metric: Name of the metric that is judged, with split and protocol.
        higher_is_better: False for a loss or an error.
        budget: What every run was allowed, in words, as "150 steps of 16 x 24 tokens".
        runs: All runs, failed ones included.
        arms: As from `judge`; default: described from the runs, without intervals.
        pairs: As from `judge`.
        verdicts: As from `judge`.
        ties: As from `judge`.
        outcome: As from `judge`.
        sentence: The headline; default: a description.
        sentences: What else must be said.
        alpha: As given to `judge`; default 0.05.
        power: As given to `judge`.
        comparisons: As from `judge`.
        margin: As given to `judge`.
        recipes: Arm to its resolved recipe as YAML text.
        versions: Package to version.
        hardware: One line.
        command: What to type to get this report again.
        notes: Sentences for the reader, as "Learning rates were not tuned here."
        arm_notes: Arm to a short remark that stands beside its name.
        arm_meters: Arm to what it spent outside its runs, as `tuning/flops`, and to totals with
            that added, as `total/flops`.
    """

    title: str
    metric: str
    higher_is_better: bool
    budget: str
    runs: Sequence[RunData]
    arms: NotRequired[Sequence[Mapping[str, Any]]]
    pairs: NotRequired[Sequence[Mapping[str, Any]]]
    verdicts: NotRequired[Sequence[Mapping[str, Any]]]
    ties: NotRequired[Sequence[Sequence[str]]]
    outcome: NotRequired[str]
    sentence: NotRequired[str]
    sentences: NotRequired[Sequence[str]]
    alpha: NotRequired[float]
    power: NotRequired[float]
    comparisons: NotRequired[int]
    margin: NotRequired[float | None]
    recipes: NotRequired[Mapping[str, str]]
    versions: NotRequired[Mapping[str, str]]
    hardware: NotRequired[str]
    command: NotRequired[str]
    notes: NotRequired[Sequence[str]]
    arm_notes: NotRequired[Mapping[str, str]]
    arm_meters: NotRequired[Mapping[str, Mapping[str, float]]]


def completed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data with every optional key present and everything JSON-able, curves left out.

    Args:
        data: See `ReportData`.

    Returns:
        A new dict; numbers that are not finite became None.

    Raises:
        ConfigError: If a required key is missing or a run has no arm, seed or status.
    """
    missing = [key for key in ReportData.__required_keys__ if key not in data]
    if missing:
        raise ConfigError(
            f"a report lacks {', '.join(sorted(missing))}",
            "see outlay.comparison.page.report_data.ReportData for what it is made from",
        )
    unknown = sorted(set(data) - set(ReportData.__annotations__))
    if unknown:
        raise ConfigError(f"a report has no {', '.join(unknown)}", "leave it out, or put a note")
    if not data["runs"]:
        raise ConfigError("a report needs at least one run", "give the runs, failed ones included")
    for number, run in enumerate(data["runs"]):
        lacking = [key for key in ("arm", "seed", "status", "metrics", "meter") if key not in run]
        if lacking:
            raise ConfigError(
                f"run {number} of the report lacks {', '.join(lacking)}",
                "see outlay.comparison.page.report_data.RunData",
            )
    whole: dict[str, Any] = {
        "pairs": [], "verdicts": [], "ties": [], "outcome": "described", "sentence": "",
        "sentences": [], "alpha": 0.05, "margin": None, "recipes": {}, "versions": {},
        "hardware": "", "command": "", "notes": [], "arm_notes": {},
        "arm_meters": {},
    }  # fmt: skip
    whole |= {key: value for key, value in data.items() if key != "runs"}
    whole["runs"] = [{k: v for k, v in run.items() if k != "curves"} for run in data["runs"]]
    whole = jsonable(whole)
    whole["arms"] = whole.get("arms") or _described(whole)
    strangers = {run["arm"] for run in whole["runs"]} - {arm["name"] for arm in whole["arms"]}
    if strangers:
        raise ConfigError(
            f"runs of {', '.join(sorted(strangers))} belong to no arm of the report",
            "list every arm under arms",
        )
    return whole


def jsonable(value: Any) -> Any:
    """Plain dicts, lists, strings and finite numbers; None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(entry) for entry in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int) else str(value)


def _described(whole: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arms from the runs alone: mean over the seeds that finished, no interval."""
    arms = []
    for name in dict.fromkeys(run["arm"] for run in whole["runs"]):
        runs = [run for run in whole["runs"] if run["arm"] == name]
        values = [run["metrics"].get(whole["metric"]) for run in runs if run["status"] == "done"]
        numbers = [value for value in values if value is not None]
        trainable = [run["meter"].get("trainable_parameters") for run in runs]
        arms.append(
            {
                "name": name,
                "trainable": next((count for count in trainable if count is not None), None),
                "seeds": len(numbers),
                "metric": whole["metric"],
                "mean": sum(numbers) / len(numbers) if numbers else None,
                "interval": None,
            }
        )
    return arms
