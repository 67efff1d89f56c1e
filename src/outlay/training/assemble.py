"""From a recipe to everything that the loop needs, in the order of the places."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.budget import Budget
from ..core.claims import check
from ..core.errors import Conflict, DoesNotFit, NoEffect
from ..core.live import Live
from ..core.losses import Batch, Objective
from ..core.meter import FlopTable, Meter
from ..core.method import (
    Context,
    Example,
    Method,
    OnBatch,
    OnData,
    OnModel,
    OnObjective,
    OnReward,
    OnStep,
    Watcher,
    seed_of,
)
from .backend import OneDevice
from .data.batch import Drawer, measured, padded
from .data.columns import Row
from .data.corruption import Corruption
from .data.pool import Pool
from .data.tasks import TaskPool, first_steps
from .frozen import PrefixStore, freeze_for, frozen_prefix
from .gradients import Gradients
from .loop import Loop
from .optimizer import build_optimizers, parameter_groups, schedule_of
from .recipe import Recipe


@dataclass
class Assembly:
    """One stage, put together and not yet started.

    Attributes:
        recipe: The stage's recipe (what the stage does not name is the run's).
        model: The adapted model.
        objective: The shaped objective.
        plain: The task's own objective, for evaluation.
        live: Hands for watchers.
        loop: Ready to run.
        watchers: In the order they act.
        tokenizer: The run's tokenizer.
        splits: Encoded examples of "validation" and "test".
        context: Facts and services of the stage.
        corruption: The task's own, for evaluation.
    """

    recipe: Recipe
    model: nn.Module
    objective: Objective
    plain: Objective
    live: Live
    loop: Loop
    watchers: list[Watcher]
    tokenizer: Any
    splits: dict[str, Sequence[Example]]
    context: Context
    corruption: Corruption | None = None

    def batches(self, split: str) -> Iterator[Batch]:
        """Evaluation batches of a split, in its order."""
        yield from self.batches_of(self.splits[split])

    def batches_of(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """Evaluation batches of encoded examples, as the recipe's methods show them."""
        spec, pad = self.recipe.batch, getattr(self.tokenizer, "pad_token_id", None) or 0
        methods = [m for m in self.recipe.methods if isinstance(m, OnBatch)]
        size = self.recipe.evaluate.batch
        for start in range(0, len(examples), size):
            chunk = [
                measured(examples[index], methods, self.context, self.corruption)
                for index in range(start, min(start + size, len(examples)))
            ]
            yield self.loop.backend.place(padded(chunk, pad, spec.pad_to, spec.length))

    def exported(self) -> nn.Module:
        """The model without its methods, in reverse order."""
        model = self.objective.export_source(self.model)
        for method in reversed(self.recipe.methods):
            if isinstance(method, OnModel):
                model = method.export(model)
        return model


def expected_steps(budget: Budget, batch_size: int, pool: Pool, task: str = "") -> int | None:
    """Optimizer steps that a budget is expected to give; None for FLOPs and seconds."""
    if budget.unit == "steps":
        return int(budget.amount)
    if budget.unit == "examples":
        return math.ceil(budget.amount / batch_size)
    if budget.unit == "tokens":
        lengths = getattr(pool.examples, "lengths", None)
        if lengths is None:
            paired = task == "sequence-to-sequence"
            lengths = [
                len(e["input_ids"]) + (len(e["labels"]) if paired else 0)
                for e in pool.examples
                if "input_ids" in e
            ]
        mean = sum(lengths) / len(lengths) if len(lengths) else 1.0
        return max(1, math.ceil(budget.amount / (mean * batch_size)))
    return None


def pool_of(recipe: Recipe, train: Sequence[Example], rows: Sequence[Row] = ()) -> Pool:
    """The training examples in a seeded order, or one task after the other.

    Raises:
        ConfigError: If the budget leaves a task without a step.
    """
    pool = Pool(train, recipe.seed, rows=rows)
    if not getattr(recipe.data, "tasks", ()):
        return pool
    steps = expected_steps(recipe.budget, recipe.batch.size, pool)
    assert steps is not None, "recipes with data.tasks have budgets in steps or examples"
    weights = [task.weight for task in recipe.data.in_sequence()]
    return TaskPool(train, recipe.seed, first_steps(weights, steps), recipe.batch.size, rows)


