"""Elastic weight consolidation: weights that earlier tasks need are held (arXiv 1612.00796)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from ...core.card import Card
from ...core.errors import ConfigError, Conflict
from ...core.live import Live
from ...core.losses import Losses, Objective
from ...core.method import Context, OnObjective, OnStep, Watcher
from ...nn.anchoring import Anchored, TaskEnds, add_quadratic, trained_values
from ...nn.tasks import seen_examples


@dataclass(frozen=True, kw_only=True)
class EWC(OnObjective, OnStep):
    """Add strength / 2 * sum over earlier tasks k of F_k * (w - w_k)^2, in nats.

    w_k are the weights when task k ended, F_k the diagonal of the Fisher information there: the
    mean over examples of the squared gradient of one example's log-likelihood, in evaluation mode.
    Squares of batch gradients, which some code uses in its place, underestimate it. All earlier
    tasks together take two tensors a weight, since a sum of quadratics is one. Section 2.

    An example of several tokens counts as the mean over its tokens, as in the training loss.

    Attributes:
        strength: lambda; what is right depends on the task, so sweep it (10 to 1000 are usual for
            the Fisher as it is defined here).
        fisher: "sampled" draws the label from the model, as the definition has it; "empirical"
            takes the example's own, which vanishes where the model fits every example.
        online: One quadratic around the last weights, its Fisher decayed and added to (arXiv
            1805.06370).
        decay: With `online`, what is left of the Fisher of earlier tasks at each change.
        samples: Examples of a task that its Fisher is taken from, of those that were trained on.
    """

    card: ClassVar[Card] = Card(
        name="ewc",
        title="Overcoming catastrophic forgetting in neural networks",
        arxiv="1612.00796",
        group="objectives",
        summary="Hold the weights that earlier tasks need, by their Fisher information.",
        authors="James Kirkpatrick, Razvan Pascanu, Neil Rabinowitz, Joel Veness et al.",
        year=2017,
    )
    strength: Annotated[float, Gt(0)] = 100.0
    fisher: Literal["sampled", "empirical"] = "sampled"
    online: bool = False
    decay: Annotated[float, Gt(0), Le(1)] = 1.0
    samples: Annotated[int, Ge(1)] = 500

    def validate(self) -> None:
        """Refuse a decay that nothing would use."""
        if self.decay != 1 and not self.online:
            raise ConfigError(
                f"ewc.decay = {self.decay} is for one running Fisher", "set online=True as well"
            )

    def shape(self, objective: Objective, model: nn.Module, context: Context) -> Objective:
        """The objective with the penalty."""
        return Anchored(objective, self, self.strength)

    def watch(self, live: Live) -> Watcher:
        """Takes weights and Fisher when a task ends."""

        def ended(anchored: Anchored, task: int) -> None:
            values, fisher = trained_values(live.model), self.fisher_of(live, task)
            if self.online:
                for name, total in anchored.importance.items():
                    fisher[name] += self.decay * total
                anchored.anchors, anchored.importance = values, fisher
            else:
                add_quadratic(anchored, values, fisher)

        return TaskEnds(live, self, ended)

    def fisher_of(self, live: Live, task: int) -> dict[str, Tensor]:
        """Diagonal of the Fisher information by parameter, charged as "ewc".

        Args:
            live: The run.
            task: Whose examples are taken.
        """
        seen = seen_examples(live.pool, task)
        generator = live.context.generator(f"ewc {task}")
        chosen = torch.randperm(len(seen), generator=generator)[: self.samples].tolist()
        named = {n: p for n, p in live.model.named_parameters() if p.requires_grad}
        diagonal = {name: torch.zeros_like(p) for name, p in named.items()}

        def add(losses: Losses) -> None:
            value = nats(losses) if self.fisher == "empirical" else sampled_nats(losses, generator)
            gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    diagonal[name] += gradient.detach().square() / len(chosen)

        live.pass_over(self.card.name, [seen[i] for i in chosen], add)
        return diagonal


def nats(losses: Losses) -> Tensor:
    """Mean loss of the batch before anyone shaped it; 0 if nothing in it counts."""
    assert losses.plain is not None
    return losses.plain.row_sums().sum() / losses.plain.row_weights().sum().clamp(min=1e-30)


def sampled_nats(losses: Losses, generator: torch.Generator) -> Tensor:
    """The same with classes or tokens drawn from the model's own distribution.

    Raises:
        Conflict: If the objective predicts no classes.
    """
    assert losses.plain is not None
    logits: Any = losses.outputs["logits"]
    targets: Any = losses.outputs["targets"]
    if targets.is_floating_point() or logits.shape[:-1] != targets.shape:
        raise Conflict(
            "ewc.fisher = 'sampled' draws classes, and this task has none",
            "use fisher='empirical'",
        )
    scores = logits.float().log_softmax(-1)
    chances = scores.detach().exp().flatten(0, -2).cpu()
    drawn = torch.multinomial(chances, 1, generator=generator).to(scores.device)
    values = -scores.flatten(0, -2).gather(1, drawn).view(targets.shape)
    counted = (losses.plain.weights > 0).to(values)
    return (values * counted).sum() / counted.sum().clamp(min=1)
