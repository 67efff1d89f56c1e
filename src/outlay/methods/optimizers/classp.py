"""CLASSP: an optimizer for tasks in sequence (arXiv 2405.09637)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch._subclasses.fake_tensor import FakeTensor

from ...core.card import Card
from ...core.errors import ConfigError
from ...core.live import Live
from ...core.method import Context, OnOptimizer, OnStep, Step, Watcher
from ...nn.tasks import task_of_step
from ._classp_optimizer import CLASSPOptimizer, quantile_of

_STILL_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class CLASSP(OnOptimizer, OnStep):
    """Skip small gradients, and slow down weights that were updated much. arXiv 2405.09637.

    See `CLASSPOptimizer` for the rule. Learning rate and weight decay are the recipe's; the
    published learning rates are 0.2 (images) and 0.025 (text), for p = 1. The optimizer lives as
    long as the stage, so its accumulators survive a change of task (`data.tasks`).

    Attributes:
        threshold: Least squared gradient, exclusive, of an element that moves, or
            "quantile:LEVEL". Useful numbers are 1e-6 to 1e-4 for losses that are means; they
            depend on the batch size.
        p: Power of the accumulator; the published runs use 1, and 2 in an ablation.
        eps: Added to the accumulator; the published runs use 1e-5 (images) and 1e-4 (text).
        apply_decay: Divide by the accumulator.
        decay_from_task: Task, counted from 0, from which `apply_decay` holds; the published image
            runs take plain steps on the first task, which is 1 here.
        threshold_from_task: Task from which `threshold` holds.
        mode: "elementwise", the paper's rule; or "tensor_any", what the published class computes.
    """

    card: ClassVar[Card] = Card(
        name="classp",
        title="CLASSP: a Biologically-Inspired Approach to Continual Learning through Adjustment "
        "Suppression and Sparsity Promotion",
        paper=43,
        arxiv="2405.09637",
        group="optimizers",
        summary="An optimizer for tasks in sequence: small gradients are skipped, and weights that "
        "were updated much take smaller steps.",
        authors="Oswaldo Ludwig",
        year=2024,
        claims=("optimizer",),
        saves=("bytes",),
    )
    threshold: float | str = 0.0
    p: Annotated[float, Gt(0)] = 1.0
    eps: Annotated[float, Gt(0)] = 1e-5
    apply_decay: bool = True
    decay_from_task: Annotated[int, Ge(0)] = 0
    threshold_from_task: Annotated[int, Ge(0)] = 0
    mode: Literal["elementwise", "tensor_any"] = "elementwise"

    def validate(self) -> None:
        """Refuse thresholds that are none, and those that the mode cannot test."""
        try:
            level = quantile_of(self.threshold)
        except ConfigError as error:
            raise ConfigError(f"{self.card.name}.{error.problem}", error.remedy) from None
        if level is not None and self.mode == "tensor_any":
            raise ConfigError(
                f"{self.card.name}.threshold = {self.threshold!r} needs single elements",
                "use mode elementwise, or give a number",
            )

    def build(
        self, groups: Sequence[dict[str, Any]], settings: Any, context: Context
    ) -> CLASSPOptimizer:
        """The optimizer; the loop refuses gradients that are not finite before it steps."""
        return CLASSPOptimizer(
            list(groups), lr=settings.lr, threshold=self.threshold, p=self.p, eps=self.eps,
            apply_decay=self.apply_decay, mode=self.mode, nonfinite="unchecked",
        )  # fmt: skip

    def watch(self, live: Live) -> Watcher:
        """Turns settings on with their task, and says so if nothing moves."""
        return _Watcher(self, live)


class _Watcher(Watcher):
    def __init__(self, method: CLASSP, live: Live) -> None:
        self.method, self.live = method, live
        self.still_steps = 0
        # Gradients of a plan have shapes and no values.
        self.planned = isinstance(next(live.model.parameters()), FakeTensor)
        self.scheduled = bool(method.decay_from_task or method.threshold_from_task)
        if self.scheduled:
            task_of_step(live.pool, 0, method.card.name)  # refused now, not at the first step

    def _optimizers(self) -> Iterator[CLASSPOptimizer]:
        for optimizer in self.live.optimizers:
            if isinstance(optimizer, CLASSPOptimizer):
                yield optimizer

    def before_step(self, step: Step) -> None:
        """Settings that hold for some tasks alone."""
        if not self.scheduled:
            return
        method = self.method
        task = task_of_step(self.live.pool, step.index, method.card.name)
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                group["apply_decay"] = method.apply_decay and task >= method.decay_from_task
                late = task >= method.threshold_from_task
                group["threshold"] = method.threshold if late else 0.0

    def after_update(self, step: Step) -> None:
        """The share of elements that moved, beside the loss."""
        if self.planned:
            return
        densities = [optimizer.update_density() for optimizer in self._optimizers()]
        density = sum(densities) / max(1, len(densities))
        self.live.context.show("update_density", density)
        self.still_steps = 0 if density > 0 else self.still_steps + 1
        if self.still_steps == _STILL_STEPS:
            warnings.warn(
                f"{self.method.card.name}.threshold = {self.method.threshold} let no weight move "
                f"for {_STILL_STEPS} steps; the 99th percentile of squared gradients is "
                f"{self._high_square():.2g}",
                stacklevel=2,
            )

    def _high_square(self) -> float:
        """99th percentile of the squared gradients that are there now."""
        squares = [
            p.grad.detach().float().square().flatten().cpu()
            for _, p in self.live.named_parameters()
            if p.grad is not None
        ]
        if not squares:
            return 0.0
        ordered = torch.cat(squares).sort().values
        return float(ordered[int(0.99 * (len(ordered) - 1))])

    def state_dict(self) -> dict[str, Any]:
        """Steps in which nothing moved."""
        return {"still_steps": self.still_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self.still_steps = int(state["still_steps"])


__all__ = ["CLASSP", "CLASSPOptimizer"]
