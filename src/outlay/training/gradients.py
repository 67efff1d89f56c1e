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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, nearest
from ..core.live import Live
from ..core.losses import Batch, Losses, Objective, Rows, gathered, per_example, rows_of
from ..core.meter import Flops, FlopTable
from ..core.method import OnModel, Seen, Step, seed_of
from ..core.still import has_statistics
from .backend import OneDevice, batch_key
from .diagnose import refuse_non_finite
from .frozen import FrozenPrefix

Weights = dict[str, float]


@dataclass
class Gradients:
    """Forward and backward passes of a stage.

    Attributes:
        live: Model, objective and context.
        backend: The machine.
        binders: `OnModel` methods whose `bind` surrounds every call of the model.
        flops: FLOPs by shape, counted the first time a shape is met.
        scope: Names model, methods and objective, for FLOP tables that several runs share.
        structure: Fingerprint of the parameters that are there, since FLOPs change with them.
        last_micro: True during the last backward of a step.
        prefix: What frozen lower layers gave before, if the recipe asks for it.
    """

    live: Live
    backend: OneDevice
    binders: Sequence[OnModel] = ()
    flops: FlopTable = field(default_factory=FlopTable)
    scope: str = ""
    structure: str = ""
    last_micro: bool = False
    prefix: FrozenPrefix | None = None

    def accumulate(self, step: Step, batches: list[Batch]) -> tuple[Seen, Flops]:
        """Accumulate the gradients of the step's one loss.

        Returns:
            What was seen (loss included) and the FLOPs of forward and backward.

        Raises:
            NonFinite: Before the backward of a loss that is not finite.
        """
        with torch.random.fork_rng(self.backend.rng_devices()):
            return self._accumulate(step, batches)

    def _accumulate(self, step: Step, batches: list[Batch]) -> tuple[Seen, Flops]:
        live = self.live
        coupled, sums = bool(list(live.objective.couplers())), self.weight_sums(batches)
        self._fill_prefix(batches)
        leaves: list[Rows] | None = None
        total, flops, seen = 0.0, Flops(0, 0, 0), []
        found = dict.fromkeys(sums, 0.0)
        if coupled and len(batches) * self.backend.world > 1:
            leaves, rows = self._couple_first(step, batches)
            loss = rows.loss()
            total = float(loss.detach())
            refuse_non_finite(self, step, total, batches)
            if loss.requires_grad:
                loss.backward()
        for index, batch in enumerate(batches):
            at = replace(step, micro=index)
            self.last_micro = index == len(batches) - 1
            leaf = None if leaves is None else leaves[index]

            def work(
                batch: Batch = batch, at: Step = at, leaf: Rows | None = leaf
            ) -> tuple[Losses, float]:
                losses = self._forward(batch, at)
                if leaf is not None:
                    rows = rows_of(losses, batch, live.objective)
                    value, reported = _pulled(rows, _gradients_of(leaf), losses), 0.0
                elif coupled:
                    rows = rows_of(losses, batch, live.objective)
                    value = _coupled(live.objective, rows, at).loss()
                    reported = float(value.detach())
                else:
                    value = _reduced(losses, sums)
                    reported = float(value.detach())
                if self.last_micro:
                    for penalty in live.objective.penalties(live.model, at).values():
                        value = value + penalty
                        reported += float(penalty.detach())
                refuse_non_finite(self, step, reported, [batch])
                self.backend.backward(value)
                return losses, reported

            key = (self.last_micro, coupled, leaf is None, batch_key(batch))
            (losses, reported), counted = self._counted(key, work)
            flops, total = flops + counted, total + reported
            for name, term in losses.terms.items():
                found[name] = found.get(name, 0.0) + float(term.weights.sum())
            seen.append(_seen(losses, batch, live.objective))
        self.last_micro = False
        if self.backend.world == 1:
            _check_sums(sums, found)
        return _joined(seen, total), flops

    def _counted(self, key: Any, work: Callable[[], Any]) -> tuple[Any, Flops]:
        live, whole = self.live, (self.scope, self.structure, key)
        return self.flops.run(whole, work, live.context.meter, self._matrices, live.zeros())

    def _matrices(self) -> dict[str, Tensor]:
        """What a mask may hold, now or later."""
        return {n: p for n, p in self.live.named_parameters() if p.dim() == 2}

    def _fill_prefix(self, batches: list[Batch]) -> None:
        if self.prefix is not None:
            for batch in batches:
                with self.backend.autocast():
                    extra = self.prefix.fill(batch)
                if extra:
                    self.live.context.meter.charge("frozen_prefix", flops=extra)

    def _forward(self, batch: Batch, step: Step) -> Losses:
        """One call of the objective: dropout seeded by (seed, step, micro-batch, rank)."""
        self.backend.seed(seed_of(step.seed, "dropout", step.index, step.micro, self.backend.rank))
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

    def pass_over(
        self, name: str, batches: Iterable[Batch], step: Step, use: Callable[[Losses], None]
    ) -> None:
        """Call the objective in evaluation mode on each batch, charged as `name` with `use`."""
        live = self.live
        with self.phase(live.phase):
            for module in (*live.model.modules(), *live.objective.modules()):
                module.training = False
            for batch in batches:

                def work(batch: Batch = batch) -> None:
                    use(self._forward(batch, step))

                _, flops = self._counted(("over", name, batch_key(batch)), work)
                live.context.meter.charge(name, **flops.named(), passes=1)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Passes beside the training step: modes, running statistics and generators come back."""
        live = self.live
        before, live.phase = live.phase, name
        modules = [*live.model.modules(), *live.objective.modules()]
        modes = [(module, module.training) for module in modules]
        kept = [
            (buffer, buffer.detach().clone())
            for module in modules
            if has_statistics(module)
            for buffer in module.buffers(recurse=False)
        ]
        try:
            with torch.random.fork_rng(self.backend.rng_devices()):
                yield
        finally:
            live.phase = before
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)

    def _couple_first(self, step: Step, batches: list[Batch]) -> tuple[list[Rows], Rows]:
        """A pass without gradient: each micro-batch's rows as leaves, and what coupling gives."""
        parts, flops = [], Flops(0, 0, 0)
        with torch.no_grad(), self.phase("pass"):
            for index, batch in enumerate(batches):
                at = replace(step, micro=index)

                def work(batch: Batch = batch, at: Step = at) -> Rows:
                    return rows_of(self._forward(batch, at), batch, self.live.objective)

                rows, counted = self._counted(("pass", batch_key(batch)), work)
                parts.append(rows)
                flops += counted
        self.live.context.meter.charge("coupling", **flops.named())
        leaves = [_leaf(part) for part in parts]
        whole = self.backend.all_gather(gathered(leaves))
        return leaves, _coupled(self.live.objective, whole, step)

    def weight_sums(self, batches: list[Batch]) -> Weights:
        """Weight sum of every term over the whole step and all ranks."""
        total: Weights = {}
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
        """Gradients of each reduced term over a whole step, coupled if the objective couples.

        One backward a term; charged under "term_gradients".
        """
        live, coupled = self.live, bool(list(self.live.objective.couplers()))
        sums = self.weight_sums(batches)
        wanted = list(terms) if terms is not None else list(sums)
        for name in wanted:
            if name not in sums and not coupled:
                raise ConfigError(
                    f"no term {name!r}", f"{nearest(name, sums)}terms are {', '.join(sums)}"
                )
        names = [(n, p) for n, p in live.named_parameters() if p.requires_grad]
        found = {t: {n: torch.zeros_like(p) for n, p in names} for t in wanted}
        step = Step(int(live.context.meter.totals["steps"]), 0.0, live.context.seed)

        pulls: dict[str, list[Rows]] = {}

        def work() -> None:
            for index, batch in enumerate(batches):
                losses = self._forward(batch, replace(step, micro=index))
                mine = rows_of(losses, batch, live.objective) if coupled else None
                for term in wanted:
                    if mine is not None:
                        value = _pulled(mine, _gradients_of(pulls[term][index]), losses)
                    elif sums[term] <= 0:
                        continue
                    else:
                        value = losses.terms[term].row_sums().sum() / sums[term]
                    gradients = torch.autograd.grad(
                        value, [p for _, p in names], retain_graph=True, allow_unused=True
                    )
                    for (name, _), gradient in zip(names, gradients):
                        if gradient is not None:
                            found[term][name] += gradient

        with self.phase(live.phase):
            if coupled:
                leaves, rows = self._couple_first(step, batches)
                pulls |= {t: _term_pull(rows.reduced(t), leaves) for t in wanted}
            _, flops = self._counted(("terms", *wanted, *map(batch_key, batches)), work)
        live.context.meter.charge("term_gradients", **flops.named(), passes=len(batches))
        if self.backend.world > 1:
            for by_name in found.values():
                for name in sorted(by_name):
                    by_name[name] = self.backend.all_sum(by_name[name])
        return found


