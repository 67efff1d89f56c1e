"""Made-up optimizers, schedules, watchers and adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outlay.core.card import Card
from outlay.core.claims import Claim
from outlay.core.method import (
    OnModel,
    OnOptimizer,
    OnSchedule,
    OnStep,
    Watcher,
)

F64 = torch.float64


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
