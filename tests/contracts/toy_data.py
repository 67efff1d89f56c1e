"""Made-up selectors, corruptions, layouts and rewards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from outlay.core.card import Card
from outlay.core.losses import Losses, Objective, Term
from outlay.core.method import (
    FittedSelector,
    OnBatch,
    OnData,
    OnReward,
    Weighting,
)
from outlay.training.data.rollouts import RolloutPool

F64 = torch.float64


class ShortFirst(FittedSelector):
    def __init__(self, length: int) -> None:
        self.length = length

    def score(self, examples: Any) -> Tensor:
        return torch.tensor([-float(abs(len(e["input_ids"]) - self.length)) for e in examples])

    def select(self, pool: Any) -> Any:
        scores = self.score(pool.examples)
        return pool.keep(torch.argsort(scores, descending=True, stable=True)[:20].tolist())

    def save(self, folder: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "selector.json").write_text(json.dumps({"length": self.length}))

    @classmethod
    def load(cls, folder: Any) -> ShortFirst:
        return cls(**json.loads((folder / "selector.json").read_text()))


@dataclass(frozen=True, kw_only=True)
class Shortest(OnData):
    """A selector that learns the median length from a sample."""

    card: ClassVar[Card] = Card(name="shortest", title="toy")
    sample: Annotated[int, Ge(1)] = 8

    def fit(self, pool: Any, context: Any = None) -> ShortFirst:
        examples = context.sample(self.sample) if context else pool.peek(self.sample)
        lengths = sorted(len(example["input_ids"]) for example in examples)
        return ShortFirst(lengths[len(lengths) // 2])

    def select(self, pool: Any, context: Any = None) -> Any:
        return self.fit(pool, context).select(pool)


@dataclass(frozen=True, kw_only=True)
class Corrupt(OnBatch):
    """Replaces tokens by a new one, from a named stream."""

    card: ClassVar[Card] = Card(name="corrupt", title="toy", claims=("example.corruption",))
    rate: float = 0.3
    new: int = 10

    def tokens(self, tokenizer: Any) -> tuple[str, ...]:
        return ("<gap>",)

    def transform(self, example: Any, draw: Any, step: Any, context: Any) -> Any:
        chance = torch.rand(len(example["input_ids"]), generator=draw(example, "gaps"))
        tokens = [
            self.new if c < self.rate else t for c, t in zip(chance.tolist(), example["input_ids"])
        ]
        return {**example, "input_ids": tokens}


@dataclass(frozen=True, kw_only=True)
class Shuffle(OnBatch):
    """Another method that draws from a stream of its own."""

    card: ClassVar[Card] = Card(name="shuffle", title="toy")

    def transform(self, example: Any, draw: Any, step: Any, context: Any) -> Any:
        noise = float(torch.rand((), generator=draw(example, "noise")))
        return {**example, "noise": noise}


@dataclass(frozen=True, kw_only=True)
class Pack(OnBatch):
    """Two examples in a row, isolated from each other."""

    card: ClassVar[Card] = Card(name="pack", title="toy", claims=("batch.layout",))
    pair: int = 2

    def layout(self, context: Any) -> Any:
        pair = self.pair

        def pack(examples: list[Any], draw: Any, step: Any) -> dict[str, Any]:
            bins = [examples[i : i + pair] for i in range(0, len(examples), pair)]
            width = max(sum(len(e["input_ids"]) for e in some) for some in bins)
            batch: dict[str, Any] = {
                "ids": tuple(e["id"] for e in examples),
                "domains": tuple(e["domain"] for e in examples),
                "input_ids": torch.zeros(len(bins), width, dtype=torch.long),
                "labels": torch.full((len(bins), width), -100),
                "segment_ids": torch.full((len(bins), width), -1),
                "mixing": torch.zeros(len(bins), width, width, dtype=F64),
            }
            number = 0
            for row, some in enumerate(bins):
                at = 0
                for example in some:
                    to = at + len(example["input_ids"])
                    batch["input_ids"][row, at:to] = torch.tensor(example["input_ids"])
                    # The first token of a segment is predicted from nothing.
                    batch["labels"][row, at + 1 : to] = torch.tensor(example["labels"][1:])
                    batch["segment_ids"][row, at:to] = number
                    block = torch.ones(to - at, to - at, dtype=F64).tril()
                    batch["mixing"][row, at:to, at:to] = block / block.sum(1, keepdim=True)
                    at, number = to, number + 1
            return batch

        return pack


class Bandit(nn.Module):
    """A policy over five actions for each of four prompts."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, prompt_ids: Tensor) -> Tensor:
        return self.drop(self.table(prompt_ids))


class Answers(RolloutPool):
    """Actions drawn from the current policy, and two rewards that pull apart."""

    def write(self, prompts: Any, model: Any, generator: torch.Generator) -> list[Any]:
        assert not model.training and not torch.is_grad_enabled()
        ids = torch.tensor([p["prompt_ids"] for p in prompts])
        chances = torch.softmax(model(prompt_ids=ids).double(), -1)
        actions = torch.multinomial(chances, self.group, replacement=True, generator=generator)
        return [
            {
                "prompt_ids": prompt["prompt_ids"],
                "action": int(action),
                "rewards": {"high": float(action), "near": -abs(float(action) - 1.0)},
            }
            for prompt, some in zip(prompts, actions)
            for action in some
        ]


class Reinforce(Objective):
    """-advantage * log pi(action)."""

    def forward(self, model: nn.Module, batch: Any, step: Any) -> Losses:
        logits = model(prompt_ids=batch["prompt_ids"])
        chosen = torch.log_softmax(logits, -1).gather(-1, batch["action"][:, None])[:, 0]
        values = -batch["advantages"].to(chosen) * chosen
        return Losses({"policy": Term(values, torch.ones_like(values))}, "policy")

    def weight_sums(self, batch: Any) -> dict[str, float]:
        return {"policy": float(len(batch["ids"]))}


class Balance(Weighting):
    """Shifts weight to the reward with the larger gradient; state is its weights."""

    def __init__(self) -> None:
        self.now = {"high": 0.5, "near": 0.5}
        self.calls = 0

    def weights(self, step: Any, rewards: Any, gradients: Any = None) -> dict[str, float]:
        self.calls += 1
        sizes = {}
        for name in rewards:
            alone = {other: float(other == name) for other in rewards}
            found = gradients(alone)["policy"]
            sizes[name] = float(sum(g.square().sum() for g in found.values()) ** 0.5)
        total = sum(sizes.values()) or 1.0
        self.now = {n: 0.5 * self.now[n] + 0.5 * sizes[n] / total for n in rewards}
        return dict(self.now)

    def state_dict(self) -> dict[str, Any]:
        return {"now": dict(self.now), "calls": self.calls}

    def load_state_dict(self, state: Any) -> None:
        self.now, self.calls = dict(state["now"]), state["calls"]


@dataclass(frozen=True, kw_only=True)
class Weigh(OnReward):
    card: ClassVar[Card] = Card(name="weigh", title="toy", claims=("reward.weights",))

    def weigh(self, live: Any) -> Weighting:
        return Balance()
