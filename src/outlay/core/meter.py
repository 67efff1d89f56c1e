"""One meter counts every budget at once; extra work is charged under its own name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .budget import UNITS, Budget


class Meter:
    """Running totals of a run. Reading never costs; writing is a few additions a step.

    Attributes:
        totals: steps, micro_batches, tokens, examples, flops, seconds, plus
            `parameter_updates`: trainable parameters summed over steps (updates, not bytes).
        charges: Extra work by name, each a dict of the same units (teacher, scoring, tuning).
        facts: Numbers that do not grow, as the count of trainable parameters.
        clocked: True while a step is timed as a whole: extra seconds are in it already.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = dict.fromkeys(UNITS, 0)
        self.totals |= {"micro_batches": 0, "parameter_updates": 0}
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
        """Charge extra work under its own name; FLOPs and seconds join the totals as well."""
        entry = self.charges.setdefault(name, {})
        for key, amount in amounts.items():
            entry[key] = entry.get(key, 0) + amount
            if key == "flops" or (key == "seconds" and not self.clocked):
                self.totals[key] += amount

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


class FlopCounter(TorchDispatchMode):
    """Counts multiply-adds as 2 FLOPs over everything run inside, backward included.

    Args:
        meter: Its innermost `under` names what the work is for.

    Attributes:
        by_name: FLOPs by name; "" is work without a name.
    """

    def __init__(self, meter: Meter | None = None) -> None:
        super().__init__()
        self.meter = meter
        self.by_name: dict[str, int] = {"": 0}
        self._formulas: dict[Any, Callable[..., int] | None] = {}

    @property
    def total(self) -> int:
        """FLOPs so far."""
        return sum(self.by_name.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", None)
        if packet not in self._formulas:
            self._formulas[packet] = _formula(packet)
        formula = self._formulas[packet]
        if formula is not None:
            name = self.meter.labels[-1] if self.meter and self.meter.labels else ""
            amount = int(formula(*args, **(kwargs or {}), out_val=out))
            self.by_name[name] = self.by_name.get(name, 0) + amount
        return out


class FlopTable:
    """FLOPs by shape: measured the first time a shape is met, looked up afterwards."""

    def __init__(self) -> None:
        self.known: dict[Any, dict[str, int]] = {}

    def run(self, key: Any, function: Callable[[], Any], meter: Meter) -> tuple[Any, int]:
        """Call `function`, counting only if the key is new.

        What ran under a name of its own (`Meter.under`) is charged to the meter.

        Returns:
            The function's value and the FLOPs without a name.
        """
        outer, meter.counting = meter.counting, True
        try:
            if key in self.known:
                value = function()
            else:
                with FlopCounter(meter) as counter:
                    value = function()
                self.known[key] = counter.by_name
        finally:
            meter.counting = outer
        for name, amount in self.known[key].items():
            if name:
                meter.charge(name, flops=amount)
        return value, self.known[key][""]