def _reduced(losses: Losses, sums: Weights) -> Tensor:
    """This micro-batch's part of the step's loss: never a mean of means."""
    value: Any = 0.0
    for name, term in losses.terms.items():
        assert name in sums, f"weight_sums does not name the term {name!r}"
        if sums[name] > 0:
            value = value + term.row_sums().sum() * (term.coefficient / sums[name])
    return value if isinstance(value, Tensor) else _nothing(losses)


def _check_sums(promised: Weights, found: Weights) -> None:
    assert set(found) == set(promised), f"terms {sorted(found)}, promised {sorted(promised)}"
    for name, expected in promised.items():
        assert math.isclose(found[name], expected, rel_tol=1e-4, abs_tol=1e-6), (
            f"term {name!r} weighs {found[name]}, its objective promised {expected}"
        )


def _coupled(objective: Objective, rows: Rows, step: Step) -> Rows:
    for coupler in objective.couplers():
        rows = coupler.couple(rows, replace(step, micro=0))
    return rows


def _leaf(rows: Rows) -> Rows:
    def leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()
        }

    return replace(rows, sums=leaves(rows.sums), outputs=leaves(rows.outputs))


Pull = dict[str, dict[str, Tensor]]


def _gradients_of(leaf: Rows) -> Pull:
    """What a micro-batch's rows are multiplied with on their way back."""
    return {
        kind: {n: t.grad for n, t in getattr(leaf, kind).items() if t.grad is not None}
        for kind in ("sums", "outputs")
    }


