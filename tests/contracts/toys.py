"""Small made-up methods, models and data: one for every place that a method can take."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from outlay.core.card import Card
from outlay.core.claims import Claim
from outlay.core.losses import Losses, Objective, Rows, Shaped, Term, model_inputs
from outlay.core.method import (
    FittedSelector,
    OnBatch,
    OnData,
    OnModel,
    OnObjective,
    OnOptimizer,
    OnReward,
    OnSchedule,
    OnStep,
    Watcher,
    Weighting,
)
from outlay.core.still import still
from outlay.training.rollouts import RolloutPool

F64 = torch.float64


# ---- models and data -----------------------------------------------------------------------------


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same weights every time, whatever torch's generators hold."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


class Net(nn.Module):
    """Two layers and a head, with dropout or batch normalization if asked."""

    base_model_prefix = "body"

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.body = nn.Sequential(
            nn.Linear(6, 8), middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Language(nn.Module):
    """Causal averaging over tokens; the output layer is the embedding."""

    base_model_prefix = "body"

    def __init__(self, vocabulary: int = 12, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8)
        self.mix = nn.Linear(8, 8)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(8, vocabulary, bias=False)
        self.out.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, mixing: Tensor | None = None
    ) -> Tensor:
        hidden = self.embed(input_ids)
        if mixing is None:
            width = input_ids.shape[1]
            mixing = torch.ones(width, width, dtype=hidden.dtype).tril()
            mixing = mixing / mixing.sum(1, keepdim=True)
        hidden = mixing.to(hidden.dtype) @ hidden
        hidden = hidden + torch.tanh(self.mix(self.drop(hidden)))
        return self.out(hidden)


def vectors(count: int = 48) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "id": i,
            "domain": "abc"[i % 3],
            "x": torch.randn(6, generator=generator, dtype=F64),
            "labels": i % 3,
        }
        for i in range(count)
    ]


def sentences(count: int = 40, masked: bool = False) -> list[dict[str, Any]]:
    """Rows of 3 to 9 tokens; every third has labels that are masked in part."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for i in range(count):
        length = 3 + int(torch.randint(0, 7, (), generator=generator))
        tokens = torch.randint(0, 10, (length,), generator=generator).tolist()
        labels = [-100] * length if masked else list(tokens)
        if i % 3 == 0:
            labels[: length // 2 + 1] = [-100] * (length // 2 + 1)
        row = {"id": f"s{i}", "domain": "xy"[i % 2], "input_ids": tokens, "labels": labels}
        rows.append(row)
    return rows


class Plain(Objective):
    """Cross entropy of each row; gives features for couplings."""

    def forward(self, model: nn.Module, batch: Any, step: Any) -> Losses:
        logits = model(**model_inputs(batch))
        values = F.cross_entropy(logits, batch["labels"], reduction="none", ignore_index=-100)
        weights = (batch["labels"] != -100).to(values)
        outputs = {"logits": logits, "features": torch.tanh(logits)}
        return Losses({"task": Term(values, weights)}, "task", outputs)

    def weight_sums(self, batch: Any) -> dict[str, float]:
        return {"task": float((batch["labels"] != -100).sum())}


# ---- objectives ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reweight(OnObjective):
    """Weights known from the batch alone."""

    card: ClassVar[Card] = Card(name="reweight", title="toy", claims=("objective.weights",))
    factor: float = 3.0

    def shape(self, objective: Objective, model: nn.Module, context: Any) -> Objective:
        factor = self.factor

        class Weighted(Shaped):
            def factors(self, batch: Any) -> Tensor:
                return torch.where(batch["labels"] == 1, factor, 1.0)

            def forward(self, model: nn.Module, batch: Any, step: Any) -> Losses:
                losses = self.inner(model, batch, step)
                term = losses.terms[losses.primary]
                scaled = term.weights * self.factors(batch).to(term.weights)
                return losses.with_term(losses.primary, Term(term.values, scaled, term.coefficient))

            def weight_sums(self, batch: Any) -> dict[str, float]:
                sums = dict(self.inner.weight_sums(batch))
                known = batch["labels"] != -100
                sums["task"] = float((self.factors(batch) * known).sum())
                return sums

        return Weighted(objective)


@dataclass(frozen=True, kw_only=True)
class Focus(OnObjective):
    """Weights from the losses of the whole step (a coupling)."""

    card: ClassVar[Card] = Card(name="focus", title="toy", claims=("objective.weights",))
    detach: bool = False

    def shape(self, objective: Objective, model: nn.Module, context: Any) -> Objective:
        detach = self.detach

        class Focused(Shaped):
            def couple(self, rows: Rows, step: Any) -> Rows:
                weights = rows.weights[rows.primary]
                means = rows.sums[rows.primary] / weights.clamp(min=1e-12)
                means = means.detach() if detach else means
                return rows.scaled(torch.softmax(means, 0) * len(means))

        return Focused(objective)


@dataclass(frozen=True, kw_only=True)
class Neighbour(OnObjective):
    """Each example is drawn to its nearest neighbour in the step, through its features."""

    card: ClassVar[Card] = Card(name="neighbour", title="toy")

    def shape(self, objective: Objective, model: nn.Module, context: Any) -> Objective:
        class Near(Shaped):
            rows = ("features",)

            def couple(self, rows: Rows, step: Any) -> Rows:
                found = rows.outputs["features"]
                apart = (found[:, None] - found[None]).square().sum(-1)
                apart = apart + torch.eye(len(found), dtype=found.dtype) * 1e9
                return rows.with_term("near", apart.min(1).values, apart.new_ones(len(found)), 0.5)

        return Near(objective)


@dataclass(frozen=True, kw_only=True)
class Distil(OnObjective):
    """An extra term against a frozen teacher."""

    card: ClassVar[Card] = Card(name="distil", title="toy")
    teacher: str = "original"

    def shape(self, objective: Objective, model: nn.Module, context: Any) -> Objective:
        class Distilled(Shaped):
            def __init__(self, inner: Objective, teacher: nn.Module) -> None:
                super().__init__(inner)
                self.teacher = teacher

            def forward(self, model: nn.Module, batch: Any, step: Any) -> Losses:
                losses = self.inner(model, batch, step)
                with torch.no_grad(), context.meter.under("teacher"):
                    aim = self.teacher(**model_inputs(batch))
                    aim = getattr(aim, "logits", aim)
                gap = (losses.outputs["logits"] - aim).square().sum(-1)
                return losses.with_term("distil", Term(gap, torch.ones_like(gap), 0.3))

            def weight_sums(self, batch: Any) -> dict[str, float]:
                return {**self.inner.weight_sums(batch), "distil": float(len(batch["labels"]))}

        return Distilled(objective, context.load(self.teacher))


@dataclass(frozen=True, kw_only=True)
class MeanTeacher(OnObjective):
    """A moving average of the model that follows surgery and is what is exported."""

    card: ClassVar[Card] = Card(name="mean_teacher", title="toy", claims=("export.source",))
    rate: float = 0.2

    def shape(self, objective: Objective, model: nn.Module, context: Any) -> Objective:
        rate = self.rate

        class Averaged(Shaped):
            def __init__(self, inner: Objective, model: nn.Module) -> None:
                super().__init__(inner)
                self.teacher = still(copy.deepcopy(model))
                self.student = [model]

            def after_update(self, model: nn.Module, step: Any) -> None:
                for mine, theirs in zip(self.teacher.parameters(), model.parameters(), strict=True):
                    mine.lerp_(theirs.to(mine.dtype), rate)
                super().after_update(model, step)

            def replaced(self, old: nn.Parameter, new: nn.Parameter) -> None:
                for name, parameter in self.student[0].named_parameters():
                    if parameter is new:
                        path, _, leaf = name.rpartition(".")
                        module = self.teacher.get_submodule(path)
                        module._parameters[leaf] = nn.Parameter(
                            new.detach().clone(), requires_grad=False
                        )
                super().replaced(old, new)

            def edited(self, module: str, function: Any) -> None:
                function(self.teacher.get_submodule(module))
                still(self.teacher)
                super().edited(module, function)

            def export_source(self, model: nn.Module) -> nn.Module:
                return self.teacher

        return Averaged(objective, model)


@dataclass(frozen=True, kw_only=True)
class Anchor(OnObjective):
    """A penalty on parameters alone."""

    card: ClassVar[Card] = Card(name="anchor", title="toy")
    strength: float = 0.05

    def shape(self, objective: Objective, model: nn.Module, context: Any) -> Objective:
        strength = self.strength

        class Anchored(Shaped):
            def penalties(self, model: nn.Module, step: Any) -> dict[str, Tensor]:
                size = sum(p.square().sum() for p in model.parameters())
                return {**self.inner.penalties(model, step), "anchor": strength * size}

        return Anchored(objective)


# ---- data and batches ----------------------------------------------------------------------------


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


# ---- optimizer, schedule -------------------------------------------------------------------------


class SignMomentum(torch.optim.Optimizer):
    """A foreign optimizer: keeps its own groups and one moment a parameter."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                moment = state.setdefault("moment", torch.zeros_like(parameter))
                moment.lerp_(parameter.grad, 1 - group["beta"])
                parameter.sub_(moment.sign() * group["lr"])


@dataclass(frozen=True, kw_only=True)
class Sign(OnOptimizer):
    card: ClassVar[Card] = Card(name="sign", title="toy", claims=("optimizer",))

    def build(self, groups: Any, settings: Any, context: Any) -> torch.optim.Optimizer:
        bare = [{"params": g["params"], "lr": g["lr"]} for g in groups]
        return SignMomentum(bare, settings.lr)


@dataclass(frozen=True, kw_only=True)
class Rewarm(OnSchedule):
    card: ClassVar[Card] = Card(name="rewarm", title="toy", claims=("schedule",))
    at: float = 0.5

    def schedule(self, base: Any, context: Any) -> Any:
        return lambda step: base(step) * (0.1 if step.share >= self.at else 1.0)


@dataclass(frozen=True, kw_only=True)
class Inside(OnStep):
    """Updates inside backward."""

    card: ClassVar[Card] = Card(name="inside", title="toy", claims=("update.inside",))

    def watch(self, live: Any) -> Watcher:
        return Watcher()


# ---- watchers ------------------------------------------------------------------------------------


class Notes(Watcher):
    """Records gradients and what was seen; structure is left alone."""

    def __init__(self, live: Any) -> None:
        self.live = live
        self.gradients: list[dict[str, Tensor]] = []
        self.seen: list[Any] = []
        self.batches: list[Any] = []

    def before_forward(self, step: Any, batches: Any) -> None:
        self.batches.append([dict(batch) for batch in batches])

    def after_backward(self, step: Any, seen: Any) -> None:
        self.seen.append(seen)
        self.gradients.append(
            {n: p.grad.clone() for n, p in self.live.named_parameters() if p.grad is not None}
        )


@dataclass(frozen=True, kw_only=True)
class Note(OnStep):
    card: ClassVar[Card] = Card(name="note", title="toy")

    def watch(self, live: Any) -> Watcher:
        return Notes(live)


class Mixes(Watcher):
    """Online mixing: domains with a high loss are drawn more."""

    def __init__(self, live: Any) -> None:
        self.live = live
        self.means: dict[str, float] = {}

    def after_backward(self, step: Any, seen: Any) -> None:
        for domain, value in zip(seen.domains, seen.values.tolist()):
            self.means[domain] = 0.7 * self.means.get(domain, 1.0) + 0.3 * value

    def after_update(self, step: Any) -> None:
        if step.index % 2 == 1:
            known = self.live.pool.members()
            self.live.pool.set_weights({d: math.exp(self.means.get(d, 1.0)) for d in known})

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means)}

    def load_state_dict(self, state: Any) -> None:
        self.means = dict(state["means"])


@dataclass(frozen=True, kw_only=True)
class Mix(OnStep):
    card: ClassVar[Card] = Card(name="mix", title="toy", claims=("data.weights",))

    def watch(self, live: Any) -> Watcher:
        return Mixes(live)


class Surgeon(Watcher):
    """A script of changes by step index; nothing to keep but what the run keeps itself."""

    def __init__(self, live: Any, script: dict[int, str]) -> None:
        self.live, self.script = live, script

    def after_update(self, step: Any) -> None:
        action = self.script.get(step.index)
        if action:
            getattr(self, action)()

    def keep(self) -> None:
        old = self.live.parameter("body.0.weight")
        self.live.replace("body.0.weight", old.detach() * 0.5, state="keep")

    def reset(self) -> None:
        old = self.live.parameter("body.4.weight")
        self.live.replace("body.4.weight", old.detach() + 0.1)

    def widen(self) -> None:
        """The middle becomes two units wider; moments are padded."""

        def grow(value: Tensor, dim: int) -> Tensor:
            shape = list(value.shape)
            shape[dim] = 2
            return torch.cat([value, value.new_full(shape, 0.01)], dim)

        for name, dim in (("body.0.weight", 0), ("body.0.bias", 0), ("body.4.weight", 1)):
            old = self.live.parameter(name)

            def moved(moment: Tensor, dim: int = dim) -> Tensor:
                return grow(moment, dim)

            self.live.replace(name, grow(old.detach(), dim), state=moved)

    def hard(self) -> None:
        weight = self.live.parameter("body.4.weight")
        self.live.mask("body.4.weight", weight.detach().abs() > weight.detach().abs().median())

    def soft(self) -> None:
        weight = self.live.parameter("body.0.weight")
        self.live.mask("body.0.weight", weight.detach() > 0, "soft")

    def held(self) -> None:
        weight = self.live.parameter("head.weight")
        keep = torch.zeros_like(weight, dtype=torch.bool)
        keep[0] = True
        self.live.mask("head.weight", keep, "held")

    def lift(self) -> None:
        self.live.mask("body.4.weight", None)

    def freeze(self) -> None:
        self.live.freeze(["body.0.weight", "body.0.bias"], state="keep")

    def drop(self) -> None:
        self.live.freeze(["head.bias"])

    def thaw(self) -> None:
        self.live.thaw(["body.0.weight", "body.0.bias"])

    def split(self) -> None:
        """One matrix becomes two factors."""
        self.live.edit("body", split_layer)

    def wrap(self) -> None:
        """A module goes, another comes with a layer inside; a bias is taken away."""

        def function(module: nn.Module) -> None:
            module.head.bias = None  # type: ignore[union-attr]

        self.live.edit("", function)

    def tie(self) -> None:
        def function(module: nn.Module) -> None:
            module.other = nn.Linear(8, 3)  # type: ignore[assignment]
            module.other.weight = module.head.weight  # type: ignore[union-attr]

        self.live.edit("", function)


class Factors(nn.Module):
    """Two thin matrices in place of one."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.width, self.rank = width, rank
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.v = nn.Parameter(torch.zeros(rank, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "rank": self.rank}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.u @ self.v, self.bias)


def split_layer(body: nn.Module) -> None:
    old: Any = body.get_submodule("4")
    fresh = Factors(8, 3).to(old.weight.dtype)
    u, s, v = torch.linalg.svd(old.weight.detach())
    fresh.u.data = (u[:, :3] * s[:3]).contiguous()
    fresh.v.data = v[:3].contiguous()
    fresh.bias.data = old.bias.detach().clone()
    setattr(body, "4", fresh)


@dataclass(frozen=True, kw_only=True)
class Operate(OnStep):
    card: ClassVar[Card] = Card(name="operate", title="toy", claims=("structure",))
    script: tuple[tuple[int, str], ...] = ()

    def watch(self, live: Any) -> Watcher:
        return Surgeon(live, dict(self.script))


# ---- adapters ------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scale


@dataclass(frozen=True, kw_only=True)
class Scale(OnModel):
    """Wraps a layer: original names move one level down."""

    card: ClassVar[Card] = Card(
        name="scale", title="toy", claims=("delta.multiplicative",), freezes_base=True
    )

    def adapt(self, model: Any, context: Any = None) -> nn.Module:
        model.body[4] = Wrapped(model.body[4])
        return model

    def export(self, model: Any) -> nn.Module:
        layer = model.body[4]
        with torch.no_grad():
            layer.base.weight.mul_(layer.scale[:, None])
            layer.base.bias.mul_(layer.scale)
        model.body[4] = layer.base
        return model

    def claims(self, model: Any) -> list[Claim]:
        return [Claim("delta.multiplicative", frozenset({"body.4"}))]


@dataclass(frozen=True, kw_only=True)
class Insert(OnModel):
    """Puts a layer in between: every later name is one further, so original names are ambiguous."""

    card: ClassVar[Card] = Card(name="insert", title="toy")

    def adapt(self, model: Any, context: Any = None) -> nn.Module:
        layers = list(model.body)
        model.body = nn.Sequential(layers[0], nn.Linear(8, 8), *layers[1:])
        return model


# ---- rewards -------------------------------------------------------------------------------------


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
