"""What every sparse method does in a run: count what lives, show it, and leave the averages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.errors import ConfigError, NoEffect
from ..core.live import Live
from ..core.method import Step, Watcher
from .masking import MaskController


class MaskWatcher(Watcher):
    """Masks of one run, their density in the log, and the average parameter count at the end.

    The log line of each step shows the `density` that it trained at. The meter's facts are
    `prunable_parameters`, `average_prunable_parameters` (their live entries summed over steps, over
    the steps), `average_density` and `final_density`.

    Args:
        live: The run.
        axes: Weights by original name, with the axis of their inputs.
        owner: Name of the method, for errors.
    """

    def __init__(self, live: Live, axes: Mapping[str, int], owner: str) -> None:
        self.live, self.owner = live, owner
        self.masks = MaskController(live, axes, live.context.seed)
        self.steps = self.spent = 0

    def start(self) -> None:
        """Before the first step."""

    def due(self, step: Step) -> None:
        """After a step was trained and counted."""

    def before_step(self, step: Step) -> None:
        """Start, once: weights have values only now, not where a run is planned."""
        if not self.steps:
            self.start()

    def after_update(self, step: Step) -> None:
        """Count and show what the step trained, then do what is due."""
        self.live.context.show("density", self.masks.density())
        self.steps += 1
        self.spent += self.masks.alive
        self.due(step)

    def close(self) -> None:
        """Leave the averages in the meter.

        Raises:
            NoEffect: If the watcher was never told of a step.
        """
        if not self.steps:
            raise NoEffect(
                f"{self.owner} was to hold masks and was never told of a step",
                "call the watcher's before_step and after_update around every optimizer step, or "
                "train with run()",
            )
        average = self.spent / self.steps
        self.live.context.meter.facts |= {
            "prunable_parameters": self.masks.total,
            "average_prunable_parameters": average,
            "average_density": average / self.masks.total,
            "final_density": self.masks.density(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Counts; the masks are the run's own state."""
        return {"steps": self.steps, "spent": self.spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; the masks have come back with the run."""
        self.steps, self.spent = int(state["steps"]), int(state["spent"])
        self.masks.recount()


def known_steps(live: Live, owner: str) -> int:
    """Optimizer steps of the run, on which a schedule in steps stands.

    Raises:
        ConfigError: If the budget does not say.
    """
    if live.context.total_steps is None:
        raise ConfigError(
            f"{owner} places its events among the run's steps, and a budget of "
            f"{live.context.budget} does not say how many there will be",
            "give the budget in steps, tokens or examples",
        )
    return live.context.total_steps