def _term_pull(value: Tensor, leaves: list[Rows]) -> list[Rows]:
    """Copies of the leaves that hold the gradient of one reduced term."""
    copies = [_leaf(leaf) for leaf in leaves]
    pairs = [
        (leaf_tensor, copy_tensor)
        for leaf, copy in zip(leaves, copies)
        for kind in ("sums", "outputs")
        for leaf_tensor, copy_tensor in zip(
            getattr(leaf, kind).values(), getattr(copy, kind).values()
        )
        if leaf_tensor.requires_grad
    ]
    if value.requires_grad:
        gradients = torch.autograd.grad(
            value, [leaf for leaf, _ in pairs], retain_graph=True, allow_unused=True
        )
        for (_, copy), gradient in zip(pairs, gradients):
            copy.grad = gradient
    return copies


def _pulled(rows: Rows, gradients: Pull, losses: Losses) -> Tensor:
    """The chain rule through the rows: their gradients are known from the first pass."""
    value = _nothing(losses)
    for kind, by_name in gradients.items():
        for name, gradient in by_name.items():
            tensor = getattr(rows, kind)[name]
            if tensor.requires_grad:
                value = value + (tensor * gradient).sum()
    return value


def _nothing(losses: Losses) -> Tensor:
    """A zero that still has a graph, so that a step without weight runs its backward."""
    return losses.terms[losses.primary].values.sum() * 0


def _seen(losses: Losses, batch: Batch, objective: Objective) -> Seen:
    plain = losses.plain
    assert plain is not None
    with torch.no_grad():
        weights = per_example(plain.weights, batch, objective.align)
        values = per_example(plain.values * plain.weights, batch, objective.align)
    ids, domains = tuple(batch.get("ids", ())), tuple(batch.get("domains", ()))
    return Seen(values / weights.clamp(min=1e-30), weights, ids, domains, 0.0)


def _joined(parts: list[Seen], loss: float) -> Seen:
    return Seen(
        torch.cat([p.values for p in parts]),
        torch.cat([p.weights for p in parts]),
        tuple(i for p in parts for i in p.ids),
        tuple(d for p in parts for d in p.domains),
        loss,
    )
