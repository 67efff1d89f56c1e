"""The layer of SVFit: a frozen weight whose singular values move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn.adapter import apply_weight, plain_layer
from ...nn.spectral import SpectralDelta, channels_back, channels_last, project
from ...nn.svd import float_matrix
from ...nn.targets import is_conv1d, weight_of

Parameterisation = Literal["additive", "relative", "softplus"]
Side = Literal["both", "right", "left"]


class Rescale(torch.autograd.Function):
    """y = x + ((x B^T - offset) * gain) B along the rows of a frozen basis B.

    Only x B^T, of r features, is kept for the backward pass, in which the sum runs inside the
    product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, basis: Tensor, gain: Tensor, offset: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(basis.dtype)
        seen = rows @ basis.T
        if offset is not None:
            seen = seen - offset
        ctx.save_for_backward(seen, basis, gain)
        return torch.addmm(rows, seen * gain, basis).to(x.dtype).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seen, basis, gain = ctx.saved_tensors
        rows = grads[0].reshape(-1, grads[0].shape[-1]).to(basis.dtype)
        back = rows @ basis.T
        dgain = (back * seen).sum(0).to(gain.dtype)
        dx = doffset = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            back = back * gain
        if ctx.needs_input_grad[0]:
            dx = torch.addmm(rows, back, basis).to(grads[0].dtype).view(grads[0].shape)
        if ctx.needs_input_grad[3]:
            doffset = -back.sum(0)
        return dx, None, dgain, doffset


class SVFitDelta(SpectralDelta):
    r"""$\Delta W = U_r \,\mathrm{diag}(d)\, V_r^\top$ with d = sigma - Sigma_r.

    With both bases it adds U_r (d * V_r^T x). With one basis it holds half as much, because the
    weight itself carries the other: $\Delta W = W V_r \mathrm{diag}(d/\Sigma_r) V_r^\top$ acts
    on the layer's input, $U_r \mathrm{diag}(d/\Sigma_r) U_r^\top W$ on its output.

    Attributes:
        delta: What trains, zeros at the start. Shape (r,).
        sigma: Sigma_r, frozen.
        side: "both", "right" (V alone) or "left" (U alone).
    """

    sigma: Tensor
    u: Tensor
    vh: Tensor

    def __init__(
        self,
        bases: Mapping[str, Tensor],
        side: Side,
        parameterisation: Parameterisation,
        layer: nn.Module,
        **facts: Any,
    ) -> None:
        probe = bases["u"].T if side == "left" else bases["vh"]
        super().__init__(bases=bases, probe=probe, **facts)
        self.side, self.parameterisation = side, parameterisation
        self.delta = nn.Parameter(torch.zeros_like(self.sigma))
        # The very parameter, in a list so that it is not registered: merging puts another one
        # into the layer, and exporting factors needs the frozen one.
        self._stored, self._transposed = [weight_of(layer)], is_conv1d(layer)

    def shift(self) -> Float[Tensor, " r"]:
        """The change d = sigma - Sigma_r."""
        if self.parameterisation == "additive":
            return self.delta
        if self.parameterisation == "relative":
            return self.delta * self.sigma
        start = self.sigma + torch.log(-torch.expm1(-self.sigma))
        return F.softplus(start + self.delta) - F.softplus(start)

    def gain(self) -> Float[Tensor, " r"]:
        """The change as a share, d / Sigma_r."""
        return self.delta if self.parameterisation == "relative" else self.shift() / self.sigma

    def singular_values(self) -> Float[Tensor, " r"]:
        """What the paper trains: sigma = Sigma_r + d."""
        return self.sigma + self.shift()

    def output(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """The base's answer with its singular values moved, whatever kind of layer it is."""
        plain = plain_layer(base)
        if self.side == "right":
            return base(self._rescaled(x, self.vh, None))
        out = base(x)
        rows = channels_last(out, plain)
        if self.side == "left":
            bias = plain.bias
            offset = bias.to(self.u.dtype) @ self.u if isinstance(bias, Tensor) else None
            rows = self._rescaled(rows, self.u.T, offset)
        else:
            rows = (rows + self._added(x, plain)).to(out.dtype)
        return channels_back(rows, plain)

    def forward(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """The delta alone, where another one came first."""
        plain = plain_layer(base)
        if self.side == "both":
            return channels_back(self._added(x, plain), plain)
        matrix = float_matrix(plain, self.layer_name)
        if self.side == "right":
            seen = project(x, self.vh, plain) * self.gain()
            return F.linear(seen @ self.vh, matrix.to(seen.dtype)).to(x.dtype)
        out = channels_last(apply_weight(x, plain, matrix.to(x.dtype)), plain)
        added = ((out.to(self.u.dtype) @ self.u) * self.gain()) @ self.u.T
        return channels_back(added.to(x.dtype), plain)

    def weight(self, base: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The delta as a matrix."""
        self.refuse_quantized()
        b, a = self._factors(base)
        return b @ a

    def to_lora(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """A and B with B A the delta; the singular values' change is in the factor that W makes.

        One basis V gives A = V^T and B = W V diag(d / Sigma); one basis U gives B = U and
        A = diag(d / Sigma) U^T W; both give A = V^T and B = U diag(d).
        """
        with torch.no_grad():
            stored = self._stored[0]
            wide = stored if stored.dtype.is_floating_point else stored.dequantize()
            b, a = self._factors(wide.T if self._transposed else wide.flatten(1))
            return a.clone(), b.clone()

    def extra_repr(self) -> str:
        """Rank, form, and what the bases cost."""
        return (
            f"r={len(self.sigma)}, {self.parameterisation}, {self.side}, "
            f"frozen_bytes={self.frozen_bytes()}"
        )

    def _factors(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A) in the data type of the bases or the base, whichever is wider."""
        kind = torch.promote_types(base.dtype, self.sigma.dtype)
        if self.side == "both":
            return self.u.to(kind) * self.shift().to(kind), self.vh.to(kind)
        if self.side == "right":
            basis = self.vh.to(kind)
            return (base.to(kind) @ basis.T) * self.gain().to(kind), basis
        basis = self.u.to(kind)
        return basis, self.gain().to(kind)[:, None] * (basis.T @ base.to(kind))

    def _added(self, x: Tensor, plain: nn.Module) -> Tensor:
        return F.linear(project(x, self.vh, plain) * self.shift(), self.u)

    def _rescaled(self, x: Tensor, basis: Tensor, offset: Tensor | None) -> Tensor:
        gain = self.gain().to(basis.dtype)
        if torch._C._are_functorch_transforms_active():
            seen = F.linear(x.to(basis.dtype), basis)
            seen = seen if offset is None else seen - offset
            return (x + (seen * gain) @ basis).to(x.dtype)
        return Rescale.apply(x, basis, gain, offset)  # type: ignore[return-value]
