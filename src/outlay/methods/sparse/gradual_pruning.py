"""Prune while pre-training, placed in compute, and say which dense model that equals."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le, Lt
from torch import nn

from ...core.card import Card
from ...core.claims import Claim
from ...core.errors import ConfigError
from ...core.live import Live
from ...core.method import OnStep, Step
from ...nn.masking import MaskController, Scope, Score
from ...nn.masks import average_density
from ...nn.prunable import prunable_in, prunable_weights
from ...nn.sparse_run import MaskWatcher, known_steps


@dataclass(frozen=True, kw_only=True)
class GradualPruning(OnStep):
    r"""Gradual magnitude pruning between two shares of the compute. arXiv 2501.12486.

    Dense up to `start`, pruned every `every` steps up to `end`, then trained on under fixed masks
    with the ordinary schedule. Of n events the j-th leaves the share $d^{j/n}$ of all prunable
    weights ("geometric"; d is 1 - `final_sparsity`): those of largest magnitude under one threshold
    over all weights. What is pruned stays zero in value, gradient and moments.

    Shares are of compute: a sparse step costs its density. With $\bar d$ the mean density of the
    fall, the steps before, in and after it stand as
    $a : (b - a)/\bar d : (1 - b)/d$; geometric $\bar d = (1 - d)/(-\ln d)$. For 80 % the published
    25 % and 75 % of compute are 10 % and 50 % of the steps.

    The final loss is claimed to depend on the average number of parameters over training, so a run
    costs what the dense model of `dense_equivalent` costs, and ends smaller.

    Whether the published runs pruned the output layer is not established; the released code does,
    and `head=True` does too. The released code leaves the moments of pruned weights; here they are
    cleared, which changes nothing, since nothing comes back. Random scores are independent for each
    weight, where that code repeats one draw for all weights of a shape.

    Attributes:
        final_sparsity: Share of the prunable weights that is gone in the end; the paper has 0.2 to
            0.8.
        start: Share of the run at which pruning begins.
        end: Share of the run at which it is over.
        unit: What these are shares of.
        every: Steps between events. If it does not divide the window, the last event moves to
            the end; above the window there is one event, and a warning.
        shape: How the density falls.
        scope: One threshold over all weights, or one a weight.
        score: "magnitude", or "random" as the control.
        structure: "2:4" never takes the two largest of four consecutive inputs; up to 0.5.
        exclude: Expressions or ends of paths of layers that stay dense.
        head: The output layer too, if it is not tied to the embedding.
    """

    card: ClassVar[Card] = Card(
        name="gradual_pruning",
        title="The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and "
        "Dense Scaling Laws",
        paper=32,
        arxiv="2501.12486",
        group="sparse",
        summary="Prune by magnitude between 25 % and 75 % of the compute; the rest recovers.",
        authors="Tian Jin, Ahmed Imtiaz Humayun, Utku Evci, Suvinay Subramanian, "
        "Amir Yazdanbakhsh, Dan Alistarh, Gintare Karolina Dziugaite",
        year=2025,
        claims=("mask",),
        saves=("effective FLOPs", "final parameters"),
    )
    final_sparsity: Annotated[float, Ge(0.0), Lt(1.0)] = 0.5
    start: Annotated[float, Ge(0.0), Le(1.0)] = 0.25
    end: Annotated[float, Ge(0.0), Le(1.0)] = 0.75
    unit: Literal["compute", "steps"] = "compute"
    every: Annotated[int, Ge(1)] = 100
    shape: Literal["geometric", "cubic", "linear"] = "geometric"
    scope: Scope = "global"
    score: Score = "magnitude"
    structure: Literal["2:4"] | None = None
    exclude: tuple[str, ...] = ()
    head: bool = False

    def validate(self) -> None:
        """A window of some length; no more than half under 2:4."""
        if self.end <= self.start:
            raise ConfigError(
                f"gradual_pruning.end = {self.end} is not after start = {self.start}",
                "give start < end",
            )
        if self.structure == "2:4" and self.final_sparsity > 0.5:
            raise ConfigError(
                f"gradual_pruning.final_sparsity = {self.final_sparsity} is above the half that "
                '"2:4" may take',
                "give at most 0.5, or structure=None",
            )

    # ---- beforehand --------------------------------------------------------------------------

    def window(self) -> tuple[float, float]:
        """Start and end as shares of the steps."""
        before, fall, after = self._parts()
        whole = before + fall + after
        return before / whole, (before + fall) / whole

    def _parts(self) -> tuple[float, float, float]:
        """Steps before, in and after the fall, in units that sum to 1 / average density."""
        a, b, d = self.start, self.end, 1 - self.final_sparsity
        mean = self._mean()
        if self.unit == "compute":
            return a, (b - a) / mean, (1 - b) / d
        average = a + (b - a) * mean + (1 - b) * d
        return a / average, (b - a) / average, (1 - b) / average

    def _mean(self, progress: float = 1.0) -> float:
        """Mean density of the fall up to a share of it above 0."""
        d = 1 - self.final_sparsity
        if self.shape == "linear":
            return 1 - (1 - d) * progress / 2
        if self.shape == "cubic":
            return d + (1 - d) * (1 - (1 - progress) ** 4) / (4 * progress)
        return (1 - d**progress) / -(progress * math.log(d)) if d < 1 else 1.0

    def density(self, progress: float) -> float:
        """Density at a share of the fall."""
        d = 1 - self.final_sparsity
        if self.shape == "linear":
            return 1 - (1 - d) * progress
        if self.shape == "cubic":
            return d + (1 - d) * (1 - progress) ** 3
        return d**progress

    def progress(self, spent: float, effective: bool) -> float:
        """Share of the fall that is over, in steps, when a share of the budget is spent.

        Args:
            spent: Share of the FLOPs.
            effective: They are effective ones, so that a sparse step costs its density.
        """
        first, last = (self.start, self.end) if effective else self.window()
        share = min(1.0, max(0.0, (spent - first) / (last - first)))
        if not effective or share in (0.0, 1.0):
            return share
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            cost = middle * self._mean(middle) / self._mean()
            low, high = (middle, high) if cost < share else (low, middle)
        return low

    def plan(self, total_steps: int) -> list[tuple[int, float]]:
        """Events as (steps taken before it, density from then on); the last one is exact."""
        first, last = (round(total_steps * share) for share in self.window())
        count = (last - first) // self.every + 1
        steps = [first + self.every * index for index in range(count - 1)] + [last]
        return [(step, self.density((j + 1) / count)) for j, step in enumerate(steps)]

    def average_density(self, total_steps: int | None = None) -> float:
        """Mean density over the steps of a run; without a number of steps, of a very long one."""
        if total_steps is None:
            return 1 / sum(self._parts())
        return average_density(self.plan(total_steps), total_steps)

    def dense_equivalent(self, model: nn.Module, total_steps: int | None = None) -> float:
        """Prunable parameters of the dense model that costs as much at the same tokens."""
        names = prunable_weights(model, self.exclude, self.head)
        prunable = sum(model.get_parameter(name).numel() for name in names)
        return self.average_density(total_steps) * prunable

    # ---- in a run ----------------------------------------------------------------------------

    def claims(self, model: nn.Module | None) -> list[Claim]:
        """The weights that may be pruned."""
        names = () if model is None else prunable_weights(model, self.exclude, self.head)
        return [Claim("mask", frozenset(names))]

    def watch(self, live: Live) -> MaskWatcher:
        """Prunes at the events of `plan`.

        Under a budget in FLOPs the shares are of that budget, the whole model's FLOPs, and there is
        an event every `every` steps of the fall.

        Raises:
            ConfigError: If the budget says neither how many steps nor how much compute there is.
        """
        unit = live.context.budget.unit
        if unit == "effective_flops" and self.unit == "steps" and self.final_sparsity:
            raise ConfigError(
                "gradual_pruning.unit = 'steps' and a budget in effective_flops: the steps are not "
                "known beforehand",
                "use unit='compute', or a budget in steps or tokens",
            )
        by_share = unit in ("flops", "effective_flops")
        return _PrunerByShare(self, live) if by_share else _Pruner(self, live)


def _prune(masks: MaskController, method: GradualPruning, density: float, draw: str) -> None:
    """Tighten the masks to a density, as the settings say."""
    masks.prune(
        density, scope=method.scope, score=method.score, structure=method.structure, draw=draw
    )


class _Pruner(MaskWatcher):
    """Tightens the masks after the update that comes before each event."""

    def __init__(self, method: GradualPruning, live: Live) -> None:
        super().__init__(live, prunable_in(live, method.exclude, method.head), method.card.name)
        self.method, self.done = method, 0
        self.events = method.plan(known_steps(live, method.card.name))
        if len(self.events) == 1 and method.final_sparsity:
            warnings.warn(
                f"gradual_pruning.every = {method.every} is longer than the window: everything is "
                f"pruned at once, after step {self.events[0][0]}",
                stacklevel=2,
            )

    def start(self) -> None:
        """An event before the first step."""
        self._prune(0)

    def due(self, step: Step) -> None:
        """Events before the next step."""
        self._prune(step.index + 1)

    def _prune(self, taken: int) -> None:
        method, last = self.method, self.done
        while self.done < len(self.events) and self.events[self.done][0] <= taken:
            self.done += 1
        if self.done > last and method.final_sparsity:
            step, density = self.events[self.done - 1]
            _prune(self.masks, method, density, str(step))

    def may_stop(self, step: Step) -> bool:
        """Only at the final density."""
        return self.done == len(self.events)

    def close(self) -> None:
        """A budget in tokens may end before its expected last step: what is left is pruned."""
        if self.steps and self.done < len(self.events):
            warnings.warn(
                f"the run ended after {self.steps} steps, before the last pruning event: the rest "
                "was pruned at its end",
                stacklevel=2,
            )
            self._prune(self.events[-1][0])
        super().close()

    def state_dict(self) -> dict[str, Any]:
        """Counts and how many events are over."""
        return super().state_dict() | {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        super().load_state_dict(state)
        self.done = int(state["done"])


class _PrunerByShare(MaskWatcher):
    """Tightens the masks as a budget in FLOPs is spent, whose number of steps is not known."""

    def __init__(self, method: GradualPruning, live: Live) -> None:
        super().__init__(live, prunable_in(live, method.exclude, method.head), method.card.name)
        self.method, self.last = method, -method.every
        self.over = method.final_sparsity == 0

    def start(self) -> None:
        """An event before the first step."""
        self._prune(0)

    def due(self, step: Step) -> None:
        """Events before the next step."""
        self._prune(step.index + 1)

    def _prune(self, taken: int) -> None:
        context, method = self.live.context, self.method
        spent = context.meter.share(context.budget)
        progress = method.progress(spent, context.budget.unit == "effective_flops")
        if self.over or not (progress == 1 or (progress > 0 and taken - self.last >= method.every)):
            return
        self.last, self.over = taken, progress == 1
        _prune(self.masks, method, method.density(progress), str(taken))

    def may_stop(self, step: Step) -> bool:
        """Only at the final density."""
        return self.over

    def close(self) -> None:
        """The last event, where the budget ended in the step before it."""
        if self.steps and not self.over and self.method.end == 1:
            self.over = True
            _prune(self.masks, self.method, self.method.density(1.0), "end")
        super().close()

    def state_dict(self) -> dict[str, Any]:
        """Counts, the step of the last event and whether all are over."""
        return super().state_dict() | {"last": self.last, "over": self.over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        super().load_state_dict(state)
        self.last, self.over = int(state["last"]), bool(state["over"])
