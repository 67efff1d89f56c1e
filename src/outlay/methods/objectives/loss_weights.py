r"""Weigh every sequence of a step by a bounded function of its own current loss.

Sow et al., arXiv:2502.06733 (ICLR 2025), algorithm as in the authors' code. With the losses
$l_1 \dots l_B$ of all sequences of an optimizer step, each the mean over the sequence's own tokens,

$$h_i = \delta\,\frac{2 l_i - (l_{max} + l_{min})}{l_{max} - l_{min}}, \qquad
w_i = \frac{p_i\,e^{f(h_i)/r}}{\sum_j p_j\,e^{f(h_j)/r}}$$

weigh the step's loss $\sum_i w_i l_i$. No gradient flows through $w$. $w$ maximizes
$\langle w, f \rangle - r\,KL(w \,\|\, p)$ on the simplex; $p$ is what other weights say of the
sequence, uniform if there are none. With $0 \le f \le 1$ two sequences of equal $p$ differ by at
most $e^{1/r}$, so no outlier takes a step over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...core.card import Card
from ...core.errors import ConfigError, NonFinite, nearest
from ...core.losses import (
    Batch,
    Losses,
    Objective,
    Rows,
    Shaped,
    Term,
    per_example,
    per_position,
    rows_of,
)
from ...core.method import Context, OnObjective, Step

Curve = Callable[[Tensor, float], Tensor]
CurveName = Literal["linupper", "quadratic", "middle", "extremes", "upper", "uniform"]

_SMALLEST_RANGE = 1e-6  # nats; losses closer than that are equal

CURVES: dict[str, Curve] = {
    "linupper": lambda h, delta: (h + delta).clamp(max=delta),
    "quadratic": lambda h, delta: 1 - (h / delta).square(),
    "middle": lambda h, delta: 1 - (h / delta).square(),
    "extremes": lambda h, delta: h.abs(),
    "upper": lambda h, delta: (h + delta) / 2,
    "uniform": lambda h, delta: torch.zeros_like(h),
}


def loss_weights(
    losses: Float[Tensor, " sequences"],
    curve: str | Callable[[Tensor], Tensor] = "linupper",
    temperature: float = 1.0,
    *,
    delta: float = 1.0,
    prior: Float[Tensor, " sequences"] | None = None,
    loss_range: Literal["minmax", "quantile"] = "minmax",
) -> Float[Tensor, " sequences"]:
    """Weights of the sequences of one step, summing to 1, detached.

    Args:
        losses: Mean loss of each sequence, in nats.
        curve: "linupper" (0 at the smallest loss, flat above the middle of the range),
            "quadratic" or "middle" (highest in the middle), "extremes" (highest at both ends),
            "upper" (linear), "uniform"; or a function of the normalized losses in
            [-delta, delta].
        temperature: Strength of the pull to `prior`; infinity gives `prior` itself.
        delta: Half width that the losses are mapped to.
        prior: Weights of other origin, >= 0; sequences of prior 0 get weight 0 and are left out
            of the range. Uniform by default.
        loss_range: "minmax" as published, or "quantile" (5 % to 95 %, an addition here), which
            one corrupt sequence cannot squeeze.

    Raises:
        ConfigError: If the temperature, delta or the curve's name is not allowed.
        NonFinite: If a counted loss is not finite; it must not set the range.
    """
    function = _function_of(curve, delta)
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature} is not allowed", "give a value above 0")
    values = losses.detach()
    values = values if values.dtype == torch.float64 else values.float()
    share = torch.ones_like(values) if prior is None else prior.detach().to(values)
    counted = share > 0
    bad = (~values.isfinite() & counted).nonzero().flatten().tolist()
    if bad:
        raise NonFinite(
            f"the loss of sequence {bad[0]} of {len(values)} is {float(values[bad[0]])}",
            "lower the learning rate, or look at that sequence",
        )
    alone = share / share.sum().clamp(min=torch.finfo(share.dtype).tiny)
    if int(counted.sum()) < 2:
        return alone
    known = values[counted]
    if loss_range == "quantile":
        low, high = known.quantile(known.new_tensor([0.05, 0.95])).unbind()
    else:
        low, high = known.min(), known.max()
    if float(high - low) < _SMALLEST_RANGE:
        return alone
    normalized = delta * (2 * values - (high + low)) / (high - low)
    normalized = torch.where(counted, normalized, 0.0).clamp(-delta, delta)
    preferred = function(normalized) / temperature
    preferred = torch.where(counted, preferred, -math.inf)
    weights = share * (preferred - preferred.max()).exp()
    return weights / weights.sum()


def _function_of(
    curve: str | Callable[[Tensor], Tensor], delta: float
) -> Callable[[Tensor], Tensor]:
    if not delta > 0:
        raise ConfigError(f"delta = {delta} is not allowed", "give a value above 0")
    if not isinstance(curve, str):
        return curve
    if curve not in CURVES:
        raise ConfigError(
            f"unknown curve {curve!r}", f"{nearest(curve, CURVES)}known: {', '.join(CURVES)}"
        )
    return lambda h: CURVES[curve](h, delta)


def weight_figures(weights: Tensor, losses: Tensor) -> dict[str, float]:
    """What to log of a step's weights.

    Returns:
        `effective_sample_size` (1 over the sum of squares), `largest_weight`, and
        `lowest_quartile_weight` (weight on the quarter of sequences of lowest loss).
    """
    quarter = losses.argsort()[: math.ceil(len(losses) / 4)]
    return {
        "effective_sample_size": float(1 / weights.square().sum()),
        "largest_weight": float(weights.max()),
        "lowest_quartile_weight": float(weights[quarter].sum()),
    }


@dataclass(frozen=True, kw_only=True)
class LossWeights(OnObjective):
    """Loss-based reweighting of sequences inside the training step.

    The logged training loss stays the plain one. `scope="step"` sees every sequence of the
    optimizer step; with several micro-batches that takes one more forward pass, which is
    charged. `scope="micro"` looks at one micro-batch alone and takes none.

    Attributes:
        curve: See `loss_weights`.
        temperature: r; the published runs use 0.4 and 1.0.
        delta: Half width of the normalized range.
        warmup_steps: Steps before the weights act.
        warmup_temperature: Temperature of these steps; None leaves the plain loss.
        scope: "step" or "micro".
        loss_range: "minmax" or "quantile".
    """

    card: ClassVar[Card] = Card(
        name="loss_weights",
        title="Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining",
        paper=6,
        arxiv="2502.06733",
        group="objectives",
        summary="Weigh every sequence by a bounded function of its own current loss.",
        authors="Daouda Sow, Herbert Woisetschläger, Saikiran Bulusu, Shiqiang Wang, "
        "Hans-Arno Jacobsen, Yingbin Liang",
        year=2025,
        claims=("objective.weights",),
        saves=("tokens",),
    )
    curve: CurveName = "linupper"
    temperature: Annotated[float, Gt(0)] = 1.0
    delta: Annotated[float, Gt(0)] = 1.0
    warmup_steps: Annotated[int, Ge(0)] = 0
    warmup_temperature: Annotated[float, Gt(0)] | None = None
    scope: Literal["step", "micro"] = "step"
    loss_range: Literal["minmax", "quantile"] = "minmax"

    def shape(self, objective: Objective, model: nn.Module, context: Context) -> Objective:
        """The objective with weights from its own losses."""
        return _Weighted(objective, self, context)

    def weigh(self, losses: Tensor, prior: Tensor, step: Step) -> Tensor | None:
        """Weights of one step's sequences; None leaves the plain loss."""
        temperature = self.temperature
        if step.index < self.warmup_steps:
            if self.warmup_temperature is None:
                return None
            temperature = self.warmup_temperature
        return loss_weights(
            losses, self.curve, temperature, delta=self.delta, prior=prior,
            loss_range=self.loss_range,
        )  # fmt: skip


