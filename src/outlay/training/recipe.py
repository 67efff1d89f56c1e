"""A recipe: everything that decides a run, frozen, read from and written to YAML.

Unknown keys, wrong types and impossible values are refused with the path of the field, the
value, what is allowed and the nearest right spelling.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from ..core.budget import CAPS, Budget
from ..core.errors import ConfigError, nearest
from .specs import (
    MASKED,
    BatchSpec,
    DataSpec,
    Duration,
    EvaluateSpec,
    EverySpec,
    Methods,
    ModelSpec,
    OptimizerSpec,
    ScheduleSpec,
    Spec,
    StageSpec,
    Task,
    TaskSpec,
)


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
        if getattr(self.data, "tasks", ()):
            if self.budget.unit not in ("steps", "examples"):
                raise ValueError(
                    f"budget = {self.budget} cannot be parted among data.tasks beforehand; "
                    "give steps or examples"
                )
            if self.evaluate.patience or self.evaluate.keep_best:
                raise ValueError(
                    "evaluate.patience and keep_best look for one best moment, which a sequence "
                    "of data.tasks has not"
                )
        if self.batch.packing and self.task != "causal-language-modeling":
            raise ValueError(f"batch.packing is for causal-language-modeling, not {self.task}")
        if self.batch.packing and getattr(self.model, "cache_frozen", False):
            raise ValueError("model.cache_frozen keeps whole rows; leave batch.packing out")
        if self.task in MASKED and getattr(self.model, "cache_frozen", False):
            raise ValueError(f"{self.task} hides other parts each time: no model.cache_frozen")
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
            if isinstance(value.get("tasks"), list):
                tasks = [_anchored({"data": task}, base)["data"] for task in value["tasks"]]
                fields[part]["tasks"] = tasks
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
        "tasks": TaskSpec,
    }  # fmt: skip
    kind = root
    for part in path:
        kind = parts.get(part, kind)
    return list(kind.model_fields)


Stage = StageSpec
