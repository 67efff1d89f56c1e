"""Does the average parameter count decide the loss of a pruned run? arXiv 2501.12486.

Two questions, over small language models from scratch: at equal compute, where should pruning be
(placements); and does a law fitted to dense runs alone predict pruned ones, if N is their average
number of parameters rather than their first or last (the hold-out)? Every run is a recipe under the
run's own meter, in a folder of its own; what is done is not run again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core import registry
from ..core.budget import Budget
from ..core.errors import ConfigError, nearest
from ..nn.masks import average_density
from ..training.materials import Materials, load_materials
from ..training.recipe import Recipe
from ..training.result import Result
from ..training.runs import run
from ..training.specs import (
    BatchSpec,
    DataSpec,
    EvaluateSpec,
    ModelSpec,
    OptimizerSpec,
    ScheduleSpec,
)
from .scaling_laws import ScalingLaw, fit_scaling_law

N_KEYS = ("avg_params", "params_final", "params_initial")
_EDGE = 1e-6  # a window so narrow that it holds one event

# Windows in shares of the compute; the published one is 25 % to 75 %.
PLACEMENTS: dict[str, tuple[float, float]] = {
    "all at the start": (0.0, _EDGE),
    "0 to 25 %": (0.0, 0.25),
    "0 to 100 %": (0.0, 1.0),
    "25 to 75 %": (0.25, 0.75),
    "50 to 100 %": (0.5, 1.0),
    "all at the end": (1.0 - _EDGE, 1.0),
}


@dataclass(frozen=True)
class StudySize:
    """How much is run.

    Attributes:
        widths: Hidden widths of the dense runs of the law; the widest is pruned.
        steps: Lengths of the law's runs.
        sparsities: Final sparsities of the law's pruned runs.
        placement_steps: Steps of a dense run of the placements' compute; 0 leaves them out.
        placement_sparsity: Their final sparsity.
        seeds: Seeds of every run.
        events: Most pruning events a run.
        resamples: Bootstrap resamples of the law.
        verdict: False where runs are too short to say anything.
    """

    widths: tuple[int, ...]
    steps: tuple[int, ...]
    sparsities: tuple[float, ...]
    placement_steps: int
    placement_sparsity: float = 0.8
    seeds: tuple[int, ...] = (0,)
    events: int = 50
    resamples: int = 200
    verdict: bool = True


SIZES: dict[str, StudySize] = {
    "smoke": StudySize(
        (16, 24, 32), (8, 16, 32), (0.6,), 8, events=4, resamples=20, verdict=False
    ),
    "cpu": StudySize(
        (32, 48, 64, 96), (150, 300, 600), (0.2, 0.4, 0.6, 0.8), 200, seeds=(0, 1, 2)
    ),
    "gpu": StudySize(
        (192, 256, 384, 512), (2000, 5000, 12000), (0.2, 0.4, 0.6, 0.8), 4000, seeds=(0, 1, 2)
    ),
}  # fmt: skip


def base_recipe() -> Recipe:
    """The language reference that Python carries, in full rows, under a tokenizer of its own."""
    return Recipe(
        name="average-parameters",
        model=ModelSpec(config="llama", layers=2, width=64, vocabulary=512, tokenizer="bpe"),
        task="causal-language-modeling",
        data=DataSpec(asset="python-reference", blocks=True, test_share=0),
        optimizer=OptimizerSpec(lr=4e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        schedule=ScheduleSpec(name="cosine", floor=0.1),
        batch=BatchSpec(size=16, length=64),
        evaluate=EvaluateSpec(splits=("validation",)),
        budget=Budget(100, "steps"),
    )


# ---- beforehand ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruningPlan:
    """What a pruning schedule costs and what it equals.

    Attributes:
        events: (steps taken before it, density from then on).
        average_density: Over the steps; also the cost of its masked layers over that of dense ones.
        params_initial: Prunable parameters before pruning.
        params_final: Those that are left.
        avg_params: Those of the dense model that costs as much at the same tokens.
        loss: What a law expects, nats; None without one.
    """

    events: list[tuple[int, float]]
    average_density: float
    params_initial: int
    params_final: int
    avg_params: float
    loss: float | None = None


def plan_pruning(
    method: str | Any,
    params: int,
    total_steps: int,
    tokens_a_step: float = 0.0,
    law: ScalingLaw | None = None,
) -> PruningPlan:
    """Work out beforehand what a schedule costs, which dense model it equals, and its loss.

    Args:
        method: A `gradual_pruning(...)` call or object.
        params: Prunable parameters of the model before pruning.
        total_steps: Steps of the run.
        tokens_a_step: Tokens of one step, for a law over tokens.
        law: A law fitted with N as average parameters.
    """
    pruning = registry.build(method)
    events = pruning.plan(total_steps)
    density = average_density(events, total_steps)
    loss = None if law is None else law.predict(density * params, total_steps * tokens_a_step)
    left = round(events[-1][1] * params)
    return PruningPlan(events, density, params, left, density * params, loss)


def pruning(
    sparsity: float, steps: int, events: int, window: tuple[float, float] = (0.25, 0.75)
) -> str:
    """A `gradual_pruning` call with at most so many events in its window."""
    start, end = window
    return (
        f"gradual_pruning(final_sparsity={sparsity}, start={start}, end={end}, "
        f"every={max(1, round(steps / events))})"
    )


# ---- the study -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arm:
    """One run of the study."""

    kind: str
    name: str
    width: int
    steps: int
    method: str
    seed: int

    def recipe(self, base: Recipe) -> Recipe:
        """The run that this is."""
        return base.changed(
            {"model.width": self.width, "budget": Budget(self.steps, "steps"), "seed": self.seed,
             "methods": [*base.methods, self.method]}
        )  # fmt: skip


def _arms(size: StudySize) -> list[_Arm]:
    found, widest = [], max(size.widths)
    for seed in size.seeds:
        for steps in size.steps:
            # Sparsity 0 is the dense run bit by bit, and fills in the same facts.
            dense = "gradual_pruning(final_sparsity=0.0)"
            found += [
                _Arm("dense", f"width {width}, {steps} steps", width, steps, dense, seed)
                for width in size.widths
            ]
            for sparsity in size.sparsities:
                call, name = pruning(sparsity, steps, size.events), f"{sparsity:.0%} pruned"
                found.append(_Arm("sparse", f"{name}, {steps} steps", widest, steps, call, seed))
        for name, window in PLACEMENTS.items() if size.placement_steps else ():
            sparsity = size.placement_sparsity
            steps = _steps_of_equal_compute(size, window)
            call = pruning(sparsity, steps, size.events, window)
            found.append(_Arm("placement", name, widest, steps, call, seed))
    return found


def _steps_of_equal_compute(size: StudySize, window: tuple[float, float]) -> int:
    """Steps after which a placement has cost what the dense run of `placement_steps` costs."""

    def gap(steps: int) -> float:
        call = pruning(size.placement_sparsity, steps, size.events, window)
        return abs(registry.build(call).average_density(steps) * steps - size.placement_steps)

    limit = registry.build(pruning(size.placement_sparsity, 1, 1, window)).average_density()
    near = size.placement_steps / limit
    return min(range(round(0.95 * near), round(1.05 * near) + 1), key=gap)


def average_parameters(
    size: str | StudySize = "cpu",
    recipe: Recipe | None = None,
    *,
    out: str | Path = "runs",
    device: str = "auto",
    threads: int | None = None,
    progress: Any = None,
) -> dict[str, Any]:
    """Run what is missing, fit the law to the dense runs, and judge what predicts the pruned ones.

    Args:
        size: "smoke", "cpu", "gpu", or how much is run.
        recipe: Data, optimizer and batch; a language model from scratch. Width, budget, method and
            seed are the study's.
        out: Where run folders go.
        device: "auto", "cpu", "cuda" or "mps".
        threads: Threads of torch.
        progress: Shows the runs.

    Returns:
        "runs" (one row each: kind, name, seed, params_initial, params_final, avg_params, tokens,
        flops, effective_flops, loss), "law", "errors" (mean |relative error| of the pruned runs'
        predicted loss, by what N was), "dense_error" (the same for dense runs left out of the fit),
        "placements" (mean loss by window, best first) and "verdict".

    Raises:
        ConfigError: If the size is unknown or the recipe is no model from scratch.
        DataError: If the runs cannot tell the law's constants.
    """
    if isinstance(size, str):
        if size not in SIZES:
            raise ConfigError(
                f"size {size!r} is not allowed", f"{nearest(size, SIZES)}give {', '.join(SIZES)}"
            )
        chosen, name = SIZES[size], size
    else:
        chosen, name = size, "custom"
    base = recipe or base_recipe()
    if not isinstance(base.model, ModelSpec) or base.model.config is None:
        raise ConfigError(
            f"the model of {base.name!r} is not from scratch, so its width cannot change",
            "give a recipe with model.config",
        )
    arms, rows = _arms(chosen), []
    shared: dict[int, Materials] = {}
    for index, arm in enumerate(arms):
        if progress is not None:
            progress.run_of(arm.name, arm.seed, index + 1, len(arms))
        recipe = arm.recipe(base)
        if arm.width not in shared:
            shared[arm.width] = load_materials(recipe)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "gradual_pruning.every .* pruned at once")
            result = run(
                recipe, out=out, device=device, threads=threads, progress=progress,
                materials=shared[arm.width],
            )  # fmt: skip
        if result.status != "done":
            raise KeyboardInterrupt
        rows.append(_row(arm, result))
    return {"size": name, "settings": asdict(chosen), **judge(rows, chosen)}


def _row(arm: _Arm, result: Result) -> dict[str, Any]:
    """A run as a row for the law."""
    meter = result.meter
    prunable = meter["prunable_parameters"]
    return {
        "kind": arm.kind, "name": arm.name, "seed": arm.seed, "width": arm.width,
        "steps": arm.steps, "method": arm.method, "params_initial": prunable,
        "params_final": round(meter["final_density"] * prunable),
        "avg_params": meter["average_prunable_parameters"], "tokens": meter["tokens"],
        "flops": meter["flops"], "effective_flops": meter["effective_flops"],
        "loss": result.metrics["validation/loss"], "run": result.run,
    }  # fmt: skip


def judge(rows: Sequence[Mapping[str, Any]], size: StudySize) -> dict[str, Any]:
    """Fit the dense rows, predict the others; see `average_parameters`."""
    dense = [row for row in rows if row["kind"] == "dense"]
    sparse = [row for row in rows if row["kind"] == "sparse"]
    law = fit_scaling_law(dense, resamples=size.resamples)
    errors = {key: _error(law, sparse, key) for key in N_KEYS}
    held_out = _held_out(dense)
    placements: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "placement":
            placements.setdefault(row["name"], []).append(row["loss"])
    ranked = sorted(
        ({"window": name, "loss": float(np.mean(losses)), "seeds": len(losses),
          "deviation": float(np.std(losses, ddof=1)) if len(losses) > 1 else None}
         for name, losses in placements.items()),
        key=lambda entry: entry["loss"],
    )  # fmt: skip
    return {
        "runs": [dict(row) for row in rows], "law": asdict(law), "errors": errors,
        "dense_error": held_out, "placements": ranked,
        "verdict": _verdict(errors, held_out) if size.verdict else None,
    }  # fmt: skip


def _error(law: ScalingLaw, rows: Sequence[Mapping[str, Any]], key: str) -> float:
    found = [abs(law.predict(row[key], row["tokens"]) / row["loss"] - 1) for row in rows]
    return float(np.mean(found))


def _held_out(dense: Sequence[Mapping[str, Any]]) -> float:
    """Error on dense runs of one width and length, left out of the fit, over all of them."""
    cells: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in dense:
        cells.setdefault((row["width"], row["steps"]), []).append(row)
    found = []
    for cell in cells.values():
        law = fit_scaling_law([row for row in dense if row not in cell], resamples=0)
        found.append(_error(law, cell, "avg_params"))
    return float(np.mean(found))


def _verdict(errors: Mapping[str, float], dense_error: float) -> str:
    """Supported if average parameters err half as much as the others, as dense runs do."""
    average, *others = (errors[key] for key in N_KEYS)
    if min(others) <= average:
        return "refuted"
    return "supported" if average <= min(min(others) / 2, 2 * dense_error) else "not resolved"
