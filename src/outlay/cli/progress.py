"""A run while it goes, on stderr: a bar on a terminal, lines at intervals elsewhere.

Everything is throttled by the clock, so a step of a fast run pays two comparisons.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .screen import amount, console, duration

if TYPE_CHECKING:
    from ..core.budget import Budget
    from ..core.meter import Meter
    from ..core.method import Step

SOON = 2.0  # seconds before anything is shown: shorter runs need no bar
_REDRAW = 0.1
_LINE_EVERY = 5.0


class Hidden:
    """Shows nothing; keeps the budget's meter for whoever asks after a failure."""

    def __init__(self) -> None:
        self.meter: Meter | None = None

    def stage(self, name: str, budget: Budget, meter: Meter) -> None:
        """A stage begins or goes on."""
        self.meter = meter

    def step(self, step: Step, values: dict[str, Any], meter: Meter) -> None:
        """A step was taken."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def run_of(self, arm: str, seed: int, index: int, total: int) -> None:
        """A run of a comparison begins."""

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Work of unknown length."""
        yield

    def close(self) -> None:
        """Take everything off the screen."""


class _Clocked(Hidden):
    """What bars and lines share: where the run is, how fast, and how long still."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.perf_counter()
        self.name, self.budget = "", None
        self.arm, self.index, self.total = "", 0, 0
        self.stage_began = self.last = self.began
        self.first: tuple[float, int] | None = None
        self.runs_began: float | None = None

    def stage(self, name: str, budget: Budget, meter: Meter) -> None:
        """A stage begins or goes on."""
        super().stage(name, budget, meter)
        self.name, self.budget, self.first = name, budget, None
        self.stage_began = time.perf_counter()

    def run_of(self, arm: str, seed: int, index: int, total: int) -> None:
        """A run of a comparison begins."""
        self.arm, self.index, self.total = f"{arm}, seed {seed}", index, total
        if index == 1 or self.runs_began is None:
            self.runs_began = time.perf_counter()

    def step(self, step: Step, values: dict[str, Any], meter: Meter) -> None:
        """A step was taken; most of them show nothing."""
        if self.first is None:
            self.first = (meter.share(self.budget), step.index) if self.budget else (0.0, 0)
            self.stage_began = time.perf_counter()
        now = time.perf_counter()
        if now - self.last < self.pause(now) or now - self.began < SOON:
            return
        self.last = now
        self.draw(step, values, meter, now)

    def pause(self, now: float) -> float:
        """Seconds between two looks."""
        return _REDRAW

    def draw(self, step: Step, values: dict[str, Any], meter: Meter, now: float) -> None:
        """Show where the run is."""

    def figures(self, step: Step, meter: Meter, now: float) -> dict[str, Any]:
        """Share of the budget, steps a second, seconds left, and the budget in words."""
        share = meter.share(self.budget) if self.budget else 0.0
        share0, index0 = self.first or (0.0, 0)
        elapsed = now - self.stage_began
        # The first step of this sitting also warms up, so it counts for neither side.
        rate = (step.index - index0) / elapsed if elapsed > 0 and step.index > index0 else None
        left = elapsed * (1 - share) / (share - share0) if share > share0 else None
        spent = meter.spent(self.budget) if self.budget else 0
        unit = self.budget.unit if self.budget else "steps"
        whole = self.budget.amount if self.budget else 0
        return {
            "share": share, "rate": rate, "left": left, "unit": unit,
            "spent": f"{amount(round(spent))}/{amount(round(whole))} {unit}",
        }  # fmt: skip

    def overall(self, share: float, now: float) -> tuple[float, float | None]:
        """Share of a whole comparison that is done, and seconds left."""
        done = (self.index - 1 + share) / self.total if self.total else share
        began = self.runs_began or self.began
        return done, (now - began) * (1 - done) / done if done > 0 else None


class Lines(_Clocked):
    """Plain lines, for a file or another program."""

    def pause(self, now: float) -> float:
        """Five seconds at first; a run of hours does not fill a log."""
        return min(60.0, max(_LINE_EVERY, (now - self.stage_began) / 20))

    def draw(self, step: Step, values: dict[str, Any], meter: Meter, now: float) -> None:
        """One more line, or the bar moved on."""
        f = self.figures(step, meter, now)
        where = f"run {self.index}/{self.total} ({self.arm}) | " if self.total else ""
        stage = "" if self.name in ("", "main") else f"{self.name} | "
        rate = f" | {f['rate']:.1f} steps/s" if f["rate"] else ""
        left = self.overall(f["share"], now)[1] if self.total else f["left"]
        print(
            f"{where}{stage}{f['spent']} ({f['share']:.0%}) | loss {values['loss']:.4f}{rate}"
            f"{'' if left is None else f' | {duration(left)} left'}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def run_of(self, arm: str, seed: int, index: int, total: int) -> None:
        """Say which run begins."""
        super().run_of(arm, seed, index, total)
        where = f"run {index}/{total}: " if total else ""
        print(f"{where}{arm}, seed {seed}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line of its own."""
        print(text, file=sys.stderr, flush=True)


class Bars(_Clocked):
    """Live bars: one for the run, one for all runs of a comparison."""

    def __init__(self) -> None:
        super().__init__()
        from rich.progress import BarColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[said]}"),
            console=console(stderr=True), transient=True, refresh_per_second=5,
        )  # fmt: skip
        self.running: Any = None
        self.whole: Any = None
        self.shown = False

    def _show(self) -> None:
        if not self.shown:
            self.shown = True
            self.progress.start()

    def draw(self, step: Step, values: dict[str, Any], meter: Meter, now: float) -> None:
        """One more line, or the bar moved on."""
        f = self.figures(step, meter, now)
        if self.running is None:
            self.running = self.progress.add_task("", total=1.0, said="")
        if self.total and self.whole is None:
            self.whole = self.progress.add_task("all runs", total=1.0, said="")
        rate = f"  {f['rate']:.1f} steps/s" if f["rate"] else ""
        self.progress.update(
            self.running, completed=f["share"], description=self.arm or self.name or "run",
            said=f"{f['spent']}  loss {values['loss']:.4f}{rate}  {duration(f['left'])} left",
        )  # fmt: skip
        if self.whole is not None:
            done, left = self.overall(f["share"], now)
            self.progress.update(
                self.whole, completed=done,
                said=f"run {self.index} of {self.total}  {duration(left)} left",
            )  # fmt: skip
        self._show()

    def note(self, text: str) -> None:
        """A line above the bars."""
        self.progress.console.print(text, markup=False)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A spinner, taken away when the work is done."""
        with self.progress.console.status(text):
            yield

    def close(self) -> None:
        """Take the bars off the screen."""
        if self.shown:
            self.progress.stop()
            self.shown = False


def progress_for(quiet: bool, hidden: bool = False) -> Hidden:
    """What fits stderr: bars on a terminal, lines elsewhere, nothing if quiet.

    Args:
        quiet: Nothing at all.
        hidden: No progress either.
    """
    if quiet or hidden:
        return Hidden()
    return Bars() if sys.stderr.isatty() else Lines()
