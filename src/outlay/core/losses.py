"""Losses that nobody but the loop reduces: terms, objectives, and the rows that couple examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .errors import Conflict

if TYPE_CHECKING:
    from .method import Step

Batch = Mapping[str, Any]

# Keys of a batch that describe its rows and are never given to the model.
NOT_INPUTS = frozenset(
    {
        "labels", "ids", "domains", "visits", "example_weights", "segment_ids", "clean",
        "completion", "prompt", "rewards", "raw_rewards", "advantages", "log_probs",
        "bidirectional", "denoiser_id", "masked",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Term:
    r"""One unreduced term of the loss.

    The loop divides the weighted sum of the values by the sum of the weights over the whole
    optimizer step (all micro-batches, all ranks); a term without weight gives 0.

    Attributes:
        values: Nats, with gradient, one an example or a position. Shape (batch, \\*positions).
        weights: >= 0, known from the batch alone. Shape of `values`.
        coefficient: Factor of the reduced term.
    """

    values: Float[Tensor, "batch *pos"]
    weights: Float[Tensor, "batch *pos"]
    coefficient: float = 1.0

    def row_sums(self) -> Float[Tensor, " batch"]:
        """Weighted sum of the values of each row, in float64 if the values are."""
        return (self.values * self.weights).flatten(1).sum(1) if self.values.dim() > 1 else (
            self.values * self.weights
        )  # fmt: skip

    def row_weights(self) -> Float[Tensor, " batch"]:
        """Sum of the weights of each row."""
        return self.weights.flatten(1).sum(1) if self.weights.dim() > 1 else self.weights


@dataclass(frozen=True)
class Losses:
    """What an objective returns for one micro-batch.

    Attributes:
        terms: Named terms.
        primary: The term that reweighters act on.
        outputs: Logits, targets, and whatever somebody asked for with `context.request`.
        plain: The primary term before anyone shaped it; always logged.
    """

    terms: Mapping[str, Term]
    primary: str
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    plain: Term | None = None

    def __post_init__(self) -> None:
        if self.plain is None:
            object.__setattr__(self, "plain", self.terms[self.primary])

    def with_term(self, name: str, term: Term) -> Losses:
        """A copy with one term added or replaced; `plain` stays what it was."""
        return replace(self, terms={**self.terms, name: term})


@dataclass(frozen=True)
class Rows:
    """All examples of an optimizer step, gathered: what `couple` sees and returns.

    Attributes:
        sums: Per term, the weighted value sum of each example. Shape (examples,).
        weights: Per term, the weight of each example. Shape (examples,).
        coefficients: Factor of each reduced term.
        primary: Name of the primary term.
        outputs: The small outputs named in `Objective.rows`. Shape (examples, ...).
        ids: Id of each example.
        domains: Domain of each example.
    """

    sums: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    coefficients: Mapping[str, float]
    primary: str
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    ids: tuple[Any, ...] = ()
    domains: tuple[Any, ...] = ()

    def loss(self) -> Tensor:
        """Sum over terms of coefficient * (sum of sums) / (sum of weights)."""
        total: Any = 0.0
        for name, coefficient in self.coefficients.items():
            total = total + coefficient * self.reduced(name)
        return total

    def reduced(self, term: str) -> Tensor:
        """(Sum of sums) / (sum of weights) of one term; 0 if it has no weight."""
        weight = self.weights[term].sum()
        total = self.sums[term].sum()
        return total / weight if float(weight.detach()) > 0 else total * 0

    def scaled(self, factors: Tensor, term: str | None = None) -> Rows:
        """A copy with the examples of one term (the primary by default) weighted by `factors`."""
        name = term or self.primary
        return replace(
            self,
            sums={**self.sums, name: self.sums[name] * factors},
            weights={**self.weights, name: self.weights[name] * factors},
        )

    def with_term(self, name: str, sums: Tensor, weights: Tensor, coefficient: float) -> Rows:
        """A copy with one more per-example term."""
        return replace(
            self,
            sums={**self.sums, name: sums},
            weights={**self.weights, name: weights},
            coefficients={**self.coefficients, name: coefficient},
        )


class Objective(nn.Module):
    """From a batch to unreduced losses. Parameters join the optimizer, buffers the checkpoint.

    Attributes:
        rows: Names of small per-example outputs that `couple` needs.
        scope: "step" if each row's loss depends on that row alone (or through `couple`);
            "micro" if rows of one micro-batch touch each other.
    """

    rows: ClassVar[tuple[str, ...]] = ()
    scope: str = "step"

    def forward(self, model: nn.Module, batch: Batch, step: Step) -> Losses:
        """Losses of one micro-batch. Calls `model(...)` and never a part of it."""
        raise NotImplementedError

    def weight_sums(self, batch: Batch) -> Mapping[str, float]:
        """Weight sum of every term, known before the first forward of a step."""
        raise NotImplementedError

    def couple(self, rows: Rows, step: Step) -> Rows:
        """Change what depends on which examples sit together in the whole step."""
        return rows

    def penalties(self, model: nn.Module, step: Step) -> Mapping[str, Tensor]:
        """Scalars of parameters alone (nats), once a step, coefficients included."""
        return {}

    def align(self, per_token: Tensor) -> Tensor:
        """Bring batch x sequence values to the shape of the token term."""
        return per_token

    def after_update(self, model: nn.Module, step: Step) -> None:
        """Moving averages and queues, after the optimizer's step."""

    def replaced(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """A parameter of the model was replaced; a teacher follows or refuses.

        On resume this is called again before values are put back.
        """

    def edited(self, module: str, function: Callable[[nn.Module], None]) -> None:
        """A module was edited; a copy of the model applies `function` to its own, or refuses."""

    def export_source(self, model: nn.Module) -> nn.Module:
        """The module that is evaluated and exported."""
        return model

    def couplers(self) -> Iterable[Objective]:
        """Every objective in the chain that overrides `couple`, innermost first."""
        return [self] if type(self).couple is not Objective.couple else []


class Shaped(Objective):
    """An objective around another one: override what differs, the rest passes through."""

    def __init__(self, inner: Objective) -> None:
        super().__init__()
        self.inner = inner
        self.scope = inner.scope

    def forward(self, model: nn.Module, batch: Batch, step: Step) -> Losses:
        """The inner losses."""
        return self.inner(model, batch, step)

    def weight_sums(self, batch: Batch) -> Mapping[str, float]:
        """The inner weight sums."""
        return self.inner.weight_sums(batch)

    def penalties(self, model: nn.Module, step: Step) -> Mapping[str, Tensor]:
        """The inner penalties."""
        return self.inner.penalties(model, step)

    def align(self, per_token: Tensor) -> Tensor:
        """The inner alignment."""
        return self.inner.align(per_token)

    def after_update(self, model: nn.Module, step: Step) -> None:
        """Passed to the inner objective."""
        self.inner.after_update(model, step)

    def replaced(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Passed to the inner objective."""
        self.inner.replaced(old, new)

    def edited(self, module: str, function: Callable[[nn.Module], None]) -> None:
        """Passed to the inner objective."""
        self.inner.edited(module, function)

    def export_source(self, model: nn.Module) -> nn.Module:
        """The inner export source."""
        return self.inner.export_source(model)

    def couplers(self) -> Iterable[Objective]:
        """Inner couplers first, as the functions compose."""
        return [*self.inner.couplers(), *super().couplers()]


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The entries of a batch that a model's forward takes."""
    return {key: value for key, value in batch.items() if key not in NOT_INPUTS}


def needed_rows(objective: Objective) -> tuple[str, ...]:
    """Names of the per-example outputs that any coupler in the chain needs."""
    names: dict[str, None] = {}
    for coupler in objective.couplers():
        names |= dict.fromkeys(coupler.rows)
    return tuple(names)


def per_example(
    values: Tensor, batch: Batch, align: Callable[[Tensor], Tensor]
) -> Float[Tensor, " examples"]:
    """Sum `values` over each example: over a row, or over a segment of a packed row.

    `batch["segment_ids"]` (batch, sequence) says which of `batch["ids"]` each token belongs to,
    -1 for padding.

    Raises:
        Conflict: If rows are packed and the values are not one a position.
    """
    segments = batch.get("segment_ids")
    if segments is None:
        return values.flatten(1).sum(1) if values.dim() > 1 else values
    owner = align(segments)
    if values.dim() < 2 or values.shape[:2] != owner.shape:
        raise Conflict(
            f"a term of shape {tuple(values.shape)} cannot be told apart in packed rows of shape "
            f"{tuple(owner.shape)}",
            "leave packing out, or give one value a position",
        )
    count = len(batch["ids"])
    flat = values.flatten(2).sum(2) if values.dim() > 2 else values
    owner = torch.where(owner < 0, count, owner)
    return flat.new_zeros(count + 1).index_add(0, owner.flatten(), flat.flatten())[:count]


def per_position(
    values: Float[Tensor, " examples"],
    batch: Batch,
    align: Callable[[Tensor], Tensor],
    like: Tensor,
) -> Tensor:
    """One value an example spread over its positions: what `per_example` sums up.

    Args:
        values: One an example.
        batch: Says, if rows are packed, where each example lies.
        align: The objective's own.
        like: Tensor of a term, of the shape that is wanted.
    """
    segments = batch.get("segment_ids")
    if segments is None:
        return values.reshape(len(values), *(1,) * (like.dim() - 1)).expand_as(like)
    owner = align(segments)
    spread = torch.where(owner < 0, values.new_zeros(()), values[owner.clamp(min=0)])
    return spread.reshape(*spread.shape, *(1,) * (like.dim() - spread.dim())).expand_as(like)


def rows_of(losses: Losses, batch: Batch, objective: Objective) -> Rows:
    """Per-example sums, weights and small outputs of one micro-batch."""
    names = needed_rows(objective)
    missing = [name for name in names if name not in losses.outputs]
    if missing:
        raise Conflict(
            f"couple needs the output {missing[0]!r}, which the objective does not give",
            f"it gives {', '.join(losses.outputs) or 'none'}; context.request asks for more",
        )

    def summed(tensor: Tensor) -> Tensor:
        return per_example(tensor, batch, objective.align)

    return Rows(
        sums={name: summed(term.values * term.weights) for name, term in losses.terms.items()},
        weights={name: summed(term.weights) for name, term in losses.terms.items()},
        coefficients={name: term.coefficient for name, term in losses.terms.items()},
        primary=losses.primary,
        outputs={name: losses.outputs[name] for name in names},
        ids=tuple(batch.get("ids", ())),
        domains=tuple(batch.get("domains", ())),
    )


def gathered(parts: list[Rows]) -> Rows:
    """Concatenate the rows of several micro-batches."""
    first = parts[0]

    def join(pick: str) -> dict[str, Tensor]:
        return {name: torch.cat([getattr(p, pick)[name] for p in parts]) for name in getattr(
            first, pick)}  # fmt: skip

    return replace(
        first,
        sums=join("sums"),
        weights=join("weights"),
        outputs=join("outputs"),
        ids=tuple(i for part in parts for i in part.ids),
        domains=tuple(d for part in parts for d in part.domains),
    )
