"""The layer of LaMDA: a frozen projection, a small trained square, a projection that freezes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.method import generator_of
from ...nn.adapter import plain_layer
from ...nn.spectral import SpectralDelta, channels_back, channels_last, project
from ...nn.svd import hollow


class SeededDropout(torch.autograd.Function):
    """Dropout that keeps a seed instead of a mask as wide as its input.

    The seed is one draw from torch's default generator, so whoever seeds that decides the mask.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        # A plan's tensors have no values, so nothing can be drawn from them.
        ctx.seed = 0 if hollow(x) else int(torch.randint(1 << 62, (), device="cpu"))
        ctx.p = p
        return x * _mask(x, p, ctx.seed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * _mask(grads[0], ctx.p, ctx.seed), None


def _mask(like: Tensor, p: float, seed: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    # Layout by shape alone: a gradient may be strided differently from its input.
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)


class LaMDADelta(SpectralDelta):
    r"""$\Delta W = s\,B S A$, less $U_r \Sigma_r V_r^\top$ where the start took that out.

    Attributes:
        down: A, frozen. Shape (r, in).
        core: S, trains. Shape (r, r).
        up: B, trains until it is frozen. Shape (out, r).
        taken: U_r Sigma_r with the start "svd_residual", whose A is V_r^T. Shape (out, r).
        scale: s = alpha / r.
    """

    down: Tensor
    up: Tensor
    taken: Tensor

    def __init__(
        self,
        down: Float[Tensor, "r in"],
        core: Float[Tensor, "r r"],
        up: Float[Tensor, "out r"],
        taken: Float[Tensor, "out r"] | None,
        scale: float,
        dropout: float,
        trains_up: bool,
        **facts: Any,
    ) -> None:
        bases: Mapping[str, Tensor] = {"down": down}
        if taken is not None:
            bases = {**bases, "taken": taken}
        if not trains_up:
            bases = {**bases, "up": up}
        super().__init__(bases=bases, probe=down, **facts)
        self.core = nn.Parameter(core)
        if trains_up:
            self.up = nn.Parameter(up)
        self.trains_up, self.residual = trains_up, taken is not None
        self.scale, self.dropout = scale, dropout

    def net(self) -> Float[Tensor, "out r"]:
        """The factor beside A: s B S, less U_r Sigma_r where that was taken out."""
        if torch.is_autocast_enabled(self.core.device.type):
            # Full precision: the difference is small beside either side.
            with torch.autocast(self.core.device.type, enabled=False):
                return self.net()
        kind = self.core.dtype
        if self.residual:
            taken, up = self.taken.to(kind), self.up.to(kind)
            return torch.addmm(taken, up, self.core, beta=-1, alpha=self.scale)
        return (self.up.to(kind) @ self.core) * self.scale

    def output(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """The base's answer and the delta, added in one product where it is not dropped out."""
        out, plain = base(x), plain_layer(base)
        if self._dropping() or torch.is_autocast_enabled(x.device.type):
            return (out + self(x, base)).to(out.dtype)
        seen = project(x, self.down, plain)
        rows = channels_last(out, plain)
        flat, seen = rows.reshape(-1, rows.shape[-1]), seen.reshape(-1, seen.shape[-1])
        added = self._added(flat.to(self.core.dtype), seen.to(self.core.dtype))
        return channels_back(added.to(out.dtype).view(rows.shape), plain)

    def forward(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """The delta alone; dropout acts on what trains and not on what was taken out."""
        plain = plain_layer(base)
        dropping = self._dropping()
        dropped = SeededDropout.apply(x, self.dropout) if dropping else x
        seen = project(dropped, self.down, plain)  # type: ignore[arg-type]
        if not dropping or not self.residual:
            return channels_back(F.linear(seen.to(self.core.dtype), self.net()), plain)
        grown = F.linear(F.linear(seen.to(self.core.dtype), self.core), self.up) * self.scale
        less = F.linear(project(x, self.down, plain), self.taken)
        return channels_back(grown - less, plain)

    def weight(self, base: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The delta as a matrix."""
        self.refuse_quantized()
        kind = torch.promote_types(base.dtype, self.core.dtype)
        return self.net().to(kind) @ self.down.to(kind)

    def remainder(self, base: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The part of the base weight that stays: W - U_r Sigma_r V_r^T, or W."""
        return base - self.taken @ self.down if self.residual else base

    def to_lora(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """A as it is, and everything else in B: exact, of rank r with every start."""
        return self.down.detach().to(self.core.dtype), self.net().detach()

    def extra_repr(self) -> str:
        """Rank, start, and what the bases cost."""
        kind = "svd_residual" if self.residual else "additive"
        return f"r={len(self.core)}, {kind}, frozen_bytes={self.frozen_bytes()}"

    def _dropping(self) -> bool:
        return self.training and self.dropout > 0

    def _added(self, rows: Tensor, seen: Tensor) -> Tensor:
        """Rows plus the delta, by whichever product is cheaper in the backward pass."""
        if self.residual or self.up.requires_grad:
            return torch.addmm(rows, seen, self.net().T)
        # With B frozen only r-wide gradients are left to form.
        inner = F.linear(seen, self.core)
        return torch.addmm(rows, inner, self.up.to(inner.dtype).T, alpha=self.scale)


def kaiming(shape: tuple[int, int], seed: tuple[Any, ...], like: Tensor) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), the default start of `nn.Linear`: +-1 / sqrt(in).

    Args:
        shape: (out, in).
        seed: Parts of the seed.
        like: Gives data type and device.
    """
    if hollow(like):
        return like.new_empty(shape)
    bound = shape[1] ** -0.5
    values = torch.rand(shape, generator=generator_of(*seed), dtype=torch.float64)
    return (values * 2 * bound - bound).to(like)
