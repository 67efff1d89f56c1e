"""The law's constants come back from its own losses; what cannot be fitted is refused by name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from outlay.core.errors import ConfigError, DataError
from outlay.studies.scaling_laws import ScalingLaw, fit_scaling_law

LAWS = [
    ScalingLaw("chinchilla", 1.69, 406.4, 0.34, 410.7, 0.28),
    ScalingLaw("chinchilla", 2.4, 30.0, 0.5, 80.0, 0.35),
    ScalingLaw("chinchilla", 0.8, 12.0, 0.12, 5e3, 0.7),
]
SIZES = np.geomspace(3e6, 5e8, 5)
TOKENS = np.geomspace(6e7, 1e10, 5)


def rows(law: ScalingLaw, noise: float = 0.0, sizes=SIZES, tokens=TOKENS) -> list[dict]:
    draw = np.random.default_rng(1)
    return [
        {"avg_params": n, "tokens": d,
         "loss": law.predict(n, d) * float(np.exp(noise * draw.standard_normal()))}
        for n, d in itertools.product(sizes, tokens)
    ]  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
def test_known_constants_come_back(law):
    found = fit_scaling_law(rows(law), resamples=0)
    for key in ("E", "A", "alpha", "B", "beta"):
        assert getattr(found, key) == pytest.approx(getattr(law, key), rel=1e-3), key
    assert found.error < 1e-8 and found.intervals == {} and found.runs == 25


def test_one_number_of_tokens_is_a_power_law():
    law = LAWS[0]
    found = fit_scaling_law(rows(law, tokens=[1e9]), "power", resamples=0)
    assert found.alpha == pytest.approx(law.alpha, rel=1e-3)
    assert pytest.approx(law.A, rel=1e-3) == found.A
    assert pytest.approx(law.E + law.B * 1e9**-law.beta, rel=1e-3) == found.E
    assert found.predict(1e8) == pytest.approx(law.predict(1e8, 1e9), rel=1e-6)


def test_small_runs_are_scaled_as_well_as_large_ones():
    law = ScalingLaw("chinchilla", 2.0, 8.0, 0.25, 20.0, 0.3)
    found = fit_scaling_law(
        rows(law, sizes=[2e4, 5e4, 1e5, 2e5], tokens=[5e4, 1e5, 2e5]), resamples=0
    )
    assert found.alpha == pytest.approx(0.25, rel=1e-3)
    assert pytest.approx(2.0, rel=1e-3) == found.E


def test_intervals_hold_the_constants_and_outliers_do_not_move_them():
    law = LAWS[1]
    table = rows(law, noise=2e-3)
    table[7]["loss"] *= 1.5
    found = fit_scaling_law(table, resamples=40, seed=2)
    for key in ("E", "alpha", "beta"):
        low, high = found.intervals[key]
        assert low < getattr(law, key) < high, key
    assert found.alpha == pytest.approx(law.alpha, rel=0.1)
    again = fit_scaling_law(table, resamples=40, seed=2)
    assert again.intervals == found.intervals


def test_predictions_and_asymptotes():
    law = LAWS[0]
    assert law.predict(1e8, 1e9) == pytest.approx(1.69 + 406.4 / 1e8**0.34 + 410.7 / 1e9**0.28)
    assert law.predict(SIZES, 1e9).shape == (5,)
    assert law.asymptote() == law.E
    assert law.asymptote(parameters=1e8) == pytest.approx(law.predict(1e8, 1e60))
    assert law.asymptote(tokens=1e9) == pytest.approx(law.predict(1e60, 1e9))
    with pytest.raises(ConfigError, match="depends on tokens"):
        law.predict(1e8)


def refused(table: list[dict], names: str, form: str = "chinchilla") -> None:
    with pytest.raises(DataError, match=names):
        fit_scaling_law(table, form, resamples=0)


def test_what_cannot_be_fitted_is_refused_by_name():
    law = LAWS[0]
    refused(rows(law, sizes=SIZES[:2]), "2 distinct values of avg_params")
    refused(rows(law, tokens=TOKENS[:2]), "2 distinct values of tokens")
    refused(rows(law, sizes=SIZES[:2], tokens=TOKENS[:1]), "2 different runs for the 5 constants")
    refused(rows(law, sizes=SIZES[:2], tokens=TOKENS[:1]), "2 different runs for the 3", "power")
    table = [{"avg_params": n, "tokens": 20 * n, "loss": law.predict(n, 20 * n)} for n in SIZES]
    refused(table, "tokens follow avg_params")
    for value in (float("nan"), float("inf"), 0.0, -1, None, "3", True):
        broken = rows(law)
        broken[3]["loss"] = value
        refused(broken, "run 3 has loss = ")
    refused([{**row, "loss": 2.0} for row in rows(law)], "all losses are equal")
    refused([{"tokens": 1.0, "loss": 2.0}] * 6, "run 0 has avg_params = None")
    with pytest.raises(ConfigError, match="form = 'cubic'"):
        fit_scaling_law(rows(law), "cubic")
