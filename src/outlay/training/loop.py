"""The training loop: plain torch, no global state, every moment of a step in order.

A step draws its micro-batches, knows the weight sum of every loss term before the first
forward, accumulates gradients of the one reduced loss, clips, updates, and lets watchers act
in between. How a step is split into micro-batches changes nothing but rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import NonFinite
from ..core.live import Live
from ..core.losses import Batch, Losses
from ..core.meter import Meter
from ..core.method import Example, Step, Watcher, seed_of
from .backend import OneDevice
from .data.batch import Drawer, example_count, token_count
from .diagnose import refuse_non_finite
from .gradients import Gradients
from .optimizer import Schedule, set_rates


@dataclass
class Loop:
    """One stage's training.

    Attributes:
        live: Model, objective, optimizers, pool and context.
        drawer: Where micro-batches come from.
        watchers: In the order they act.
        schedule: Learning-rate factor of a step.
        backend: The machine.
        gradients: Forward and backward passes.
        clip: Largest gradient norm of the whole model.
        inside: True if parameters are updated inside backward.
        on_step: Called with (step, values) after every step: logs and progress bars.
        after_step: Called with the next step's index: evaluation, checkpoint, stop. Returns
            True to stop.
        paused: True if the run was asked to stop and will go on later.
        marks: Tensors as they were before the run, for checkpoints.
        stopped: True if the run that goes on here had stopped early: no step is taken.
    """

    live: Live
    drawer: Drawer
    watchers: Sequence[Watcher]
    schedule: Schedule
    backend: OneDevice
    gradients: Gradients
    clip: float | None = None
    inside: bool = False
    on_step: Callable[[Step, dict[str, Any]], None] = lambda step, values: None
    after_step: Callable[[Step], bool] = lambda step: False
    marks: dict[str, Any] = field(default_factory=dict)
    stopped: bool = False
    paused: bool = False
    _hooks: list[Any] = field(default_factory=list)
    _homes: list[tuple[str, nn.Parameter, torch.optim.Optimizer]] = field(default_factory=list)
    _wired: bool = False

    # ---- one run -----------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the budget is spent or `after_step` stops.

        Raises:
            NonFinite: At the step whose loss or gradient is not finite, before the update.
        """
        live, meter = self.live, self.live.context.meter
        live.engine = self
        live.model.train()
        live.objective.train()
        budget = live.context.budget
        try:
            # The caller's generators come back as they were.
            with torch.random.fork_rng(self.backend.rng_devices()):
                while not self.stopped and meter.spent(budget) < budget.amount:
                    step = Step(
                        int(meter.totals["steps"]),
                        meter.share(budget),
                        live.context.seed,
                        total=live.context.total_steps or 0,
                    )
                    self.step(step, meter)
                    if self.after_step(step):
                        break
        finally:
            live.engine = None
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self._wired = False
        if not self.paused:
            for watcher in self.watchers:
                watcher.close()

    def step(self, step: Step, meter: Meter) -> dict[str, Any]:
        """Take one optimizer step and return what was logged."""
        live, started, meter.clocked = self.live, time.perf_counter(), True
        # Whoever draws from torch's default generator gets the same numbers after a resume.
        self.backend.seed(seed_of(step.seed, "step", step.index))
        self._tell("before_step", step)
        batches = [self.backend.place(b) for b in self._drawn(step)]
        live.open = False
        self._tell("before_forward", step, batches)
        self._rewire()
        rate = set_rates(live.optimizers, self.schedule(step))
        seen, flops = self.gradients.accumulate(step, batches)
        if not self.inside:
            seen.gradient_norm = float(self.clip_gradients())
            refuse_non_finite(self.gradients, step, seen.loss, batches, seen.gradient_norm)
        self._tell("after_backward", step, seen)
        self._update()
        live.open = True
        with torch.no_grad():
            live.objective.after_update(live.model, step)
        self._tell("after_update", step)
        trained = 0
        for optimizer in live.optimizers:
            for group in optimizer.param_groups:
                trained += sum(p.numel() for p in group["params"])
                trained -= sum(live.masks[n].still for n in group["names"] if n in live.masks)
            optimizer.zero_grad(set_to_none=True)
        meter.clocked = False
        meter.add(
            steps=1,
            micro_batches=len(batches),
            examples=sum(map(example_count, batches)),
            tokens=sum(token_count(batch, live.context.task) for batch in batches),
            **flops.named(),
            parameter_updates=trained,
            seconds=time.perf_counter() - started,
        )
        plain = float((seen.values * seen.weights).sum() / seen.weights.sum().clamp(min=1e-30))
        values = {"loss": plain, "lr": rate, "gradient_norm": seen.gradient_norm}
        if not math.isclose(seen.loss, plain, rel_tol=1e-5, abs_tol=1e-12):
            values["objective"] = seen.loss
        values |= live.context.figures
        live.context.figures.clear()
        self.on_step(step, values)
        return values

    def _drawn(self, step: Step) -> list[Batch]:
        """The step's micro-batches; where the model writes them, that is a charged rollout."""
        if not self.live.pool.needs_model:
            return self.drawer.draw(step)
        with torch.no_grad(), self.gradients.phase("rollout"):
            self.live.model.eval()
            self.backend.seed(seed_of(step.seed, "rollout", step.index))
            with self.live.context.meter.under("rollout"):
                return self.drawer.draw(step)

    # ---- update ------------------------------------------------------------------------------

    def clip_gradients(self) -> Tensor:
        """Clip each group that asks for it, then the whole model; the norm before clipping.

        Gradients are added in name order, so that a rebuilt model gives the same bits. Entries
        that a mask holds count in no norm, though watchers still see their gradients.
        """
        self._rewire()
        everything = [(n, p) for n, p, _ in self._homes if p.grad is not None]
        norm = whole = self._norm(everything)
        for group in [g for o in self.live.optimizers for g in o.param_groups]:
            if group.get("clip") is not None:
                some = sorted((n, p) for n, p in zip(group["names"], group["params"]) if _has(p))
                self.backend.clip([p for _, p in some], group["clip"], self._norm(some))
                whole = None
        if self.clip is not None:
            whole = self._norm(everything) if whole is None else whole
            self.backend.clip([p for _, p in everything], self.clip, whole)
        return norm

    def _norm(self, named: list[tuple[str, nn.Parameter]]) -> Tensor:
        masks = self.live.masks
        return self.backend.norm(
            p.grad * masks[n].keep if n in masks else p.grad for n, p in named if p.grad is not None
        )

    def _update(self) -> None:
        live = self.live
        if self.inside:
            # Parameters used only in earlier micro-batches did not meet the last backward.
            for name, parameter, optimizer in self._homes:
                if parameter.grad is not None:
                    self._update_one(name, parameter, optimizer)
            return
        masked = [(n, p) for n, p, _ in self._homes if n in live.masks] if live.masks else []
        for name, parameter in masked:
            live.before_update(name, parameter)
        for optimizer in live.optimizers:
            optimizer.step()
        for name, parameter in masked:
            live.after_update(name, parameter)

    def _update_one(
        self, name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer
    ) -> None:
        """Update one parameter alone, though its optimizer may hold others after an edit."""
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            raise NonFinite(
                f"the gradient of {name} is not finite",
                "lower optimizer.lr; layers above it are updated already, go back to a checkpoint",
            )
        others = [
            (p, p.grad)
            for group in optimizer.param_groups
            for p in group["params"]
            if p is not parameter
        ]
        for other, _ in others:
            other.grad = None
        self.live.before_update(name, parameter)
        optimizer.step()
        self.live.after_update(name, parameter)
        parameter.grad = None
        for other, gradient in others:
            other.grad = gradient

    def _rewire(self) -> None:
        """After a structural change: hooks sit on the parameters that are there now."""
        if self._wired and not self.live.changed:
            return
        self._wired, self.live.changed = True, False
        homes = [
            (name, parameter, optimizer)
            for optimizer in self.live.optimizers
            for group in optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"])
        ]
        self._homes = sorted(homes, key=lambda home: home[0])
        self.gradients.structure = _fingerprint(self.live)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if not self.inside:
            return
        for name, parameter, optimizer in self._homes:

            def fire(p: nn.Parameter, name: str = name, optimizer: Any = optimizer) -> None:
                if self.gradients.last_micro:
                    self._update_one(name, p, optimizer)

            self._hooks.append(parameter.register_post_accumulate_grad_hook(fire))

    # ---- watchers and services -----------------------------------------------------------------

    def _tell(self, moment: str, *arguments: Any) -> None:
        for watcher in self.watchers:
            getattr(watcher, moment)(*arguments)

    def evaluating(self, split: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Measure between the watchers' moments; charged if one of them reads the metrics."""
        live, read = self.live, any(map(_reads_metrics, self.watchers))
        with self.gradients.phase("evaluation"):
            live.open = False
            try:
                self._tell("before_eval")
                with live.context.meter.under("evaluation") if read else contextlib.nullcontext():
                    metrics = measure()
            finally:
                live.open = True
        self._tell("after_eval", split, metrics)
        return metrics

    def may_stop(self, step: Step) -> bool:
        """True if no watcher's schedule would break."""
        return all(watcher.may_stop(step) for watcher in self.watchers)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.backend.all_sum(tensor)

    def term_gradients(
        self, batches: list[Batch], terms: Iterable[str] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Gradients of each reduced term over a whole step, for `Live`."""
        return self.gradients.term_gradients(batches, terms)

    def pass_over(
        self, name: str, examples: Sequence[Example], use: Callable[[Losses], None]
    ) -> None:
        """Passes of one example each, for `Live`."""
        meter = self.live.context.meter
        step = Step(int(meter.totals["steps"]), meter.share(self.live.context.budget),
                    self.live.context.seed)  # fmt: skip
        self.gradients.pass_over(
            name, map(self.backend.place, self.drawer.one_by_one(examples, step)), step, use
        )


def _has(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None


def _reads_metrics(watcher: Watcher) -> bool:
    return type(watcher).after_eval is not Watcher.after_eval


def _fingerprint(live: Live) -> str:
    """Names, shapes and frozen set: what FLOPs depend on beside a batch's shape."""
    facts = [(n, tuple(p.shape), p.requires_grad) for n, p in live.named_parameters()]
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
