"""AdaLoRA: low-rank adapters whose rank budget moves between layers during training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from ...core.card import Card
from ...core.claims import Claim
from ...core.errors import ConfigError
from ...core.losses import Objective
from ...core.method import Context, OnModel, OnObjective, OnStep, generator_of
from ...nn.adapter import AdapterMethod, Delta, delta_dtype
from ...nn.sensitivity import Importance
from ...nn.targets import is_conv1d, linear_shape
from ._adalora_layer import TripletDelta
from ._adalora_run import Allocation, Orthogonal, Phases

Share = Annotated[float, Ge(0.0), Lt(1.0)]
Beta = Annotated[float, Gt(0.0), Lt(1.0)]


@dataclass(frozen=True, kw_only=True)
class AdaLora(AdapterMethod, OnModel, OnObjective, OnStep):
    r"""Adaptive budget allocation over SVD-shaped adapters. arXiv 2303.10512.

    $W = W_0 + s\,B(E * A)$ starts with rank `init_r` everywhere (eq. 3); every unit (a singular
    value and its two vectors) is scored by how sensitive the loss is to it (eq. 8 to 11), and
    the worst of all layers are zeroed on a cubic schedule (eq. 13, 14) until `target_r` is left
    on average. Vectors stay alive, so a unit pruned by mistake can return before the final
    phase; there the pattern is fixed. A penalty keeps A and B near orthogonal (eq. 5).

    Departures, all of them the published runs' own: the penalty is the mean of unsquared norms
    (`orth_norm="squared_sum"` is the paper's sum of squares); the numerator of eq. 14 is
    t - t_i, which reaches the target where the final phase starts. Ties at the threshold are
    broken by index, so that the budget is met exactly. The budget counts ranks as in the paper;
    training memory is that of `init_r` until `compact` (or `compact_final`) drops dead rows.

    Attributes:
        init_r: Rank of every layer at the start, 1.5 times the target in the paper.
        target_r: Average rank at the end; equal to `init_r` means never prune.
        alpha: Numerator of the scaling, 16 or 32 in the paper; 0 means a factor of about 1.
        warmup_share: Share of the budget before ranks fall (t_i / T).
        final_share: Share of the budget after ranks are fixed (t_f / T).
        warmup_steps: The same in optimizer steps, instead of the share.
        final_steps: The same in optimizer steps, instead of the share.
        every: Steps between allocations (delta T).
        beta1: Smoothing of the sensitivity.
        beta2: Smoothing of the uncertainty.
        gamma: Coefficient of the orthogonality penalty: 0.1, 0.3 or 0.5 in the paper.
        orth_norm: "mean_fro" or "squared_sum".
        importance: "uncertain_sensitivity", "sensitivity" or "magnitude" (of E); "random", fixed
            at the start, is the control that shows whether scores matter.
        units: "triplets", or "doublets" (pruned LoRA: no E, no penalty, nothing returns).
        cost: Price of a unit: "rank" (1 each) or "params" (in + out).
        compact_final: Drop dead rows during the run when the final phase starts.
        dropout: Probability of dropping an input feature of the adapter.
    """

    card: ClassVar[Card] = Card(
        name="adalora",
        title="Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        paper=2,
        arxiv="2303.10512",
        group="adapters",
        summary="SVD-shaped adapters whose worst ranks, over all layers, are pruned in training.",
        authors="Qingru Zhang, Minshuo Chen, Alexander Bukharin, Nikos Karampatziakis, "
        "Pengcheng He, Yu Cheng, Weizhu Chen and Tuo Zhao",
        year=2023,
        claims=("delta.additive",),
        saves=("trainable parameters", "optimizer memory"),
        freezes_base=True,
    )

    init_r: Annotated[int, Ge(1)] = 12
    target_r: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Ge(0.0)] = 16.0
    warmup_share: Share = 0.1
    final_share: Share = 0.4
    warmup_steps: Annotated[int, Ge(0)] | None = None
    final_steps: Annotated[int, Ge(0)] | None = None
    every: Annotated[int, Ge(1)] = 1
    beta1: Beta = 0.85
    beta2: Beta = 0.85
    gamma: Annotated[float, Ge(0.0)] = 0.1
    orth_norm: Literal["mean_fro", "squared_sum"] = "mean_fro"
    importance: Importance = "uncertain_sensitivity"
    units: Literal["triplets", "doublets"] = "triplets"
    cost: Literal["rank", "params"] = "rank"
    compact_final: bool = False
    dropout: Share = 0.0

    def validate(self) -> None:
        """Refuse schedules and shapes that leave nothing to allocate."""
        if self.target_r > self.init_r:
            raise ConfigError(
                f"adalora.target_r = {self.target_r} is above init_r = {self.init_r}",
                f"give target_r between 1 and {self.init_r}",
            )
        in_steps = self.warmup_steps is not None or self.final_steps is not None
        if not in_steps and self.warmup_share + self.final_share >= 1 - 1e-9:
            raise ConfigError(
                f"adalora.warmup_share = {self.warmup_share} and final_share = "
                f"{self.final_share} leave no phase in which ranks fall",
                "make their sum smaller than 1; half of the budget is a good falling phase",
            )
        if self.units == "doublets" and (self.gamma or self.importance == "magnitude"):
            raise ConfigError(
                f"adalora.units = 'doublets' with gamma = {self.gamma} and importance = "
                f"{self.importance!r}: doublets have no singular values",
                "set gamma=0 and importance to 'uncertain_sensitivity' or 'sensitivity'",
            )

    def kinds(self) -> tuple[type[nn.Module], ...]:
        """Convolutions too, as the matrix (out, in * kernel)."""
        return (nn.Conv2d,)

    def make(self, name: str, layer: nn.Module, context: Context | None = None) -> Delta:
        """A, B ~ N(0, 0.02^2) drawn by layer name, E = 0: nothing is added at the start."""
        out, width = linear_shape(layer)
        draw = generator_of(context.seed if context else 0, "adalora", self.adapter_name, name)
        a = torch.randn(self.init_r, width, generator=draw) * 0.02
        b = torch.randn(out, self.init_r, generator=draw) * 0.02
        return TripletDelta(
            a, b, self.units == "triplets", self.alpha, self.dropout, delta_dtype(layer)
        )

    def phases(self, total: int | None) -> Phases:
        """Where ranks stand still, fall and are fixed, in shares of the budget.

        Raises:
            ConfigError: If steps are given and the total is not known, or nothing is left.
        """
        steps = {"warmup_steps": self.warmup_steps, "final_steps": self.final_steps}
        given = {name: count for name, count in steps.items() if count is not None}
        if given and not total:
            raise ConfigError(
                f"adalora.{next(iter(given))} = {next(iter(given.values()))} needs the number of "
                "steps in advance, and this budget does not give it",
                "use a budget in steps, or warmup_share and final_share",
            )
        warmup = (
            self.warmup_share if self.warmup_steps is None else self.warmup_steps / (total or 1)
        )
        final = self.final_share if self.final_steps is None else self.final_steps / (total or 1)
        if warmup + final >= 1 - 1e-9:
            raise ConfigError(
                f"adalora's warm-up ({warmup:.3g} of the budget) and final phase ({final:.3g}) "
                "leave no phase in which ranks fall",
                "make warmup_steps or final_steps smaller, or the budget longer",
            )
        return Phases(warmup, 1 - final)

    def shape(self, objective: Objective, model: nn.Module, context: Context) -> Objective:
        """Adds gamma times the orthogonality penalty."""
        return Orthogonal(objective, self) if self.gamma else objective

    def watch(self, live: Any) -> Allocation:
        """The allocation, once an optimizer step."""
        return Allocation(self, live)

    def claims(self, model: nn.Module | None) -> list[Claim]:
        """The addition, and structure where dead rows are dropped during the run."""
        start = 0.0 if self.final_steps is not None else 1 - self.final_share
        changes = [Claim("structure", share=(start, 1.0))] if self.compact_final else []
        return [*super().claims(model), *changes]

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """Live rank of every layer."""
        return {name: int(d.keep.sum()) for name, d in self.deltas(model).items()}

    def rank_pattern(self, model: nn.Module) -> dict[str, Tensor]:
        """Which of the initial units of every layer are alive. Shape (init_r,) each."""
        return {name: d.keep.clone() for name, d in self.deltas(model).items()}

    def compact(self, model: nn.Module) -> nn.Module:
        """Drop the dead rows of every layer, in place; outputs and scaling stay (rank 0 too)."""
        for delta in self.deltas(model).values():
            delta.compact()
        return model

    def to_peft(
        self, deltas: Mapping[str, Delta], layers: Mapping[str, nn.Module]
    ) -> dict[str, Any] | None:
        """PEFT's AdaLoRA with its pattern; the schedule is over, so it is given as trivial."""
        if self.units == "doublets":
            return None
        patterns = {
            f"{name}.lora_E": delta.keep.tolist()
            for name, delta in deltas.items()
            if isinstance(delta, TripletDelta)
        }
        return {
            "peft_type": "ADALORA",
            "init_r": self.init_r,
            "target_r": self.target_r,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": self.dropout,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "deltaT": self.every,
            "orth_reg_weight": self.gamma,
            "tinit": 0,
            "tfinal": 0,
            "total_step": 1,
            "fan_in_fan_out": any(is_conv1d(layer) for layer in layers.values()),
            "rank_pattern": None if all(map(all, patterns.values())) else patterns,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> AdaLora | None:
        """The settings of an AdaLoRA config; a schedule that is over stays the default one."""
        if config["peft_type"] != "ADALORA":
            return None
        total = config.get("total_step") or 1
        shares = {}
        if total > 1:
            shares = {
                "warmup_share": config.get("tinit", 0) / total,
                "final_share": config.get("tfinal", 0) / total,
            }
        return cls(
            init_r=config["init_r"],
            target_r=min(config["target_r"], config["init_r"]),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout", 0.0)),
            beta1=config.get("beta1", 0.85),
            beta2=config.get("beta2", 0.85),
            every=config.get("deltaT", 1),
            gamma=float(config.get("orth_reg_weight", 0.5)),
            **shares,
        )
