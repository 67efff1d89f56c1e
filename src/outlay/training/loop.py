"""The training loop: plain torch, no global state, every moment of a step in order.

A step draws its micro-batches, knows the weight sum of every loss term before the first
forward, accumulates gradients of the one reduced loss, clips, updates, and lets watchers act
in between. How a step is split into micro-batches changes nothing but rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import NonFinite
from ..core.live import Live
from ..core.losses import Batch
from ..core.meter import Meter
from ..core.method import Seen, Step, Watcher
from .backend import OneDevice
from .batch import Drawer, example_count, token_count
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
    _hooks: list[Any] = field(default_factory=list)

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
        self._rewire()
        budget = live.context.budget
        try:
            while meter.spent(budget) < budget.amount:
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
            for watcher in self.watchers:
                watcher.close()

    def step(self, step: Step, meter: Meter) -> dict[str, Any]:
        """Take one optimizer step and return what was logged."""
        live, started = self.live, time.perf_counter()
        self._tell("before_step", step)
        batches = [self.backend.place(b) for b in self.drawer.draw(step)]
        self._tell("before_forward", step, batches)
        self._rewire()
        rate = set_rates(live.optimizers, self.schedule(step))
        live.open = False
        seen, flops = self.gradients.accumulate(step, batches)
        seen.gradient_norm = float(self.clip_gradients())
        self._refuse_non_finite(step, seen, batches)
        self._tell("after_backward", step, seen)
        self._update()
        live.open = True
        with torch.no_grad():
            live.objective.after_update(live.model, step)
        self._tell("after_update", step)
        trained = 0
        for optimizer in live.optimizers:
            trained += sum(p.numel() for g in optimizer.param_groups for p in g["params"])
            optimizer.zero_grad(set_to_none=True)
        meter.add(
            steps=1,
            micro_batches=len(batches),
            examples=sum(map(example_count, batches)),
            tokens=sum(map(token_count, batches)),
            flops=flops,
            parameter_updates=trained,
            seconds=time.perf_counter() - started,
        )
        plain = float((seen.values * seen.weights).sum() / seen.weights.sum().clamp(min=1e-30))
        values = {"loss": plain, "lr": rate, "gradient_norm": seen.gradient_norm}
        if not math.isclose(seen.loss, plain, rel_tol=1e-9, abs_tol=1e-12):
            values["objective"] = seen.loss
        self.on_step(step, values)
        return values

    # ---- update ------------------------------------------------------------------------------

    def clip_gradients(self) -> Tensor:
        """Clip each group that asks for it, then the whole model; the norm before clipping."""
        groups = [g for o in self.live.optimizers for g in o.param_groups]
        everything = [p for group in groups for p in group["params"] if p.grad is not None]
        for group in groups:
            if group.get("clip") is not None:
                self.backend.clip([p for p in group["params"] if p.grad is not None], group["clip"])
        return self.backend.clip(everything, self.clip)

    def _update(self) -> None:
        live = self.live
        if self.inside:
            # Parameters used only in earlier micro-batches did not meet the last backward.
            for name, parameter, optimizer in self._homes():
                if parameter.grad is not None:
                    self._update_one(name, parameter, optimizer)
            return
        named = dict(live.named_parameters()) if live.masks else {}
        masked = {name: named[name] for name in live.masks}
        for name, parameter in masked.items():
            live.before_update(name, parameter)
        for optimizer in live.optimizers:
            optimizer.step()
        for name, parameter in masked.items():
            live.after_update(name, parameter)

    def _update_one(
        self, name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer
    ) -> None:
        self.live.before_update(name, parameter)
        optimizer.step()
        self.live.after_update(name, parameter)
        parameter.grad = None

    def _homes(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        for optimizer in self.live.optimizers:
            for group in optimizer.param_groups:
                yield from ((n, p, optimizer) for n, p in zip(group["names"], group["params"]))

    def _rewire(self) -> None:
        """After a structural change: hooks sit on the parameters that are there now."""
        if self.gradients.structure and not self.live.changed:
            return
        self.gradients.structure += 1
        self.live.changed = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if not self.inside:
            return
        for name, parameter, optimizer in self._homes():

            def fire(p: nn.Parameter, name: str = name, optimizer: Any = optimizer) -> None:
                if self.gradients.last_micro:
                    self._update_one(name, p, optimizer)

            self._hooks.append(parameter.register_post_accumulate_grad_hook(fire))

    def _refuse_non_finite(self, step: Step, seen: Seen, batches: list[Batch]) -> None:
        if math.isfinite(seen.loss) and math.isfinite(seen.gradient_norm):
            return
        culprit = next(
            (
                name
                for name, p in self.live.named_parameters()
                if p.grad is not None and not bool(torch.isfinite(p.grad).all())
            ),
            "the loss itself",
        )
        ids = ", ".join(str(i) for b in batches for i in b["ids"][:3])
        raise NonFinite(
            f"step {step.index}: loss {seen.loss}, gradient norm {seen.gradient_norm}; "
            f"first seen in {culprit}; rows {ids}",
            "lower optimizer.lr, or look at these rows; the weights before this step are kept",
        )

    # ---- watchers and services -----------------------------------------------------------------

    def _tell(self, moment: str, *arguments: Any) -> None:
        for watcher in self.watchers:
            getattr(watcher, moment)(*arguments)

    def evaluating(self, split: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Measure between the watchers' moments; training mode and phase come back."""
        self.live.phase = "evaluation"
        self._tell("before_eval")
        try:
            metrics = measure()
        finally:
            self.live.phase = "train"
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
