"""A method is its frozen settings, and it acts at typed places.

Each place is one function from a thing to the same kind of thing, so composing methods is
composing functions. A method inherits the places where it acts and writes only their functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from . import callspec
from .budget import Budget
from .card import Card
from .claims import Claim
from .errors import ConfigError
from .meter import Meter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .live import Live
    from .losses import Batch, Objective

Example = dict[str, Any]
Draw = Callable[[Example, str], torch.Generator]


def seed_of(*parts: Any) -> int:
    """A 63-bit seed from any printable parts, equal on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(*parts: Any) -> torch.Generator:
    """A CPU generator seeded by `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


@dataclass(frozen=True)
class Step:
    """Where a run is.

    Attributes:
        index: Optimizer steps taken before this one.
        share: Share of the budget spent when the step was drawn, in [0, 1].
        seed: The run's seed.
        micro: Index of the micro-batch within the step.
        total: Steps that the budget is expected to give.
    """

    index: int
    share: float
    seed: int
    micro: int = 0
    total: int = 0

    def generator(self, name: str) -> torch.Generator:
        """A generator of this step's own, by stream name."""
        return generator_of(self.seed, "step", name, self.index)


@dataclass
class Seen:
    """What a step saw, detached: the primary term before anyone shaped it.

    Attributes:
        values: Mean nats of each example. Shape (examples,).
        weights: Weight of each example. Shape (examples,).
        ids: Id of each example.
        domains: Domain of each example.
        loss: The reduced loss that was optimized, nats.
        gradient_norm: Norm over all trainable parameters before clipping.
    """

    values: Tensor
    weights: Tensor
    ids: tuple[Any, ...]
    domains: tuple[Any, ...]
    loss: float
    gradient_norm: float = float("nan")


@dataclass
class Context:
    """Facts and services that a run offers to methods; never live training objects.

    Attributes:
        budget: What ends the run.
        meter: Where extra work is charged.
        total_steps: Optimizer steps that the budget is expected to give; None if unknown.
        seed: The run's seed.
        device: Where the model runs.
        tokenizer: The run's one tokenizer, or None.
        pool: Training examples as `OnData` methods left them, or None.
        requests: Outputs that somebody asked the base objective for.
    """

    budget: Budget = field(default_factory=lambda: Budget(1, "steps"))
    meter: Meter = field(default_factory=Meter)
    total_steps: int | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokenizer: Any = None
    pool: Any = None
    requests: set[str] = field(default_factory=set)
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    loader: Callable[[str], nn.Module] | None = None
    freezes: bool = False

    def generator(self, name: str) -> torch.Generator:
        """A fresh generator seeded by (seed, name)."""
        return generator_of(self.seed, "context", name)

    def sample(self, count: int) -> list[Example]:
        """The first `count` training examples of the pool's order, charged as "sample"."""
        if self.pool is None:
            raise ConfigError("no pool to sample from", "call this inside a run")
        examples = self.pool.peek(count)
        self.meter.charge("sample", examples=len(examples))
        return examples

    def request(self, output: str) -> None:
        """Ask the base objective for an output, for example "hidden:-1"."""
        self.requests.add(output)

    def load(self, reference: str) -> nn.Module:
        """Load `original`, `stage:x`, a path or an asset: frozen, eval, outside the checkpoint."""
        if self.loader is None:
            raise ConfigError(f"cannot load {reference!r} outside a run", "call this inside a run")
        model = self.loader(reference)
        model.requires_grad_(False)
        return model.eval()

    def once(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of a pass that is made once, kept in the checkpoint and charged once."""
        if key not in self.kept:
            self.kept[key] = compute()
        return self.kept[key]


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


def _freeze(value: Any) -> Any:
    """Sequences to tuples, maps to sorted tuples of pairs: settings are hashable."""
    if isinstance(value, Mapping):
        return tuple(sorted((key, _freeze(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(_freeze(item) for item in value))
    return value


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
            value = _freeze(getattr(self, name))
            try:
                value = adapter.validate_python(value)
            except ValidationError as error:
                reason = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()[:3]))
                raise ConfigError(
                    f"{self.card.name}.{name} = {value!r} is not allowed",
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
            if f.default is dataclasses.MISSING or getattr(self, f.name) != _freeze(f.default)
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


class OnData(Method):
    """Chooses, orders or weighs the training examples."""

    @abstractmethod
    def select(self, pool: Any, context: Context | None = None) -> Any:
        """From a pool to a pool."""

    def fit(self, pool: Any, context: Context | None = None) -> Any:
        """Learn a selector from the pool; the result has score, select, save and load."""
        raise ConfigError(f"{self.card.name!r} learns nothing", "call select")


class OnBatch(Method):
    """Rewrites examples or decides how they become rows of a batch."""

    def transform(self, example: Example, draw: Draw, step: Step, context: Context) -> Example:
        """From an example to an example; randomness only through `draw(example, stream)`."""
        return example

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


class Watcher:
    """Moments of a run, all of them no-ops. State is tensors and JSON only.

    Structure may change (through `live`) in `before_step`, `after_update` and `after_eval`.
    A watcher never keeps a parameter object.
    """

    def before_step(self, step: Step) -> None:
        """Before the step's batches are drawn."""

    def before_forward(self, step: Step, batches: list[Batch]) -> None:
        """After drawing, before the first forward."""

    def after_backward(self, step: Step, seen: Seen) -> None:
        """Gradients are complete, reduced over ranks and clipped."""

    def after_update(self, step: Step) -> None:
        """After the optimizer's step, before gradients are cleared."""

    def before_eval(self) -> None:
        """Before an evaluation."""

    def after_eval(self, split: str, metrics: Mapping[str, float]) -> None:
        """After an evaluation of one split."""

    def may_stop(self, step: Step) -> bool:
        """False while stopping early would break the method's schedule."""
        return True

    def close(self) -> None:
        """The run ended."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""


class Weighting(Watcher):
    """A watcher that gives reward weights."""

    def weights(
        self, step: Step, rewards: Mapping[str, Tensor], gradients: Callable[[], Any] | None = None
    ) -> Mapping[str, float]:
        """Weight of each reward, once a step, after each reward's own normalization."""
        raise NotImplementedError
