"""One meter counts every budget at once; extra work is charged under its own name."""

from __future__ import annotations

from collections.abc import Callable
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
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = dict.fromkeys(UNITS, 0)
        self.totals |= {"micro_batches": 0, "parameter_updates": 0}
        self.charges: dict[str, dict[str, float]] = {}
        self.facts: dict[str, float] = {}

    def add(self, **amounts: float) -> None:
        """Add to the totals."""
        for key, amount in amounts.items():
            self.totals[key] = self.totals.get(key, 0) + amount

    def charge(self, name: str, **amounts: float) -> None:
        """Charge extra work under its own name; FLOPs and seconds join the totals as well."""
        entry = self.charges.setdefault(name, {})
        for key, amount in amounts.items():
            entry[key] = entry.get(key, 0) + amount
            if key in ("flops", "seconds"):
                self.totals[key] += amount

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
    return sdpa_backward_flop_count(grad, query, key, value)


_CPU_ATTENTION: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}


def _formula(packet: Any) -> Callable[..., int] | None:
    """FLOP formula of an operator; torch's registry has none for attention on CPU."""
    name = getattr(packet, "__name__", "")
    if name in _CPU_ATTENTION:
        formula = _CPU_ATTENTION[name]
        return lambda *args, out_val=None, **kwargs: formula(
            *[a.shape if isinstance(a, torch.Tensor) else a for a in args]
        )
    return flop_registry.get(packet)


class FlopCounter(TorchDispatchMode):
    """Counts multiply-adds as 2 FLOPs over everything run inside, backward included.

    Attributes:
        total: FLOPs so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas: dict[Any, Callable[..., int] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", None)
        if packet not in self._formulas:
            self._formulas[packet] = _formula(packet)
        formula = self._formulas[packet]
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


class FlopTable:
    """FLOPs by shape: measured the first time a shape is met, looked up afterwards."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}

    def run(self, key: Any, function: Callable[[], Any]) -> tuple[Any, int]:
        """Call `function`, counting only if the key is new; return its value and the FLOPs."""
        if key in self.known:
            return function(), self.known[key]
        with FlopCounter() as counter:
            value = function()
        self.known[key] = counter.total
        return value, counter.total
