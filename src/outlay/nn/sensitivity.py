"""How much each unit of many layers matters to the loss, from weights and gradients alone.

A unit is a row or column that several parameters of one layer share (a rank of an adapter, a
neuron). Scores of all units of all layers come out as one vector, ready for `core.allocate`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Importance = Literal["uncertain_sensitivity", "sensitivity", "magnitude", "random"]


class UnitScores:
    r"""Smoothed sensitivity and uncertainty of every entry, summed up over each unit.

    For an entry w with gradient g: I = |w g|, mean I <- b1 mean I + (1 - b1) I, and
    U <- b2 U + (1 - b2) |I - mean I|. The entry's score is (mean I) U, the unit's the sum over
    its parts of the mean over the part (arXiv 2303.10512, section 3.3, eq. 8 to 11). Statistics
    are float32 whatever the parameters are: products of three small numbers underflow in half
    precision. Equal shapes are stacked, so the work is a few operations and not a few per layer.

    Args:
        layers: Modules that hold the parts; all have the same parts.
        parts: Axis of the unit by name of the parameter.
        beta1: Smoothing of the sensitivity, in (0, 1).
        beta2: Smoothing of the uncertainty, in (0, 1).
        importance: "uncertain_sensitivity" as above; "sensitivity" scores an entry by the
            latest I alone; "magnitude" a unit by the |entry| of its first part; "random" draws one
            score a unit, the same ones at every step, as a control.
        generator: Draws the random scores.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        parts: Mapping[str, int],
        beta1: float = 0.85,
        beta2: float = 0.85,
        importance: Importance = "uncertain_sensitivity",
        generator: torch.Generator | None = None,
    ) -> None:
        self.layers = list(layers)
        self.parts = dict(parts)
        self.betas = (beta1, beta2)
        self.importance = importance
        first = next(iter(self.parts))
        self.counts = [_parameter(layer, first).shape[self.parts[first]] for layer in self.layers]
        self._groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for name in self.parts:
            for index, layer in enumerate(self.layers):
                shape = tuple(_parameter(layer, name).shape)
                self._groups.setdefault((name, shape), []).append(index)
        starts = [0, *itertools.accumulate(self.counts)]
        self._places = [
            torch.cat([torch.arange(starts[i], starts[i + 1]) for i in members])
            for members in self._groups.values()
        ]
        self.statistics: list[tuple[Tensor, ...]] = []
        if importance == "random":
            self._drawn = torch.rand(sum(self.counts), generator=generator)
        self._warned = False

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights and the gradients that stand beside them."""
        if self.importance in ("magnitude", "random"):
            return
        fresh = not self.statistics
        for index, (weights, grads) in enumerate(self._stacks()):
            now = weights.mul_(grads).abs_()
            if self.importance == "sensitivity":
                self.statistics[index : index + 1] = [(now,)]
                continue
            if fresh:
                self.statistics.append((torch.zeros_like(now), torch.zeros_like(now)))
            mean, spread = self.statistics[index]
            mean.lerp_(now, 1 - self.betas[0])
            spread.lerp_(now.sub_(mean).abs_(), 1 - self.betas[1])

    @torch.no_grad()
    def scores(self) -> Float[Tensor, " units"]:
        """Score of every unit, layer after layer."""
        first = next(iter(self.parts))
        device = _parameter(self.layers[0], first).device
        if self.importance == "random":
            return self._drawn.to(device)
        total = torch.zeros(sum(self.counts), device=device)
        for index, ((name, _), members) in enumerate(self._groups.items()):
            if self.importance == "magnitude":
                if name != first:
                    continue
                entries = torch.stack([_parameter(self.layers[i], name) for i in members]).abs()
            elif not self.statistics:
                continue
            else:
                mean, *spread = self.statistics[index]
                entries = mean * spread[0] if spread else mean
            others = [d for d in range(1, entries.dim()) if d != self.parts[name] + 1]
            reduced = entries.mean(others) if others else entries
            total.index_add_(0, self._places[index].to(device), reduced.flatten().float())
        return total

    def split(self, units: Tensor) -> tuple[Tensor, ...]:
        """A vector over all units, cut into the layers' parts."""
        return units.split(self.counts)

    def forget(self) -> None:
        """Drop all statistics."""
        self.statistics = []

    def state_dict(self) -> dict[str, Any]:
        """Statistics by group and kind."""
        return {
            f"{group}.{kind}": tensor
            for group, kinds in enumerate(self.statistics)
            for kind, tensor in enumerate(kinds)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        found: dict[int, list[Tensor]] = {}
        device = _parameter(self.layers[0], next(iter(self.parts))).device
        for key in sorted(state, key=lambda k: tuple(map(int, k.split(".")))):
            group = found.setdefault(int(key.split(".")[0]), [])
            group.append(state[key].to(device).clone())
        self.statistics = [tuple(found[index]) for index in sorted(found)]

    def _stacks(self) -> Any:
        """(weights, gradients) of each group, stacked, float32."""
        for (name, _), members in self._groups.items():
            held = [_parameter(self.layers[i], name) for i in members]
            grads = [p.grad for p in held]
            if any(g is None for g in grads):
                if not self._warned:
                    warnings.warn(
                        f"parameters {name!r} without a gradient count as unimportant: their "
                        "layers took no part in the loss",
                        stacklevel=2,
                    )
                self._warned = True
                grads = [
                    torch.zeros_like(p) if g is None else g
                    for p, g in zip(held, grads, strict=True)
                ]
            yield torch.stack(held).float(), torch.stack(grads).float()  # type: ignore[arg-type]


def _parameter(layer: nn.Module, name: str) -> nn.Parameter:
    return layer._parameters[name]  # type: ignore[return-value]
