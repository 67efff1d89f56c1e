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
    """y = base(x) + (x L^T) B^T with L = scaling * (gain * A), added in place into base's output.

    Beside the input only x L^T, of r features, is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        gain: Tensor | None,
        base: nn.Module,
        scaling: Any,
    ) -> Tensor:
        """Base output with the product added in place."""
        out = base(x)
        flat = out.view(-1, out.shape[-1])
        hidden = x.reshape(-1, x.shape[-1]).to(a.dtype) @ _left(a, gain, scaling).T
        if b.dtype == out.dtype:
            flat.addmm_(hidden, b.T)
        else:
            flat.add_(hidden @ b.T)
        ctx.weight, ctx.scaling = as_matrix(base), scaling
        ctx.save_for_backward(x, a, b, gain, hidden)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gives dB = g^T (x L^T); dL = (g B)^T x gives dA and dgain; dx = g W + (g B) L."""
        x, a, b, gain, hidden = ctx.saved_tensors
        left = _left(a, gain, ctx.scaling)
        rows = x.reshape(-1, x.shape[-1]).to(a.dtype)
        if torch.is_grad_enabled():
            hidden = rows @ left.T  # a second derivative must see how it came about
        flat = grads[0].reshape(-1, grads[0].shape[-1])
        wide = flat.to(b.dtype)
        inner = wide @ b
        dx = da = db = dgain = None
        if ctx.needs_input_grad[1]:
            dleft = inner.T @ rows
            da = dleft * (ctx.scaling if gain is None else gain * ctx.scaling)
            if gain is not None:
                dgain = (dleft * a).sum(1, keepdim=True) * ctx.scaling
        if ctx.needs_input_grad[2]:
            db = wide.T @ hidden
        if ctx.needs_input_grad[0]:
            dx = flat @ ctx.weight
            dx = dx.addmm_(inner, left) if left.dtype == dx.dtype else dx.add_(inner @ left)
            dx = dx.view(x.shape)
        return dx, da, db, dgain, None, None


def _left(a: Tensor, gain: Tensor | None, scaling: Any) -> Tensor:
    return a * scaling if gain is None else a * (gain * scaling)


def low_rank_output(
    delta: Delta,
    x: Float[Tensor, "*inputs"],
    base: nn.Module,
    a: Float[Tensor, "r in"],
    b: Float[Tensor, "out r"],
    dropout: nn.Module,
    gain: Float[Tensor, "r 1"] | None = None,
    scaling: float | Tensor = 1.0,
) -> Float[Tensor, "*outputs"]:
    """`base(x) + dropout(x) (scaling * gain * A)^T B^T`, fused where nothing forbids it.

    Args:
        delta: Whose `forward` gives the product where it cannot be fused.
        x: Input of the layer.
        base: The frozen layer.
        a: Right factor.
        b: Left factor.
        dropout: `nn.Dropout` or `nn.Identity`.
        gain: One factor a rank (singular values); None means 1. A must train with it.
        scaling: Constant factor.
    """
    dropping = delta.training and isinstance(dropout, nn.Dropout)
    if not dropping and fusable(x, base):
        return LowRankProduct.apply(x, a, b, gain, base, scaling)  # type: ignore[return-value]
    return Delta.output(delta, x, base)


class Orthogonality(torch.autograd.Function):
    """Sum of ||M M^T - I||_F, or of its square, over matrices (the first `rows`) or their
    transposes; keeps the small Gram matrices and no copy of the stacks.
    """

    @staticmethod
    def forward(ctx: Any, squared: bool, rows: int, *matrices: Tensor) -> Tensor:
        """Equal shapes are stacked, so the work is a few operations and not a few a matrix."""
        groups: dict[tuple[bool, torch.Size], list[int]] = {}
        for index, matrix in enumerate(matrices):
            groups.setdefault((index < rows, matrix.shape), []).append(index)
        total, kept = matrices[0].new_zeros(()), []
        for (by_row, _), members in groups.items():
            stack = torch.stack([matrices[i] for i in members])
            rest = stack @ stack.mT if by_row else stack.mT @ stack
            rest.diagonal(dim1=1, dim2=2).sub_(1.0)
            norms = torch.linalg.matrix_norm(rest, keepdim=True)
            total = total + (norms.square().sum() if squared else norms.sum())
            kept.append(rest if squared else rest / norms.clamp_min(torch.finfo(rest.dtype).tiny))
        ctx.groups, ctx.squared, ctx.kept = groups, squared, kept
        ctx.save_for_backward(*matrices)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """d||R||_F / dM = 2 R M / ||R||_F and d||R||_F^2 / dM = 4 R M, with R = M M^T - I."""
        matrices, found = ctx.saved_tensors, {}
        factor = grads[0] * (4 if ctx.squared else 2)
        for ((by_row, _), members), rest in zip(ctx.groups.items(), ctx.kept, strict=True):
            stack = torch.stack([matrices[i] for i in members])
            slopes = (rest * factor) @ stack if by_row else stack @ (rest * factor)
            found.update(zip(members, slopes.unbind(), strict=True))
        return None, None, *(found[i] for i in range(len(matrices)))


def orthogonality_loss(
    rows: Sequence[Tensor], columns: Sequence[Tensor] = (), norm: str = "mean_fro"
) -> Tensor:
    r"""How far matrices are from having orthonormal rows, and others orthonormal columns.

    Args:
        rows: Matrices A, measured by ||A A^T - I||_F.
        columns: Matrices B, measured by ||B^T B - I||_F.
        norm: "mean_fro", the mean over all matrices; "squared_sum", the sum of the squares.
    """
    squared = norm == "squared_sum"
    total: Tensor = Orthogonality.apply(squared, len(rows), *rows, *columns)  # type: ignore[assignment]
    return total if squared else total / (len(rows) + len(columns))


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
        return low_rank_output(self, x, base, self.a, self.b, self.dropout, scaling=self.scaling)

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
