"""What stays frozen: the base of an adapter, its normalization statistics, its lower layers.

The lower blocks that nothing trains give the same hidden states every time an example comes.
`FrozenPrefix` computes them once an example and runs only the blocks above.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import Conflict
from ..core.losses import Batch, model_inputs
from ..core.meter import FlopCounter
from ..core.method import Method, OnBatch
from ..core.still import hold_statistics
from ..nn.targets import blocks, head_modules
from .backend import batch_key
from .models.export import fingerprint


def freeze_for(methods: Sequence[Method], model: nn.Module, original: Iterable[str]) -> bool:
    """Freeze the base once for all if any method's card asks for it.

    The task's head, parameters that methods brought, and those that methods name in `trains`
    stay trainable.

    Args:
        methods: Methods of the stage.
        model: The adapted model.
        original: Ids of the parameters that were there before adapting.

    Returns:
        True if the base was frozen.
    """
    if not any(method.card.freezes_base for method in methods):
        return False
    keep = {name for method in methods for name in method.trains(model)}
    heads = head_modules(model)
    base = set(original)
    for name, parameter in model.named_parameters():
        if str(id(parameter)) in base and name not in keep and name.split(".")[0] not in heads:
            parameter.requires_grad_(False)
    hold_statistics(model)
    return True


class _PassThrough(nn.Module):
    """A block whose work is already done."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


