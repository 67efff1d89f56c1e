"""What a judgement says in words: one sentence a pair, one headline, and what else must be said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import statistics as st
from .formats import between, counted, listed, probability, signed, significant

if TYPE_CHECKING:
    from .judge import Question


def verdict_of(question: Question, pair: dict[str, Any]) -> dict[str, Any]:
    """A separated pair as `{better, worse, difference, interval}`, turned round if need be."""
    low, high = pair["interval"]
    if (pair["difference"] > 0) == question.higher_is_better:
        better, worse, difference, interval = pair["a"], pair["b"], pair["difference"], [low, high]
    else:
        better, worse = pair["b"], pair["a"]
        difference, interval = -pair["difference"], [-high, -low]
    return {"better": better, "worse": worse, "difference": difference, "interval": interval}


def pair_sentence(question: Question, pair: dict[str, Any]) -> str:
    """What was found for one tested pair."""
    a, b, seeds = pair["a"], pair["b"], counted(pair["seeds"], "seed")
    if pair["outcome"] == "identical":
        return f"{a} and {b} give the same {question.metric} at each of {seeds}; not ranked."
    if pair["outcome"] == "constant_difference":
        return (
            f"{a} and {b} differ by {signed(pair['difference'])} {question.metric} at each of "
            f"{seeds}: no spread, so no test; not ranked."
        )
    level = f"{100 * (1 - question.alpha):g}%"
    measured = (
        f"{signed(pair['difference'])} {question.metric}, simultaneous {level} interval "
        f"{between(pair['interval'], plus=True)}, {seeds}, Holm p {probability(pair['p_holm'])}"
    )
    if pair["outcome"] == "separated":
        verdict = verdict_of(question, pair)
        text = f"{verdict['better']} is better than {verdict['worse']} ({a} − {b}: {measured})"
        if question.margin and st.inside_margin(tuple(pair["interval"]), question.margin):
            text += f", by less than the margin of {significant(question.margin)}"
        return text + "."
    if pair["outcome"] == "equal_within_margin":
        return f"{a} and {b} are equal within {significant(question.margin)} ({measured})."
    return (
        f"{a} and {b} are not separated ({measured}); a true difference of "
        f"{significant(pair['detectable'])} would have been found with probability "
        f"{question.power:g}."
    )


def headline(
    question: Question,
    arms: list[dict[str, Any]],
    pairs: list[dict[str, Any]],
    verdicts: list[dict[str, Any]],
) -> tuple[str, str]:
    """Outcome of the whole comparison, and its headline."""
    if len(arms) == 1:
        arm = arms[0]
        return "single_arm", (
            f"{arm['name']}: {question.metric} {significant(arm['mean'])}, "
            f"mean of {counted(arm['seeds'], 'seed')}; nothing to compare it with."
        )
    tested = [pair for pair in pairs if pair["p"] is not None]
    if not tested:
        reasons = {pair["outcome"] for pair in pairs}
        if reasons == {"unequal_budget"}:
            return "not_ranked", "Budgets differ, so nothing is ranked."
        return "not_ranked", "No pair of arms could be tested, so nothing is ranked."
    compared = [a["name"] for a in arms if any(a["name"] in (p["a"], p["b"]) for p in tested)]
    if not verdicts:
        if all(pair["outcome"] == "equal_within_margin" for pair in tested):
            return "equal_within_margin", (
                f"{listed(compared)} are equal within a margin of {significant(question.margin)} "
                f"{question.metric}."
            )
        return "not_separated", f"{listed(compared)} are not separated by these seeds."
    return "ranked", _ranked(question, arms, compared, pairs, verdicts)


def _ranked(
    question: Question,
    arms: list[dict[str, Any]],
    compared: Sequence[str],
    pairs: list[dict[str, Any]],
    verdicts: list[dict[str, Any]],
) -> str:
    """Who is beaten by none, who by whom; never an order among those not separated."""
    beaten = {verdict["worse"] for verdict in verdicts}
    sign = -1 if question.higher_is_better else 1
    mean = {arm["name"]: sign * arm["mean"] for arm in arms if arm["mean"] is not None}
    front = sorted((name for name in compared if name not in beaten), key=mean.__getitem__)
    wins = {name: [v for v in verdicts if v["better"] == name] for name in front}
    if len(front) == 1 and len(wins[front[0]]) == len(compared) - 1:
        closest = min(wins[front[0]], key=lambda v: abs(v["difference"]))
        return (
            f"{front[0]} is better than {listed([v['worse'] for v in wins[front[0]]])}, by at "
            f"least {significant(abs(closest['difference']))} {question.metric} on average."
        )
    if len(verdicts) == 1:
        verdict = verdicts[0]
        others = "; no other pair is separated" if len(compared) > 2 else ""
        return (
            f"{verdict['better']} is better than {verdict['worse']} by "
            f"{significant(abs(verdict['difference']))} {question.metric} on average{others}."
        )
    trailing = sorted(beaten, key=mean.__getitem__)
    untested = any(pair["p"] is None for pair in pairs if pair["a"] in front and pair["b"] in front)
    leaders = f"No arm is better than {listed(front)}"
    if len(front) > 1 and not untested:
        leaders += ", which these seeds do not separate"
    return f"{leaders}; {listed(trailing)} {'is' if len(trailing) == 1 else 'are'} beaten."


def remarks(arms: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> list[str]:
    """Sentences that a reader must not miss: failed runs, missing seeds, budgets, no spread."""
    said = [arm["sentence"] for arm in arms if arm["sentence"]]
    special = [
        pair
        for pair in pairs
        if pair["outcome"]
        in ("unequal_budget", "too_few_seeds", "identical", "constant_difference")
    ]
    # An arm that fits none of the others is said once, not once for each of them.
    for name in (arm["name"] for arm in arms):
        own = [pair for pair in special if name in (pair["a"], pair["b"])]
        reasons = {pair["reason"] for pair in own}
        others = sum(pair["outcome"] != "failed_run" and name in (pair["a"], pair["b"])
                     for pair in pairs)  # fmt: skip
        if len(own) == others > 1 and len(reasons) == 1 and reasons != {""}:
            said.append(f"{name} is not ranked against any other arm: {reasons.pop()}.")
            special = [pair for pair in special if pair not in own]
    return said + [pair["sentence"] for pair in special]


def seeds_text(seeds: Sequence[int]) -> str:
    """`seed 3`, `seeds 3 and 4`."""
    return f"seed{'' if len(seeds) == 1 else 's'} {listed([str(seed) for seed in seeds])}"