def adapt(
    model: nn.Module, methods: Sequence[Method], context: Context
) -> tuple[nn.Module, dict[str, int]]:
    """Check claims on the original model, fold the `OnModel` methods, freeze once for all.

    Returns:
        The adapted model and the original parameter names with the ids of their objects.
    """
    check(methods, model)
    originals = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    context.freezes = True
    for index, method in enumerate(methods):
        if isinstance(method, OnModel):
            with _seeded(context, "adapt", index, method):
                model = method.adapt(model, context)
    freeze_for(methods, model, map(str, originals.values()))
    return model, originals


@contextlib.contextmanager
def _seeded(context: Context, place: str, index: int, method: Method) -> Iterator[None]:
    """What a method draws from torch's default generators: from the seed, and given back."""
    device = context.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        value = seed_of(context.seed, place, method.card.name, index)
        torch.default_generator.manual_seed(value)
        if device.type == "cuda":
            torch.cuda.manual_seed(value)
        yield


def assemble(
    recipe: Recipe,
    *,
    model: nn.Module,
    tokenizer: Any,
    objective: Callable[[set[str]], Objective],
    train: Sequence[Example],
    rows: Sequence[Row] = (),
    splits: dict[str, Sequence[Example]],
    meter: Meter,
    backend: OneDevice,
    pool: Pool | None = None,
    new_tokens: Sequence[int] = (),
    loader: Callable[[str], nn.Module] | None = None,
    kept: dict[str, Any] | None = None,
    flops: FlopTable | None = None,
    prefix: bool = True,
    prefixes: dict[str, PrefixStore] | None = None,
    corruption: Corruption | None = None,
) -> Assembly:
    """Put one stage together.

    Args:
        recipe: The stage's recipe.
        model: The plain model that the stage starts from.
        tokenizer: The run's tokenizer.
        objective: Makes the task's objective, given the outputs that methods asked for.
        train: Encoded training examples.
        rows: The rows behind them.
        splits: Encoded evaluation examples.
        meter: The run's meter.
        backend: The machine.
        pool: A pool of its own kind (rollouts) in place of one over `train`.
        new_tokens: Rows of the embedding that were added for methods; they train.
        loader: Resolves model references for `context.load`.
        kept: Tensors of passes made once, from a checkpoint.
        flops: FLOP table to share between runs of equal shape.
        prefixes: What frozen lower layers gave in earlier runs.
        corruption: The task's own.
        prefix: False leaves `model.cache_frozen` to the caller.

    Raises:
        Conflict: If methods clash.
        NoEffect: If nothing would train.
        DoesNotFit: If the recipe's cap is exceeded.
    """
    methods: Sequence[Method] = recipe.methods
    context = Context(
        budget=recipe.budget,
        meter=meter,
        seed=recipe.seed,
        device=backend.device,
        tokenizer=tokenizer,
        task=recipe.task,
        length=recipe.batch.length,
        loader=loader,
        kept=kept if kept is not None else {},
    )
    check(methods, None if any(isinstance(m, OnModel) for m in methods) else model)
    chosen: Pool = pool_of(recipe, train, rows) if pool is None else pool
    for method in methods:
        if isinstance(method, OnData):
            context.pool = chosen
            with context.meter.under(method.card.name):
                chosen = method.select(chosen, context)
    context.pool = chosen
    context.total_steps = expected_steps(recipe.budget, recipe.batch.size, chosen, recipe.task)
    model, originals = adapt(model, methods, context)
    model = backend.place(model)
    if recipe.batch.packing:
        from .data.packed import check_packing

        check_packing(model)
    shaped = plain = backend.place(objective(context.requests))
    for index, method in enumerate(methods):
        if isinstance(method, OnObjective):
            with _seeded(context, "shape", index, method):
                shaped = method.shape(shaped, model, context)
    shaped = backend.place(shaped)
    # `request` may have come while shaping: the set is shared with the base objective.
    held = _train_rows(model, new_tokens)
    groups = parameter_groups(model, shaped, recipe.optimizer, methods)
    if not groups:
        raise NoEffect("nothing in this recipe trains", "add a method, or a head to train")
    _hold_cap(recipe, model)
    inside = refuse_inside(methods, recipe.optimizer.clip, groups)
    optimizers = build_optimizers(groups, recipe.optimizer, methods, context, inside)
    live = Live(model, shaped, optimizers, chosen, context)
    live.alias_originals(originals)
    for name, keep in held.items():
        live.mask(name, keep, "held")
    watchers = _watchers(methods, live, inside)
    gradients = Gradients(
        live,
        backend,
        [m for m in methods if isinstance(m, OnModel)],
        FlopTable() if flops is None else flops,
        _scope(recipe, model),
    )
    if prefix and getattr(recipe.model, "cache_frozen", False):
        gradients.prefix = frozen_prefix(model, methods, prefixes)
    on_batch = [m for m in methods if isinstance(m, OnBatch)]
    drawer = Drawer(
        chosen, recipe.batch, on_batch, context, model, "clean" in context.requests, corruption
    )
    loop = Loop(
        live=live,
        drawer=drawer,
        watchers=watchers,
        schedule=schedule_of(recipe.schedule, methods, context),
        backend=backend,
        gradients=gradients,
        clip=recipe.optimizer.clip,
        inside=inside,
    )
    meter.facts["trainable_parameters"] = sum(
        p.numel() for _, p in live.named_parameters() if p.requires_grad
    )
    meter.facts["total_parameters"] = sum(p.numel() for p in model.parameters())
    return Assembly(
        recipe, model, shaped, plain, live, loop, watchers, tokenizer, splits, context, corruption
    )


