"""The parts of a recipe: frozen, strict about keys, with what each field means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from ..core import registry
from ..core.budget import Budget
from ..core.method import Method

TASKS = (
    "sequence-classification",
    "regression",
    "multi-label-classification",
    "causal-language-modeling",
    "sequence-to-sequence",
    "image-classification",
    "masked-language-modeling",
    "masked-image-modeling",
)
Task = Literal[
    "sequence-classification",
    "regression",
    "multi-label-classification",
    "causal-language-modeling",
    "sequence-to-sequence",
    "image-classification",
    "masked-language-modeling",
    "masked-image-modeling",
]
# Tasks whose targets are made from the inputs: parts of them are hidden and predicted.
MASKED_TEXT, MASKED_IMAGES = "masked-language-modeling", "masked-image-modeling"
MASKED = (MASKED_TEXT, MASKED_IMAGES)
IMAGES = ("image-classification", MASKED_IMAGES)


class Spec(BaseModel):
    """Base of all parts of a recipe: frozen, strict about keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
    )


# Only what a task itself names: the rest it takes from the specification around it.
_AS_GIVEN = PlainSerializer(
    lambda tasks: [task.model_dump(exclude_unset=True) for task in tasks], return_type=list
)


class ModelSpec(Spec):
    """Which model: exactly one of `path`, `asset` and `config`.

    Attributes:
        path: A local transformers folder (config.json and safetensors).
        asset: Name of a packaged model, see `outlay doctor`.
        config: A model from scratch: "llama", "gpt2", "bert", "t5", "vit" or "cnn".
        layers: Blocks of a model from scratch.
        width: Hidden width of a model from scratch.
        heads: Attention heads of a model from scratch; width / 32 by default.
        vocabulary: Token ids of a model from scratch; the tokenizer's size by default.
        tokenizer: Path or asset of the tokenizer, if not the model's own; "bpe" trains a byte-level
            one of `vocabulary` tokens on the training rows.
        dropout: Dropout of the whole model, if not its config's own.
        gradient_checkpointing: Recompute activations in the backward pass.
        cache_frozen: Compute what frozen lower layers give once per example and reuse it.
        revision: Free text that names the weights, part of the run's identity.
    """

    path: str | None = None
    asset: str | None = None
    config: Literal["llama", "gpt2", "bert", "t5", "vit", "cnn"] | None = None
    layers: Annotated[int, Field(ge=1)] | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    heads: Annotated[int, Field(ge=1)] | None = None
    vocabulary: Annotated[int, Field(ge=2)] | None = None
    tokenizer: str | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    gradient_checkpointing: bool = False
    cache_frozen: bool = False
    revision: str = ""

    @property
    def trains_tokenizer(self) -> bool:
        """True if the tokenizer is made from the training rows."""
        return self.tokenizer == "bpe"

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        given = [k for k in ("path", "asset", "config") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, asset and config, not {given or 'none'}")
        if self.config is None and (self.layers or self.width or self.heads or self.vocabulary):
            raise ValueError("layers, width, heads and vocabulary go with config alone")
        if self.trains_tokenizer and self.config is None:
            raise ValueError(
                "tokenizer = 'bpe' goes with config alone: a trained model has its own"
            )
        return self


class DataSpec(Spec):
    """Which data: exactly one of `path`, `asset` and `tasks`; columns by name.

    Attributes:
        path: JSONL, CSV, Parquet or plain text file, or a `datasets` folder.
        asset: Name of a packaged data set.
        text: Column of the text.
        text_pair: Column of the second text of a pair.
        label: Column of the label or the real-valued target.
        labels: Columns of several labels, or one column that holds lists.
        prompt: Column of the prompt; the loss is on the completion only.
        completion: Column of the completion.
        messages: Column of a list of {role, content}; the loss is on assistant turns only.
        id: Column of the id; the row number by default.
        domain: Column of the domain.
        date: Column of a date or year, for methods that choose by age.
        validation: File of the validation split; otherwise a share of `path`.
        test: File of the test split; otherwise a share of `path`.
        validation_share: Share (below 1) or number of rows, stratified by label.
        test_share: Share (below 1) or number of rows, stratified by label.
        split_seed: Seed of the split, apart from the run's seed.
        limit: Largest number of training rows.
        deduplicate: Remove rows with equal text before splitting.
        blocks: Join the documents of a split and domain, each ended by the end-of-text token, and
            cut them into full rows of `batch.length` tokens. For causal language modeling on text.
        class_weights: "balanced", or a weight for each class name.
        tasks: Tasks learned one after the other in one stage, under one optimizer. What a task does
            not name it takes from here. The label space is that of all of them.
    """

    path: str | None = None
    asset: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    labels: str | tuple[str, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    id: str | None = None
    domain: str | None = None
    date: str | None = None
    validation: str | None = None
    test: str | None = None
    validation_share: Annotated[float, Field(ge=0)] = 0.1
    test_share: Annotated[float, Field(ge=0)] = 0.1
    split_seed: int = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    deduplicate: bool = False
    blocks: bool = False
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    tasks: Annotated[tuple[TaskSpec, ...], _AS_GIVEN] = ()

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        given = [k for k in ("path", "asset") if getattr(self, k) is not None]
        given += ["tasks"] if self.tasks else []
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, asset and tasks, not {given or 'none'}")
        if not self.tasks:
            return self
        if self.validation or self.test:
            raise ValueError("with tasks, validation and test are named by each task")
        if self.blocks or self.class_weights:
            raise ValueError("blocks and class_weights do not go with tasks")
        names = [task.name for task in self.in_sequence()]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"give at least two tasks with names of their own, not {names}")
        return self

    def in_sequence(self) -> tuple[TaskSpec, ...]:
        """The tasks in order, each with its name and everything that it takes from here."""
        shared = {k: getattr(self, k) for k in self.model_fields_set - {"tasks"}}
        found = []
        for task in self.tasks:
            own = {k: getattr(task, k) for k in task.model_fields_set}
            name = task.name or task.asset or Path(str(task.path)).stem
            found.append(TaskSpec(**{**shared, **own, "name": name}))
        return tuple(found)


class TaskSpec(DataSpec):
    """One task of a sequence: data, a name, and its part of the budget.

    Attributes:
        name: What it is called in metrics; the asset's or the file's name by default.
        weight: Its part of the steps, over the sum of all weights.
    """

    name: Annotated[str, Field(pattern=r"^[^/]+$")] | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _no_tasks_inside(self) -> TaskSpec:
        if self.tasks:
            raise ValueError("a task holds no tasks of its own")
        return self


DataSpec.model_rebuild()


class OptimizerSpec(Spec):
    """The update rule.

    Attributes:
        name: "adamw", "sgd" or "adagrad".
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay; with adagrad it joins the gradient, as torch has it.
        betas: AdamW's moment decays, or (momentum, ignored) for sgd.
        eps: AdamW's or AdaGrad's epsilon, outside the root.
        clip: Largest gradient norm; None does not clip.
        head_lr_factor: Learning rate of the task's head over that of the rest.
    """

    name: Literal["adamw", "sgd", "adagrad"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    head_lr_factor: Annotated[float, Field(gt=0)] = 1.0


class ScheduleSpec(Spec):
    """Learning-rate factor over the share of the budget that is spent.

    Attributes:
        name: "linear", "cosine" or "constant" after warm-up.
        warmup: Share of the budget over which the rate rises from zero.
        floor: Factor at the end.
    """

    name: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0


class BatchSpec(Spec):
    """How examples become a step.

    Attributes:
        size: Examples of one optimizer step.
        micro: Examples of one forward pass; must divide `size`; the whole step by default.
        length: Longest row in tokens; longer ones are cut.
        pad_to: Rows are padded to a multiple of this many tokens, or to `length` if 0.
        prefetch: Steps drawn ahead; never changes a result.
        packing: Several examples a row, none seeing another: less padding, the same loss. For
            causal language modeling.
    """

    size: Annotated[int, Field(ge=1)] = 16
    micro: Annotated[int, Field(ge=1)] | None = None
    length: Annotated[int, Field(ge=1)] = 128
    pad_to: Annotated[int, Field(ge=0)] = 8
    prefetch: Annotated[int, Field(ge=0)] = 0
    packing: bool = False

    @model_validator(mode="after")
    def _divides(self) -> BatchSpec:
        if self.micro is not None and self.size % self.micro:
            raise ValueError(f"micro = {self.micro} does not divide size = {self.size}")
        return self


def _duration(value: Any) -> Any:
    return value if value is None else Budget.parse(value)


Duration = Annotated[
    Budget, BeforeValidator(_duration), PlainSerializer(str, return_type=str, when_used="always")
]


class EverySpec(Spec):
    """How often.

    Attributes:
        evaluate: Steps between evaluations on the validation split; only at the end by default.
        save: Steps between checkpoints; by default one a minute, and one when asked to stop.
        log: Steps between log lines.
        keep: Checkpoints that stay on disk.
    """

    evaluate: Annotated[int, Field(ge=1)] | None = None
    save: Annotated[int, Field(ge=1)] | None = None
    log: Annotated[int, Field(ge=1)] = 1
    keep: Annotated[int, Field(ge=1)] = 2


class EvaluateSpec(Spec):
    """What is measured and which weights are kept.

    Attributes:
        splits: Splits that are measured at the end.
        metric: Metric that decides; the task's own by default.
        batch: Rows of one evaluation pass.
        keep_best: Export the weights of the best validation instead of the last.
        references: Estimators that are fitted on the same rows and measured beside the run, as
            `ngram(order=5)` and `xz` in language modeling.
        patience: Stop after so many evaluations without a better one; needs every.evaluate.
    """

    splits: tuple[Literal["validation", "test"], ...] = ("validation", "test")
    metric: str | None = None
    batch: Annotated[int, Field(ge=1)] = 64
    keep_best: bool = False
    references: tuple[str, ...] = ()
    patience: Annotated[int, Field(ge=1)] | None = None


def _methods(value: Any) -> Any:
    if isinstance(value, (str, Method)):
        value = (value,)
    if not isinstance(value, Sequence):
        raise ValueError("give a list of call strings")
    return tuple(registry.build(item) for item in value)


Methods = Annotated[
    tuple[Any, ...],
    BeforeValidator(_methods),
    PlainSerializer(lambda methods: [m.spec() for m in methods], return_type=list),
]


class StageSpec(Spec):
    """One stage of a recipe; what it does not name it takes from the recipe.

    Attributes:
        name: Name, for `stage:NAME` references.
        start: "previous", "original" or "stage:NAME".
        optimizer_state: "fresh", or "carry" to go on with the previous stage's moments.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    start: str = "previous"
    optimizer_state: Literal["fresh", "carry"] = "fresh"
    model: ModelSpec | None = None
    data: DataSpec | None = None
    task: Task | None = None
    methods: Methods | None = None
    objective: dict[str, Any] | None = None
    optimizer: OptimizerSpec | None = None
    schedule: ScheduleSpec | None = None
    budget: Duration | None = None
