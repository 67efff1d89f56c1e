"""A method is its frozen settings, and it acts at typed places.

Each place is one function from a thing to the same kind of thing, so composing methods is
composing functions. A method inherits the places where it acts and writes only their functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from . import callspec
from .card import Card
from .claims import Claim
from .context import Context, Draw, Example, Seen, Step, generator_of, seed_of
from .errors import ConfigError
from .watcher import Watcher, Weighting, mix_rewards

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .live import Live
    from .losses import Batch, Objective


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that a method wants treated apart.

    Attributes:
        names: Parameter names as they stand after adapting.
        lr_factor: Multiplies the scheduled learning rate.
        weight_decay: Replaces the recipe's; None keeps it.
        clip: Largest gradient norm of this group alone; None leaves it to the recipe.
    """

    names: tuple[str, ...]
    lr_factor: float = 1.0
    weight_decay: float | None = None
    clip: float | None = None


def hashable(value: Any) -> Any:
    """Sequences to tuples, maps to sorted tuples of pairs: settings are hashable."""
    if isinstance(value, Mapping):
        return tuple(sorted(((k, hashable(v)) for k, v in value.items()), key=_order))
    if isinstance(value, (list, tuple)):
        return tuple(hashable(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted((hashable(item) for item in value), key=_order))
    return value


def _order(value: Any) -> tuple[str, Any]:
    """A sort key that keeps numbers in order and never compares unlike things."""
    first = value[0] if isinstance(value, tuple) and value else value
    plain = isinstance(first, (int, float)) and not isinstance(first, bool)
    return ("", first) if plain else (f"{type(first).__name__} {first!r}", 0)


def _checked(adapter: Any, given: Any) -> Any:
    """The first form of a value that its annotation allows, hashable."""
    from pydantic import ValidationError

    try:
        return hashable(adapter.validate_python(hashable(given)))
    except ValidationError as error:
        # An annotation that wants a map or a set alone gets one; the setting stays hashable.
        kinds = {detail["type"] for detail in error.errors()}
        if not kinds <= {"dict_type", "mapping_type", "set_type", "frozen_set_type"}:
            raise
        wants_map = kinds & {"dict_type", "mapping_type"}
        try:
            given = dict(given) if wants_map else given
        except (TypeError, ValueError):
            raise error from None
        return hashable(adapter.validate_python(given))


@functools.cache
def _adapters(cls: type) -> dict[str, Any]:
    from pydantic import ConfigDict, TypeAdapter

    hints = typing.get_type_hints(cls, include_extras=True)
    strict = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    return {f.name: TypeAdapter(hints[f.name], config=strict) for f in dataclasses.fields(cls)}


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods: a frozen dataclass of settings with a card.

    Settings are checked against their annotations when the object is made; ranges are given
    with `Annotated[int, Ge(1)]`. Cross-field checks go into `validate`.

    Raises:
        ConfigError: If a setting has the wrong type or is out of range.
    """

    card: ClassVar[Card]

    def __post_init__(self) -> None:
        from pydantic import ValidationError

        for name, adapter in _adapters(type(self)).items():
            value = getattr(self, name)
            try:
                value = _checked(adapter, value)
            except ValidationError as error:
                reason = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()[:3]))
                raise ConfigError(
                    f"{self.card.name}.{name} = {callspec.shown(value)} is not allowed",
                    reason[:1].lower() + reason[1:].replace("\n", " "),
                ) from None
            object.__setattr__(self, name, value)
        self.validate()

    def validate(self) -> None:
        """Refuse settings that do not go together."""

    def settings(self) -> dict[str, Any]:
        """All settings by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def spec(self) -> str:
        """The call string that makes this object again: only what differs from the defaults."""
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.default is dataclasses.MISSING or getattr(self, f.name) != hashable(f.default)
        }
        return callspec.render(self.card.name, changed)

    @classmethod
    def places(cls) -> tuple[str, ...]:
        """Names of the places where the method acts, in the order a run meets them."""
        return tuple(p.__name__ for p in PLACES if issubclass(cls, p))

    def claims(self, model: nn.Module | None) -> list[Claim]:
        """What the method holds; run-wide unless a subclass names parameters."""
        return [Claim(word) for word in self.card.claims]

    def groups(self, model: nn.Module, objective: Objective) -> list[ParameterGroup]:
        """Parameters that want their own learning rate, weight decay or clip."""
        return []

    def trains(self, model: nn.Module) -> tuple[str, ...]:
        """Names of base parameters that stay trainable though the card freezes the base."""
        return ()


