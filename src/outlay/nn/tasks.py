"""What a method needs to know about tasks in sequence."""

from __future__ import annotations

from typing import Any

from ..core.errors import Conflict


def task_of_step(pool: Any, step: int, name: str) -> int:
    """The task, counted from 0, whose examples a step draws.

    Args:
        pool: The run's pool.
        step: Index of the optimizer step.
        name: Method that asks.

    Raises:
        Conflict: If the run's data is no sequence of tasks.
    """
    if not hasattr(pool, "task_of_step"):
        raise Conflict(
            f"{name!r} follows the tasks of a sequence, and this run has none",
            "give the recipe data.tasks, or leave the setting out",
        )
    return pool.task_of_step(step)


def seen_examples(pool: Any, task: int) -> list[Any]:
    """The examples of a task that were trained on, each once, in the order of first sight."""
    return [pool.examples[index] for index in pool.seen_of(task)]
