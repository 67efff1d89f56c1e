"""From examples to the micro-batches of a step: transforms, layout, and drawing ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...core.errors import Conflict, DataError
from ...core.losses import Batch
from ...core.method import Context, Draw, Example, OnBatch, Step, generator_of
from ..specs import BatchSpec
from .corruption import Corruption
from .pool import Pool

Layout = Callable[[list[Example], Draw, Step], Batch]


def padded(
    examples: Sequence[Example], pad_id: int = 0, pad_to: int = 8, length: int | None = None
) -> dict[str, Any]:
    """The default layout: one row an example, padded on the right.

    Integer lists are padded (`input_ids` with `pad_id`, `labels` with -100, others with 0) and
    get an `attention_mask`; so are float lists with one value a token. Other float lists,
    numbers and tensors are stacked; maps of numbers (rewards) become maps of tensors.

    Args:
        examples: What a micro-batch holds.
        pad_id: Token that fills `input_ids`.
        pad_to: Widths are rounded up to a multiple of this; 0 pads to `length`.
        length: Largest width.
    """
    batch: dict[str, Any] = {
        "ids": tuple(example["id"] for example in examples),
        "domains": tuple(example.get("domain", "") for example in examples),
    }
    for key in examples[0]:
        if key in ("id", "domain", "task", "visit", "clean", "row"):
            continue
        if any(key not in example for example in examples):
            raise DataError(
                f"some examples of a batch have {key!r} and some have not",
                "a transform gives every example the same keys",
            )
        values = [example[key] for example in examples]
        if isinstance(values[0], Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], Mapping):
            batch[key] = {n: torch.tensor([float(v[n]) for v in values]) for n in values[0]}
        elif isinstance(values[0], (list, tuple)) and by_token(key, values, examples):
            filler = {"input_ids": pad_id, "labels": -100}.get(key, 0)
            width = _width(max(map(len, values)), pad_to, length)
            batch[key] = torch.tensor([[*v, *[filler] * (width - len(v))] for v in values])
            if key == "input_ids":
                batch["attention_mask"] = torch.tensor(
                    [[1] * len(v) + [0] * (width - len(v)) for v in values]
                )
        elif isinstance(values[0], str):
            batch[key] = tuple(values)
        else:
            batch[key] = torch.tensor(values)
    if "clean" in examples[0]:
        batch["clean"] = padded([e["clean"] for e in examples], pad_id, pad_to, length)
    return batch


def presented(example: Example, methods: Sequence[OnBatch], context: Context) -> Example:
    """An example as the methods show it everywhere, corruption apart."""
    for method in methods:
        example = method.present(example, context)
    return example


def measured(
    example: Example,
    methods: Sequence[OnBatch],
    context: Context,
    corruption: Corruption | None = None,
) -> Example:
    """An example as it is evaluated: the task hides the same parts of it in every run."""
    example = presented(example, methods, context)
    if corruption is None:
        return example
    return corruption(example, generator_of("evaluation", "corruption", example["id"]))


def by_token(key: str, values: Sequence[Any], examples: Sequence[Example]) -> bool:
    """True for lists of integers, and for float lists with one value a token."""
    if not values[0] or isinstance(values[0][0], int):
        return True
    if key == "labels" or "input_ids" not in examples[0]:
        return False
    return all(len(v) == len(e["input_ids"]) for v, e in zip(values, examples))


def _width(longest: int, pad_to: int, length: int | None) -> int:
    if pad_to == 0 and length:
        return max(length, longest)
    rounded = -(-longest // max(1, pad_to)) * max(1, pad_to)
    return rounded if length is None else max(longest, min(rounded, length))


def _layout_of(spec: BatchSpec, pad: int) -> Layout:
    if not spec.packing:
        return lambda examples, _draw, _step: padded(examples, pad, spec.pad_to, spec.length)
    from .packed import packed

    return lambda examples, _draw, _step: packed(examples, pad, spec.pad_to)


def token_count(batch: Batch, task: str = "") -> int:
    """Processed tokens, padding left out; rows where there are no tokens.

    Args:
        batch: What is counted.
        task: With "sequence-to-sequence" the scored tokens of the targets count as well.
    """
    labels = batch.get("labels")
    if task == "sequence-to-sequence" and isinstance(labels, Tensor):
        return token_count(batch) + int((labels != -100).sum())
    segments = batch.get("segment_ids")
    if isinstance(segments, Tensor):
        return int((segments >= 0).sum())
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int(mask.sum())
    ids = batch.get("input_ids")
    return int(ids.numel()) if isinstance(ids, Tensor) else example_count(batch)


def example_count(batch: Batch) -> int:
    """Examples in a batch (a packed row holds several)."""
    return len(batch["ids"])


@dataclass
class Drawn:
    """One step's micro-batches, and where pool and counts stood after drawing them."""

    batches: list[Batch]
    after: dict[str, Any]
    counts: dict[str, int]
    version: int


