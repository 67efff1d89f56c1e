"""The judge: JSON pieces, defined outcomes, and simulated rates of false and true winners."""

import json
from itertools import pairwise

import numpy as np
import pytest

from outlay.comparison import statistics as st
from outlay.comparison.judge import judge
from outlay.core.errors import ConfigError


def table_of(shifts, seeds=6, spread=0.004, generator=None):
    generator = generator or np.random.default_rng(0)
    hard = generator.normal(0, 0.01, seeds)
    return {
        name: {s: float(0.8 + shift + hard[s] + generator.normal(0, spread)) for s in range(seeds)}
        for name, shift in shifts.items()
    }


@pytest.fixture
def clear():
    return judge(
        table_of({"good": 0.05, "also good": 0.051, "bad": -0.1}),
        metric="test accuracy",
        trainable={"good": 1000, "bad": 7},
    )


def test_pieces_are_those_that_the_command_prints(clear):
    assert json.loads(json.dumps(clear)) == clear
    assert [arm["name"] for arm in clear["arms"]] == ["good", "also good", "bad"]
    assert [arm["trainable"] for arm in clear["arms"]] == [1000, None, 7]
    assert {"name", "trainable", "seeds", "metric", "mean", "interval"} <= set(clear["arms"][0])
    for pair in clear["pairs"]:
        assert set(pair) >= {
            "a", "b", "difference", "interval", "p_holm", "p_sign_flip", "detectable",
        }  # fmt: skip
    assert {"better", "worse", "difference", "interval"} == set(clear["verdicts"][0])
    assert clear["ties"] == [["good", "also good"]]
    assert clear["outcome"] == "ranked"
    assert "bad is beaten" in clear["sentence"]


def test_numbers_equal_the_plain_functions(clear):
    table = table_of({"good": 0.05, "also good": 0.051, "bad": -0.1})
    differences = [
        np.array(list(table[a].values())) - np.array(list(table[b].values()))
        for a, b in [("good", "also good"), ("good", "bad"), ("also good", "bad")]
    ]
    adjusted = st.holm([st.paired_t_test(x) for x in differences])
    for pair, x, p in zip(clear["pairs"], differences, adjusted):
        assert pair["difference"] == pytest.approx(x.mean())
        assert pair["interval"] == pytest.approx(st.mean_interval(x, 0.05, 3))
        assert pair["p_holm"] == pytest.approx(p)
        assert pair["p_sign_flip"] == st.sign_flip_test(x)
        assert pair["p_floor"] == 2 / 64
        assert pair["detectable"] == pytest.approx(
            st.detectable_difference(x.std(ddof=1), 6, 0.05, 3)
        )


def test_lower_is_better_turns_the_verdict_and_keeps_the_unit():
    table = table_of({"low": -0.1, "high": 0.1})
    result = judge(table, metric="validation loss", higher_is_better=False)
    [verdict] = result["verdicts"]
    assert (verdict["better"], verdict["worse"]) == ("low", "high")
    assert verdict["difference"] < 0
    assert verdict["interval"][0] < verdict["difference"] < verdict["interval"][1] < 0
    turned = judge(dict(reversed(table.items())), metric="loss", higher_is_better=False)
    assert turned["verdicts"][0]["better"] == "low"
    assert turned["verdicts"][0]["interval"] == pytest.approx(verdict["interval"])


def test_one_seed_is_refused_and_none_is_too():
    with pytest.raises(ConfigError, match="1 seed cannot"):
        judge({"a": {0: 0.5}, "b": {0: 0.6}}, metric="accuracy")
    with pytest.raises(ConfigError, match="no arm"):
        judge({}, metric="accuracy")


def test_one_arm_alone_is_described_and_not_compared():
    result = judge({"a": {0: 0.5}}, metric="accuracy")
    assert result["outcome"] == "single_arm"
    assert result["pairs"] == result["verdicts"] == result["ties"] == []
    assert result["arms"][0]["interval"] is None


def test_unequal_budgets_are_never_ranked():
    table = table_of({"a": 0.3, "b": 0.0})
    spent = {"a": {"steps": 100}, "b": {"steps": dict.fromkeys(range(6), 150)}}
    result = judge(table, metric="accuracy", spent=spent)
    assert result["verdicts"] == result["ties"] == []
    assert result["outcome"] == "not_ranked"
    assert result["pairs"][0]["outcome"] == "unequal_budget"
    assert "100 and 150 steps" in result["pairs"][0]["sentence"]
    assert result["pairs"][0]["p_holm"] is None
    close = {"a": {"steps": 100}, "b": {"steps": 100.5}}
    assert judge(table, metric="accuracy", spent=close)["outcome"] == "ranked"
    unknown = {"a": {"steps": 100}, "b": {}}
    assert judge(table, metric="accuracy", spent=unknown)["outcome"] == "not_ranked"


def test_an_unequal_pair_does_not_stop_the_equal_ones():
    table = table_of({"a": 0.3, "b": 0.0, "c": 0.1})
    spent = {"a": {"tokens": 10}, "b": {"tokens": 10}, "c": {"tokens": 20}}
    result = judge(table, metric="accuracy", spent=spent)
    assert [(v["better"], v["worse"]) for v in result["verdicts"]] == [("a", "b")]
    assert result["comparisons"] == 1
    assert result["sentences"] == [
        "c is not ranked against any other arm: budgets differ (10 and 20 tokens)."
    ]


