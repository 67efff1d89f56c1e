"""Batch shapes that a run will draw, and how values between them are read off."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...core.losses import Batch
from ...core.method import Context, OnBatch, Step
from ..assemble import expected_steps, pool_of
from ..backend import batch_key
from ..data.batch import Drawer
from ..materials import Materials
from ..recipe import Recipe

_LOOKED_AT = 200  # steps whose real batch shapes are drawn; longer runs are extrapolated
_SHAPES = 6  # shapes that are worked out one by one; others are interpolated by length
_PAIRS = 10  # the same where two lengths vary, as in sequence to sequence


@dataclass
class Shape:
    """One batch shape that the run will draw, and how often."""

    key: Any
    batch: Batch
    count: int
    cells: int
    fresh: int  # of the count, those with a row that comes for the first time


def drawn_shapes(recipe: Recipe, materials: Materials) -> list[Shape]:
    """Micro-batch shapes of the first steps, in the run's own order."""
    context = Context(
        budget=recipe.budget,
        seed=recipe.seed,
        tokenizer=materials.tokenizer,
        task=recipe.task,
        length=recipe.batch.length,
    )
    pool = pool_of(recipe, materials.train)
    context.total_steps = expected_steps(recipe.budget, recipe.batch.size, pool, recipe.task)
    spec = recipe.batch.model_copy(update={"prefetch": 0})
    methods = [m for m in recipe.methods if isinstance(m, OnBatch)]
    corruption = materials.corruption(recipe)
    drawer = Drawer(pool, spec, methods, context, clean=True, corruption=corruption)
    counts: Counter[Any] = Counter()
    fresh: Counter[Any] = Counter()
    seen: dict[Any, Batch] = {}
    rows: set[Any] = set()
    for index in range(min(context.total_steps or _LOOKED_AT, _LOOKED_AT)):
        for batch in drawer.draw(Step(index, 0.0, recipe.seed)):
            key = batch_key(batch)
            counts[key] += 1
            fresh[key] += not rows.issuperset(batch["ids"])
            rows.update(batch["ids"])
            seen.setdefault(key, batch)
    cells = {key: sum(v.numel() for v in batch.values() if _is(v)) for key, batch in seen.items()}
    return [Shape(key, seen[key], n, cells[key], fresh[key]) for key, n in counts.items()]


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def some_of(shapes: list[Shape]) -> list[Shape]:
    """All shapes, or if there are many, ones spread over the sizes."""
    ordered = sorted(shapes, key=lambda shape: shape.cells)
    wanted = _PAIRS if any(len(set(lengths_of(shape))) > 1 for shape in shapes) else _SHAPES
    if len(ordered) <= wanted:
        return ordered
    picks = {round(i * (len(ordered) - 1) / (wanted - 1)) for i in range(wanted)}
    return [ordered[index] for index in sorted(picks)]


def lengths_of(shape: Shape) -> tuple[int, int]:
    """Tokens of a row that go in, and those that are asked for."""
    held: list[Any] = [shape.batch.get(name) for name in ("input_ids", "labels")]
    sizes = [value.shape[1] for value in held if _is(value) and value.dim() > 1]
    return (sizes[0], sizes[-1]) if sizes else (0, 0)


def spread(shapes: list[Shape], known: dict[Any, float]) -> dict[Any, float]:
    """A value for every shape: known ones, and a quadratic between them.

    FLOPs are a quadratic in the two lengths, and between enough points it gives them exactly. A
    few points, as those of times, take one in the number of cells.
    """
    import numpy as np

    if len(known) == len(shapes):
        return known
    sizes = np.array([(shape.cells, *lengths_of(shape)) for shape in shapes], dtype=float)
    cells, first, second = (sizes / np.maximum(sizes.max(0), 1)).T
    one = np.ones_like(cells)
    if len(known) >= _SHAPES and (first != second).any():
        terms = np.stack([one, first, second, first**2, second**2, first * second], 1)
    else:
        terms = np.stack([one, cells, cells**2][: len(known)], 1)
    there = [index for index, shape in enumerate(shapes) if shape.key in known]
    values = np.array([known[shapes[index].key] for index in there], dtype=float)
    curve = np.linalg.lstsq(terms[there], values, rcond=None)[0]
    made = terms @ curve
    return {
        shape.key: known.get(shape.key, max(0.0, float(value)))
        for shape, value in zip(shapes, made, strict=True)
    }


def share_of_new_rows(
    recipe: Recipe, materials: Materials, shapes: list[Shape], steps: int
) -> float:
    """Micro-batches with new rows in the whole run, over those among the drawn ones."""
    size = recipe.batch.micro or recipe.batch.size
    drawn, fresh = sum(shape.count for shape in shapes), sum(shape.fresh for shape in shapes)
    to_come = max(0, steps * recipe.batch.size // size - drawn)
    unseen = max(0, len(materials.train) - fresh * size)
    return 1 + min(to_come, -(-unseen // size)) / fresh