class _Weighted(Shaped):
    """Couples the sequences of a step, or weighs those of a micro-batch as they come."""

    def __init__(self, inner: Objective, method: LossWeights, context: Context) -> None:
        super().__init__(inner)
        self.method, self.context = method, context
        self.scope = "micro" if method.scope == "micro" else inner.scope
        self.rows = ("counted",) if method.scope == "step" else ()  # type: ignore[misc]

    def forward(self, model: nn.Module, batch: Batch, step: Step) -> Losses:
        """The inner losses; with weights already if the scope is a micro-batch."""
        losses = self.inner(model, batch, step)
        assert losses.plain is not None
        counted = per_example(
            (losses.plain.weights > 0).to(losses.plain.values.dtype), batch, self.align
        )
        losses = replace(losses, outputs={**losses.outputs, "counted": counted})
        if self.method.scope == "step":
            return losses
        term = losses.terms[losses.primary]
        rows = rows_of(replace(losses, terms={losses.primary: term}), batch, self)
        weights = self._weights(rows, counted, step)
        if weights is None:
            return losses
        own = rows.weights[rows.primary]
        # The weight sum of the micro-batch stays what it was, as the loop expects it.
        factors = torch.where(own > 0, weights * own.sum() / own.clamp(min=1e-30), 0.0)
        scaled = term.weights * per_position(factors, batch, self.align, term.weights)
        return losses.with_term(losses.primary, Term(term.values, scaled, term.coefficient))

    def couple(self, rows: Rows, step: Step) -> Rows:
        """The sequences of the whole step, weighted."""
        weights = self._weights(rows, rows.outputs["counted"], step)
        if weights is None:
            return rows
        name = rows.primary
        means = rows.sums[name] / rows.weights[name].clamp(min=1e-30)
        return replace(
            rows,
            sums={**rows.sums, name: weights * means},
            weights={**rows.weights, name: weights},
        )

    def couplers(self) -> list[Objective]:
        """Those inside, and this one if it looks at whole steps."""
        return [*self.inner.couplers(), *([self] if self.method.scope == "step" else [])]

    def _weights(self, rows: Rows, counted: Tensor, step: Step) -> Tensor | None:
        own = rows.weights[rows.primary].detach()
        means = rows.sums[rows.primary].detach() / own.clamp(min=1e-30)
        # What others did to a sequence's weight beyond its number of tokens multiplies.
        prior = torch.where(counted > 0, own / counted.detach().clamp(min=1), 0.0)
        weights = self.method.weigh(means, prior, step)
        if weights is not None:
            weights = weights.to(means)
            for name, value in weight_figures(weights, means).items():
                self.context.show(name, value)
        return weights