class Drawer:
    """Draws the micro-batches of each step, ahead of time if asked.

    Drawing ahead never changes a result: when the pool's weights change, what was drawn ahead
    is thrown away and drawn again from the consumed position.

    Args:
        pool: Where examples come from.
        spec: Batch sizes and widths.
        methods: `OnBatch` methods in the order they act.
        context: The run's context.
        model: Handed to pools whose examples the model writes.
        clean: Keep each example as it was before corruption under `clean`.
        corruption: The task's own, after the methods; a method that claims `example.corruption`
            takes its place.

    Raises:
        Conflict: If two methods lay out batches, or one does and packing is on.
    """

    def __init__(
        self,
        pool: Pool,
        spec: BatchSpec,
        methods: Sequence[OnBatch],
        context: Context,
        model: Any = None,
        clean: bool = False,
        corruption: Corruption | None = None,
    ) -> None:
        self.pool, self.spec, self.methods, self.context = pool, spec, methods, context
        self.model, self.clean = model, clean
        claimed = {claim.word for method in methods for claim in method.claims(None)}
        self.corruption = None if "example.corruption" in claimed else corruption
        found = [(m.card.name, layout) for m in methods if (layout := m.layout(context))]
        if len(found) > 1:
            raise Conflict(
                f"{found[0][0]!r} and {found[1][0]!r} both lay out batches", "leave one of them out"
            )
        layouts = [layout for _, layout in found]
        pad = getattr(context.tokenizer, "pad_token_id", None) or 0
        if spec.packing and layouts:
            raise Conflict(
                f"{found[0][0]!r} lays out batches, and so does packing", "leave batch.packing out"
            )
        self.layout: Layout = layouts[0] if layouts else _layout_of(spec, pad)
        # A share of FLOPs or seconds is not known before the step before has run.
        on_clock = context.budget.unit in ("flops", "effective_flops", "seconds")
        self.depth = 0 if pool.needs_model or on_clock else spec.prefetch
        self._ahead: deque[tuple[int, Future[Drawn]]] = deque()
        self._worker = ThreadPoolExecutor(1) if self.depth else None
        self.consumed = pool.cursor()
        self.counts = {"steps": 0, "examples": 0, "tokens": 0}
        self._frontier = dict(self.counts)

    def start_from(self, consumed: dict[str, Any], counts: Mapping[str, float]) -> None:
        """Continue at a checkpoint's position."""
        self.consumed = consumed
        self.counts = {key: int(counts[key]) for key in self.counts}
        self._rewind()

    def draw(self, step: Step) -> list[Batch]:
        """The micro-batches of a step, in order."""
        drawn = self._make(step) if self._worker is None else self._from_ahead(step)
        self.consumed, self.counts = drawn.after, drawn.counts
        return drawn.batches

    def one_by_one(self, examples: Iterable[Example], step: Step) -> Iterator[Batch]:
        """Batches of one example each, as training shows them; nothing is drawn from the pool."""
        for example in examples:
            yield self._laid_out([self._transform(example, step)], step)

    def _from_ahead(self, step: Step) -> Drawn:
        assert self._worker is not None
        while True:
            following = self._ahead[-1][0] + 1 if self._ahead else step.index
            for index in range(following, step.index + 1 + self.depth):
                ahead = replace(step, index=index)
                self._ahead.append((index, self._worker.submit(self._make, ahead)))
            index, future = self._ahead.popleft()
            drawn = future.result()
            if index == step.index and drawn.version == self.pool.version:
                return drawn
            self._rewind()

    def _rewind(self) -> None:
        """Throw away what was drawn ahead and stand at the consumed position again."""
        for _, future in self._ahead:
            if not future.cancel():
                future.exception()
        self._ahead.clear()
        self.pool.seek(self.consumed)
        self._frontier = dict(self.counts)

    def _make(self, step: Step) -> Drawn:
        budget = self.context.budget
        if budget.unit in self._frontier:
            spent = min(1.0, self._frontier[budget.unit] / budget.amount)
            step = replace(step, share=spent)
        with self.pool.lock:
            version = self.pool.version
            examples = self.pool.draw(self.spec.size, self.model)
            after = self.pool.cursor()
        size, micro = len(examples), self.spec.micro or len(examples)
        ready = [self._transform(example, step) for example in examples]
        batches = [
            self._laid_out(ready[i : i + micro], replace(step, micro=i // micro))
            for i in range(0, size, micro)
        ]
        self._frontier = {
            "steps": self._frontier["steps"] + 1,
            "examples": self._frontier["examples"] + sum(map(example_count, batches)),
            "tokens": self._frontier["tokens"]
            + sum(token_count(batch, self.context.task) for batch in batches),
        }
        return Drawn(batches, after, dict(self._frontier), version)

    def _laid_out(self, examples: list[Example], step: Step) -> Batch:
        """The layout's batch, and that of the examples before corruption beside it."""
        if "clean" not in examples[0]:
            return self.layout(examples, self._stream, step)
        corrupted = [{k: v for k, v in e.items() if k != "clean"} for e in examples]
        clean = self.layout([e["clean"] for e in examples], self._stream, step)
        return {**self.layout(corrupted, self._stream, step), "clean": clean}

    def _stream(self, example: Example, name: str) -> torch.Generator:
        return generator_of(
            self.context.seed, "example", name, example["id"], example.get("visit", 0)
        )

    def _transform(self, example: Example, step: Step) -> Example:
        original = example = presented(example, self.methods, self.context)
        for method in self.methods:
            example = method.transform(example, self._stream, step, self.context)
        if self.corruption is not None:
            example = self.corruption(example, self._stream(example, "corruption"))
        if self.clean and "clean" not in example:
            example = {**example, "clean": original}
        return example

    def close(self) -> None:
        """Stop drawing ahead."""
        self._rewind()
        if self._worker is not None:
            self._worker.shutdown(wait=True)
