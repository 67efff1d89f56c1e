"""A pool whose examples the current model writes: rollouts for on-policy training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...core.errors import ConfigError
from ...core.method import Example, generator_of
from .pool import Pool

EPSILON = 1e-6


class RolloutPool(Pool):
    """Prompts in a seeded order; each step's examples are answers of the model in hand.

    Each prompt gets `group` answers, and each answer carries `rewards`: every reward normalized
    within its group on its own, (reward - mean) / (standard deviation + 1e-6), and the plain
    ones under `raw_rewards`. A reward that does not apply is NaN: it counts in no statistic and
    becomes 0. Reused rollouts are part of the pool's state, so of every checkpoint.

    Args:
        prompts: Examples with `id`.
        seed: Seed of the order and of every rollout.
        group: Answers to a prompt.
        reuse: Steps that train on one batch of rollouts.
    """

    needs_model = True

    def __init__(
        self, prompts: Sequence[Example], seed: int = 0, group: int = 4, reuse: int = 1
    ) -> None:
        super().__init__(prompts, seed)
        if group < 1 or reuse < 1:
            raise ConfigError(f"group = {group}, reuse = {reuse}", "give numbers >= 1")
        self.group, self.reuse = group, reuse
        self.rollouts: list[Example] = []
        self.uses_left = 0

    def _like(self, examples: Sequence[Example]) -> Pool:
        return type(self)(examples, self.seed, self.group, self.reuse)

    @abstractmethod
    def write(
        self, prompts: list[Example], model: Any, generator: torch.Generator
    ) -> list[Example]:
        """Let the model answer: `group` examples a prompt, in order, each with `rewards`."""

    def draw(self, count: int, model: Any = None) -> list[Example]:
        """The step's rollouts: fresh ones, or those of the step before while `reuse` lasts."""
        if count % self.group:
            raise ConfigError(
                f"batch.size = {count} is no multiple of {self.group} answers a prompt",
                "make batch.size a multiple of group",
            )
        if self.uses_left == 0 or len(self.rollouts) != count:
            generator = generator_of(self.seed, "rollout", self.position)
            prompts = self._take(count // self.group)
            self.rollouts = self._scored(prompts, self.write(prompts, model, generator))
            self.uses_left = self.reuse
        self.uses_left -= 1
        return [dict(example) for example in self.rollouts]

    def _scored(self, prompts: list[Example], answers: list[Example]) -> list[Example]:
        if len(answers) != len(prompts) * self.group:
            raise ConfigError(
                f"{len(answers)} answers to {len(prompts)} prompts", f"write {self.group} a prompt"
            )
        names = list(answers[0]["rewards"])
        table = torch.tensor(
            [[float(a["rewards"][n]) for n in names] for a in answers], dtype=torch.float64
        ).reshape(len(prompts), self.group, len(names))
        there = ~table.isnan()
        counts = there.sum(1, keepdim=True).clamp(min=1)
        mean = table.nan_to_num(0.0).sum(1, keepdim=True) / counts
        spread = ((table - mean) ** 2).nan_to_num(0.0).sum(1, keepdim=True) / counts
        normal = ((table - mean) / (spread.sqrt() + EPSILON)).nan_to_num(0.0).flatten(0, 1)
        return [
            {
                **answer,
                "id": f"{prompts[i // self.group]['id']}/{i % self.group}",
                "domain": prompts[i // self.group].get("domain", ""),
                "visit": prompts[i // self.group]["visit"],
                "raw_rewards": dict(answer["rewards"]),
                "rewards": dict(zip(names, normal[i].tolist())),
            }
            for i, answer in enumerate(answers)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Weights, and the rollouts that are still to be used."""
        kept = self.rollouts if self.uses_left else []
        return {**super().state_dict(), "rollouts": kept, "uses_left": self.uses_left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        super().load_state_dict(state)
        self.rollouts, self.uses_left = list(state["rollouts"]), int(state["uses_left"])
