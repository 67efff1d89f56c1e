"""A low-rank product beside a frozen linear layer, fused, and the plain LoRA delta on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .adapted import Delta, as_matrix, fusable, plain_layer
from .targets import is_linear


class LowRankProduct(torch.autograd.Function):
    """y = base(x) + (x A^T) B^T: the product is added in place, its gradient into base's.

    Beside the input only x A^T, of r features, is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: nn.Module) -> Tensor:
        """Base output with the product added in place."""
        out = base(x)
        flat = out.view(-1, out.shape[-1])
        hidden = x.reshape(-1, x.shape[-1]).to(a.dtype) @ a.T
        if b.dtype == out.dtype:
            flat.addmm_(hidden, b.T)
        else:
            flat.add_(hidden @ b.T)
        ctx.base = base
        ctx.save_for_backward(x, a, b, hidden)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """DB = g^T (x A^T); dA = (g B)^T x; dx = g W + (g B) A."""
        x, a, b, hidden = ctx.saved_tensors
        flat = grads[0].reshape(-1, grads[0].shape[-1])
        wide = flat.to(b.dtype)
        inner = wide @ b
        dx = da = db = None
        if ctx.needs_input_grad[1]:
            da = inner.T @ x.reshape(-1, x.shape[-1]).to(a.dtype)
        if ctx.needs_input_grad[2]:
            db = wide.T @ hidden
        if ctx.needs_input_grad[0]:
            dx = flat @ as_matrix(ctx.base)
            dx = dx.addmm_(inner, a) if a.dtype == dx.dtype else dx.add_(inner @ a)
            dx = dx.view(x.shape)
        return dx, da, db, None


def low_rank_output(
    delta: Delta,
    x: Float[Tensor, "*inputs"],
    base: nn.Module,
    a: Float[Tensor, "r in"],
    b: Float[Tensor, "out r"],
    dropout: nn.Module,
) -> Float[Tensor, "*outputs"]:
    """`base(x) + dropout(x) A^T B^T`, fused where nothing forbids it."""
    dropping = delta.training and isinstance(dropout, nn.Dropout)
    if not dropping and fusable(x, base):
        return LowRankProduct.apply(x, a, b, base)  # type: ignore[return-value]
    return Delta.output(delta, x, base)


def orthogonality_loss(matrices: Sequence[Tensor], norm: str = "mean_fro") -> Tensor:
    r"""How far the rows of matrices are from orthonormal; equal shapes are stacked.

    "mean_fro": the mean of ||A A^T - I||_F. "squared_sum": the sum of the squares.
    """
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for matrix in matrices:
        groups.setdefault(tuple(matrix.shape), []).append(matrix)
    norms = []
    for (r, _), members in groups.items():
        stack = torch.stack(members)
        eye = torch.eye(r, dtype=stack.dtype, device=stack.device)
        norms.append(torch.linalg.matrix_norm(stack @ stack.mT - eye))
    every = torch.cat(norms)
    return every.mean() if norm == "mean_fro" else every.square().sum()


class LowRankDelta(Delta):
    r"""Plain LoRA: delta W = scaling * B A (arXiv 2106.09685).

    Attributes:
        a: (r, in).
        b: (out, r).
        scaling: Factor of the product, alpha / r in PEFT.
    """

    scaling: Tensor

    def __init__(self, a: Tensor, b: Tensor, scaling: float = 1.0, dropout: float = 0.0):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.register_buffer("scaling", torch.tensor(float(scaling)))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """(x A^T) B^T times the scaling."""
        if not is_linear(plain_layer(base)):
            return super().forward(self.dropout(x), base)
        hidden = self.dropout(x).to(self.a.dtype) @ self.a.T
        return hidden @ (self.b * self.scaling).T

    def output(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """Base and product in one function."""
        return low_rank_output(self, x, base, self.a, self.b * self.scaling, self.dropout)

    def weight(self, base: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Scaling * B A."""
        return (self.b.to(base.dtype) @ self.a.to(base.dtype)) * self.scaling

    def to_lora(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """A, and B times the scaling."""
        return self.a.detach(), self.b.detach() * self.scaling

    def peft_tensors(self) -> dict[str, Tensor]:
        """LoRA's two factors, unscaled."""
        return {"lora_A.weight": self.a, "lora_B.weight": self.b}

    @torch.no_grad()
    def load_peft_tensors(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
    ) -> None:
        """Take over LoRA's two factors."""
        self.a.copy_(tensors["lora_A.weight"].flatten(1))
        self.b.copy_(tensors["lora_B.weight"].flatten(1))
