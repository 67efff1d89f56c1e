"""Arms by seeds in, verdicts out: which pairs are separated, which are not, and in what words.

A pair is ranked only if its paired-t p-value, Holm-adjusted over all pairs that are compared, is
below alpha. Intervals are simultaneous (Bonferroni). Holm rejects a little more often than
Bonferroni, so the interval of a ranked pair can reach across zero; the p-value decides.

Outcomes of a pair, each with its own sentence:

- `separated`: ranked.
- `equal_within_margin`: the whole interval lies inside the margin stated beforehand.
- `not_separated`: neither; says what difference these seeds would have shown.
- `identical`, `constant_difference`: the differences have no spread, so there is no test.
- `unequal_budget`: what should be equal was not; never ranked.
- `failed_run`: a run of one arm failed. Seeds are not dropped for it: an arm that fails on hard
  seeds would look better for it. Never ranked.
- `too_few_seeds`: fewer than two seeds that both arms ran.

Outcomes of an arm: `complete`, `missing_seeds` (compared on the seeds it shares with the other
arm), `failed_run`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..core.errors import ConfigError
from . import statistics as st
from .formats import counted, listed, significant
from .wording import headline, pair_sentence, remarks, seeds_text, verdict_of

Values = Mapping[str, Mapping[int, float | None]]
Spent = Mapping[str, Mapping[str, float | Mapping[int, float]]]

UNTESTED = ("unequal_budget", "failed_run", "too_few_seeds")
TIED = ("equal_within_margin", "not_separated", "identical", "constant_difference")


@dataclass(frozen=True)
class Question:
    """What is judged: the checked arguments of `judge`, failed and missing seeds apart."""

    metric: str
    higher_is_better: bool
    alpha: float
    power: float
    margin: float | None
    table: dict[str, dict[int, float]]
    failed: dict[str, list[int]]
    missing: dict[str, list[int]]
    spent: Spent
    tolerance: float
    outside: frozenset[str] = frozenset()
    comparisons: int = 0


def judge(
    table: Values,
    *,
    metric: str,
    higher_is_better: bool = True,
    trainable: Mapping[str, int | None] | None = None,
    spent: Spent | None = None,
    items: Mapping[str, Mapping[int, ArrayLike]] | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
    margin: float | None = None,
    budget_tolerance: float = 0.01,
    outside: Collection[str] = (),
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge all pairs of arms, paired by seed.

    Args:
        table: Arm to seed to the metric. A seed that is absent was not run (missing); a value
            that is None, NaN or infinite is a failed run.
        metric: Name of the metric, with split and protocol.
        higher_is_better: False for a loss or an error.
        trainable: Trainable parameters by arm, copied into the result.
        spent: What must be equal: arm to unit (`steps`, `tokens`, ...) to the amount, one
            number or one by seed. None: budgets are not checked.
        items: Arm to seed to one outcome per test item, the same items in the same order
            everywhere; adds `interval_items` (see `statistics.bootstrap_items`) to pairs whose
            shared seeds all have outcomes.
        alpha: Probability of any false winner, over all pairs.
        power: For the smallest detectable difference.
        margin: Differences inside it are called equal; stated before the runs, in the metric's
            unit. None: equality is never claimed.
        budget_tolerance: Budgets are equal if they differ by at most this share of the larger.
        outside: Arms that are fitted outside the budget, as a linear model on counts: their
            pairs compare quality alone, and a sentence says so.
        resamples: Of the bootstrap over items.
        seed: Of the bootstrap and of sampled sign flips.

    Returns:
        JSON-able dict. `difference` is `a - b` (in `verdicts` better - worse) in the metric's
        unit, so a better arm has a negative one where lower is better.

        - `arms`: `{name, trainable, seeds, metric, mean, interval, spread, outcome, sentence}`
          in the order given; `interval` simultaneous over arms, None without spread.
        - `pairs`: `{a, b, seeds, difference, interval, spread, p, p_holm, p_sign_flip, p_floor,
          detectable, outcome, sentence, reason}`, with `interval_items` where items were given;
          `reason` says why a pair was not tested.
        - `verdicts`: `{better, worse, difference, interval}` of the separated pairs.
        - `ties`: groups (two arms or more) none of which is separated from another, see
          `statistics.tie_groups`; pairs that could not be tested tie nothing.
        - `outcome`: `ranked`, `not_separated`, `equal_within_margin`, `not_ranked` (no pair
          could be tested) or `single_arm`; `sentence`: the headline; `sentences`: what else
          must be said (failed runs, missing seeds, unequal budgets, no spread).
        - `metric`, `higher_is_better`, `alpha`, `power`, `margin`, `comparisons`.

    Raises:
        ConfigError: With no arm, with one seed for several arms, or a value out of range.
    """
    question = _ask(
        table, metric, higher_is_better, alpha, power, margin, spent or {}, budget_tolerance,
        frozenset(outside),
    )  # fmt: skip
    arms = [_arm(question, name, trainable or {}) for name in table]
    pairs = [_pair(question, a, b, seed) for a, b in combinations(table, 2)]
    _adjust(question, pairs)
    if items:
        _add_item_intervals(question, pairs, items, resamples, seed)
    verdicts = [verdict_of(question, pair) for pair in pairs if pair["outcome"] == "separated"]
    tied = [(pair["a"], pair["b"]) for pair in pairs if pair["outcome"] in TIED]
    ties = [group for group in st.tie_groups(list(table), tied) if len(group) > 1]
    outcome, sentence = headline(question, arms, pairs, verdicts)
    apart = [
        f"{name} is fitted outside the budget: its pairs compare quality, not what it cost."
        for name in table
        if name in question.outside
    ]
    return {
        "arms": arms, "pairs": pairs, "verdicts": verdicts, "ties": ties, "outcome": outcome,
        "sentence": sentence, "sentences": [*apart, *remarks(arms, pairs)], "metric": metric,
        "higher_is_better": higher_is_better, "alpha": alpha, "power": power, "margin": margin,
        "comparisons": question.comparisons,
    }  # fmt: skip


