"""Meters as a reader meets them: label, explanation, and how their numbers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..formats import duration, prefixed


@dataclass(frozen=True)
class MeterText:
    """How a meter is shown.

    Attributes:
        label: Heading of its column and axis.
        kind: `count`, `seconds`, `bytes` or `flops`.
        explanation: One sentence.
    """

    label: str
    kind: str
    explanation: str

    def write(self, value: float | None) -> str:
        """Three significant digits with prefix and unit."""
        if self.kind == "seconds":
            return duration(value)
        return prefixed(value, {"bytes": "B", "flops": "FLOP"}.get(self.kind, ""))


METERS = {
    "trainable_parameters": MeterText(
        "Trainable parameters", "count", "Parameters that are updated, the head included."
    ),
    "flops": MeterText(
        "FLOPs", "flops", "Floating-point operations of the whole run; a multiply-add counts 2."
    ),
    "effective_flops": MeterText(
        "Effective FLOPs",
        "flops",
        "FLOPs without entries that a mask holds at zero and without forming dense matrices: what "
        "hardware that skips zeros would do. Ordinary hardware executes the FLOPs beside it.",
    ),
    "dense_flops": MeterText(
        "Dense-equivalent FLOPs",
        "flops",
        "FLOPs of plain dense layers in the place of sparse and low-rank ones.",
    ),
    "seconds": MeterText("Time", "seconds", "Wall-clock time of the run on this machine."),
    "peak_bytes": MeterText("Peak memory", "bytes", "Largest amount of memory held at once."),
    "adapter_bytes": MeterText(
        "Adapter size", "bytes", "Size of what must be stored beside the base model."
    ),
    "total_parameters": MeterText(
        "All parameters", "count", "Parameters of the model, frozen ones included."
    ),
    "steps": MeterText("Steps", "count", "Optimizer steps."),
    "micro_batches": MeterText(
        "Micro-batches", "count", "Forward and backward passes; several may make one step."
    ),
    "tokens": MeterText("Tokens", "count", "Tokens processed in training, padding included."),
    "examples": MeterText("Examples", "count", "Examples processed in training."),
    "parameter_updates": MeterText(
        "Parameter updates", "count", "Trainable parameters summed over the steps."
    ),
    "total/flops": MeterText(
        "FLOPs with tuning",
        "flops",
        "One run, mean over seeds, and all of the arm's tuning: what a tuned model costs.",
    ),
    "total/seconds": MeterText(
        "Time with tuning", "seconds", "One run, mean over seeds, and all of the arm's tuning."
    ),
    "tuning/trials": MeterText(
        "Tuning: runs", "count", "Runs on the validation split that chose the arm's settings."
    ),
    "tuning/steps": MeterText("Tuning: steps", "count", "Optimizer steps of all tuning runs."),
    "tuning/tokens": MeterText("Tuning: tokens", "count", "Tokens of all tuning runs."),
    "tuning/flops": MeterText(
        "Tuning: FLOPs", "flops", "Floating-point operations of all tuning runs."
    ),
    "tuning/seconds": MeterText("Tuning: time", "seconds", "Time of all tuning runs."),
}
_KINDS = {"flops": "flops", "seconds": "seconds", "bytes": "bytes"}


def meter_text(key: str) -> MeterText:
    """Known text of a meter, or one made from a name such as `teacher/flops`."""
    if key in METERS:
        return METERS[key]
    words = key.replace("/", ": ").replace("_", " ").replace("flops", "FLOPs")
    kind = next((kind for end, kind in _KINDS.items() if key.endswith(end)), "count")
    return MeterText(
        words[:1].upper() + words[1:], kind, f"Extra cost charged under its own name, {key}."
    )


def meter_means(data: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Meter to arm to its mean over the runs that are done; known meters first.

    What an arm spent outside its runs (`arm_meters`) is taken as it is.

    Args:
        data: From `report_data.completed`.
    """
    sums: dict[str, dict[str, list[float]]] = {}
    for run in data["runs"]:
        if run["status"] != "done":
            continue
        for key, value in run["meter"].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                sums.setdefault(key, {}).setdefault(run["arm"], []).append(value)
    trainable = sums.setdefault("trainable_parameters", {})
    for arm in data["arms"]:
        if arm["name"] not in trainable and arm.get("trainable") is not None:
            trainable[arm["name"]] = [arm["trainable"]]
    for name, amounts in data["arm_meters"].items():
        for key, amount in amounts.items():
            sums.setdefault(key, {})[name] = [amount]
    # Where all work is dense, the three counts are one.
    for kind in ("effective_flops", "dense_flops"):
        if sums.get(kind) == sums.get("flops"):
            sums.pop(kind, None)
    known = [key for key in METERS if sums.get(key)]
    extra = sorted(key for key in sums if key not in METERS and sums[key])
    return {
        key: {name: sum(values) / len(values) for name, values in sums[key].items()}
        for key in [*known, *extra]
    }


def varies(by_arm: Mapping[str, float], arms: Sequence[str]) -> bool:
    """True if the meter tells arms apart: by more than 0.5 %, or by being there or not."""
    if len(by_arm) < len(arms):
        return True
    low, high = min(by_arm.values()), max(by_arm.values())
    return high - low > 0.005 * max(abs(low), abs(high))
