r"""Scaling laws fitted to finished runs, with intervals, and refused where runs cannot tell.

"chinchilla": $L(N, D) = E + A N^{-\alpha} + B D^{-\beta}$; "power": $L(N) = E + A N^{-\alpha}$,
what it becomes at one D. The fit is that of the Chinchilla paper (arXiv 2203.15556, appendix D.3):
Huber loss on the residuals of log L, with the sum in log-sum-exp form, by L-BFGS from a grid of
starts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.errors import ConfigError, DataError

DELTA = 1e-3  # where the Huber loss turns linear, in nats of log L
_STARTS = 12  # of the grid, the best are followed
_DISTINCT = 3  # values of N and of D: a curve with a floor takes three points
_FOLLOWS = 0.999  # correlation of log N and log D from which one cannot be told from the other
_NO_FLOOR = math.log(1e-9)
_KEYS = {"chinchilla": ("E", "A", "alpha", "B", "beta"), "power": ("E", "A", "alpha")}


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law.

    Attributes:
        form: "chinchilla" or "power".
        E: Loss that no model and no data take away, nats.
        A: Coefficient of the parameters' term.
        alpha: Its exponent.
        B: Coefficient of the tokens' term; 0 in a power law.
        beta: Its exponent; 0 in a power law.
        n_key: What was taken for N.
        intervals: 95 % bootstrap intervals by constant, over resampled runs.
        error: Mean |relative error| of the loss on the runs it was fitted to.
        runs: How many these were.
    """

    form: str
    E: float
    A: float
    alpha: float
    B: float = 0.0
    beta: float = 0.0
    n_key: str = "avg_params"
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    error: float = 0.0
    runs: int = 0

    def predict(self, parameters: Any, tokens: Any = None) -> Any:
        """Expected loss in nats; numbers or arrays.

        Raises:
            ConfigError: If the law needs tokens and none are given.
        """
        loss = self.E + self.A * np.asarray(parameters, float) ** -self.alpha
        if self.form == "chinchilla":
            if tokens is None:
                raise ConfigError("this law depends on tokens", "give tokens as well")
            loss = loss + self.B * np.asarray(tokens, float) ** -self.beta
        return float(loss) if np.ndim(loss) == 0 else loss

    def asymptote(self, parameters: float | None = None, tokens: float | None = None) -> float:
        """Loss where what is not given grows without bound; of neither, E."""
        loss = self.E
        if parameters is not None:
            loss += self.A * parameters**-self.alpha
        if tokens is not None:
            loss += self.B * tokens**-self.beta
        return loss


def fit_scaling_law(
    runs: Sequence[Mapping[str, Any]],
    form: str = "chinchilla",
    n_key: str = "avg_params",
    *,
    resamples: int = 200,
    seed: int = 0,
) -> ScalingLaw:
    """Fit a law to runs.

    Args:
        runs: One mapping a run: `n_key`, "tokens" (not for "power") and "loss" in nats.
        form: Which law.
        n_key: What counts as N.
        resamples: Bootstrap resamples for the intervals; 0 leaves them out.
        seed: Of the resampling.

    Raises:
        ConfigError: If the form is unknown.
        DataError: If the runs cannot tell the constants: values missing, not finite or not
            positive, too few distinct N or D, N and D that go together, losses that do not fall.
    """
    if form not in _KEYS:
        raise ConfigError(f"form = {form!r} is not allowed", f"give {' or '.join(_KEYS)}")
    n = _column(runs, n_key)
    d = _column(runs, "tokens") if form == "chinchilla" else np.ones_like(n)
    loss = _column(runs, "loss")
    _refuse(form, n_key, n, d, loss)
    fit = _Fit(form, n, d, loss)
    best = fit.best(fit.grid())
    constants = fit.constants(best)
    draw, found = np.random.default_rng(seed), []
    while len(found) < resamples:
        rows = draw.integers(0, len(n), len(n))
        if _tells(form, n[rows], d[rows]):
            again = _Fit(form, n[rows], d[rows], loss[rows], fit.centre)
            found.append(again.constants(again.best([best], refine=False)))
    intervals = {
        key: (float(low), float(high))
        for key in (_KEYS[form] if found else ())
        for low, high in [np.percentile([each[key] for each in found], [2.5, 97.5])]
    }
    law = ScalingLaw(form, **constants, n_key=n_key, intervals=intervals, runs=len(n))
    error = float(np.mean(np.abs(law.predict(n, d) / loss - 1)))
    return ScalingLaw(**{**vars(law), "error": error})