def _ask(
    table: Values,
    metric: str,
    higher_is_better: bool,
    alpha: float,
    power: float,
    margin: float | None,
    spent: Spent,
    tolerance: float,
    outside: frozenset[str],
) -> Question:
    if not table:
        raise ConfigError("no arm to judge", "give at least one arm with its runs")
    if not 0 < alpha < 1 or not alpha < power < 1:
        raise ConfigError(
            f"alpha {alpha} and power {power} do not fit", "take 0 < alpha < power < 1"
        )
    if margin is not None:
        st.inside_margin((0.0, 0.0), margin)
    if strangers := sorted(set(spent) - set(table)):
        raise ConfigError(
            f"budgets are given for {listed(strangers)}, which are no arms here",
            "give them by arm, then by unit",
        )
    every_seed = sorted({seed for values in table.values() for seed in values})
    if len(table) > 1 and len(every_seed) < 2:
        raise ConfigError(
            f"{counted(len(every_seed), 'seed')} cannot tell a difference from chance",
            "run every arm with at least two seeds, better five",
        )
    numbers = {
        name: {s: float(v) for s, v in values.items() if v is not None and math.isfinite(v)}
        for name, values in table.items()
    }
    question = Question(
        metric=metric,
        higher_is_better=higher_is_better,
        alpha=alpha,
        power=power,
        margin=margin,
        table=numbers,
        failed={name: sorted(set(table[name]) - set(numbers[name])) for name in table},
        missing={name: sorted(set(every_seed) - set(table[name])) for name in table},
        spent=spent,
        tolerance=tolerance,
        outside=outside,
    )
    testable = sum(_refusal(question, a, b) is None for a, b in combinations(table, 2))
    return replace(question, comparisons=testable)


def _arm(question: Question, name: str, trainable: Mapping[str, int | None]) -> dict[str, Any]:
    values = np.array(list(question.table[name].values()))
    outcome, sentence = "complete", ""
    if question.missing[name]:
        outcome = "missing_seeds"
        sentence = (
            f"{name} was not run with {seeds_text(question.missing[name])}: its pairs use the "
            "seeds that both arms ran."
        )
    if question.failed[name]:
        outcome = "failed_run"
        runs = len(values) + len(question.failed[name])
        sentence = (
            f"{len(question.failed[name])} of {counted(runs, 'run')} of {name} failed "
            f"({seeds_text(question.failed[name])}): it is not ranked, because leaving those seeds "
            "out would favor it."
        )
    spread = float(values.std(ddof=1)) if len(values) > 1 else None
    if len(values) > 1 and st.is_constant(values):
        spread = 0.0
        if not sentence:
            sentence = f"{name} gives {significant(values[0])} at every seed."
    interval = None
    if spread:
        interval = list(st.mean_interval(values, question.alpha, len(question.table)))
    return {
        "name": name, "trainable": trainable.get(name), "seeds": len(values),
        "metric": question.metric, "mean": float(values.mean()) if len(values) else None,
        "interval": interval, "spread": spread, "outcome": outcome, "sentence": sentence,
    }  # fmt: skip


def _refusal(question: Question, a: str, b: str) -> tuple[str, str] | None:
    """Why a pair cannot be tested, as outcome and reason; None if it can be."""
    failing = [name for name in (a, b) if question.failed[name]]
    if failing:
        seeds = sorted({seed for name in failing for seed in question.failed[name]})
        return "failed_run", f"{listed(failing)} failed at {seeds_text(seeds)}"
    unequal = _unequal_budget(question, a, b)
    if unequal:
        return "unequal_budget", f"budgets differ ({unequal})"
    shared = question.table[a].keys() & question.table[b].keys()
    if len(shared) < 2:
        seeds_shared = counted(len(shared), "seed")
        return "too_few_seeds", f"they share {seeds_shared}, and at least two are needed"
    return None


