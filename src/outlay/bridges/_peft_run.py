"""What PEFT's AdaLoRA needs during a run and leaves to its user: the penalty and the call."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import NoEffect
from ..core.losses import Objective, Shaped
from ..core.method import Step, Watcher
from ..nn.lowrank import orthogonality_loss


class PeftPenalty(Shaped):
    """The inner objective with PEFT's orthogonality penalty.

    PEFT adds it inside its own wrapper's forward, and only for some task types.
    """

    def __init__(self, inner: Objective, name: str, weight: float) -> None:
        super().__init__(inner)
        self.name, self.weight = name, weight

    def penalties(self, model: nn.Module, step: Step) -> Mapping[str, Tensor]:
        """The inner penalties and `orth_reg_weight` times the mean norm."""
        named = list(model.named_parameters())
        rows = [p for path, p in named if f"lora_A.{self.name}" in path]
        columns = [p for path, p in named if f"lora_B.{self.name}" in path]
        penalty = self.weight * orthogonality_loss(rows, columns)
        return {**super().penalties(model, step), f"orthogonality.peft.{self.name}": penalty}


class PeftAllocation(Watcher):
    """Calls PEFT's `update_and_allocate` after every optimizer step."""

    def __init__(self, model: nn.Module, name: str) -> None:
        from peft.tuners.adalora.layer import RankAllocator

        config: Any = model.peft_config[name]  # type: ignore[index]
        self.allocator = RankAllocator(model, config, name)
        # What the wrapper would be to its own method: the model has no wrapper here.
        self.tuner = SimpleNamespace(
            peft_config={name: config},
            trainable_adapter_name=name,
            rankallocator=self.allocator,
            model=model,
        )
        self.config = config
        self.calls = 0

    def after_update(self, step: Step) -> None:
        """PEFT counts steps from 1."""
        from peft import AdaLoraModel

        self.calls += 1
        AdaLoraModel.update_and_allocate(self.tuner, step.index + 1)  # type: ignore[arg-type]

    def may_stop(self, step: Step) -> bool:
        """Only where ranks are fixed."""
        return step.index + 1 >= self.config.total_step - self.config.tfinal

    def close(self) -> None:
        """Refuse a run in which the call was never made.

        Raises:
            NoEffect: If it was not.
        """
        if not self.calls:
            raise NoEffect(
                "PEFT's AdaLoRA allocation was never called: ranks stayed at init_r",
                "drive its watcher after every optimizer step, before gradients are cleared",
            )

    def state_dict(self) -> dict[str, Any]:
        """Statistics by kind and parameter name, and the pattern."""
        held = self.allocator
        return {
            "ipt": dict(held.ipt),
            "exp_avg_ipt": dict(held.exp_avg_ipt),
            "exp_avg_unc": dict(held.exp_avg_unc),
            "rank_pattern": self.config.rank_pattern,
            "calls": self.calls,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            held = {n: t.clone() for n, t in state[kind].items() if isinstance(t, torch.Tensor)}
            setattr(self.allocator, kind, held)
        self.config.rank_pattern = state["rank_pattern"]
        self.calls = int(state["calls"])