def _drops(module: nn.Module) -> bool:
    """True for dropout layers, and for attention that keeps its rate as a plain number."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    rates = [value for key, value in vars(module).items() if "drop" in key]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


class _Enough(Exception):
    """Raised inside a forward pass that is needed no further."""


@dataclass
class PrefixStore:
    """What one set of frozen lower layers gave.

    Attributes:
        rows: Hidden states by example. Shape (tokens, width) each.
        flops: FLOPs of the pass by batch shape.
    """

    rows: dict[Any, Tensor] = field(default_factory=dict)
    flops: dict[Any, int] = field(default_factory=dict)


class FrozenPrefix:
    """Replaces the frozen lower blocks by what they gave the first time, example by example.

    Args:
        model: The adapted and frozen model.
        methods: Methods of the stage.
        stores: Shared by runs, keyed by the lower layers' content: what one run computed the
            next one reuses, and is charged for all the same.

    Raises:
        Conflict: If there is no frozen prefix, it has dropout, or a method rewrites inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[Method],
        stores: dict[str, PrefixStore] | None = None,
    ) -> None:
        stack = blocks(model)
        if stack is None:
            raise Conflict(
                f"model.cache_frozen: {type(model).__name__} has no list of blocks",
                "set model.cache_frozen to false",
            )
        self.model, (self.path, self.blocks) = model, stack
        trainable = [any(p.requires_grad for p in block.parameters()) for block in self.blocks]
        self.depth = trainable.index(True) if True in trainable else len(self.blocks)
        below = [n for n, p in model.named_parameters() if p.requires_grad and self._below(n)]
        rewriting = [m.card.name for m in methods if isinstance(m, OnBatch)]
        lower = [*self.blocks[: self.depth], *self._embeddings()]
        dropping = any(_drops(m) for block in lower for m in block.modules())
        reason = (
            f"{rewriting[0]!r} rewrites inputs" if rewriting
            else f"{below[0]!r} trains below the first trained block" if below
            else "the lower layers have dropout" if dropping
            else "every block is frozen" if self.depth == len(self.blocks)
            else ""
        )  # fmt: skip
        if reason and reason != "every block is frozen":
            raise Conflict(
                f"model.cache_frozen cannot hold: {reason}",
                "set model.cache_frozen to false (or model.dropout to 0 if it is dropout)",
            )
        # With every block frozen the last one still runs, so that its output is in its place.
        self.depth = min(self.depth, len(self.blocks) - 1)
        self.stores = stores if stores is not None else {}
        self.store = PrefixStore()
        self.seen: set[Any] = set()
        self._mark: tuple[Any, ...] = ()
        self._pretends = False  # tensors have shapes alone, so tokens cannot be read
        self._real = [self.blocks[i] for i in range(self.depth)]

    def _below(self, name: str) -> bool:
        """True for a parameter that acts before the first trained block."""
        inside_stack = name.startswith(f"{self.path}.")
        in_head = name.split(".")[0] in head_modules(self.model)
        after = any(part in name for part in ("pooler", "final", "ln_f", "norm.", "deltas"))
        return not inside_stack and not in_head and not after

    def _embeddings(self) -> list[nn.Module]:
        body = getattr(self.model, getattr(self.model, "base_model_prefix", ""), self.model)
        return [child for name, child in body.named_children() if "embed" in name]

    def _keys(self, batch: Batch) -> list[Any]:
        """Id and tokens of each row: two splits may have one id for different rows."""
        if self._pretends:
            return list(batch["ids"])
        tokens = batch["input_ids"]
        lengths = batch["attention_mask"].sum(1).tolist()
        rows = tokens.cpu().numpy()
        return [
            (example, row[:length].tobytes())
            for example, row, length in zip(batch["ids"], rows, lengths)
        ]

    def _refresh(self) -> None:
        """Find the store of these lower layers; another one if they were written since."""
        lower = self._lower()
        mark = tuple((id(p), p._version) for p in lower)
        if mark == self._mark:
            return
        if any(p.requires_grad for p in lower):
            raise Conflict(
                "model.cache_frozen cannot hold: a layer below the first trained block trains now",
                "set model.cache_frozen to false",
            )
        content = fingerprint({str(index): p for index, p in enumerate(lower)})
        self.store = self.stores.setdefault(f"{self.path}.{self.depth}:{content}", PrefixStore())
        self.seen.clear()
        self._mark = mark

    def _lower(self) -> list[nn.Parameter]:
        return [p for module in (*self._real, *self._embeddings()) for p in module.parameters()]

    def fill(self, batch: Batch) -> int:
        """Compute what is not there yet; returns the FLOPs of rows new to this run.

        Raises:
            Conflict: If a parameter below the first trained block came to train.
        """
        self._refresh()
        keys = self._keys(batch)
        if all(key in self.seen for key in keys):
            return 0
        self.seen.update(keys)
        rows, shape = self.store.rows, batch_key(batch)
        if shape in self.store.flops and all(key in rows for key in keys):
            return self.store.flops[shape]
        lengths = batch["attention_mask"].sum(1).tolist()

        def take(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = arguments[0] if arguments else named["hidden_states"]
            for key, row, length in zip(keys, hidden, lengths):
                rows[key] = row[:length].detach().clone()
            raise _Enough

        with FlopCounter() as counter:
            self._stop_at_block(take, batch)
        self.store.flops[shape] = counter.total
        return counter.total

    def pretend(self, batch: Batch) -> None:
        """Put rows of the right shape in place of computed ones: for plans, where none run."""

        def take(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = arguments[0] if arguments else named["hidden_states"]
            self.store.rows |= dict(zip(self._keys(batch), torch.empty_like(hidden).unbind()))
            raise _Enough

        self._pretends = True
        self._stop_at_block(take, batch)
        self.seen.update(self._keys(batch))
        self._mark = tuple((id(p), p._version) for p in self._lower())

    def _stop_at_block(self, take: Callable[..., None], batch: Batch) -> None:
        """Run the model up to the first trained block, where `take` looks and stops it."""
        block: nn.Module = self.blocks[self.depth]
        handle = block.register_forward_pre_hook(take, with_kwargs=True)
        try:
            with torch.no_grad(), contextlib.suppress(_Enough):
                self.model(**model_inputs(batch))
        finally:
            handle.remove()

    @contextlib.contextmanager
    def bind(self, batch: Batch) -> Iterator[None]:
        """Inside, calls on this batch start at the first trained block."""
        self.fill(batch)
        keys = self._keys(batch)
        width = batch["input_ids"].shape[1]

        def give(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            rows = [self.store.rows[key] for key in keys]
            hidden = rows[0].new_zeros(len(rows), width, rows[0].shape[-1])
            for index, row in enumerate(rows):
                hidden[index, : len(row)] = row
            if arguments:
                return (hidden, *arguments[1:]), named
            return arguments, {**named, "hidden_states": hidden}

        block: nn.Module = self.blocks[self.depth]
        handle = block.register_forward_pre_hook(give, with_kwargs=True)
        try:
            for index in range(self.depth):
                self.blocks[index] = _PassThrough()
            yield
        finally:
            handle.remove()
            for index, real in enumerate(self._real):
                self.blocks[index] = real


def frozen_prefix(
    model: nn.Module, methods: Sequence[Method], stores: dict[str, PrefixStore] | None = None
) -> FrozenPrefix | None:
    """The cache of the frozen lower layers; None if the first block trains: nothing to cache.

    Raises:
        Conflict: If the lower layers are frozen and cannot be cached.
    """
    stack = blocks(model)
    if stack is not None and any(p.requires_grad for p in stack[1][0].parameters()):
        return None
    return FrozenPrefix(model, methods, stores)
