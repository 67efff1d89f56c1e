"""outlay's methods inside transformers' own `Trainer`.

`OutlayTrainer` takes `methods=[...]` beside everything that `Trainer` takes: it adapts the
model, shapes the loss, builds the optimizer and drives the watchers. `OutlayCallback` is the
part for a `Trainer` of your own: it drives `OnStep` methods of a model that is already adapted.
What a `Trainer` cannot carry is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..core import registry
from ..core.budget import Budget
from ..core.claims import check
from ..core.errors import Conflict, NoEffect
from ..core.live import Live
from ..core.losses import Objective
from ..core.method import (
    Context,
    Method,
    OnBatch,
    OnData,
    OnModel,
    OnObjective,
    OnOptimizer,
    OnReward,
    OnSchedule,
    OnStep,
    Seen,
    Step,
    Watcher,
)
from ..training import checkpoint
from ..training.assemble import adapt
from ..training.objectives import objective_for
from ..training.optimizer import schedule_of
from ..training.specs import OptimizerSpec, ScheduleSpec

STATE = "outlay"


def task_of(model: nn.Module) -> str:
    """Outlay's task name for a transformers model.

    Raises:
        Conflict: If the model's head is none that outlay has an objective for.
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        config: Any = model.config
        kinds = {
            "regression": "regression",
            "multi_label_classification": "multi-label-classification",
        }
        fallback = "regression" if config.num_labels == 1 else "sequence-classification"
        return kinds.get(config.problem_type or "", fallback)
    if name.endswith("ForImageClassification"):
        return "image-classification"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-language-modeling"
    if name.endswith("ForConditionalGeneration"):
        return "sequence-to-sequence"
    raise Conflict(
        f"no objective for {name}", "use a sequence or image classification or language model"
    )


def refuse_uncarried(methods: Sequence[Method], carried: tuple[type, ...], where: str) -> None:
    """Refuse, by name, methods that act where this integration cannot reach.

    Raises:
        Conflict: With the method, the place, and where it does work.
    """
    for method in methods:
        for place in (OnData, OnBatch, OnModel, OnObjective, OnOptimizer, OnSchedule, OnStep):
            if isinstance(method, place) and not issubclass(place, carried):
                raise Conflict(
                    f"{where} cannot carry {method.card.name!r}, which acts at {place.__name__}",
                    "use outlay.run, or leave the method out",
                )
        if isinstance(method, OnReward):
            raise Conflict(
                f"{where} cannot carry {method.card.name!r}, which weighs rewards",
                "use outlay.run, or leave the method out",
            )


