"""The stages of a run, one after the other: what each starts from, resumes at, and hands on."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import CheckpointError, NoEffect
from ..core.meter import FlopTable, Meter
from ..core.method import OnStep
from . import checkpoint
from .assemble import Assembly, assemble
from .backend import OneDevice
from .keeper import Keeper, Progress
from .log import Log, Tracker
from .materials import Materials, load_materials, raw_length, shown_length
from .models.export import fingerprint
from .recipe import Recipe
from .result import Result
from .specs import Spec, StageSpec

MAIN = "main"


def stage_recipes(recipe: Recipe) -> list[tuple[StageSpec, Recipe]]:
    """Each stage with its own recipe: what the stage does not name is the run's."""
    if not recipe.stages:
        return [(StageSpec(name=MAIN, start="original"), recipe)]
    found = []
    for stage in recipe.stages:
        fields = {name: getattr(recipe, name) for name in Recipe.model_fields if name != "stages"}
        for name in ("model", "data", "task", "methods", "objective", "optimizer", "schedule"):
            if getattr(stage, name) is not None:
                fields[name] = getattr(stage, name)
        if stage.budget is not None:
            fields["budget"] = stage.budget
        found.append((stage, Recipe(**fields)))
    return found


class Runner:
    """The stages of one run."""

    def __init__(
        self,
        recipe: Recipe,
        materials: Materials,
        folder: Path,
        backend: OneDevice,
        progress: Progress,
        trackers: Sequence[Tracker],
        flops: FlopTable,
        pools: dict[str, Any],
    ) -> None:
        self.recipe, self.materials, self.folder = recipe, materials, folder
        self.backend, self.progress, self.trackers = backend, progress, trackers
        self.flops, self.pools = flops, pools
        self.total = Meter()
        self.stop_requested = False
        self.carried: list[dict[str, Any]] = []
        self._others: dict[str, Materials] = {}

    def all_stages(self) -> Result:
        """Run what is left; status "stopped" if interrupted."""
        metrics: dict[str, float] = {}
        digest, status = "", "done"
        stages = stage_recipes(self.recipe)
        for index, (stage, recipe) in enumerate(stages):
            last = index == len(stages) - 1
            finished = self.folder / "stages" / stage.name
            if (finished / "checksums.json").exists() and not last:
                state = checkpoint.read_folder(finished)
                self.carried = state["optimizers"]
                self._absorb(stage.name, len(stages), state["meter"])
                metrics |= state["metrics"]
                continue
            assembly, status, own = self._stage(stage, recipe, index)
            metrics |= own if len(stages) == 1 else {f"{stage.name}/{k}": v for k, v in own.items()}
            if last:
                metrics |= own
            self._absorb(stage.name, len(stages), assembly.context.meter.state_dict())
            digest = checkpoint.weights_sha256(assembly.live)
            if status != "done":
                break
            self._leave(assembly, stage, last, dict(metrics))
        return Result(
            self.folder.name, str(self.folder), metrics, self.total.summary(), digest, 0.0, status,
            self.recipe.seed, [self.recipe.note] if self.recipe.note else [],
        )  # fmt: skip

    def _absorb(self, name: str, count: int, state: dict[str, Any]) -> None:
        for key, amount in state["totals"].items():
            self.total.totals[key] = self.total.totals.get(key, 0) + amount
        for charge, entry in state["charges"].items():
            label = charge if count == 1 else f"{name}/{charge}"
            self.total.charges[label] = dict(entry)
        self.total.facts |= state["facts"]

    # ---- one stage -----------------------------------------------------------------------------

    def _start_model(self, stage: StageSpec, recipe: Recipe, index: int) -> nn.Module:
        materials = self.materials_of(recipe)
        model = materials.model(recipe)
        source = stage.start
        if source == "previous" and index > 0:
            source = f"stage:{self.recipe.stages[index - 1].name}"
        if self.recipe.stages and source in ("original", "previous"):
            self._same_original(recipe, model, stage.name)
        if source.startswith("stage:"):
            report = transfer(model, self._exported(source.removeprefix("stage:")))
            if report["skipped"] or report["missing"]:
                self.progress.note(
                    f"stage {stage.name}: {len(report['loaded'])} tensors from {source}, "
                    f"{len(report['skipped'])} skipped, {len(report['missing'])} new"
                )
        return model

    def _same_original(self, recipe: Recipe, model: nn.Module, stage: str) -> None:
        """Refuse to start again from an original that is not what it was."""
        place = self.folder / "originals.json"
        known = json.loads(place.read_text()) if place.exists() else {}
        source = recipe.model.model_dump() if isinstance(recipe.model, Spec) else recipe.id
        key = hashlib.sha256(json.dumps([source, recipe.task]).encode()).hexdigest()[:16]
        digest = fingerprint(model)
        if known.get(key, digest) != digest:
            raise CheckpointError(
                f"stage {stage!r} starts from the original, and its weights are not those that an "
                "earlier stage started from",
                "put the model's folder back as it was, or start the run anew",
            )
        if key not in known:
            checkpoint.write_json(place, known | {key: digest})

    def _exported(self, name: str) -> dict[str, Tensor]:
        return checkpoint.read_folder(self.folder / "stages" / name)["model"]

    def materials_of(self, recipe: Recipe) -> Materials:
        """Data and model of a stage; those of the run where they agree."""
        parts = ("data", "task", "model", "batch")
        same = all(getattr(recipe, k) == getattr(self.recipe, k) for k in parts)
        lengths = [(shown_length(some), raw_length(some)) for some in (recipe, self.recipe)]
        if same and lengths[0] == lengths[1]:
            return self.materials
        key = json.dumps(recipe.resolved(), sort_keys=True)
        if key not in self._others:
            self._others[key] = load_materials(recipe, self.materials)
        return self._others[key]

    def _load(self, recipe: Recipe, reference: str) -> nn.Module:
        """Resolve `original`, `stage:x`, a path or an asset for `context.load`."""
        materials = self.materials_of(recipe)
        if reference == "original":
            return self.backend.place(materials.model(recipe))
        if reference.startswith("stage:"):
            model = materials.model(recipe)
            transfer(model, self._exported(reference.removeprefix("stage:")))
            return self.backend.place(model)
        other = Recipe(
            **{**{k: getattr(recipe, k) for k in Recipe.model_fields}, "model": reference}
        )
        return self.backend.place(materials.model(other))

    def assembled(
        self, stage: StageSpec, recipe: Recipe, index: int, kept: dict[str, Any] | None
    ) -> Assembly:
        """A stage put together: what it starts from, adapted, and not yet trained.

        Args:
            stage: The stage.
            recipe: Its own recipe.
            index: Its place among the stages.
            kept: Tensors of passes that were made already.
        """
        materials = self.materials_of(recipe)
        return assemble(
            recipe,
            model=self._start_model(stage, recipe, index),
            tokenizer=materials.tokenizer,
            objective=lambda requests: materials.objective(recipe, requests),
            train=materials.train,
            rows=materials.rows["train"],
            splits=materials.splits,
            meter=Meter(),
            backend=self.backend,
            pool=self.pools.get(stage.name),
            new_tokens=materials.new_tokens,
            loader=lambda reference: self._load(recipe, reference),
            kept=kept,
            flops=self.flops,
            prefixes=materials.prefixes,
            corruption=materials.corruption(recipe),
        )

    def _stage(
        self, stage: StageSpec, recipe: Recipe, index: int
    ) -> tuple[Assembly, str, dict[str, float]]:
        store = checkpoint.Checkpoints(self.folder / "checkpoints" / stage.name, recipe.every.keep)
        found = store.newest()
        assembly = self.assembled(stage, recipe, index, found[1]["kept"] if found else None)
        meter, labels = assembly.context.meter, self.materials_of(recipe).labels
        keeper = Keeper(assembly, store, labels, self.progress, lambda: self.stop_requested)
        if found:
            for complaint in found[2]:
                self.progress.note(complaint)
            keeper.restore(found[1])
            self.progress.note(f"going on at step {int(meter.totals['steps'])}")
        elif stage.optimizer_state == "carry" and self.carried:
            _carry(assembly, self.carried)
        keeper.log = Log(
            self.folder
            / ("metrics.jsonl" if stage.name == MAIN else f"metrics-{stage.name}.jsonl"),
            self.trackers,
            start=int(meter.totals["steps"]),
        )
        self.progress.stage(stage.name, recipe.budget, meter)
        assembly.loop.on_step, assembly.loop.after_step = keeper.on_step, keeper.after_step
        try:
            with self._interruptible():
                assembly.loop.run()
        finally:
            assembly.loop.drawer.close()
            keeper.log.close()
        if self.stop_requested and meter.spent(recipe.budget) < recipe.budget.amount:
            return assembly, "stopped", {}
        _refuse_idle(assembly)
        keeper.finish()
        metrics = keeper.measure_all()
        for split, table in keeper.items.items():
            _write_items(self.folder / f"items-{stage.name}-{split}.parquet", table)
        return assembly, "done", metrics

    def _leave(
        self, assembly: Assembly, stage: StageSpec, last: bool, metrics: dict[str, float]
    ) -> None:
        """Write what the stage hands on: trained weights, and the exported model if needed."""
        state = checkpoint.capture(assembly.live, assembly.loop.marks)
        checkpoint.write_folder(
            self.folder / "trained" / stage.name,
            {key: state[key] for key in ("manifest", "parameters", "buffers", "masks", "restful")}
            | {"kept": assembly.context.kept},
        )
        if last:
            return
        model = assembly.exported()
        self.carried = state["optimizers"]
        checkpoint.write_folder(
            self.folder / "stages" / stage.name,
            {
                "model": dict(model.state_dict()),
                "optimizers": state["optimizers"],
                "meter": assembly.context.meter.state_dict(),
                "metrics": metrics,
            },
        )

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C ends the run after the step it is in."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(*_: Any) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            self.progress.note("stopping after this step; press again to stop at once")

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _write_items(path: Path, table: dict[str, list[Any]]) -> None:
    """What every row of a split got: ids, losses, predictions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    spare = path.with_name(f".{path.name}.part")
    pq.write_table(pa.table(table), spare)
    spare.rename(path)


def transfer(model: nn.Module, state: dict[str, Tensor]) -> dict[str, list[str]]:
    """Load what matches by name and shape, and say what did not.

    Returns:
        Names under "loaded", "skipped" (in the state alone, or of another shape) and "missing"
        (in the model alone).
    """
    own = model.state_dict()
    fits = {n: v for n, v in state.items() if n in own and own[n].shape == v.shape}
    model.load_state_dict(fits, strict=False)
    return {
        "loaded": sorted(fits),
        "skipped": sorted(set(state) - set(fits)),
        "missing": sorted(set(own) - set(fits)),
    }


def _carry(assembly: Assembly, saved: list[dict[str, Any]]) -> None:
    """Moments of the stage before, for parameters of equal name and shape."""
    moments = {n: m for optimizer in saved for n, m in optimizer["moments"].items()}
    for optimizer in assembly.live.optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                state = moments.get(name, {})
                fits = all(
                    not isinstance(v, Tensor) or v.dim() == 0 or v.shape == parameter.shape
                    for v in state.values()
                )
                if state and fits:
                    optimizer.state[parameter] = dict(state)


def _refuse_idle(assembly: Assembly) -> None:
    """A watcher that never saw a step did nothing."""
    if assembly.watchers and assembly.context.meter.totals["steps"] == 0:
        names = [m.card.name for m in assembly.recipe.methods if isinstance(m, OnStep)]
        raise NoEffect(f"{names} watch steps and the run took none", "raise the budget")