def _unequal_budget(question: Question, a: str, b: str) -> str:
    if a in question.outside or b in question.outside:
        return ""
    first, second = question.spent.get(a, {}), question.spent.get(b, {})
    for unit in sorted(first.keys() | second.keys()):
        if unit not in first or unit not in second:
            return f"{unit} known for one of them only"
        for x, y in _amounts(first[unit], second[unit]):
            if not abs(x - y) <= question.tolerance * max(abs(x), abs(y)):
                return f"{min(x, y):,.6g} and {max(x, y):,.6g} {unit}"
    return ""


def _amounts(
    first: float | Mapping[int, float], second: float | Mapping[int, float]
) -> list[tuple[float, float]]:
    one = first if isinstance(first, Mapping) else None
    two = second if isinstance(second, Mapping) else None
    if one is not None and two is not None:
        return [(one[seed], two[seed]) for seed in sorted(one.keys() & two.keys())]
    if one is not None:
        return [(amount, second) for amount in one.values()]  # pyright: ignore[reportReturnType]
    if two is not None:
        return [(first, amount) for amount in two.values()]  # pyright: ignore[reportReturnType]
    return [(first, second)]  # pyright: ignore[reportReturnType]


def _pair(question: Question, a: str, b: str, seed: int) -> dict[str, Any]:
    seeds, differences = st.paired_differences(question.table[a], question.table[b])
    pair: dict[str, Any] = {
        "a": a, "b": b, "seeds": len(seeds),
        "difference": float(differences.mean()) if seeds else None, "interval": None,
        "spread": None, "p": None, "p_holm": None, "p_sign_flip": None, "p_floor": None,
        "detectable": None, "outcome": "", "sentence": "", "reason": "",
    }  # fmt: skip
    refusal = _refusal(question, a, b)
    if refusal:
        pair["outcome"], pair["reason"] = refusal
        pair["sentence"] = f"{a} and {b} are not ranked: {pair['reason']}."
        return pair
    pair["p_sign_flip"] = st.sign_flip_test(differences, seed=seed)
    pair["p_floor"] = st.sign_flip_floor(len(seeds))
    scale = max(abs(question.table[name][s]) for name in (a, b) for s in seeds)
    if st.is_constant(differences, scale):
        same = abs(pair["difference"]) <= 16 * np.finfo(float).eps * scale
        pair["spread"], pair["p"] = 0.0, 1.0
        pair["difference"] = 0.0 if same else pair["difference"]
        pair["outcome"] = "identical" if same else "constant_difference"
        pair["p_sign_flip"] = 1.0 if same else pair["p_sign_flip"]
        return pair
    pair["spread"] = float(differences.std(ddof=1))
    pair["p"] = st.paired_t_test(differences)
    pair["interval"] = list(st.mean_interval(differences, question.alpha, question.comparisons))
    pair["detectable"] = st.detectable_difference(
        pair["spread"], len(seeds), question.alpha, question.comparisons, question.power
    )
    return pair


def _adjust(question: Question, pairs: list[dict[str, Any]]) -> None:
    """Holm over the tested pairs, then the outcome and sentence of each."""
    tested = [pair for pair in pairs if pair["p"] is not None]
    for pair, adjusted in zip(tested, st.holm([pair["p"] for pair in tested])):
        pair["p_holm"] = float(adjusted)
        if not pair["outcome"]:
            if pair["p_holm"] < question.alpha:
                pair["outcome"] = "separated"
            elif question.margin and st.inside_margin(tuple(pair["interval"]), question.margin):
                pair["outcome"] = "equal_within_margin"
            else:
                pair["outcome"] = "not_separated"
        pair["sentence"] = pair_sentence(question, pair)


def _add_item_intervals(
    question: Question,
    pairs: list[dict[str, Any]],
    items: Mapping[str, Mapping[int, ArrayLike]],
    resamples: int,
    seed: int,
) -> None:
    by_seeds: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for pair in pairs:
        shared = sorted(question.table[pair["a"]].keys() & question.table[pair["b"]].keys())
        has_items = all(set(shared) <= set(items.get(pair[side], {})) for side in "ab")
        pair["interval_items"] = None
        if pair["outcome"] not in UNTESTED and has_items:
            by_seeds.setdefault(tuple(shared), []).append(pair)
    for seeds, group in by_seeds.items():
        names = dict.fromkeys(pair[side] for pair in group for side in "ab")
        intervals = st.bootstrap_items(
            {name: np.stack([np.asarray(items[name][s], float) for s in seeds]) for name in names},
            [(pair["a"], pair["b"]) for pair in group],
            question.alpha,
            question.comparisons,
            resamples,
            seed,
        )
        for pair, interval in zip(group, intervals):
            pair["interval_items"] = list(interval)
