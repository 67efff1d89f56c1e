"""Where a run is, what a step saw, and the services that a run offers to methods."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .budget import Budget
from .errors import ConfigError
from .meter import Meter
from .still import still

if TYPE_CHECKING:
    from torch import Tensor, nn

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
        task: The recipe's task, or an empty string.
        length: Longest row in tokens, or None.
        pool: Training examples as `OnData` methods left them, or None.
        requests: Outputs that somebody asked the base objective for.
        figures: What methods put into the log line of the step that is being taken.
    """

    budget: Budget = field(default_factory=lambda: Budget(1, "steps"))
    meter: Meter = field(default_factory=Meter)
    total_steps: int | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokenizer: Any = None
    task: str = ""
    length: int | None = None
    pool: Any = None
    requests: set[str] = field(default_factory=set)
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    loader: Callable[[str], nn.Module] | None = None
    freezes: bool = False
    figures: dict[str, float] = field(default_factory=dict)

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

    def show(self, name: str, value: float) -> None:
        """Put a figure of the method's own beside the loss in this step's log line."""
        self.figures[name] = value

    def load(self, reference: str) -> nn.Module:
        """Load `original`, `stage:x`, a path or an asset: frozen, eval, outside the checkpoint."""
        if self.loader is None:
            raise ConfigError(f"cannot load {reference!r} outside a run", "call this inside a run")
        return still(self.loader(reference))

    def once(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of a pass that is made once, kept in the checkpoint and charged once."""
        if key not in self.kept:
            with self.meter.under(key):
                self.kept[key] = compute()
        return self.kept[key]
