"""One meter counts every budget at once; extra work is charged under its own name.

FLOPs are counted in three ways that are never mixed. `flops` were executed. `effective_flops`
leave out what was spent on entries that a mask holds at zero, or on forming a dense matrix from
sparse and low-rank parts: what hardware that skips zeros would do. `dense_flops` are those of the
plain dense layers in their place.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .budget import UNITS, Budget

FLOP_KINDS = ("flops", "effective_flops", "dense_flops")


class Flops(NamedTuple):
    """FLOPs of one piece of work.

    Attributes:
        executed: What was done.
        effective: Without entries that are known to be zero.
        dense: With plain dense layers in the place of sparse and low-rank ones.
    """

    executed: int
    effective: int
    dense: int

    def __add__(self, other: Any) -> Flops:  # type: ignore[override]
        return Flops(*(a + b for a, b in zip(self, other)))

    def named(self) -> dict[str, int]:
        """By the names of the meter's totals."""
        return dict(zip(FLOP_KINDS, self))


class Meter:
    """Running totals of a run. Reading never costs; writing is a few additions a step.

    Attributes:
        totals: steps, micro_batches, tokens, examples, seconds, the three kinds of FLOPs, plus
            `parameter_updates`: trainable parameters summed over steps (updates, not bytes).
        charges: Extra work by name, each a dict of the same units (teacher, scoring, tuning).
        facts: Numbers that do not grow, as the count of trainable parameters.
        clocked: True while a step is timed as a whole: extra seconds are in it already.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = dict.fromkeys(UNITS, 0)
        self.totals |= {"dense_flops": 0, "micro_batches": 0, "parameter_updates": 0}
        self.charges: dict[str, dict[str, float]] = {}
        self.facts: dict[str, float] = {}
        self.clocked = False
        self.labels: list[str] = []
        self.counting = False

    def add(self, **amounts: float) -> None:
        """Add to the totals."""
        for key, amount in amounts.items():
            self.totals[key] = self.totals.get(key, 0) + amount

    def charge(self, name: str, **amounts: float) -> None:
        """Charge extra work under its own name; FLOPs and seconds join the totals as well.

        FLOPs of one kind alone count as all three.
        """
        entry = self.charges.setdefault(name, {})
        for key, amount in amounts.items():
            entry[key] = entry.get(key, 0) + amount
            if key == "seconds" and not self.clocked:
                self.totals[key] += amount
        if "flops" in amounts:
            for kind in FLOP_KINDS:
                self.totals[kind] += amounts.get(kind, amounts["flops"])

    @contextlib.contextmanager
    def under(self, name: str) -> Iterator[None]:
        """Charge what runs inside under a name of its own: teachers, scoring, rollouts.

        Inside an objective the FLOPs are looked up with those of the step; elsewhere they are
        counted on the spot.
        """
        if self.counting:
            self.labels.append(name)
            try:
                yield
            finally:
                self.labels.pop()
            return
        started = time.perf_counter()
        with FlopCounter() as counter:
            yield
        self.charge(name, flops=counter.total, seconds=time.perf_counter() - started)

    def spent(self, budget: Budget) -> float:
        """Amount of the budget's unit that is spent so far."""
        return self.totals.get(budget.unit, 0)

    def share(self, budget: Budget) -> float:
        """Share of the budget that is spent, clipped to 1."""
        return min(1.0, self.spent(budget) / budget.amount)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "totals": dict(self.totals),
            "charges": {name: dict(entry) for name, entry in self.charges.items()},
            "facts": dict(self.facts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.totals = dict(state["totals"])
        self.charges = {name: dict(entry) for name, entry in state["charges"].items()}
        self.facts = dict(state["facts"])

    def summary(self) -> dict[str, Any]:
        """Totals, facts and charges in one flat dict for reports."""
        whole = {key: _plain(value) for key, value in (self.totals | self.facts).items()}
        for name, entry in self.charges.items():
            whole |= {f"{name}/{key}": _plain(value) for key, value in entry.items()}
        return whole


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Four matrix products. A fused kernel makes the scores once more to save memory; that is not
    counted, so that a budget in FLOPs means the same whichever kernel a machine has.
    """
    batch, heads, length, width = query
    scores = 2 * batch * heads * length * width * key[2]
    return sdpa_backward_flop_count(grad, query, key, value) - scores


_ATTENTION: dict[str, Callable[..., int]] = {
    # Torch's registry has none for attention on CPU.
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_flash_attention_backward": _attention_backward,
    "_scaled_dot_product_efficient_attention_backward": _attention_backward,
    "_scaled_dot_product_cudnn_attention_backward": _attention_backward,
}


def _formula(packet: Any) -> Callable[..., int] | None:
    """FLOP formula of an operator: torch's own, but for attention."""
    name = getattr(packet, "__name__", "")
    if name in _ATTENTION:
        formula = _ATTENTION[name]
        return lambda *args, out_val=None, **kwargs: formula(
            *[a.shape if isinstance(a, torch.Tensor) else a for a in args]
        )
    return flop_registry.get(packet)


_ACTIVE: list[FlopCounter] = []


def stand_for(executed: int, *, effective: int | None = None, dense: int | None = None) -> None:
    """Say what work that the counter sees by itself stands for; nothing where nobody counts.

    A layer that forms its weight from sparse and low-rank parts calls this in its forward, and in
    its backward where it has one of its own.

    Args:
        executed: FLOPs that the layer is about to execute, or has just executed.
        effective: What they would be without zeros and without forming dense matrices.
        dense: What the plain dense layer in its place would need.
    """
    for counter in _ACTIVE[-1:]:
        counter.correct(executed, effective, dense)


@dataclass
class Counted:
    """FLOPs of one piece of work, by what they were for and by what may be masked later.

    Attributes:
        executed: By name; "" is work without a name.
        weights: Executed FLOPs of each named weight's products (forward, input gradient, weight
            gradient), by the name of the work.
        effective: What layers said to be added for the effective count.
        dense: What layers said to be added for the dense-equivalent count.
    """

    executed: dict[str, int] = field(default_factory=lambda: {"": 0})
    weights: dict[str, dict[str, int]] = field(default_factory=dict)
    effective: dict[str, int] = field(default_factory=dict)
    dense: dict[str, int] = field(default_factory=dict)

    def flops(self, name: str = "", still: Mapping[str, float] | None = None) -> Flops:
        """FLOPs of one name.

        Args:
            name: What the work was for.
            still: Share of each weight's entries that a mask holds at zero.
        """
        executed = self.executed.get(name, 0)
        zeros = 0.0
        if still:
            spent = self.weights.get(name, {})
            zeros = sum(spent[weight] * share for weight, share in still.items() if weight in spent)
        effective = executed + self.effective.get(name, 0) - round(zeros)
        return Flops(executed, effective, executed + self.dense.get(name, 0))


class FlopCounter(TorchDispatchMode):
    """Counts multiply-adds as 2 FLOPs over everything run inside, backward included.

    Args:
        meter: Its innermost `under` names what the work is for.
        weights: Weights whose products are counted apart, by name: those that a mask may hold.

    Attributes:
        counted: FLOPs by name; "" is work without a name.
    """

    def __init__(
        self, meter: Meter | None = None, weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        self.meter = meter
        self.counted = Counted()
        self._formulas: dict[Any, Callable[..., int] | None] = {}
        self._weights = {
            _place(w): (n, tuple(w.shape), w.requires_grad) for n, w in (weights or {}).items()
        }
        # Copies in another precision stay alive, so that no other tensor takes their place.
        self._copies: list[torch.Tensor] = []
        self._awaited: dict[tuple[int, ...], list[str]] = {}

    @property
    def total(self) -> int:
        """Executed FLOPs so far."""
        return sum(self.counted.executed.values())

    @property
    def by_name(self) -> dict[str, int]:
        """Executed FLOPs by name."""
        return self.counted.executed

    def __enter__(self) -> FlopCounter:
        _ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.remove(self)
        super().__exit__(*error)

    def _name(self) -> str:
        return self.meter.labels[-1] if self.meter and self.meter.labels else ""

    def correct(self, executed: int, effective: int | None, dense: int | None) -> None:
        """See `stand_for`."""
        for sums, amount in ((self.counted.effective, effective), (self.counted.dense, dense)):
            if amount is not None:
                sums[self._name()] = sums.get(self._name(), 0) + amount - executed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", None)
        if packet not in self._formulas:
            self._formulas[packet] = _formula(packet)
        formula = self._formulas[packet]
        if formula is not None:
            amount = int(formula(*args, **(kwargs or {}), out_val=out))
            name = self._name()
            self.counted.executed[name] = self.counted.executed.get(name, 0) + amount
            if self._weights:
                self._assign(name, amount, args, out)
        elif self._weights and packet is torch.ops.aten._to_copy:
            held = self._weights.get(_place(args[0]))
            if held is not None:
                self._copies.append(out)
                self._weights[_place(out)] = held
        return out

    def _assign(self, name: str, amount: int, args: Any, out: Any) -> None:
        """Give a product to the weight that it multiplies, or whose gradient it is.

        The gradient has the weight's shape and comes in the reverse order of the forward products.
        """
        found = None
        for value in args:
            if isinstance(value, torch.Tensor) and _place(value) in self._weights:
                found, shape, trains = self._weights[_place(value)]
                if trains and torch.is_grad_enabled():
                    self._awaited.setdefault(shape, []).append(found)
        if found is None and isinstance(out, torch.Tensor) and out.dim() == 2:
            for shape in (tuple(out.shape), tuple(out.shape)[::-1]):
                if self._awaited.get(shape):
                    found = self._awaited[shape].pop()
                    break
        if found is not None:
            spent = self.counted.weights.setdefault(name, {})
            spent[found] = spent.get(found, 0) + amount


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class FlopTable:
    """FLOPs by shape: measured the first time a shape is met, looked up afterwards."""

    def __init__(self) -> None:
        self.known: dict[Any, Counted] = {}

    def run(
        self,
        key: Any,
        function: Callable[[], Any],
        meter: Meter,
        weights: Callable[[], Mapping[str, torch.Tensor]] | None = None,
        still: Mapping[str, float] | None = None,
    ) -> tuple[Any, Flops]:
        """Call `function`, counting only if the key is new.

        What ran under a name of its own (`Meter.under`) is charged to the meter.

        Args:
            key: What FLOPs depend on.
            function: The work.
            meter: Takes charges.
            weights: Gives the weights that a mask may hold now or later, by name; called only where
                something is counted.
            still: Share of each weight's entries that a mask holds at zero now.

        Returns:
            The function's value and the FLOPs without a name.
        """
        outer, meter.counting = meter.counting, True
        try:
            if key in self.known:
                value = function()
            else:
                with FlopCounter(meter, weights() if weights is not None else None) as counter:
                    value = function()
                self.known[key] = counter.counted
        finally:
            meter.counting = outer
        counted = self.known[key]
        for name in counted.executed:
            if name:
                meter.charge(name, **counted.flops(name, still).named())
        return value, counted.flops("", still)
