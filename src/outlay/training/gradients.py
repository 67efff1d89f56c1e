"""Gradients of one step: exact whatever the split, coupled examples included.

The weight sum of every term is known before the first forward, so each micro-batch's backward
adds its exact part of the one reduced loss. Where examples are coupled (`Objective.couple`) and
the step has several micro-batches, a first pass without gradient gathers each example's rows,
the coupling is differentiated on those rows alone, and the second pass carries the rows'
gradients back through the model: the chain rule, not an approximation.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.live import Live
from ..core.losses import Batch, Losses, Objective, Rows, gathered, needed_rows, rows_of
from ..core.meter import FlopTable
from ..core.method import OnModel, Seen, Step, seed_of
from .backend import OneDevice, batch_key
from .frozen import FrozenPrefix


@dataclass
class Gradients:
    """Forward and backward passes of a stage.

    Attributes:
        live: Model, objective and context.
        backend: The machine.
        binders: `OnModel` methods whose `bind` surrounds every call of the model.
        flops: FLOPs by shape, counted the first time a shape is met.
        structure: Counts structural changes, since FLOPs change with them.
        last_micro: True during the last backward of a step.
        prefix: What frozen lower layers gave before, if the recipe asks for it.
    """

    live: Live
    backend: OneDevice
    binders: Sequence[OnModel] = ()
    flops: FlopTable = field(default_factory=FlopTable)
    structure: int = 0
    last_micro: bool = False
    prefix: FrozenPrefix | None = None

    def accumulate(self, step: Step, batches: list[Batch]) -> tuple[Seen, int]:
        """Accumulate the gradients of the step's one loss.

        Returns:
            What was seen (loss included) and the FLOPs of forward and backward.
        """
        live = self.live
        coupled = bool(list(live.objective.couplers()))
        sums = self.weight_sums(batches)
        leaves: list[Rows] | None = None
        total, flops = 0.0, 0
        seen, weights = [], dict.fromkeys(sums, 0.0)
        if self.prefix is not None:
            for batch in batches:
                if extra := self.prefix.fill(batch):
                    live.context.meter.charge("frozen_prefix", flops=extra)
        with torch.random.fork_rng(self.backend.rng_devices()):
            if coupled and len(batches) * self.backend.world > 1:
                leaves, total, extra = self._couple_first(step, batches)
                live.context.meter.charge("coupling", flops=extra)
            for index, batch in enumerate(batches):
                at = replace(step, micro=index)
                self.last_micro = index == len(batches) - 1
                leaf = None if leaves is None else leaves[index]

                def work(
                    batch: Batch = batch, at: Step = at, leaf: Rows | None = leaf
                ) -> tuple[Losses, float]:
                    losses = self._forward(batch, at)
                    value = self._reduced(losses, batch, at, sums, coupled, leaf)
                    reported = 0.0 if leaf is not None else float(value.detach())
                    if self.last_micro:
                        for penalty in live.objective.penalties(live.model, at).values():
                            value = value + penalty
                            reported += float(penalty.detach())
                    self.backend.backward(value)
                    return losses, reported

                key = (self.structure, self.last_micro, coupled, batch_key(batch))
                (losses, reported), counted = self.flops.run(key, work)
                flops += counted
                total += reported
                for name, term in losses.terms.items():
                    weights[name] = weights.get(name, 0.0) + float(term.weights.sum())
                seen.append(_seen(losses, batch))
        if self.backend.world == 1:
            _check_sums(sums, weights)
        return _joined(seen, total), flops

    def _forward(self, batch: Batch, step: Step) -> Losses:
        """One call of the objective: dropout seeded by (seed, step, micro-batch, rank)."""
        torch.manual_seed(seed_of(step.seed, "dropout", step.index, step.micro, self.backend.rank))
        with self.bound(batch), self.backend.autocast():
            return self.live.objective(self.live.model, batch, step)

    @contextlib.contextmanager
    def bound(self, batch: Batch) -> Iterator[None]:
        """Around every call of the model: the methods' own contexts."""
        with contextlib.ExitStack() as stack:
            if self.prefix is not None:
                stack.enter_context(self.prefix.bind(batch))
            for method in self.binders:
                stack.enter_context(method.bind(self.live.model, batch))
            yield

    def _reduced(
        self,
        losses: Losses,
        batch: Batch,
        step: Step,
        sums: dict[str, float],
        coupled: bool,
        leaf: Rows | None,
    ) -> Tensor:
        """This micro-batch's part of the step's loss."""
        if not coupled:
            value: Any = 0.0
            for name, term in losses.terms.items():
                if sums[name] > 0:
                    value = value + term.row_sums().sum() * (term.coefficient / sums[name])
            return value if isinstance(value, Tensor) else _nothing(losses)
        rows = rows_of(losses, batch, needed_rows(self.live.objective))
        if leaf is None:
            return _coupled(self.live.objective, rows, step).loss()
        # The chain rule through the rows: their gradients are known from the first pass.
        value = _nothing(losses)
        for mine, theirs in ((rows.sums, leaf.sums), (rows.outputs, leaf.outputs)):
            for name, tensor in mine.items():
                gradient = theirs[name].grad
                if gradient is not None and tensor.requires_grad:
                    value = value + (tensor * gradient).sum()
        return value

    def _couple_first(self, step: Step, batches: list[Batch]) -> tuple[list[Rows], float, int]:
        """A pass without gradient, then the gradient of the coupled loss at its rows."""
        names = needed_rows(self.live.objective)
        parts, flops = [], 0
        self.live.phase = "pass"
        with torch.no_grad(), _running_statistics_kept(self.live.model):
            for index, batch in enumerate(batches):
                at = replace(step, micro=index)

                def work(batch: Batch = batch, at: Step = at) -> Rows:
                    return rows_of(self._forward(batch, at), batch, names)

                rows, counted = self.flops.run((self.structure, "pass", batch_key(batch)), work)
                parts.append(rows)
                flops += counted
        self.live.phase = "train"
        leaves = [_leaf(part) for part in parts]
        loss = _coupled(self.live.objective, self.backend.all_gather(gathered(leaves)), step).loss()
        if loss.requires_grad:
            loss.backward()
        return leaves, float(loss.detach()), flops

    def weight_sums(self, batches: list[Batch]) -> dict[str, float]:
        """Weight sum of every term over the whole step and all ranks."""
        total: dict[str, float] = {}
        for batch in batches:
            for name, amount in self.live.objective.weight_sums(batch).items():
                total[name] = total.get(name, 0.0) + float(amount)
        if self.backend.world > 1:
            for name in sorted(total):
                amount = torch.tensor(total[name], dtype=torch.float64)
                total[name] = float(self.backend.all_sum(amount))
        return total

    def term_gradients(
        self, batches: list[Batch], terms: Iterable[str] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Gradients of each reduced term over a whole step; one backward a term, charged."""
        live = self.live
        sums = self.weight_sums(batches)
        wanted = list(terms) if terms is not None else list(sums)
        names = [(n, p) for n, p in live.named_parameters() if p.requires_grad]
        found = {t: {n: torch.zeros_like(p) for n, p in names} for t in wanted}
        step = Step(int(live.context.meter.totals["steps"]), 0.0, live.context.seed)

        def work() -> None:
            for index, batch in enumerate(batches):
                losses = self._forward(batch, replace(step, micro=index))
                for term in wanted:
                    if sums[term] <= 0:
                        continue
                    value = losses.terms[term].row_sums().sum() / sums[term]
                    gradients = torch.autograd.grad(
                        value, [p for _, p in names], retain_graph=True, allow_unused=True
                    )
                    for (name, _), gradient in zip(names, gradients):
                        if gradient is not None:
                            found[term][name] += gradient

        with torch.random.fork_rng(self.backend.rng_devices()):
            shapes = tuple(map(batch_key, batches))
            _, flops = self.flops.run((self.structure, "terms", tuple(wanted), shapes), work)
        live.context.meter.charge("term_gradients", flops=flops, passes=len(batches))
        if self.backend.world > 1:
            for by_name in found.values():
                for name in sorted(by_name):
                    by_name[name] = self.backend.all_sum(by_name[name])
        return found


def _check_sums(promised: dict[str, float], found: dict[str, float]) -> None:
    for name, expected in promised.items():
        assert math.isclose(found[name], expected, rel_tol=1e-4, abs_tol=1e-6), (
            f"term {name!r} weighs {found[name]}, its objective promised {expected}"
        )


def _coupled(objective: Objective, rows: Rows, step: Step) -> Rows:
    for coupler in objective.couplers():
        rows = coupler.couple(rows, step)
    return rows


def _leaf(rows: Rows) -> Rows:
    def leaves(tensors: Any) -> dict[str, Tensor]:
        return {
            n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()
        }

    return replace(rows, sums=leaves(rows.sums), outputs=leaves(rows.outputs))


def _nothing(losses: Losses) -> Tensor:
    """A zero that still has a graph, so that a step without weight runs its backward."""
    return losses.terms[losses.primary].values.sum() * 0


def _seen(losses: Losses, batch: Batch) -> Seen:
    plain = losses.plain
    assert plain is not None
    weights = plain.row_weights().detach()
    values = plain.row_sums().detach() / weights.clamp(min=1e-30)
    ids, domains = tuple(batch.get("ids", ())), tuple(batch.get("domains", ()))
    return Seen(values, weights, ids, domains, 0.0)


def _joined(parts: list[Seen], loss: float) -> Seen:
    return Seen(
        torch.cat([p.values for p in parts]),
        torch.cat([p.weights for p in parts]),
        tuple(i for p in parts for i in p.ids),
        tuple(d for p in parts for d in p.domains),
        loss,
    )


@contextlib.contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Put batch-norm statistics back after a pass that must not count."""
    kept = [
        (module, {n: b.detach().clone() for n, b in module.named_buffers(recurse=False)})
        for module in model.modules()
        if getattr(module, "track_running_stats", False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, buffers in kept:
                for name, value in buffers.items():
                    getattr(module, name).copy_(value)