class OutlayCallback(TrainerCallback):
    """Drives `OnStep` methods and masks inside a `Trainer`.

    Attach it to a `Trainer` whose model is already adapted; `OutlayTrainer` does so itself.

    Args:
        methods: Methods whose watchers run; those that act elsewhere too must already have
            adapted the model.
        objective: The shaped objective, if the trainer computes its loss with one.

    Raises:
        Conflict: If a method acts where a callback cannot reach.
    """

    def __init__(self, methods: Sequence[Any], objective: Objective | None = None) -> None:
        self.methods = [registry.build(method) for method in methods]
        if objective is None:
            refuse_uncarried(self.methods, (OnModel, OnStep), "OutlayCallback")
        self.objective = objective or Objective()
        self.live: Live | None = None
        self.watchers: list[Watcher] = []
        self.originals: dict[str, int] = {}
        self._calls = 0

    def attach(self, model: nn.Module, optimizer: Any, total_steps: int, seed: int) -> Live:
        """Make the watchers of a run; called once, before its first step."""
        inner = getattr(optimizer, "optimizer", optimizer)
        names = {id(p): n for n, p in model.named_parameters()}
        for group in inner.param_groups:
            group["names"] = [
                names.get(id(p), f"objective.{i}") for i, p in enumerate(group["params"])
            ]
            group.setdefault("base_lr", group["lr"])
        context = Context(
            budget=Budget(total_steps, "steps"),
            total_steps=total_steps,
            seed=seed,
            device=next(model.parameters()).device,
            freezes=True,
        )
        self.live = Live(model, self.objective, [inner], None, context)
        self.live.alias_originals(self.originals)
        self.watchers = [m.watch(self.live) for m in self.methods if isinstance(m, OnStep)]
        self._marks = checkpoint.buffer_marks(model, self.objective)
        return self.live

    def _step(self, state: Any, args: Any) -> Step:
        total = state.max_steps
        return Step(state.global_step, min(1.0, state.global_step / total), args.seed, total=total)

    # ---- the trainer's moments -------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before a step's first forward."""
        if self.live is None:
            self.attach(kwargs["model"], kwargs["optimizer"], state.max_steps, args.seed)
        for watcher in self.watchers:
            watcher.before_step(self._step(state, args))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are complete and clipped."""
        assert self.live is not None
        self.live.open = False
        nothing = torch.zeros(0)
        for watcher in self.watchers:
            watcher.after_backward(self._step(state, args), Seen(nothing, nothing, (), (), 0.0))
        named = dict(self.live.named_parameters()) if self.live.masks else {}
        for name in self.live.masks:
            self.live.before_update(name, named[name])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the update, gradients still there."""
        assert self.live is not None
        named = dict(self.live.named_parameters()) if self.live.masks else {}
        for name in self.live.masks:
            self.live.after_update(name, named[name])
        self.live.open = True
        step = self._step(state, args)
        with torch.no_grad():
            self.objective.after_update(self.live.model, step)
        for watcher in self.watchers:
            watcher.after_update(step)
        self._calls += 1
        self.live.context.meter.add(steps=1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an evaluation."""
        for watcher in self.watchers:
            watcher.after_eval("validation", kwargs.get("metrics") or {})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put outlay's state beside the trainer's."""
        if self.live is not None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
            tree = checkpoint.capture(self.live, self._marks)
            tree["watchers"] = [watcher.state_dict() for watcher in self.watchers]
            checkpoint.write_folder(folder, tree)

    def restore(self, folder: Path) -> None:
        """Rebuild structure, masks, moments and watchers from `on_save`'s folder."""
        assert self.live is not None
        tree = checkpoint.read_folder(folder)
        checkpoint.restore(self.live, tree)
        for watcher, saved in zip(self.watchers, tree["watchers"], strict=True):
            watcher.load_state_dict(saved)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a run in which the watchers were never driven."""
        for watcher in self.watchers:
            watcher.close()
        stepping = [m.card.name for m in self.methods if isinstance(m, OnStep)]
        if stepping and not self._calls:
            raise NoEffect(
                f"{', '.join(stepping)} never saw an optimizer step",
                "check that training ran and that this callback is attached to it",
            )


class OutlayTrainer(Trainer):
    """transformers' `Trainer` with outlay's methods.

    Args:
        model: A plain transformers model; adapted in place.
        args: As for `Trainer`.
        methods: Call strings or method objects.
        objective: Settings of the task's objective, as in a recipe.
        **kwargs: As for `Trainer`.

    Raises:
        Conflict: If methods clash, or act where a `Trainer` cannot reach.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        methods: Sequence[Any] = (),
        objective: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.methods = [registry.build(method) for method in methods]
        carried = (OnModel, OnObjective, OnOptimizer, OnSchedule, OnStep)
        refuse_uncarried(self.methods, carried, "OutlayTrainer")
        check(self.methods, model)
        context = Context(seed=args.seed if args is not None else 42, freezes=True)
        model, originals = adapt(model, self.methods, context)
        self.shaped: Objective = objective_for(
            task_of(model), objective or {}, None, context.requests
        )
        for method in self.methods:
            if isinstance(method, OnObjective):
                self.shaped = method.shape(self.shaped, model, context)
        coupled = [type(c).__name__ for c in self.shaped.couplers()]
        if coupled:
            raise Conflict(
                f"OutlayTrainer cannot couple the examples of a step ({', '.join(coupled)})",
                "use outlay.run, which sees the whole step before its backward",
            )
        super().__init__(model=model, args=args, **kwargs)
        if self.args.parallel_mode.value == "distributed" or self.args.n_gpu > 1:
            raise Conflict(
                "OutlayTrainer runs on one device", "use outlay.run under torchrun for several"
            )
        self.shaped.to(self.args.device)
        self.watching = OutlayCallback(self.methods, self.shaped)
        self.watching.originals = originals
        self.add_callback(self.watching)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The shaped objective, reduced as the trainer expects: a mean over the step."""
        step = Step(
            self.state.global_step,
            min(1.0, self.state.global_step / max(1, self.state.max_steps)),
            self.args.seed,
            total=max(0, self.state.max_steps),
        )
        losses = self.shaped(model, inputs, step)
        whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        value: Any = 0.0
        for name, term in losses.terms.items():
            weight = term.weights.sum()
            if whole and name == losses.primary:
                weight = torch.as_tensor(num_items_in_batch, device=weight.device)
            value = value + term.coefficient * term.row_sums().sum() / weight.clamp(min=1e-30)
        if model.training:
            # The trainer divides by the accumulation steps unless it counted the items itself.
            share = 1.0 / self.current_gradient_accumulation_steps if whole else 1.0
            for penalty in self.shaped.penalties(model, step).values():
                value = value + penalty * share
        if not return_outputs:
            return value
        return value, {"loss": value, "logits": losses.outputs["logits"]}

    def create_optimizer(self, model: Any = None) -> Any:
        """The trainer's optimizer, or that of a method that brings one; groups carry names."""
        owners = [m for m in self.methods if isinstance(m, OnOptimizer)]
        if self.optimizer is None and owners:
            named = [(n, p) for n, p in self._module().named_parameters() if p.requires_grad]
            group = {
                "params": [p for _, p in named],
                "names": [n for n, _ in named],
                "lr": self.args.learning_rate,
                "base_lr": self.args.learning_rate,
                "weight_decay": self.args.weight_decay,
            }
            spec = OptimizerSpec(lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
            self.optimizer = owners[-1].build([group], spec, Context(seed=self.args.seed))
            return self.optimizer
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The trainer's schedule, or the methods' own on top of a linear one."""
        if self.lr_scheduler is None and any(isinstance(m, OnSchedule) for m in self.methods):
            warmup = self.args.get_warmup_steps(num_training_steps) / max(1, num_training_steps)
            factor = schedule_of(ScheduleSpec(warmup=warmup), self.methods, Context())

            def at(index: int) -> float:
                share = min(1.0, index / num_training_steps)
                return factor(Step(index, share, self.args.seed, total=num_training_steps))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, at)
            return self.lr_scheduler
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Resume: outlay's own state holds structure and moments; the schedule is the trainer's."""
        folder = Path(checkpoint) / STATE if checkpoint else None
        if folder is None or not folder.exists():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.watching.attach(self._module(), self.optimizer, self.state.max_steps, self.args.seed)
        self.watching.restore(folder)
        schedule = Path(checkpoint or "") / "scheduler.pt"
        if schedule.exists() and self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(torch.load(schedule, weights_only=True))

    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def export_model(self) -> nn.Module:
        """The plain model, methods merged and unwrapped."""
        model: Any = self.shaped.export_source(self._module())
        for method in reversed(self.methods):
            if isinstance(method, OnModel):
                model = method.export(model)
        return model