def test_a_failed_run_is_not_dropped_but_stops_the_ranking_of_its_arm():
    table = table_of({"a": 0.3, "b": 0.0, "c": 0.1})
    table["a"][3] = float("nan")
    table["a"][4] = None
    result = judge(table, metric="accuracy")
    outcomes = {(pair["a"], pair["b"]): pair["outcome"] for pair in result["pairs"]}
    assert outcomes[("a", "b")] == outcomes[("a", "c")] == "failed_run"
    assert outcomes[("b", "c")] == "separated"
    assert result["arms"][0]["outcome"] == "failed_run"
    assert "seeds 3 and 4" in result["arms"][0]["sentence"]
    assert result["arms"][0]["seeds"] == 4


def test_missing_seeds_leave_the_shared_ones():
    table = table_of({"a": 0.3, "b": 0.0})
    del table["b"][5], table["b"][4]
    result = judge(table, metric="accuracy")
    assert result["arms"][1]["outcome"] == "missing_seeds"
    assert "seeds 4 and 5" in result["sentences"][0]
    assert result["pairs"][0]["seeds"] == 4
    assert result["pairs"][0]["outcome"] == "separated"
    alone = {"a": {0: 0.1, 1: 0.2}, "b": {1: 0.3, 2: 0.4}}
    assert judge(alone, metric="accuracy")["pairs"][0]["outcome"] == "too_few_seeds"


def test_constant_metrics_are_named_and_not_ranked():
    same = {name: {0: 1.0, 1: 1.0, 2: 1.0} for name in "ab"}
    result = judge(same, metric="accuracy")
    assert result["pairs"][0]["outcome"] == "identical"
    assert result["pairs"][0]["p_holm"] == 1
    assert result["ties"] == [["a", "b"]]
    shifted = {"a": {0: 0.7, 1: 0.8, 2: 0.3}, "b": {0: 0.6, 1: 0.7, 2: 0.2}}
    result = judge(shifted, metric="accuracy")
    assert result["pairs"][0]["outcome"] == "constant_difference"
    assert result["verdicts"] == []
    assert "no spread" in result["pairs"][0]["sentence"]


def test_equality_needs_a_margin_stated_beforehand():
    table = table_of({"a": 0.001, "b": 0.0}, spread=0.002)
    assert judge(table, metric="accuracy")["outcome"] == "not_separated"
    equal = judge(table, metric="accuracy", margin=0.02)
    assert equal["outcome"] == "equal_within_margin"
    assert "equal within 0.0200" in equal["pairs"][0]["sentence"]
    assert judge(table, metric="accuracy", margin=0.001)["outcome"] == "not_separated"
    with pytest.raises(ConfigError, match="margin"):
        judge(table, metric="accuracy", margin=-1)


def test_not_separated_says_what_would_have_been_seen():
    pair = judge(table_of({"a": 0.0, "b": 0.0}), metric="accuracy")["pairs"][0]
    assert "would have been found with probability 0.8" in pair["sentence"]


def test_items_add_a_bootstrap_interval():
    generator = np.random.default_rng(5)
    skill = {"a": 0.9, "b": 0.6}
    items = {
        name: {s: (generator.random(200) < p).astype(int) for s in range(4)}
        for name, p in skill.items()
    }
    table = {name: {s: float(x.mean()) for s, x in rows.items()} for name, rows in items.items()}
    [pair] = judge(table, metric="accuracy", items=items, resamples=1_000)["pairs"]
    assert pair["interval_items"][0] < pair["difference"] < pair["interval_items"][1]
    del items["b"][3]
    [pair] = judge(table, metric="accuracy", items=items, resamples=1_000)["pairs"]
    assert pair["interval_items"] is None


@pytest.mark.parametrize("seeds", [3, 6])
def test_false_winners_among_equal_arms_stay_below_alpha(seeds):
    generator = np.random.default_rng(6)
    tables, wrong = 150, 0
    for _ in range(tables):
        table = table_of(dict.fromkeys("abcd", 0.0), seeds, generator=generator)
        wrong += bool(judge(table, metric="accuracy")["verdicts"])
    # 150 tables at a true rate of 5 % exceed 14 with a probability below 1 %.
    assert wrong <= 14


def test_planted_differences_are_found_as_often_as_the_power_says():
    generator = np.random.default_rng(7)
    seeds, spread, tables = 5, 1.0, 4_000
    shift = st.detectable_difference(spread, seeds)
    x = generator.normal(shift, spread, (tables, seeds))
    found = np.mean([st.paired_t_test(row) < 0.05 for row in x])
    assert found == pytest.approx(0.8, abs=0.02)


def test_headline_never_orders_arms_that_are_not_separated():
    result = judge(table_of({"a": 0.2, "b": 0.1, "c": 0.0, "d": 0.001}), metric="accuracy")
    assert result["sentence"].startswith("a is better than b")
    for first, second in pairwise(result["ties"]):
        assert set(first) != set(second)
    assert ["c", "d"] in result["ties"]


def test_an_arm_outside_the_budget_is_compared_and_said() -> None:
    table = {"trained": {0: 0.9, 1: 0.92, 2: 0.91}, "fitted": {0: 0.5, 1: 0.5, 2: 0.5}}
    spent = {"trained": {"steps": 10.0}}
    without = judge(table, metric="test/accuracy", spent=spent)
    assert without["pairs"][0]["outcome"] == "unequal_budget"
    found = judge(table, metric="test/accuracy", spent=spent, outside=["fitted"])
    assert found["pairs"][0]["outcome"] == "separated"
    assert any("fitted outside the budget" in sentence for sentence in found["sentences"])
