"""A recipe: everything that decides a run, frozen, read from and written to YAML.

Unknown keys, wrong types and impossible values are refused with the path of the field, the
value, what is allowed and the nearest right spelling.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from ..core import registry
from ..core.budget import CAPS, Budget
from ..core.errors import ConfigError, nearest
from ..core.method import Method

TASKS = (
    "sequence-classification",
    "regression",
    "multi-label-classification",
    "causal-language-modeling",
    "sequence-to-sequence",
    "image-classification",
)
Task = Literal[
    "sequence-classification",
    "regression",
    "multi-label-classification",
    "causal-language-modeling",
    "sequence-to-sequence",
    "image-classification",
]


class Spec(BaseModel):
    """Base of all parts of a recipe: frozen, strict about keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
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
        tokenizer: Path or asset of the tokenizer, if not the model's own.
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

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        given = [k for k in ("path", "asset", "config") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, asset and config, not {given or 'none'}")
        if self.config is None and (self.layers or self.width or self.heads or self.vocabulary):
            raise ValueError("layers, width, heads and vocabulary go with config alone")
        return self


class DataSpec(Spec):
    """Which data: exactly one of `path` and `asset`; columns by name.

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
        validation: File of the validation split; otherwise a share of `path`.
        test: File of the test split; otherwise a share of `path`.
        validation_share: Share (below 1) or number of rows, stratified by label.
        test_share: Share (below 1) or number of rows, stratified by label.
        split_seed: Seed of the split, apart from the run's seed.
        limit: Largest number of training rows.
        deduplicate: Remove rows with equal text before splitting.
        class_weights: "balanced", or a weight for each class name.
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
    validation: str | None = None
    test: str | None = None
    validation_share: Annotated[float, Field(ge=0)] = 0.1
    test_share: Annotated[float, Field(ge=0)] = 0.1
    split_seed: int = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    deduplicate: bool = False
    class_weights: Literal["balanced"] | dict[str, float] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        given = [k for k in ("path", "asset") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path and asset, not {given or 'none'}")
        return self


class OptimizerSpec(Spec):
    """The update rule.

    Attributes:
        name: "adamw" or "sgd".
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        betas: AdamW's moment decays, or (momentum, ignored) for sgd.
        eps: AdamW's epsilon.
        clip: Largest gradient norm; None does not clip.
        head_lr_factor: Learning rate of the task's head over that of the rest.
    """

    name: Literal["adamw", "sgd"] = "adamw"
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
    """

    size: Annotated[int, Field(ge=1)] = 16
    micro: Annotated[int, Field(ge=1)] | None = None
    length: Annotated[int, Field(ge=1)] = 128
    pad_to: Annotated[int, Field(ge=0)] = 8
    prefetch: Annotated[int, Field(ge=0)] = 0

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
        save: Steps between checkpoints; by default only when the run is asked to stop.
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
        patience: Stop after so many evaluations without a better one; needs every.evaluate.
    """

    splits: tuple[Literal["validation", "test"], ...] = ("validation", "test")
    metric: str | None = None
    batch: Annotated[int, Field(ge=1)] = 64
    keep_best: bool = False
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


class Recipe(Spec):
    """Everything that decides a run.

    Attributes:
        name: Names the run's folder.
        model: Which model, or a live `nn.Module` (then give `id`).
        task: What is learned.
        data: Which data, or a live sequence of rows (then give `id`).
        methods: Methods in the order they act; call strings or objects.
        objective: Settings of the task's objective: `average` ("tokens" or "sequences"),
            `label_smoothing`.
        optimizer: The update rule.
        schedule: Learning-rate schedule.
        batch: How examples become steps.
        precision: "float32", "float64" or "bfloat16" (compute; master weights are float32).
        budget: What ends the run, as `60steps` or `2e6tokens`.
        cap: What the run must not exceed, as `300000trainable_parameters`.
        every: Intervals.
        evaluate: What is measured.
        stages: Stages, one after the other; empty means one.
        seed: Seed of everything random.
        id: Names live objects; such a recipe cannot be replayed from its file.
        note: Free text, printed with results.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    model: ModelSpec | Any
    task: Task = "sequence-classification"
    data: DataSpec | Any
    methods: Methods = ()
    objective: dict[str, Any] = Field(default_factory=dict)
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    batch: BatchSpec = BatchSpec()
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    budget: Duration = Field(default_factory=lambda: Budget(100, "steps"))
    cap: Duration | None = None
    every: EverySpec = EverySpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    stages: tuple[StageSpec, ...] = ()
    seed: int = 0
    id: str | None = None
    note: str = ""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise _refusal(error, type(self)) from None

    @model_validator(mode="before")
    @classmethod
    def _sources(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            raise ValueError("a recipe is a mapping of fields")
        fields = dict(fields)
        for key, kind in (("model", ModelSpec), ("data", DataSpec)):
            value = fields.get(key)
            if isinstance(value, str):
                fields[key] = kind.model_validate({_source_kind(value): value})
            elif isinstance(value, Mapping):
                try:
                    fields[key] = kind.model_validate(dict(value))
                except ValidationError as error:
                    raise _refusal(error, kind, key) from None
        return fields

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        live = [k for k in ("model", "data") if not isinstance(getattr(self, k), Spec)]
        if live and not self.id:
            raise ValueError(f"{' and '.join(live)} given as live objects need an id")
        if self.budget.unit in CAPS:
            raise ValueError(f"{self.budget} is a cap, not a budget; give steps or tokens")
        if self.cap is not None and self.cap.unit not in CAPS:
            raise ValueError(f"cap = {self.cap} must be in {' or '.join(CAPS)}")
        if self.evaluate.patience and not self.every.evaluate:
            raise ValueError("evaluate.patience needs every.evaluate")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages have one name: {names}")
        for index, stage in enumerate(self.stages):
            known = [f"stage:{name}" for name in names[:index]]
            if stage.start not in ("previous", "original", *known):
                raise ValueError(
                    f"stage {stage.name!r} starts from {stage.start!r}; "
                    f"use previous, original{', ' if known else ''}{', '.join(known)}"
                )
        return self

    @property
    def replayable(self) -> bool:
        """False if the model or the data is a live object."""
        return isinstance(self.model, Spec) and isinstance(self.data, Spec)

    def resolved(self) -> dict[str, Any]:
        """Every field as plain values, defaults included."""
        fields = self.model_dump(mode="python", exclude={"model", "data"})
        for key in ("model", "data"):
            value = getattr(self, key)
            fields[key] = value.model_dump() if isinstance(value, Spec) else f"live:{self.id}"
        fields["methods"] = [method.spec() for method in self.methods]
        for stage, plain in zip(self.stages, fields["stages"]):
            if stage.methods is not None:
                plain["methods"] = [method.spec() for method in stage.methods]
        return json.loads(json.dumps(fields, default=str))

    def written(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        blank = type(self).model_construct(model=None, data=None)
        plain = self.resolved()
        for key in ("model", "data"):
            if isinstance(plain[key], dict):
                plain[key] = {k: v for k, v in plain[key].items() if v is not None}
                kind = type(getattr(self, key))
                plain[key] = {
                    k: v for k, v in plain[key].items() if v != kind.model_fields[k].default
                }
        for key in ("optimizer", "schedule", "batch", "every", "evaluate"):
            base = json.loads(json.dumps(getattr(blank, key).model_dump(), default=str))
            plain[key] = {k: v for k, v in plain[key].items() if v != base[k]}
        plain["stages"] = [
            {k: _compact(v) for k, v in stage.items() if v is not None} for stage in plain["stages"]
        ]
        return {k: v for k, v in plain.items() if v not in (None, "", [], {}) and _differs(k, v)}

    def to_yaml(self) -> str:
        """YAML that `Recipe.from_yaml` reads back to an equal recipe."""
        head = (
            "" if self.replayable else "# holds live objects: cannot be replayed from this file\n"
        )
        return head + yaml.safe_dump(self.written(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str, source: str = "recipe", base: Path | None = None) -> Recipe:
        """Read a recipe; nothing but plain YAML values is accepted.

        Args:
            text: YAML.
            source: What errors call it.
            base: Folder that relative paths start from; they become absolute.

        Raises:
            ConfigError: Broken YAML, unknown keys, wrong types or impossible values.
        """
        try:
            fields = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            line = getattr(getattr(error, "problem_mark", None), "line", None)
            where = f" at line {line + 1}" if line is not None else ""
            raise ConfigError(
                f"{source} is not YAML{where}", "`outlay recipe copy` writes one that works"
            ) from None
        if not isinstance(fields, dict):
            raise ConfigError(
                f"{source} holds no mapping of fields", "`outlay recipe copy` writes one that works"
            )
        if base is not None:
            fields = _anchored(fields, base)
        return cls(**{str(key): value for key, value in fields.items()})

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a YAML file; relative paths in it are taken from the file's folder."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read recipe {str(path)!r} ({type(error).__name__})", "give a YAML file"
            ) from None
        return cls.from_yaml(text, str(path), path.parent)

    def changed(self, settings: Mapping[str, Any]) -> Recipe:
        """A copy with dotted settings changed: `{"optimizer.lr": 1e-3}`.

        Raises:
            ConfigError: If a key is unknown or a value not allowed.
        """
        fields: dict[str, Any] = {k: getattr(self, k) for k in type(self).model_fields}
        fields = {k: v.model_dump() if isinstance(v, Spec) else v for k, v in fields.items()}
        fields["stages"] = [stage.model_dump(exclude_unset=True) for stage in self.stages]
        for dotted, value in settings.items():
            *parents, leaf = dotted.split(".")
            place = fields
            for parent in parents:
                if not isinstance(place.get(parent), dict):
                    raise ConfigError(
                        f"unknown setting {dotted!r}",
                        f"{nearest(parent, place)}known here: {', '.join(place)}",
                    )
                place = place[parent]
            if leaf not in place and place is not fields.get("objective"):
                raise ConfigError(
                    f"unknown setting {dotted!r}",
                    f"{nearest(leaf, place)}known here: {', '.join(place)}",
                )
            if leaf in ("path", "asset", "config") and value is not None:
                for other in ("path", "asset", "config"):
                    if other in place:
                        place[other] = None
            place[leaf] = value
        return type(self)(**fields)


def _source_kind(value: str) -> str:
    return "path" if "/" in value or "." in value or Path(value).exists() else "asset"


_PATHS = {"model": ("path",), "data": ("path", "validation", "test")}


def _anchored(fields: dict[Any, Any], base: Path) -> dict[Any, Any]:
    """A recipe's fields with relative paths made absolute; anything else is left as it is."""

    def absolute(text: Any) -> Any:
        plain = isinstance(text, str) and text
        return os.path.abspath(base / Path(text).expanduser()) if plain else text

    fields = dict(fields)
    for part, names in _PATHS.items():
        value = fields.get(part)
        if isinstance(value, str) and ("/" in value or "." in value or (base / value).exists()):
            fields[part] = absolute(value)
        elif isinstance(value, dict):
            fields[part] = {k: absolute(v) if k in names else v for k, v in value.items()}
    tokenizer = fields["model"].get("tokenizer") if isinstance(fields.get("model"), dict) else None
    if isinstance(tokenizer, str) and (base / tokenizer).is_dir():
        fields["model"]["tokenizer"] = absolute(tokenizer)
    if isinstance(fields.get("stages"), list):
        fields["stages"] = [
            _anchored(stage, base) if isinstance(stage, dict) else stage
            for stage in fields["stages"]
        ]
    return fields


def _compact(value: Any) -> Any:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _differs(key: str, value: Any) -> bool:
    field = Recipe.model_fields[key]
    if field.is_required():
        return True
    return value != field.get_default(call_default_factory=True)  # type: ignore[call-arg]


def _refusal(error: ValidationError, root: type[BaseModel], inside: str = "") -> ConfigError:
    """The first problem as two lines: path, value and what is allowed."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if not str(part).startswith("function-")]
    path = [inside, *path] if inside else path
    place = ".".join(path) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _known(root, path[:-1])
        return ConfigError(
            f"unknown key {place!r}", f"{nearest(path[-1], known)}known here: {', '.join(known)}"
        )
    if first["type"] == "missing":
        return ConfigError(f"{place!r} is missing", f"give {place}")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    value = repr(first["input"])
    reason = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(first["input"], Mapping) else f" = {value[:80]}"
    return ConfigError(f"{place}{shown} is not allowed", reason[:1].lower() + reason[1:])


def _known(root: type[BaseModel], path: list[str]) -> list[str]:
    parts = {
        "model": ModelSpec, "data": DataSpec, "optimizer": OptimizerSpec, "schedule": ScheduleSpec,
        "batch": BatchSpec, "every": EverySpec, "evaluate": EvaluateSpec, "stages": StageSpec,
    }  # fmt: skip
    kind = root
    for part in path:
        kind = parts.get(part, kind)
    return list(kind.model_fields)


Stage = StageSpec
