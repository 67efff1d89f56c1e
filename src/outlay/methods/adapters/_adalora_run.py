"""What AdaLoRA does during a run: the penalty and the allocation. arXiv 2303.10512."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...core.allocate import allocate, cubic
from ...core.errors import NoEffect
from ...core.losses import Objective, Shaped
from ...core.method import Step, Watcher, generator_of
from ...nn.lowrank import orthogonality_loss
from ...nn.sensitivity import UnitScores

if TYPE_CHECKING:
    from ._adalora_layer import TripletDelta
    from .adalora import AdaLora

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Phases:
    """Shares of the budget at which ranks start to fall and are fixed.

    Attributes:
        falls: Up to here nothing is pruned.
        fixed: From here the pattern stays.
    """

    falls: float
    fixed: float

    def progress(self, step: Step) -> float:
        """Progress of the falling phase when the step is over: <= 0 before, >= 1 after."""
        end = step.share + (1 / step.total if step.total else 0.0)
        done = (end - self.falls) / (self.fixed - self.falls)
        return 0.0 if done < _ROUNDING else 1.0 if done > 1 - _ROUNDING else done


class Orthogonal(Shaped):
    """The inner objective with the orthogonality penalty."""

    def __init__(self, inner: Objective, method: AdaLora) -> None:
        super().__init__(inner)
        self.method = method
        self._found: tuple[int, tuple[Any, ...]] = (0, ())

    def penalties(self, model: nn.Module, step: Step) -> Mapping[str, Tensor]:
        """The inner penalties and gamma times this one."""
        if self._found[0] != id(model):
            # A walk over the model costs as much as the penalty itself: once is enough.
            self._found = (id(model), tuple(self.method.deltas(model).values()))
        rows, columns = [d.a for d in self._found[1]], [d.b for d in self._found[1]]
        loss = orthogonality_loss(rows, columns, self.method.orth_norm)
        name = f"orthogonality.{self.method.adapter_name}"
        return {**super().penalties(model, step), name: self.method.gamma * loss}


class Allocation(Watcher):
    """Scores every unit after the update and zeroes the worst.

    Attributes:
        last: What the latest step did: budget (in the unit of `cost`), threshold (smallest
            score that was kept) and rank (units alive).
    """

    def __init__(self, method: AdaLora, live: Any) -> None:
        self.method, self.live = method, live
        self.deltas: dict[str, TripletDelta] = method.deltas(live.model)
        self.phases = method.phases(live.context.total_steps)
        parts = {"e": 0, "a": 0, "b": 1} if method.units == "triplets" else {"a": 0, "b": 1}
        held = list(self.deltas.values())
        draw = generator_of(live.context.seed, "adalora.importance", method.adapter_name)
        self.scores = UnitScores(
            held, parts, method.beta1, method.beta2, method.importance, generator=draw
        )
        prices = [d.a.shape[1] + d.b.shape[0] if method.cost == "params" else 1 for d in held]
        # In plain numbers: a plan assembles the run on tensors without values.
        units = [price for price, count in zip(prices, self.scores.counts) for _ in range(count)]
        self.costs = torch.tensor(units, dtype=torch.float64)
        self.start = float(sum(units))
        self.end = float(method.target_r * sum(prices))
        self.calls = self.allocations = 0
        self.fixed = False
        self.last: dict[str, float] = {}
        self._factors: list[Tensor] = []

    def budget(self, step: Step) -> float:
        """Live ranks (or parameters) that the step may leave, whole as in the paper."""
        spent = cubic(self.phases.progress(step), self.start, self.end)
        return float(int(spent + _ROUNDING * self.start))

    def after_update(self, step: Step) -> None:
        """The paper's order: weights are updated, gradients are those that updated them."""
        self.calls += 1
        if self.fixed:
            # Compacted layers have nothing dead left.
            return None if self.method.compact_final else self._mask(self._pattern())
        progress = self.phases.progress(step)
        if progress < 1:
            self.scores.update()
        if progress >= 1 or (progress > 0 and (step.index + 1) % self.method.every == 0):
            self._allocate(step)
        if progress >= 1:
            self._fix()
        return None

    def _allocate(self, step: Step) -> None:
        scores, budget = self.scores.scores(), self.budget(step)
        kept = allocate(scores, self.costs, budget)
        held = list(self.deltas.values())
        with torch.no_grad():
            torch._foreach_copy_([delta.keep for delta in held], list(self.scores.split(kept)))
        self._mask(self.scores.split(kept.to(held[0].a.dtype)))
        self.allocations += 1
        threshold = float(scores[kept].min()) if bool(kept.any()) else float("inf")
        self.last = {"budget": budget, "threshold": threshold, "rank": float(kept.sum())}

    @torch.no_grad()
    def _mask(self, factors: Sequence[Tensor]) -> None:
        """Zero what is dead: E, or the whole doublet. One factor of shape (rho,) a layer."""
        values: list[Tensor]
        columns = [factor[:, None] for factor in factors]
        held = list(self.deltas.values())
        if self.method.units == "triplets":
            values = [delta.e for delta in held if delta.e is not None]
        else:
            values = [*(delta.a for delta in held), *(delta.b for delta in held)]
            columns = [*columns, *(factor[None] for factor in factors)]
        torch._foreach_mul_(values, columns)

    def _fix(self) -> None:
        self.fixed = True
        self.scores.forget()
        if self.method.compact_final:
            name = self.method.adapter_name
            for path, layer in self._paths().items():
                alive = layer.alive()
                for leaf, axis in (("e", 0), ("a", 0), ("b", 1)):
                    value = getattr(layer, leaf)
                    if value is not None:
                        pick = _picker(alive, axis)
                        self.live.replace(f"{path}.deltas.{name}.{leaf}", pick(value), state=pick)

    def _pattern(self) -> list[Tensor]:
        """The fixed pattern as factors; made once."""
        if not self._factors:
            self._factors = [delta.keep.to(delta.a.dtype) for delta in self.deltas.values()]
        return self._factors

    def _paths(self) -> dict[str, TripletDelta]:
        ids = {id(delta): delta for delta in self.deltas.values()}
        ending = f".deltas.{self.method.adapter_name}"
        return {
            path.removesuffix(ending): ids[id(module)]
            for path, module in self.live.model.named_modules()
            if id(module) in ids
        }

    def may_stop(self, step: Step) -> bool:
        """Only where ranks are fixed: a run that ends before has not met its budget."""
        return self.fixed

    def close(self) -> None:
        """Refuse a run in which nothing was ever allocated.

        Raises:
            NoEffect: If the hook was never called, or the run ended before ranks fell.
        """
        if not self.calls:
            raise NoEffect(
                "adalora's allocation was never called: ranks stayed at init_r",
                "drive its watcher after every optimizer step, before gradients are cleared",
            )
        if not self.allocations:
            raise NoEffect(
                f"adalora never allocated in {self.calls} steps: ranks stayed at init_r",
                "make warmup_share or `every` smaller, or the budget longer",
            )

    def state_dict(self) -> dict[str, Any]:
        """Statistics, pattern and counts."""
        return {
            "statistics": self.scores.state_dict(),
            "keep": {name: delta.keep.clone() for name, delta in self.deltas.items()},
            "calls": self.calls,
            "allocations": self.allocations,
            "fixed": self.fixed,
            "last": dict(self.last),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.scores.load_state_dict(state["statistics"])
        self._factors = []
        for name, delta in self.deltas.items():
            delta.keep.copy_(state["keep"][name])
        self.calls, self.allocations = int(state["calls"]), int(state["allocations"])
        self.fixed, self.last = bool(state["fixed"]), dict(state["last"])


def _picker(alive: Tensor, axis: int) -> Any:
    return lambda tensor: tensor[alive] if axis == 0 else tensor[:, alive]