def _column(runs: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    values = []
    for index, run in enumerate(runs):
        value: Any = run.get(key)
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise DataError(
                f"run {index} has {key} = {value!r}", "every run needs a finite number above 0"
            )
        values.append(float(value))
    return np.array(values)


def _tells(form: str, n: np.ndarray, d: np.ndarray) -> bool:
    enough = len(set(n)) >= _DISTINCT and len({*zip(n, d)}) >= len(_KEYS[form])
    return enough and (form == "power" or (len(set(d)) >= _DISTINCT and not _follows(n, d)))


def _follows(n: np.ndarray, d: np.ndarray) -> bool:
    return bool(abs(np.corrcoef(np.log(n), np.log(d))[0, 1]) > _FOLLOWS)


def _refuse(form: str, n_key: str, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> None:
    needed = len(_KEYS[form])
    if len({*zip(n, d)}) < needed:
        raise DataError(
            f"{len({*zip(n, d)})} different runs for the {needed} constants of {form!r}",
            f"give at least {needed} runs that differ in {n_key} or tokens",
        )
    for name, values in ((n_key, n), ("tokens", d)):
        if (name == n_key or form == "chinchilla") and len(set(values)) < _DISTINCT:
            way = ', or form="power" at one number of tokens' if name == "tokens" else ""
            raise DataError(
                f"{len(set(values))} distinct values of {name}: its curve cannot be told",
                f"give runs at {_DISTINCT} or more{way}",
            )
    if form == "chinchilla" and _follows(n, d):
        raise DataError(
            f"tokens follow {n_key} (their logarithms correlate above {_FOLLOWS}): the two terms "
            "cannot be told apart",
            "give runs of one size at several numbers of tokens",
        )
    if float(np.ptp(loss)) < 1e-6 * float(loss.mean()):
        raise DataError("all losses are equal", "give runs whose loss differs")


class _Fit:
    """The objective over (log of each term's share at the centre, exponents).

    Terms are taken at the geometric mean of N and D, where they are of the size of the loss: the
    problem is then well scaled whatever the units.
    """

    def __init__(
        self, form: str, n: np.ndarray, d: np.ndarray, loss: np.ndarray,
        centre: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        self.form = form
        self.centre = centre or (float(np.log(n).mean()), float(np.log(d).mean()))
        self.x, self.y = np.log(n) - self.centre[0], np.log(d) - self.centre[1]
        self.target = np.log(loss)

    def residuals(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of log L, and their derivatives. Shapes (runs,) and (runs, constants)."""
        e, a, alpha = point[:3]
        terms = [np.full_like(self.x, e), a - alpha * self.x]
        if self.form == "chinchilla":
            terms.append(point[3] - point[4] * self.y)
        stacked = np.stack(terms)
        top = stacked.max(0)
        whole = top + np.log(np.exp(stacked - top).sum(0))
        weights = np.exp(stacked - whole)
        slopes = [weights[0], weights[1], -weights[1] * self.x]
        if self.form == "chinchilla":
            slopes += [weights[2], -weights[2] * self.y]
        return whole - self.target, np.stack(slopes, 1)

    def objective(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Huber loss in units of delta squared, and its gradient."""
        residual, slopes = self.residuals(point)
        scaled = residual / DELTA
        near = np.abs(scaled) <= 1
        value = np.where(near, scaled**2 / 2, np.abs(scaled) - 0.5).sum()
        return float(value), (np.clip(scaled, -1, 1) / DELTA) @ slopes

    def grid(self) -> list[np.ndarray]:
        """Starts: shares of the mean loss for each term, and exponents."""
        level = float(self.target.mean())
        starts = []
        for floor, alpha in itertools.product((0.1, 0.4, 0.7, 0.9), (0.1, 0.3, 0.6, 1.2)):
            if self.form == "power":
                point = [level + math.log(floor), level + math.log(1 - floor), alpha]
                starts.append(np.array(point))
                continue
            for part, beta in itertools.product((0.2, 0.5, 0.8), (0.1, 0.3, 0.6, 1.2)):
                first, second = (1 - floor) * part, (1 - floor) * (1 - part)
                point = [level + math.log(floor), level + math.log(first), alpha]
                starts.append(np.array([*point, level + math.log(second), beta]))
        return starts

    def best(self, starts: Sequence[np.ndarray], refine: bool = True) -> np.ndarray:
        """The best point that L-BFGS finds; least squares with the same loss refine it."""
        from scipy.optimize import least_squares, minimize

        chosen = sorted(starts, key=lambda start: self.objective(start)[0])[:_STARTS]
        found = [
            minimize(
                self.objective, start, jac=True, method="L-BFGS-B",
                options={"maxiter": 300, "ftol": 1e-14, "gtol": 1e-9},
            )
            for start in chosen
        ]  # fmt: skip
        point = min(found, key=lambda each: float(each.fun)).x
        if not refine:
            return point
        jacobian: Any = lambda p: self.residuals(p)[1]  # noqa: E731 - scipy's stubs want a name
        refined = least_squares(
            lambda p: self.residuals(p)[0], point, jac=jacobian,
            loss="huber", f_scale=DELTA, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=400,
        ).x  # fmt: skip
        return refined if self.objective(refined)[0] <= self.objective(point)[0] else point

    def constants(self, point: np.ndarray) -> dict[str, float]:
        """The law's constants at a point."""
        e, a, alpha = map(float, point[:3])
        # A floor that the runs do not show runs off to zero.
        floor = math.exp(e) if e > float(self.target.mean()) + _NO_FLOOR else 0.0
        found = {"E": floor, "A": math.exp(a + alpha * self.centre[0]), "alpha": alpha}
        if self.form == "chinchilla":
            b, beta = map(float, point[3:])
            found |= {"B": math.exp(b + beta * self.centre[1]), "beta": beta}
        return found
