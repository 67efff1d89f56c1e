"""One run from recipe to result: its folder, resuming, and what it leaves behind.

A run's folder is `NAME-HASH`; the hash is over the resolved recipe, the data's and the model's
fingerprints and the version, so the same command continues and a changed setting is another
folder. Inside lie recipe.yaml, run.json, plan.json where it was asked for, metrics.jsonl,
checkpoints/, stages/, trained/ and result.json.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..core.budget import Budget
from ..core.errors import ConfigError, Conflict, OutlayError
from ..core.meter import FlopTable
from ..core.method import OnStep
from . import checkpoint
from .backend import OneDevice
from .keeper import Progress, Silent
from .log import Tracker
from .materials import Materials, load_materials
from .recipe import Recipe
from .result import Result
from .stages import Runner

# ---- identity ------------------------------------------------------------------------------------


def identity(recipe: Recipe, materials: Materials) -> str:
    """Hash over the resolved recipe, data, model and version: 10 hex digits."""
    plain = recipe.resolved()
    plain.pop("note", None)
    plain.get("batch", {}).pop("prefetch", None)
    facts = {
        "recipe": plain,
        "data": materials.fingerprint,
        "model": materials.model_fingerprint,
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Dotted names of the fields in which two resolved recipes differ."""
    found = []
    for key in sorted({*old, *new}):
        a, b, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(name)
    return found


# ---- running -------------------------------------------------------------------------------------


def run(
    recipe: Recipe,
    *,
    out: str | Path = "runs",
    device: str = "auto",
    threads: int | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    trackers: Sequence[Tracker] = (),
    materials: Materials | None = None,
    flops: FlopTable | None = None,
    pools: dict[str, Any] | None = None,
    plan: bool = False,
) -> Result:
    """Train a recipe, or go on with it where it stopped.

    Args:
        recipe: What to run.
        out: Where run folders go.
        device: "auto", "cpu", "cuda" or "mps".
        threads: Threads of torch; part of what a bit-exact resume compares.
        resume: Folder of a run to go on with; its recipe must agree but for a longer budget.
        progress: Shows the run.
        trackers: Further sinks of metrics.
        materials: Data and model already loaded for this recipe.
        flops: FLOP table shared with runs of equal shape.
        pools: A pool of its own kind for a stage, by stage name.
        plan: Work out beforehand what it costs, into plan.json.

    Returns:
        The result; a run that is already done returns what it recorded.

    Raises:
        OutlayError: Anything a user can mend; nothing half-written stays.
    """
    started = time.perf_counter()
    if threads is not None:
        torch.set_num_threads(max(1, threads))
    progress = progress or Silent()
    backend = OneDevice(device, recipe.precision)
    materials = materials or load_materials(recipe)
    folder = Path(out) / f"{recipe.name}-{identity(recipe, materials)}"
    if resume is not None:
        folder = Path(resume)
        _compare_for_resume(folder, recipe)
    done = folder / "result.json"
    if done.exists():
        recorded = Result(**json.loads(done.read_text()))
        spent = recorded.meter.get(recipe.budget.unit, 0) >= recipe.budget.amount
        if recorded.status == "done" and (recipe.stages or spent or resume is None):
            progress.note(f"already done: {folder}")
            return recorded
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with checkpoint.locked(folder):
            _write_recipe(folder, recipe, materials)
            if plan:
                _write_plan(folder, recipe, materials, device, progress)
            runner = Runner(
                recipe, materials, folder, backend, progress, trackers, flops or FlopTable(),
                pools or {},
            )  # fmt: skip
            result = runner.all_stages()
            result.seconds = round(time.perf_counter() - started, 3)
            if result.status == "done":
                checkpoint.write_json(done, asdict(result))
    except OutlayError as error:
        if error.exit_code != OutlayError.exit_code:
            _leave_nothing(folder, made)
        raise
    return result


def _leave_nothing(folder: Path, made: Sequence[Path]) -> None:
    """Take away what a refused run made, unless something was trained in it."""
    if folder not in made or any(
        (folder / part).exists() for part in ("checkpoints", "stages", "trained")
    ):
        return
    shutil.rmtree(folder, ignore_errors=True)
    for place in made[1:]:
        with suppress(OSError):
            place.rmdir()


def _write_recipe(folder: Path, recipe: Recipe, materials: Materials) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    facts = {
        "recipe": recipe.resolved(),
        "data": materials.fingerprint,
        "model": materials.model_fingerprint,
        "version": __version__,
        "torch": torch.__version__,
        "counts": materials.counts,
        "labels": asdict(materials.labels),
    }
    checkpoint.write_json(folder / "run.json", facts)
    if materials.trained_tokenizer:
        (folder / "tokenizer.json").write_text(materials.trained_tokenizer, encoding="utf-8")


def _write_plan(
    folder: Path, recipe: Recipe, materials: Materials, device: str, progress: Progress
) -> None:
    """plan.json; what cannot be planned can be run all the same."""
    from .planning.plan import plan

    target = folder / "plan.json"
    if target.exists():
        return
    try:
        planned = plan(recipe, device=device, materials=materials)
    except OutlayError:
        raise
    except Exception as error:
        progress.note(f"no plan was made ({type(error).__name__}); the run goes on without one")
        return
    checkpoint.write_json(target, planned.to_json())
    if not planned.fits:
        progress.note(f"this may not fit: {planned.notes[-1]}")


def _compare_for_resume(folder: Path, recipe: Recipe) -> None:
    if not (folder / "run.json").exists():
        raise ConfigError(f"{str(folder)!r} is not a run's folder", "give one that holds run.json")
    old = json.loads((folder / "run.json").read_text())["recipe"]
    changed = [d for d in differences(old, recipe.resolved()) if d != "note"]
    if changed == ["budget"] and recipe.schedule.name == "constant":
        scheduled = [m.card.name for m in recipe.methods if isinstance(m, OnStep)]
        scheduled += [task.name for task in getattr(recipe.data, "tasks", ())]
        before = Budget.parse(old["budget"])
        longer = before.unit == recipe.budget.unit and recipe.budget.amount >= before.amount
        if longer and not scheduled:
            return
    if changed:
        raise Conflict(
            f"this recipe differs from {folder.name} in {', '.join(changed)}",
            "run it without --resume (a changed setting is another folder), or set it back; "
            "a longer budget goes on only under schedule constant",
        )
