"""Watchers see every moment of a run and may change it; a weighting weighs several rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .context import Seen, Step
from .errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from .live import Live
    from .losses import Batch


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
        """False while stopping early would break the method's schedule.

        Until then no evaluation counts for the best weights either.
        """
        return True

    def close(self) -> None:
        """The run ended by itself: budget spent or stopped early, not paused, not failed."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""


class Weighting(Watcher):
    """A watcher that gives reward weights.

    Batches carry `rewards` ({name: one an example}, already normalized by the pool). Before each
    step's first forward they are mixed into `advantages`, which the objective reads.

    Attributes:
        live: The run, set when the weighting joins it.
    """

    live: Live | None = None

    def weights(
        self,
        step: Step,
        rewards: Mapping[str, Tensor],
        gradients: Callable[[Mapping[str, float]], Any] | None = None,
    ) -> Mapping[str, float]:
        """Weight of each reward, once a step.

        Args:
            step: Where the run is.
            rewards: Normalized rewards of the whole step, by name. Shape (examples,).
            gradients: From reward weights to {term: {name: gradient}} under them; charged. They
                mix linearly only on fresh rollouts.
        """
        raise NotImplementedError

    def before_forward(self, step: Step, batches: list[Batch]) -> None:
        """Mix the rewards of every batch into its `advantages`."""
        names = list(batches[0]["rewards"]) if "rewards" in batches[0] else []
        if not names:
            raise ConfigError(
                "there are no rewards to weigh", "give a pool whose examples carry `rewards`"
            )
        rewards = {n: torch.cat([b["rewards"][n] for b in batches]) for n in names}

        def gradients(weights: Mapping[str, float]) -> Any:
            assert self.live is not None
            mix_rewards(batches, weights)
            return self.live.term_gradients(batches)

        mix_rewards(batches, self.weights(step, rewards, gradients))


def mix_rewards(batches: Sequence[Batch], weights: Mapping[str, float]) -> None:
    """Write `advantages` = sum of weight * normalized reward into every batch.

    Raises:
        ConfigError: If a weight is missing or for no known reward.
    """
    for batch in batches:
        rewards = batch["rewards"]
        if set(weights) != set(rewards):
            raise ConfigError(
                f"weights for {sorted(weights)}, rewards are {sorted(rewards)}",
                "give one weight a reward",
            )
        mixed: Any = sum(rewards[name] * float(weights[name]) for name in rewards)
        batch["advantages"] = mixed  # type: ignore[index]
