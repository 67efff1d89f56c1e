"""What a paper claims, as a statement about two arms, and what the runs say of it.

A claim is judged by its gain: the paired difference between its two arms, turned so that a
positive number favors the claim's own arm whatever the metric's direction. Outcomes:

- `supported`: the interval lies on the claim's side.
- `partly`: it does, but all of it below the size that was claimed.
- `refuted`: the interval excludes what was claimed.
- `underpowered`: neither, and the smallest gain that these seeds could show is above the claim's
  size. Said only when no more seeds are to come.
- `not resolved`: neither, although the claim's size could have been seen; or a run failed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..core.errors import ConfigError
from . import statistics as st
from .formats import between, counted, signed, significant

Kind = Literal["better", "not_worse", "equal", "at_most"]
Role = Literal["main", "control", "secondary"]
By = Mapping[str, Mapping[int, float | None]]

VERDICTS = ("supported", "partly", "refuted", "not resolved", "underpowered")
OPEN = ("not resolved", "underpowered")
ALPHA, POWER = 0.05, 0.8


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement about two arms, with the size that the paper gives it.

    Attributes:
        name: Unique within its replication.
        text: The statement in one clause.
        arm: The arm that it speaks for.
        than: The arm that it is measured against.
        kind: "better" (by at least `size`), "not_worse" (by more than `size`), "equal" (within
            `size`), or "at_most" (`size` times the `quantity` of `than`).
        size: Task to size, in the unit of the task's metric (a ratio for "at_most"). The claim is
            made on these tasks.
        role: "main" claims decide; a refuted "control" refutes the paper, because what is
            claimed to matter does not; a "secondary" one can only turn supported into partly.
        quantity: What is compared instead of the task's metric (see `quantities.measured`),
            lower being better; beside "not_worse" what has to be saved at equal quality.
        at_most: Beside "not_worse", the largest ratio of the quantity, arm over than.
        beyond: Two further arms whose difference the gain has to exceed.
        source: Where the paper says so, or whose choice the size is.
    """

    name: str
    text: str
    arm: str
    than: str
    kind: Kind
    size: Mapping[str, float]
    role: Role = "main"
    quantity: str = ""
    at_most: float | None = None
    beyond: tuple[str, str] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse a claim that could not be judged.

        Raises:
            ConfigError: If a size is not positive, or a ratio or its quantity is missing.
        """
        if not self.size or any(not size > 0 for size in self.size.values()):
            raise ConfigError(
                f"claim {self.name!r} has the sizes {dict(self.size)}",
                "give a positive size for each task that it is made on",
            )
        wants = self.kind == "at_most" or self.at_most is not None
        if (wants and not self.quantity) or (self.at_most is not None and self.at_most <= 0):
            raise ConfigError(
                f"claim {self.name!r} has at_most = {self.at_most} of {self.quantity!r}",
                "give a positive ratio and the quantity that it is a ratio of",
            )

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms that have to be run for it."""
        return (self.arm, self.than, *(self.beyond or ()))


@dataclass(frozen=True)
class Level:
    """How sure an interval has to be.

    Attributes:
        alpha: Share of misses allowed at this look, over all claims of the family together.
        comparisons: Claims of the family.
        last: No more seeds will come, so what is open gets its final name.
    """

    alpha: float = ALPHA
    comparisons: int = 1
    last: bool = True


