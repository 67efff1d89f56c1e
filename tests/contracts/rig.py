"""Drives toy runs through the real assembly, loop, keeper and checkpoints."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contracts import toys

from outlay.core.meter import Meter
from outlay.training import checkpoint
from outlay.training.assemble import Assembly, assemble
from outlay.training.backend import OneDevice
from outlay.training.keeper import Keeper, Silent
from outlay.training.objectives import CausalObjective
from outlay.training.recipe import Recipe

Make = Callable[..., Assembly]


def make(
    methods: Any = (),
    *,
    model: Any = None,
    rows: Any = None,
    objective: Any = None,
    size: int = 16,
    micro: int | None = None,
    steps: int = 3,
    prefetch: int = 0,
    precision: str = "float64",
    pool: Any = None,
    new_tokens: Any = (),
    optimizer: Any = None,
    seed: int = 0,
    budget: str | None = None,
) -> Assembly:
    """One stage over the toy network, or what is given."""
    model = toys.filled(toys.Net()) if model is None else copy.deepcopy(model)
    rows = toys.vectors() if rows is None else rows
    original = copy.deepcopy(model)
    recipe = Recipe(
        model=model,
        data=rows,
        id="toy",
        methods=methods,
        budget=budget or f"{steps}steps",
        batch={"size": size, "micro": micro, "prefetch": prefetch},
        precision=precision,
        optimizer={"lr": 0.02, "weight_decay": 0.01, **(optimizer or {})},
        schedule={"name": "linear", "warmup": 0.3},
        every={"save": 1, "keep": 1000},
        seed=seed,
    )
    backend = OneDevice("cpu", precision)
    return assemble(
        recipe,
        model=model,
        tokenizer=None,
        objective=lambda requests: objective() if objective else toys.Plain(),
        train=rows,
        splits={},
        meter=Meter(),
        backend=backend,
        pool=pool,
        new_tokens=new_tokens,
        loader=lambda reference: backend.place(copy.deepcopy(original)),
    )


def language(methods: Any = (), *, rows: Any = None, dropout: float = 0.0, **more: Any) -> Assembly:
    """One stage over the toy language model with tied weights."""
    return make(
        methods,
        model=toys.filled(toys.Language(dropout=dropout)),
        rows=toys.sentences() if rows is None else rows,
        objective=CausalObjective,
        **more,
    )


def trained(assembly: Assembly) -> Assembly:
    """Run it to its end."""
    try:
        assembly.loop.run()
    finally:
        assembly.loop.drawer.close()
    return assembly


def notes(assembly: Assembly) -> Any:
    """The watcher of `toys.Note`."""
    return next(w for w in assembly.watchers if isinstance(w, toys.Notes))


def keeper_of(assembly: Assembly, folder: Path) -> Keeper:
    """The run's own keeper, saving into a folder."""
    store = checkpoint.Checkpoints(folder, 1000)
    keeper = Keeper(assembly, store, None, Silent(), lambda: False)
    assembly.loop.on_step, assembly.loop.after_step = keeper.on_step, keeper.after_step
    return keeper


def digest(assembly: Assembly) -> str:
    """Everything that decides how a run goes on: weights, buffers, moments, watchers, meter."""
    live = assembly.live
    state = checkpoint.capture(live, {})
    tree = {
        "parameters": dict(live.named_parameters()),
        "buffers": state["buffers"],
        "optimizers": state["optimizers"],
        "masks": state["masks"],
        "restful": state["restful"],
        "watchers": [watcher.state_dict() for watcher in assembly.watchers],
        "pool": live.pool.state_dict(),
        "consumed": assembly.loop.drawer.consumed,
        "meter": {k: v for k, v in assembly.context.meter.totals.items() if k != "seconds"},
    }
    tensors: dict[str, torch.Tensor] = {}
    plain = json.dumps(checkpoint.pack(tree, tensors), sort_keys=True)
    return hashlib.sha256((checkpoint.tensors_sha256(tensors) + plain).encode()).hexdigest()
