"""What happens between the steps of a stage: log, show, evaluate, keep the best, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import CheckpointError
from ..core.losses import Batch
from ..core.meter import Meter
from ..core.method import Step
from . import checkpoint
from .assemble import Assembly
from .data.tasks import TaskPool
from .evaluate import Evaluation, evaluate, main_metric
from .log import Log
from .models.tokens import token_bytes
from .sequence import TaskRecord

SAVE_SECONDS = 60.0  # between checkpoints where the recipe names no steps
_SAVE_SHARE = 0.02  # of the time, at most, goes into them


@runtime_checkable
class Progress(Protocol):
    """What shows a run while it goes."""

    def stage(self, name: str, budget: Budget, meter: Meter) -> None:
        """A stage begins or goes on."""
        ...

    def step(self, step: Step, values: dict[str, Any], meter: Meter) -> None:
        """A step was taken."""
        ...

    def note(self, text: str) -> None:
        """Something the user should know."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, name: str, budget: Budget, meter: Meter) -> None:
        """Nothing."""

    def step(self, step: Step, values: dict[str, Any], meter: Meter) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class Keeper:
    """What happens between the steps of a stage: log, evaluate, keep the best, save, stop."""

    def __init__(
        self,
        assembly: Assembly,
        store: checkpoint.Checkpoints,
        labels: Any,
        progress: Progress,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self.assembly, self.store, self.labels = assembly, store, labels
        self.progress, self.asked_to_stop = progress, asked_to_stop
        self.recipe, self.meter = assembly.recipe, assembly.context.meter
        self.log: Log = Log(None)
        self.best: float | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.since_best = 0
        self.stopped = False
        self._saved_at, self._pause = time.monotonic(), SAVE_SECONDS
        assembly.loop.marks = checkpoint.buffer_marks(assembly.model, assembly.objective)
        self.metric, self.higher = main_metric(self.recipe.task, self.recipe.evaluate.metric)
        self.items: dict[str, dict[str, list[Any]]] = {}
        self.tasks: TaskRecord | None = None
        if isinstance(assembly.live.pool, TaskPool):
            names = [str(task.name) for task in self.recipe.data.in_sequence()]
            splits = {s: assembly.splits[s] for s in self.recipe.evaluate.splits}
            self.tasks = TaskRecord(names, self.metric, self.higher, splits)
        of_tokens = self.recipe.task in ("causal-language-modeling", "sequence-to-sequence")
        self._bytes = token_bytes(assembly.tokenizer) if of_tokens else None

    def on_step(self, step: Step, values: dict[str, Any]) -> None:
        """Log and show."""
        if step.index % self.recipe.every.log == 0:
            spent = {
                key: self.meter.totals[key] for key in ("tokens", "examples", "flops", "seconds")
            }
            self.log.log(values | spent, step.index)
        self.progress.step(step, values, self.meter)

    def after_step(self, step: Step) -> bool:
        """Evaluate, save; True to stop."""
        every, taken = self.recipe.every, step.index + 1
        over = self.meter.spent(self.recipe.budget) >= self.recipe.budget.amount
        stop = False
        if self.tasks is not None and taken in self.assembly.live.pool.starts:
            self._measure_tasks(self.tasks, step)
        if every.evaluate and (taken % every.evaluate == 0 or over):
            stop = self.stopped = self._evaluated(step)
        stop = stop or self.asked_to_stop()
        due = (
            taken % every.save == 0 if every.save
            else time.monotonic() - self._saved_at >= self._pause and not over
        )  # fmt: skip
        self.assembly.loop.paused = self.asked_to_stop() and not over
        if due or self.assembly.loop.paused:
            self.save()
        return stop

    def _evaluated(self, step: Step) -> bool:
        metrics = self.assembly.loop.evaluating("validation", lambda: self.measure("validation"))
        self.log.log({f"validation/{k}": v for k, v in metrics.items()}, step.index)
        # A model that some schedule has not finished with is no candidate.
        if not self.assembly.loop.may_stop(step):
            return False
        value = metrics[self.metric]
        if self.best is None or (value > self.best if self.higher else value < self.best):
            self.best, self.since_best = value, 0
            if self.recipe.evaluate.keep_best:
                named = dict(self.assembly.live.named_parameters())
                self.best_weights = {
                    n: named[n].detach().clone() for n in self.assembly.live.touched if n in named
                }
        else:
            self.since_best += 1
        patience = self.recipe.evaluate.patience
        return bool(patience and self.since_best >= patience)

    def _measure_tasks(self, record: TaskRecord, step: Step) -> None:
        """A task ended: what every task is worth now. Neither charged nor told to watchers."""
        with self.assembly.loop.gradients.phase("evaluation"):
            for split, parts in record.examples.items():
                batches = map(self.assembly.batches_of, parts)
                values = [self._evaluation(some).metrics[self.metric] for some in batches]
                self.log.log(record.add(split, values), step.index)

    def measure(self, split: str) -> dict[str, float]:
        """Metrics of one split; costs are not charged."""
        found = self._evaluation(self.assembly.batches(split))
        self.items[split] = found.table
        return found.metrics

    def _evaluation(self, batches: Iterable[Batch]) -> Evaluation:
        assembly = self.assembly
        return evaluate(
            assembly.objective.export_source(assembly.model),
            assembly.plain,
            batches,
            self.recipe.task,
            self.labels,
            around=assembly.loop.gradients.bound,
            token_bytes=self._bytes,
        )

    def measure_all(self) -> dict[str, float]:
        """Metrics of every split that the recipe names, as `split/metric`; then those of tasks."""
        found = {
            f"{split}/{name}": value
            for split in self.recipe.evaluate.splits
            if self.assembly.splits.get(split)
            for name, value in self.measure(split).items()
        }
        return found if self.tasks is None else found | self.tasks.metrics()

    def finish(self) -> None:
        """Put the best weights in place if the recipe keeps them."""
        if self.best_weights:
            named = dict(self.assembly.live.named_parameters())
            with torch.no_grad():
                for name, value in self.best_weights.items():
                    named[name].copy_(value)

    # ---- checkpoints -----------------------------------------------------------------------------

    def save(self) -> None:
        """The last act of a step."""
        loop, began = self.assembly.loop, time.monotonic()
        self.log.flush()
        tree = {
            **checkpoint.capture(self.assembly.live, loop.marks),
            "watchers": [watcher.state_dict() for watcher in self.assembly.watchers],
            "pool": self.assembly.live.pool.state_dict(),
            "drawer": {"consumed": loop.drawer.consumed, "counts": loop.drawer.counts},
            "meter": self.meter.state_dict(),
            "kept": self.assembly.context.kept,
            "best": {
                "value": self.best, "weights": self.best_weights, "since": self.since_best,
                "stopped": self.stopped,
            },
            "tasks": {} if self.tasks is None else self.tasks.state_dict(),
            "threads": torch.get_num_threads(),
            "device": self.assembly.loop.backend.device.type,
        }  # fmt: skip
        self.store.save(int(self.meter.totals["steps"]), tree)
        now = time.monotonic()
        self._saved_at, self._pause = now, max(SAVE_SECONDS, (now - began) / _SAVE_SHARE)

    def restore(self, tree: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: If the thread count differs, which changes bits.
        """
        if tree["device"] == "cpu" and tree["threads"] != torch.get_num_threads():
            raise CheckpointError(
                f"the checkpoint was made with {tree['threads']} threads, now there are "
                f"{torch.get_num_threads()}: the bits would differ",
                f"give --threads {tree['threads']}",
            )
        assembly = self.assembly
        checkpoint.restore(assembly.live, tree)
        self.meter.load_state_dict(tree["meter"])
        assembly.live.pool.load_state_dict(tree["pool"])
        assembly.loop.drawer.start_from(tree["drawer"]["consumed"], tree["drawer"]["counts"])
        for watcher, state in zip(assembly.watchers, tree["watchers"], strict=True):
            watcher.load_state_dict(state)
        if self.tasks is not None:
            self.tasks.load_state_dict(tree["tasks"])
        best = tree["best"]
        self.best, self.best_weights = best["value"], dict(best["weights"])
        self.since_best = best["since"]
        # A kill after the decision to stop early must not train on.
        self.stopped = assembly.loop.stopped = best["stopped"]