# ---- in a loop of one's own ----------------------------------------------------------------------


def sequence_losses(
    logits: Float[Tensor, "batch length vocabulary"],
    labels: Int64[Tensor, "batch length"],
    ignore_index: int = -100,
    chunk: int = 2048,
) -> tuple[Float[Tensor, " batch"], Int64[Tensor, " batch"]]:
    """Mean cross entropy of each sequence, in nats, and its number of counted tokens.

    `logits[:, t]` predicts `labels[:, t]`: shift them first. Positions are taken `chunk` at a
    time and computed again in the backward pass, so the float32 copy of the logits is never
    whole in memory.

    Args:
        logits: Any floating type.
        labels: Token ids; `ignore_index` is not counted.
        ignore_index: See there.
        chunk: Positions at a time.
    """

    def some(part: Tensor, wanted: Tensor) -> Tensor:
        wide = part if part.dtype == torch.float64 else part.float()
        return F.cross_entropy(wide, wanted, ignore_index=ignore_index, reduction="none")

    flat, targets = logits.flatten(0, 1), labels.flatten()
    parts = [
        checkpoint(some, flat[at : at + chunk], targets[at : at + chunk], use_reentrant=False)
        for at in range(0, len(targets), chunk)
    ]
    values = torch.cat(parts).view(labels.shape)  # type: ignore[arg-type]
    counts = (labels != ignore_index).sum(1)
    return values.sum(1) / counts.clamp(min=1), counts