class FittedSelector(ABC):
    """What a selector learned: scores examples, chooses from pools, and lives on disk."""

    @abstractmethod
    def score(self, examples: Sequence[Example]) -> Tensor:
        """One score an example, higher is kept first. Shape (examples,)."""

    @abstractmethod
    def select(self, pool: Any) -> Any:
        """From a pool to a pool."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write safetensors and JSON."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> FittedSelector:
        """Read what `save` wrote."""


class OnData(Method):
    """Chooses, orders or weighs the training examples."""

    @abstractmethod
    def select(self, pool: Any, context: Context | None = None) -> Any:
        """From a pool to a pool."""

    def fit(self, pool: Any, context: Context | None = None) -> FittedSelector:
        """Learn a selector from the pool; the settings stay frozen."""
        raise ConfigError(f"{self.card.name!r} learns nothing", "call select")


class OnBatch(Method):
    """Rewrites examples or decides how they become rows of a batch."""

    def transform(self, example: Example, draw: Draw, step: Step, context: Context) -> Example:
        """From an example to an example; randomness only through `draw(example, stream)`."""
        return example

    def present(self, example: Example, context: Context) -> Example:
        """How an example is shown, in training, evaluation and prediction alike.

        Called before any `transform`; draws nothing. What only training sees belongs to
        `transform`.
        """
        return example

    def shown_length(self, length: int) -> int:
        """Tokens of any example before `present`, so that it fits `length` after it."""
        return length

    def raw_length(self, length: int, task: str) -> int:
        """Tokens of a training example before `transform`, so that it fits `length` after it.

        Args:
            length: Longest row in tokens.
            task: The recipe's task; of a pair, the tokens of both parts together count.
        """
        return length

    def layout(self, context: Context) -> Callable[[list[Example], Draw, Step], Batch] | None:
        """How examples become a batch; None leaves the layout to others."""
        return None

    def tokens(self, tokenizer: Any) -> tuple[str, ...]:
        """Names of tokens that must exist before any data is encoded."""
        return ()


class OnModel(Method):
    """Changes the model before training and hands back a plain one afterwards."""

    @abstractmethod
    def adapt(self, model: nn.Module, context: Context | None = None) -> nn.Module:
        """From a model to a model. Without a context the base is frozen for the caller."""

    def export(self, model: nn.Module) -> nn.Module:
        """Back to a model without this method: merged, densified, unwrapped."""
        return model

    def bind(self, model: nn.Module, batch: Batch) -> contextlib.AbstractContextManager[Any]:
        """A context around every call of the model, for what depends on the batch."""
        return contextlib.nullcontext()


class OnObjective(Method):
    """Changes the objective."""

    @abstractmethod
    def shape(self, objective: Objective, model: nn.Module, context: Context) -> Objective:
        """From an objective to an objective."""


class OnOptimizer(Method):
    """Brings the update rule."""

    @abstractmethod
    def build(
        self, groups: Sequence[dict[str, Any]], settings: Any, context: Context
    ) -> torch.optim.Optimizer:
        """An optimizer over parameter groups (keys params, names, lr, weight_decay)."""


class OnSchedule(Method):
    """Changes the learning-rate schedule."""

    @abstractmethod
    def schedule(self, base: Callable[[Step], float], context: Context) -> Callable[[Step], float]:
        """From a schedule to a schedule: step -> factor of the learning rate."""


class OnStep(Method):
    """Watches the run and may change it."""

    @abstractmethod
    def watch(self, live: Live) -> Watcher:
        """The watcher of one run."""


class OnReward(Method):
    """Weighs several rewards against each other."""

    @abstractmethod
    def weigh(self, live: Live) -> Weighting:
        """The weighting of one run."""


PLACES: tuple[type[Method], ...] = (
    OnData, OnBatch, OnModel, OnObjective, OnOptimizer, OnSchedule, OnStep, OnReward,
)  # fmt: skip

__all__ = [
    "PLACES", "Context", "Draw", "Example", "FittedSelector", "Method", "OnBatch", "OnData",
    "OnModel", "OnObjective", "OnOptimizer", "OnReward", "OnSchedule", "OnStep",
    "ParameterGroup", "Seen", "Step", "Watcher", "Weighting", "generator_of", "mix_rewards",
    "seed_of",
]  # fmt: skip