@dataclass
class Finding:
    """What the runs say of one claim on one task.

    Attributes:
        claim: The claim.
        task: Name of the task.
        verdict: One of `VERDICTS`.
        figures: gain, interval, spread, seeds, detectable, p, size, metric, level; and ratio.
        sentence: The same in words.
    """

    claim: Claim
    task: str
    verdict: str
    figures: dict[str, Any] = field(default_factory=dict)
    sentence: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the ledger keeps them."""
        return {
            "claim": self.claim.name, "text": self.claim.text, "arm": self.claim.arm,
            "than": self.claim.than, "kind": self.claim.kind, "role": self.claim.role,
            "source": self.claim.source, "verdict": self.verdict, **self.figures,
            "sentence": self.sentence,
        }  # fmt: skip


def look_alpha(seeds: Sequence[int], stage: int, alpha: float = ALPHA) -> float:
    """The share of alpha that one of several looks at growing numbers of seeds may spend.

    Shares are proportional to the seeds of a look and sum to alpha, so that looking again after
    more seeds does not raise the rate of false findings above it (Bonferroni over looks).

    Args:
        seeds: Numbers of seeds at the planned looks.
        stage: Which look, from 0.
        alpha: For all looks together.
    """
    return alpha * seeds[stage] / sum(seeds)


def gains(claim: Claim, values: By, higher: bool) -> tuple[list[int], np.ndarray]:
    """Paired gains of a claim by seed; positive favors its arm.

    Args:
        claim: The claim.
        values: Arm to seed to what is compared; None is a failed run.
        higher: True if a higher value is better.

    Returns:
        Seeds that all of the claim's arms have, and one gain each.
    """
    seeds = sorted(set.intersection(*(set(values.get(name, {})) for name in claim.arms)))
    table = {name: [values[name][seed] for seed in seeds] for name in claim.arms}
    columns = {n: np.array([math.nan if v is None else v for v in t]) for n, t in table.items()}
    found = columns[claim.arm] - columns[claim.than]
    if claim.beyond:
        found = found - (columns[claim.beyond[0]] - columns[claim.beyond[1]])
    return seeds, found if higher else -found


def judge_claim(
    claim: Claim,
    task: str,
    values: By,
    *,
    metric: str,
    higher: bool,
    amounts: By | None = None,
    level: Level | None = None,
) -> Finding:
    """Judge one claim on one task.

    Args:
        claim: The claim.
        task: Name of the task, one of the claim's.
        values: Arm to seed to the metric; None is a failed run.
        metric: Name of the metric or of the quantity that stands in its place.
        higher: True if a higher value is better.
        amounts: Arm to seed to the claim's quantity, for claims with a ratio.
        level: How sure intervals have to be.
    """
    level = level or Level()
    if claim.kind == "at_most":
        figures, verdict = _ratio(claim, claim.size[task], amounts or {}, level)
        return _finding(claim, task, verdict, figures)
    size = claim.size[task]
    figures = {"metric": metric, "size": size}
    seeds, found = gains(claim, values, higher)
    figures["seeds"] = len(seeds)
    if len(seeds) < 2 or not np.isfinite(found).all():
        figures["reason"] = "a run failed" if len(seeds) >= 2 else "fewer than two shared seeds"
        return _finding(claim, task, "not resolved", figures)
    figures |= _paired(
        found, level, max(abs(v or 0) for a in claim.arms for v in values[a].values())
    )
    verdict = _decided(claim.kind, figures["gain"], figures["interval"], size)
    if verdict is None:
        verdict = _open(figures["detectable"], size, level)
    if claim.at_most is not None:
        ratio, saved = _ratio(claim, claim.at_most, amounts or {}, level)
        figures |= {key: ratio[key] for key in ratio if key not in figures}
        if verdict == "supported" and saved != "supported":
            verdict = "partly" if saved in ("partly", "refuted") else saved
    return _finding(claim, task, verdict, figures)


def _paired(found: np.ndarray, level: Level, scale: float) -> dict[str, Any]:
    """Mean, interval, spread, p and what could have been seen."""
    mean = float(found.mean())
    plain = {"gain": mean, "level": 1 - level.alpha / level.comparisons}
    if st.is_constant(found, scale):
        return {**plain, "interval": [mean, mean], "spread": 0.0, "p": None, "detectable": 0.0}
    spread = float(found.std(ddof=1))
    return {
        **plain,
        "interval": list(st.mean_interval(found, level.alpha, level.comparisons)),
        "spread": spread,
        "p": st.paired_t_test(found),
        "detectable": st.detectable_difference(
            spread, len(found), level.alpha, level.comparisons, POWER
        ),
    }


def _decided(kind: Kind, gain: float, interval: Sequence[float], size: float) -> str | None:
    """The verdict of an interval of gains, None if it leaves the question open."""
    low, high = interval
    if kind == "better":
        if high < size:
            return "partly" if low > 0 else "refuted"
        return "supported" if low > 0 else None
    if kind == "not_worse":
        if low > -size:
            return "supported"
        return "refuted" if high < 0 and gain < -size else None
    if -size < low and high < size:
        return "supported"
    return "refuted" if low > size or high < -size else None


def _open(detectable: float, size: float, level: Level) -> str:
    return "underpowered" if level.last and detectable > size else "not resolved"


def _ratio(claim: Claim, at_most: float, amounts: By, level: Level) -> tuple[dict[str, Any], str]:
    """Ratio of a quantity, arm over than, by the paired differences of its logarithm."""
    pair = [amounts.get(name, {}) for name in (claim.arm, claim.than)]
    seeds = sorted(set(pair[0]) & set(pair[1]))
    numbers = [[float(side[s] or math.nan) for s in seeds] for side in pair]
    figures: dict[str, Any] = {
        "quantity": claim.quantity, "at_most": at_most, "seeds": len(seeds)
    }  # fmt: skip
    logs = np.log(np.array(numbers[0])) - np.log(np.array(numbers[1]))
    if len(seeds) < 2 or not np.isfinite(logs).all():
        return figures | {"reason": "the quantity was not measured in every run"}, "not resolved"
    paired = _paired(logs, level, 1.0)
    low, high = (math.exp(end) for end in paired["interval"])
    figures |= {
        "ratio": math.exp(paired["gain"]), "ratio_interval": [low, high],
        "amounts": [float(np.mean(side)) for side in numbers],
    }  # fmt: skip
    slack = 1 + 1e-9
    if high <= at_most * slack:
        return figures, "supported"
    if low > at_most * slack:
        return figures, "partly" if high < 1 and at_most < 1 else "refuted"
    return figures, _open(paired["detectable"], abs(math.log(at_most)) or 1e-9, level)


# ---- words ---------------------------------------------------------------------------------------


def _finding(claim: Claim, task: str, verdict: str, figures: dict[str, Any]) -> Finding:
    parts = []
    if figures.get("gain") is not None:
        beyond = f" beyond {claim.beyond[0]} over {claim.beyond[1]}" if claim.beyond else ""
        wanted = {"better": "at least {} claimed", "not_worse": "margin {}", "equal": "within {}"}
        parts.append(
            f"{claim.arm} over {claim.than}{beyond}: gain {signed(figures['gain'])} "
            f"{figures['metric']}, interval {between(figures['interval'], plus=True)}, "
            f"{counted(figures['seeds'], 'seed')}; "
            f"{wanted[claim.kind].format(significant(figures['size']))}, "
            f"{significant(figures['detectable'])} could have been seen"
        )
    if figures.get("ratio") is not None:
        parts.append(
            f"{significant(figures['ratio'])} times the {claim.quantity.replace('_', ' ')} of "
            f"{claim.than} ({between(figures['ratio_interval'])}), at most "
            f"{significant(figures['at_most'])} claimed"
        )
    if figures.get("reason"):
        parts.append(f"{claim.arm} and {claim.than} are not compared: {figures['reason']}")
    sentence = f"{claim.text}: {verdict} on {task} ({'; '.join(parts)})."
    return Finding(claim, task, verdict, figures, sentence)


# ---- many claims ---------------------------------------------------------------------------------


def combined(verdicts: Collection[str]) -> str:
    """One verdict of several equal ones (main claims of a task, or tasks).

    All alike: that. Something seen and something not: partly. Nothing seen and something
    refuted: refuted. Only open ones: underpowered if all are, else not resolved.
    """
    found = set(verdicts)
    if len(found) == 1:
        return found.pop()
    if found & {"supported", "partly"}:
        return "partly"
    return "refuted" if "refuted" in found else "not resolved"


def task_verdict(findings: Sequence[Finding]) -> str:
    """Verdict of a task: its main claims, then what controls and secondary claims take away."""
    verdict = combined([f.verdict for f in findings if f.claim.role == "main"] or ["not resolved"])
    if any(f.claim.role == "control" and f.verdict == "refuted" for f in findings):
        return "refuted"
    others = [f for f in findings if f.claim.role != "main"]
    if verdict == "supported" and any(
        f.verdict != "supported" if f.claim.role == "control" else f.verdict == "refuted"
        for f in others
    ):
        return "partly"
    return verdict


def unresolved(findings: Sequence[Finding]) -> list[Finding]:
    """Findings that more seeds may settle; failed runs are not among them."""
    return [f for f in findings if f.verdict in OPEN and "reason" not in f.figures]