class LossReweighter:
    """Loss-based weights in a training loop of one's own, over all ranks of a process group.

    ```python
    losses, tokens = sequence_losses(logits, labels)
    reweighter.reduce(losses, step, tokens).backward()
    ```

    Args:
        curve: See `loss_weights`; a function too.
        temperature: r.
        delta: Half width of the normalized range.
        warmup_steps: Steps with uniform weights.
        temperature_schedule: Temperature by step, in place of the fixed one.
        loss_range: "minmax" or "quantile".
        process_group: Ranks whose sequences form one step; the default group if torch.distributed
            runs.
    """

    def __init__(
        self,
        curve: str | Callable[[Tensor], Tensor] = "linupper",
        temperature: float = 1.0,
        delta: float = 1.0,
        warmup_steps: int = 0,
        temperature_schedule: Callable[[int], float] | None = None,
        loss_range: Literal["minmax", "quantile"] = "minmax",
        process_group: Any = None,
    ) -> None:
        self.curve, self.temperature, self.delta = curve, temperature, delta
        self.warmup_steps, self.temperature_schedule = warmup_steps, temperature_schedule
        self.loss_range: Literal["minmax", "quantile"] = loss_range
        self.group = process_group
        loss_weights(torch.zeros(2), curve, temperature, delta=delta)  # refuses bad settings now

    def weights(
        self,
        losses: Float[Tensor, " batch"],
        step: int = 0,
        tokens: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Weights of this rank's sequences; over all ranks they sum to 1.

        Args:
            losses: Mean loss of each sequence of this rank.
            step: Optimizer step, for warm-up and schedule.
            tokens: Counted tokens of each; sequences of none get weight 0.
        """
        counted = torch.ones_like(losses) if tokens is None else (tokens > 0).to(losses)
        everyone, kept, start = self._gathered(losses.detach(), counted.detach())
        curve = "uniform" if step < self.warmup_steps else self.curve
        temperature = self.temperature
        if self.temperature_schedule is not None:
            temperature = self.temperature_schedule(step)
        found = loss_weights(
            everyone, curve, temperature, delta=self.delta, prior=kept, loss_range=self.loss_range
        )
        return found[start : start + len(losses)].to(losses)

    def reduce(
        self,
        losses: Float[Tensor, " batch"],
        step: int = 0,
        tokens: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """The step's loss on this rank.

        Averaged over ranks, as DDP averages gradients, it is the weighted sum over all sequences.
        """
        weights = self.weights(losses, step, tokens)
        return (weights * torch.where(weights > 0, losses, 0.0)).sum() * self._world()

    def _world(self) -> int:
        import torch.distributed as dist

        running = dist.is_available() and dist.is_initialized()
        return dist.get_world_size(self.group) if running else 1

    def _gathered(self, losses: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, int]:
        """Losses and marks of all ranks, and where this rank's begin; blocks may differ in size."""
        world = self._world()
        if world == 1:
            return losses, counted, 0
        import torch.distributed as dist

        size = losses.new_tensor([len(losses)], dtype=torch.int64)
        sizes = [torch.empty_like(size) for _ in range(world)]
        dist.all_gather(sizes, size, group=self.group)
        counts = [int(s) for s in sizes]
        block = torch.zeros(2, max(counts), dtype=losses.dtype, device=losses.device)
        block[0, : len(losses)], block[1, : len(losses)] = losses, counted
        blocks = [torch.empty_like(block) for _ in range(world)]
        dist.all_gather(blocks, block, group=self.group)
        joined = torch.cat([b[:, :n] for b, n in zip(blocks, counts, strict=True)], 1)
        return joined[0], joined[1], sum(counts[: dist.get_rank(self.group)])
