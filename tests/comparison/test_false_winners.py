"""The campaign over recorded real runs, small: few false winners, planted shifts found."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from outlay.comparison import statistics as st

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "false_winners.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("false_winners", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pool(script):
    values = script.recorded()
    assert len(values) >= 1000 and len(set(values.values())) > 0.99 * len(values)
    return np.array(list(values.values()))


def test_no_run_is_twice_in_a_table(script, pool):
    table = script.draw(pool, 7, 10, np.random.default_rng(0))
    assert len({value for arm in table.values() for value in arm.values()}) == 70


@pytest.mark.parametrize(("arms", "seeds"), [(2, 3), (2, 6), (7, 5)])
def test_winners_are_not_made_up(script, pool, arms, seeds):
    row = script.false_winners(pool, arms, seeds, 120, np.random.default_rng(1))
    assert script.failures({"false_winners": [row]}) == []
    if arms == 7:
        assert row["uncorrected"] > 0.3 > row["rate"]


def test_a_planted_shift_is_found_as_often_as_the_tests_power_says(script, pool):
    row = script.planted(pool, 2, 6, 1.5, 200, np.random.default_rng(2))
    assert row["agrees"] and row["wrong"] == 0 and row["expected"] > 0.8
    assert row["expected"] == pytest.approx(st.t_test_power(1.5, 1.0, 6), abs=1e-4)


def test_too_many_false_winners_fail_it(script):
    row = {"arms": 2, "seeds": 3, "rate": 0.1, "interval": [0.065, 0.15]}
    assert script.failures({"false_winners": [row]}) != []


def test_a_record_that_was_cut_off_is_read_to_its_last_whole_line(script, tmp_path):
    (tmp_path / "runs.csv").write_text("seed,test/loss\n0,1.5\n1,2.25\n2,0.")
    assert script.recorded(tmp_path / "runs.csv") == {0: 1.5, 1: 2.25}
