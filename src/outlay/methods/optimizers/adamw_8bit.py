"""AdamW with block-wise 8-bit moments, by torchao."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from ...core.card import Card
from ...core.errors import require
from ...core.method import Context, OnOptimizer

_SMALLEST = 4096  # torchao's: fewer entries keep moments in the parameter's own type


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(OnOptimizer):
    """AdamW whose moments are 8-bit codes with one scale a block. arXiv 2110.02861.

    The arithmetic and the code are those of torchao's `AdamW8bit`, run without compiling; the
    recipe's learning rate, betas, eps and weight decay hold. Parameters of fewer than 4,096
    entries, or whose size no block divides, keep plain moments.

    Attributes:
        block_size: Entries that share a scale.
        stochastic_rounding: Round bfloat16 weights at random in proportion, so that updates
            below their resolution are not lost. Draws from the step's generator.
    """

    card: ClassVar[Card] = Card(
        name="adamw_8bit",
        title="8-bit Optimizers via Block-wise Quantization",
        arxiv="2110.02861",
        group="optimizers",
        summary="AdamW with 8-bit moments (torchao).",
        authors="Tim Dettmers, Mike Lewis, Sam Shleifer, Luke Zettlemoyer",
        year=2021,
        claims=("optimizer",),
        saves=("optimizer memory",),
    )

    block_size: Annotated[int, Ge(16)] = 256
    stochastic_rounding: bool = False

    def build(
        self, groups: Sequence[dict[str, Any]], settings: Any, context: Context
    ) -> torch.optim.Optimizer:
        """The optimizer over these groups.

        Raises:
            MissingExtra: If torchao is not installed.
        """
        require("torchao.optim", "torchao")
        return _CodedAdamW(
            groups, settings.betas, settings.eps, self.block_size, self.stochastic_rounding
        )


class _CodedAdamW(torch.optim.Optimizer):
    """torchao's update on state of plain tensors, which a checkpoint can hold.

    Codes are kept as (blocks, 1, block_size): they are no moment of the parameter's shape that a
    mask could be laid on.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        block_size: int,
        stochastic_rounding: bool,
    ) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.block_size, self.stochastic_rounding = block_size, stochastic_rounding

    def _is_coded(self, parameter: Tensor) -> bool:
        return parameter.numel() >= _SMALLEST and parameter.numel() % self.block_size == 0

    def state_bytes(self) -> int:
        """Bytes of all moments from the first step on."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        coded = sum(p.numel() for p in parameters if self._is_coded(p))
        plain = sum(p.numel() * p.element_size() for p in parameters if not self._is_coded(p))
        return 2 * (coded + 4 * coded // self.block_size + plain)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        from torchao.optim.adam import single_param_adam

        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for name in ("exp_avg", "exp_avg_sq"):
                        self._start(state, name, parameter)
                state["step"] += 1
                single_param_adam(
                    parameter.detach(),
                    parameter.grad,
                    state["step"],
                    self._moment(state, "exp_avg", parameter),
                    self._moment(state, "exp_avg_sq", parameter),
                    None,
                    group["lr"],
                    *group["betas"],
                    group["weight_decay"],
                    group["eps"],
                    IS_ADAMW=True,
                    BF16_STOCHASTIC_ROUND=self.stochastic_rounding
                    and parameter.dtype == torch.bfloat16,
                )

    def _start(self, state: dict[str, Any], name: str, parameter: Tensor) -> None:
        if not self._is_coded(parameter):
            state[name] = torch.zeros_like(parameter)
            return
        blocks = parameter.numel() // self.block_size
        state[f"{name}_codes"] = torch.zeros(
            blocks, 1, self.block_size, dtype=torch.uint8, device=parameter.device
        )
        state[f"{name}_scales"] = torch.zeros(blocks, device=parameter.device)

    def _moment(self, state: dict[str, Any], name: str, parameter: Tensor) -> Tensor:
        """The moment as torchao sees it, over the state's own storage."""
        from torchao.optim import subclass_8bit as coded

        if name in state:
            return state[name]
        signed = name == "exp_avg"
        levels = coded.get_qmap_signed() if signed else coded.get_qmap_unsigned()
        return coded.OptimState8bit(
            state[f"{name}_codes"].view(parameter.shape),
            state[f"{name}_scales"],
            torch.tensor(levels, device=parameter.device),
            signed,
            parameter.dtype,
        )