def _watchers(methods: Sequence[Method], live: Live, inside: bool) -> list[Watcher]:
    """The watchers of a stage, in the order they act; weightings after the others."""
    watchers: list[Watcher] = []
    for index, method in enumerate(methods):
        if isinstance(method, OnStep):
            with _seeded(live.context, "watch", index, method):
                watcher = method.watch(live)
            if inside and type(watcher).after_backward is not Watcher.after_backward:
                owner = next(m for m in methods if _is_inside(m))
                raise Conflict(
                    f"{method.card.name!r} looks at a step's gradients and {owner.card.name!r} "
                    "spends them inside backward",
                    "leave one of them out",
                )
            watchers.append(watcher)
    for method in methods:
        if isinstance(method, OnReward):
            weighting = method.weigh(live)
            weighting.live = live
            watchers.append(weighting)
    return watchers


def _scope(recipe: Recipe, model: nn.Module) -> str:
    """What FLOPs depend on beside shapes, for tables that several runs share."""
    source = recipe.id or recipe.model
    methods = [method.spec() for method in recipe.methods]
    facts = (type(model).__name__, source, recipe.task, recipe.objective, methods, recipe.precision)
    return repr(facts)


def _hold_cap(recipe: Recipe, model: nn.Module) -> None:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if recipe.cap is None:
        return
    held = {
        "trainable_parameters": trainable,
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }[recipe.cap.unit]
    if held > recipe.cap.amount:
        raise DoesNotFit(
            f"{held:,} {recipe.cap.unit.replace('_', ' ')} exceed the cap of {recipe.cap}",
            "raise the cap, or lower the methods' ranks or target_modules",
        )


def _train_rows(model: nn.Module, new_tokens: Sequence[int]) -> dict[str, torch.Tensor]:
    """Let the rows of new tokens train even where the embedding is frozen."""
    if not new_tokens:
        return {}
    masks = {}
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        weight = getattr(embedding, "weight", None)
        if weight is None or weight.requires_grad:
            continue
        weight.requires_grad_(True)
        keep = torch.zeros_like(weight, dtype=torch.bool)
        keep[list(new_tokens)] = True
        name = next(n for n, p in model.named_parameters() if p is weight)
        masks[name] = keep
    return masks


def _is_inside(method: Method) -> bool:
    return any(claim.word == "update.inside" for claim in method.claims(None))


def refuse_inside(
    methods: Sequence[Method], clip: float | None, groups: Sequence[dict[str, Any]] = ()
) -> bool:
    """True if a method updates inside backward; refuses clipping, which needs whole gradients.

    Raises:
        Conflict: If the recipe or a group clips.
    """
    inside = [m for m in methods if _is_inside(m)]
    clipped = clip if clip is not None else next((c for g in groups if (c := g["clip"])), None)
    if inside and clipped is not None:
        raise Conflict(
            f"{inside[0].card.name!r} updates inside backward and optimizer.clip = {clipped} "
            "needs the gradients of all parameters at once",
            "set optimizer.clip to null",
        )
    return bool(inside)
