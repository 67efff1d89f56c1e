"""Further pre-training by self-distillation in front of a fine-tuning recipe (arXiv:2210.02871)."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..core import registry
from ..core.budget import Budget
from ..core.errors import ConfigError
from ..training.data.columns import CLASSES
from ..training.recipe import Recipe
from ..training.specs import (
    BatchSpec,
    DataSpec,
    EverySpec,
    ModelSpec,
    OptimizerSpec,
    ScheduleSpec,
    StageSpec,
)

_LOG = "distance_to_initial"


def self_distillation(
    fine_tune: Recipe,
    task: str,
    budget: Budget | str,
    *,
    rounds: int = 1,
    teacher_budget: Budget | str | None = None,
    distillation: Any = "feature_distillation",
    start: str = "original",
    data: DataSpec | None = None,
    optimizer: OptimizerSpec | None = None,
    objective: dict[str, object] | None = None,
) -> Recipe:
    """Stages `teacher`, `student-1` to `student-N` and `fine-tune` in place of the recipe's one.

    Every student starts from the original weights again, which are hashed each time; the run fails
    if they changed. The teacher of the first is the stage `teacher`, of the others the student
    before. The last student is fine-tuned. Each stage logs its distance to the original.

    Args:
        fine_tune: What comes last, without stages: its data, model, methods and budget.
        task: The self-supervised task, as "masked-language-modeling" or "masked-image-modeling".
        budget: Of each student.
        rounds: Students in a row; 1 in the released scripts.
        teacher_budget: The students' by default, as published.
        distillation: The penalty, `feature_distillation(...)`; its teacher is filled in.
        start: What students start from. "stage:teacher" goes on from the teacher: an ablation,
            which the paper found worse.
        data: Unlabeled rows; those of `fine_tune` without their labels by default.
        optimizer: Of teacher and students; that of `fine_tune` by default.
        objective: Settings of the self-supervised task.

    Raises:
        ConfigError: If there are no rounds, the recipe has stages, or rows to be tested on would be
            seen without labels: real targets and several labels split the rows in another way.
    """
    if rounds < 1:
        raise ConfigError(f"rounds = {rounds} is not allowed", "give at least one student")
    if fine_tune.stages:
        raise ConfigError("the recipe to fine-tune has stages of its own", "give one without")
    own = all(getattr(fine_tune.data, split, None) for split in ("validation", "test"))
    if fine_tune.task not in CLASSES and not own:
        raise ConfigError(
            f"{fine_tune.task} splits its rows by their targets, which {task} does not read",
            "give data.validation and data.test as files",
        )
    budget = Budget.parse(budget)
    teacher_budget = budget if teacher_budget is None else Budget.parse(teacher_budget)
    students = [f"student-{index}" for index in range(1, rounds + 1)]
    shared = {
        "task": task,
        "data": data or fine_tune.data,
        "objective": objective or {},
        "optimizer": optimizer or fine_tune.optimizer,
    }
    penalty = registry.build(distillation)
    stages = [
        StageSpec(
            name="teacher", start="original", methods=(_LOG,), budget=teacher_budget,
            **shared,
        )
    ]  # fmt: skip
    for teacher, name in zip(["teacher", *students], students):
        methods = (dataclasses.replace(penalty, teacher=f"stage:{teacher}"), _LOG)
        stages.append(StageSpec(name=name, start=start, methods=methods, budget=budget, **shared))
    tuned = StageSpec(
        name="fine-tune", start=f"stage:{students[-1]}", task=fine_tune.task, data=fine_tune.data,
        methods=fine_tune.methods, objective=fine_tune.objective, optimizer=fine_tune.optimizer,
        budget=fine_tune.budget,
    )  # fmt: skip
    return fine_tune.changed({"stages": [*(s.model_dump(exclude_unset=True) for s in stages),
                                         tuned.model_dump(exclude_unset=True)]})  # fmt: skip


def digits_self_distillation() -> Recipe:
    """A vision transformer hides and predicts patches of digits, teaches itself, is fine-tuned.

    It starts from random weights: this shows how the stages go together, in a minute. What the
    method is for is an original that was pre-trained on far more.
    """
    from .usual import digits_vit

    tuning = digits_vit().changed(
        {"name": "digits-self-distillation", "every": EverySpec(), "budget": Budget(200, "steps")}
    )
    return self_distillation(
        tuning, "masked-image-modeling", Budget(200, "steps"),
        optimizer=OptimizerSpec(lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95)),
    )  # fmt: skip


def minilm_self_distillation() -> Recipe:
    """A pre-trained encoder (22.7 M parameters) on questions without labels, then on 300 with.

    Teacher and student see all training questions and no label; their classes come with the last
    stage, which sees 300. A few minutes on one core.
    """
    questions = DataSpec(
        asset="questions", deduplicate=True, validation_share=1000, test_share=1000
    )
    tuning = Recipe(
        name="minilm-self-distillation",
        model=ModelSpec(asset="minilm", dropout=0.0),
        task="sequence-classification",
        data=questions.model_copy(update={"limit": 300}),
        optimizer=OptimizerSpec(lr=1e-4),
        schedule=ScheduleSpec(),
        batch=BatchSpec(size=16, length=24),
        budget=Budget(60, "steps"),
    )
    return self_distillation(
        tuning, "masked-language-modeling", Budget(30, "steps"), data=questions,
        optimizer=OptimizerSpec(lr=1e-4, weight_decay=0.01, betas=(0.9, 0.95)),
    )  # fmt: skip
