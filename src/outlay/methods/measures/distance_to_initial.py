"""How far the pre-trained part has moved from where it began."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ...core.card import Card
from ...core.live import Live
from ...core.method import OnStep, Step, Watcher
from ...nn.targets import blocks


def distances(
    weights: dict[str, Tensor], initial: dict[str, Tensor], stack: str = ""
) -> dict[str, float]:
    r"""Distance to the initial weights, of all together and of every layer.

    Args:
        weights: Tensors by name.
        initial: Those that they began as; what is in only one of both counts nowhere.
        stack: Path of the repeated blocks.

    Returns:
        `distance`, $\lVert \theta - \theta_0 \rVert$; `relative_distance`, over
        $\lVert \theta_0 \rVert$; and `relative_distance.LAYER`: the number of a block, or `rest`.
    """
    moved: dict[str, float] = {}
    size: dict[str, float] = {}
    for name, start in initial.items():
        if name not in weights or weights[name].shape != start.shape:
            continue
        inside = stack and name.startswith(f"{stack}.")
        layer = name.removeprefix(f"{stack}.").split(".")[0] if inside else "rest"
        apart = (weights[name].detach().double() - start.double()).square().sum()
        moved[layer] = moved.get(layer, 0.0) + float(apart)
        size[layer] = size.get(layer, 0.0) + float(start.double().square().sum())

    def relative(apart: float, length: float) -> float:
        return (apart / max(length, 1e-300)) ** 0.5

    total = sum(moved.values())
    found = {"distance": total**0.5, "relative_distance": relative(total, sum(size.values()))}
    return found | {
        f"relative_distance.{layer}": relative(moved[layer], size[layer]) for layer in moved
    }


@dataclass(frozen=True, kw_only=True)
class DistanceToInitial(OnStep):
    """Distance of the model's own weights to the initial ones, in the log of every few steps.

    The task's head counts nowhere: it is new in every task. What an adapter adds beside a frozen
    weight is not seen, only what happens to the weights themselves. A model from scratch whose
    stages have different tasks has no one original; name the stage that it began with.

    Attributes:
        initial: What `context.load` takes; the run's `original` by default, whatever the stage
            starts from.
        every: Steps between measurements.
    """

    card: ClassVar[Card] = Card(
        name="distance_to_initial",
        title="Self-Distillation for Further Pre-training of Transformers",
        paper=36,
        arxiv="2210.02871",
        group="measures",
        summary="Log how far the weights are from the initial ones, in all and by layer.",
        authors="Seanie Lee, Minki Kang, Juho Lee, Sung Ju Hwang, Kenji Kawaguchi",
        year=2022,
    )
    initial: str = "original"
    every: Annotated[int, Ge(1)] = 10

    def watch(self, live: Live) -> Watcher:
        """The watcher, which holds the initial weights and changes nothing."""
        return _Distance(live, self.every, live.context.load(self.initial))


class _Distance(Watcher):
    def __init__(self, live: Live, every: int, initial: nn.Module) -> None:
        stack, prefix = blocks(initial), getattr(initial, "base_model_prefix", "")
        body = f"{prefix}." if prefix and hasattr(initial, prefix) else ""
        self.live, self.every, self.stack = live, every, stack[0] if stack else ""
        self.initial: dict[str, Tensor] = {
            n: p.detach() for n, p in initial.named_parameters() if n.startswith(body)
        }

    def after_update(self, step: Step) -> None:
        """Measure where it is due."""
        if step.index % self.every:
            return
        with torch.no_grad():
            now = self.live.every_name()
            # Adapters move a weight to another name.
            aliases = {n: now[at] for n, at in self.live.aliases.items() if at in now}
            weights: dict[str, Tensor] = {**now, **aliases}
            for name, value in distances(weights, self.initial, self.stack).items():
                self.live.context.show(name, value)
