"""AdamW whose moments live in a projection of the gradient, for the matrices that are wide enough.

GaLore and APOLLO share it: they differ in where the projection comes from and in what the small
moments say about the full update. Arithmetic as in both authors' code: epsilon is added before
the bias correction, and weight decay acts on the updated weight. Moments and projections are
float32 or wider, where the authors' follow the gradient's type.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import ConfigError


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW on projected gradients of the matching matrices, plain AdamW on the rest.

    A gradient G (m, n) is projected on its longer side's complement: G P^T with P (r, n) if
    m >= n, else P^T G with P (m, r). Matrices whose smaller side is not above the rank are left
    to plain AdamW.

    Args:
        groups: Parameter groups with `names` beside `params`.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        rank: r.
        update_every: Steps of a parameter between two projections.
        target_modules: Regular expression over the path of the module that holds the matrix.

    Raises:
        ConfigError: If the expression is broken.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        rank: int,
        update_every: int,
        target_modules: str,
    ) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.rank, self.update_every = rank, update_every
        self.pattern = pattern_of(target_modules)

    @abstractmethod
    def basis(self, gradient: Float[Tensor, "m n"], name: str, turn: int) -> Tensor:
        """A new projection. Shape (r, n) if m >= n, else (m, r).

        Args:
            gradient: The full gradient.
            name: Of the parameter.
            turn: How many projections this parameter had before.
        """

    @abstractmethod
    def full_update(
        self, small: Tensor, projected: Tensor, gradient: Tensor, state: dict[str, Any]
    ) -> Tensor:
        """The full update before the step size. Shape (m, n).

        Args:
            small: Adam's direction in the projected space.
            projected: The projected gradient.
            gradient: The full gradient.
            state: Of the parameter; its projection is `basis`.
        """

    def is_projected(self, name: str, parameter: Tensor) -> bool:
        """True for a matrix of a matching module whose sides are both above the rank."""
        module = name.rpartition(".")[0]
        wide = parameter.dim() == 2 and min(parameter.shape) > self.rank
        return wide and self.pattern.fullmatch(module) is not None

    def state_bytes(self) -> int:
        """Bytes of moments and projections from the first step on."""
        total = 0
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                entries = 2 * parameter.numel()
                if self.is_projected(name, parameter):
                    shorter, longer = sorted(parameter.shape)
                    entries = self.rank * (2 * longer + shorter)
                total += entries * max(4, parameter.element_size())
        return total

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    wide = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32))
                    self._update(name, parameter, wide, group)

    def _update(self, name: str, parameter: Tensor, gradient: Tensor, group: Any) -> None:
        state = self.state[parameter]
        count = state.get("step", 0)
        state["step"] = count + 1
        small = self.is_projected(name, parameter)
        seen = gradient
        if small:
            if count % self.update_every == 0:
                state["basis"] = self.basis(gradient, name, count // self.update_every)
            seen = project(gradient, state["basis"])
        if count == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(seen), torch.zeros_like(seen)
        first, second = group["betas"]
        state["exp_avg"].mul_(first).add_(seen, alpha=1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(seen, seen, value=1 - second)
        update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
        if small:
            update = self.full_update(update, seen, gradient, state)
        corrected = math.sqrt(1 - second ** (count + 1)) / (1 - first ** (count + 1))
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * corrected)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def project(gradient: Float[Tensor, "m n"], basis: Tensor) -> Tensor:
    """The gradient in the small space. Shape (m, r) if m >= n, else (r, n)."""
    tall = gradient.shape[0] >= gradient.shape[1]
    return gradient @ basis.T if tall else basis.T @ gradient


def project_back(small: Tensor, basis: Tensor, shape: Sequence[int]) -> Float[Tensor, "m n"]:
    """From the small space back to the parameter's shape."""
    return small @ basis if shape[0] >= shape[1] else basis @ small


def pattern_of(target_modules: str) -> re.Pattern[str]:
    """The compiled expression.

    Raises:
        ConfigError: If it is broken.
    """
    try:
        return re.compile(target_modules)
    except re.error as error:
        raise ConfigError(
            f"target_modules = {target_modules!r} is not a regular expression ({error})",
            "give an expression over the paths of modules",
        ) from None
