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
from ...nn.targets import is_conv1d

Parameterisation = Literal["additive", "relative", "softplus"]
Side = Literal["right", "left"]


class Rescale(torch.autograd.Function):
    """y = x + ([x B_g^T - offset, tail] * gain) B over the rows of a frozen basis B = [B_g, B_t].

    Only the bracket, of r features, is kept for the backward pass, in which the sum runs inside
    the product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tail: Tensor | None,
        basis: Tensor,
        gain: Tensor,
        offset: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(basis.dtype)
        seen = _bracket(rows, tail, basis, offset)
        ctx.save_for_backward(seen, basis, gain)
        ctx.own = len(basis) - (0 if tail is None else tail.shape[-1])
        return torch.addmm(rows, seen * gain, basis).to(x.dtype).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seen, basis, gain = ctx.saved_tensors
        grad, own = grads[0], ctx.own
        rows = grad.reshape(-1, grad.shape[-1]).to(basis.dtype)
        back = rows @ basis.T
        dgain = (back * seen).sum(0).to(gain.dtype)
        dx = dtail = doffset = None
        if any(ctx.needs_input_grad[i] for i in (0, 1, 4)):
            back = back * gain
        if ctx.needs_input_grad[0]:
            dx = grad
            if own:
                dx = torch.addmm(rows, back[:, :own], basis[:own]).to(grad.dtype).view(grad.shape)
        if ctx.needs_input_grad[1]:
            dtail = back[:, own:].reshape(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[4]:
            doffset = -back[:, :own].sum(0)
        return dx, dtail, None, dgain, doffset


def _bracket(rows: Tensor, tail: Tensor | None, basis: Tensor, offset: Tensor | None) -> Tensor:
    """Rows along the first directions, and what the others saw elsewhere."""
    if tail is None:
        seen = rows @ basis.T
        return seen if offset is None else seen - offset
    given = tail.reshape(-1, tail.shape[-1]).to(basis.dtype)
    own = len(basis) - given.shape[1]
    if not own:
        return given
    seen = rows @ basis[:own].T
    return torch.cat([seen if offset is None else seen - offset, given], 1)


def rescale(
    x: Float[Tensor, "*rows width"],
    tail: Float[Tensor, "*rows t"] | None,
    basis: Float[Tensor, "r width"],
    gain: Float[Tensor, " r"],
    offset: Float[Tensor, " g"] | None = None,
) -> Float[Tensor, "*rows width"]:
    """`Rescale`, or the same in plain operations under function transforms."""
    if torch._C._are_functorch_transforms_active():
        rows = x.reshape(-1, x.shape[-1]).to(basis.dtype)
        out = rows + (_bracket(rows, tail, basis, offset) * gain) @ basis
        return out.to(x.dtype).reshape(x.shape)
    return Rescale.apply(x, tail, basis, gain, offset)  # type: ignore[return-value]


class SVFitDelta(SpectralDelta):
    r"""$\Delta W = U_r \,\mathrm{diag}(d)\, V_r^\top$ with d = sigma - Sigma_r.

    One basis is held in full and the other only for the t smallest of the chosen values, because
    for the rest the weight itself carries it: $u_i d_i v_i^\top = u_i (d_i/\sigma_i) u_i^\top W$
    acts on the layer's output (side "left"), $W v_i (d_i/\sigma_i) v_i^\top$ on its input
    ("right"). With t = r both bases are held in full and the layer's output gets
    U_r (d * V_r^T x).

    Attributes:
        delta: What trains, zeros at the start. Shape (r,).
        sigma: Sigma_r, frozen, decreasing.
        u: Left vectors: all of them, or the last t ("right"; none if t = 0). Shape (out, r or t).
        vh: Right vectors: all of them, or the last t ("left"; none if t = 0). Shape (r or t, in).
        side: Which basis is held in full.
        t: How many values have both vectors held.
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
        left = side == "left"
        super().__init__(bases=bases, probe=bases["u"].T if left else bases["vh"], **facts)
        self.side, self.parameterisation = side, parameterisation
        self.t = len(bases["vh"]) if left and "vh" in bases else 0
        if not left and "u" in bases:
            self.t = bases["u"].shape[1]
        self.delta = nn.Parameter(torch.zeros_like(self.sigma))
        # The very parameter, in a list so that it is not registered: merging puts another one
        # into the layer, and exporting factors needs the frozen one.
        self._stored, self._transposed = [layer.weight], is_conv1d(layer)

    def shift(self) -> Float[Tensor, " r"]:
        """The change d = sigma - Sigma_r."""
        if self.parameterisation == "additive":
            return self.delta
        if self.parameterisation == "relative":
            return self.delta * self.sigma
        start = self.sigma + torch.log(-torch.expm1(-self.sigma))
        return F.softplus(start + self.delta) - F.softplus(start)

    def gain(self) -> Float[Tensor, " r"]:
        """Factors of the directions: d / Sigma_r, but d for the last t."""
        own = len(self.sigma) - self.t
        if self.parameterisation == "relative" and not self.t:
            return self.delta
        shift = self.shift()
        if not own:
            return shift
        if not self.t:
            return shift / self.sigma
        return torch.cat([shift[:own] / self.sigma[:own], shift[own:]])

    def singular_values(self) -> Float[Tensor, " r"]:
        """What the paper trains: sigma = Sigma_r + d."""
        return self.sigma + self.shift()

    def output(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """The base's answer with its singular values moved, whatever kind of layer it is."""
        plain, own = plain_layer(base), len(self.sigma) - self.t
        if self.side == "left":
            tail = project(x, self.vh, plain) if self.t else None
            rows = channels_last(base(x), plain)
            offset = None
            if own and isinstance(plain.bias, Tensor):
                offset = plain.bias.to(self.u.dtype) @ self.u[:, :own]
            return channels_back(rescale(rows, tail, self.u.T, self._gain(), offset), plain)
        out = base(rescale(x, None, self.vh[:own], self._gain()[:own]))
        return (out + self._tail(x, plain)).to(out.dtype) if self.t else out

    def forward(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """The delta alone, where another one came first."""
        plain, own, gain = plain_layer(base), len(self.sigma) - self.t, self._gain()
        if self.side == "left":
            tail = project(x, self.vh, plain) if self.t else None
            rows = tail
            if own:
                matrix = float_matrix(plain, self.layer_name).to(self.u.dtype)
                rows = channels_last(apply_weight(x.to(matrix.dtype), plain, matrix), plain)
            assert rows is not None
            seen = _bracket(rows.reshape(-1, rows.shape[-1]), tail, self.u.T, None)
            added = ((seen * gain) @ self.u.T).view(*rows.shape[:-1], -1)
            return channels_back(added, plain)
        seen = project(x, self.vh[:own], plain) * gain[:own]
        matrix = float_matrix(plain, self.layer_name).to(seen.dtype)
        added = F.linear(seen @ self.vh[:own], matrix)
        return added + self._tail(x, plain) if self.t else added

    def weight(self, base: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The delta as a matrix."""
        self.refuse_quantized()
        b, a = self._factors(base)
        return b @ a

    def to_lora(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """A and B with B A the delta, exactly; the basis that the weight carries is multiplied out.

        Side "left" gives B = U and the moved values in A, "right" A = V^T and them in B.
        """
        with torch.no_grad():
            stored = self._stored[0]
            assert isinstance(stored, Tensor)
            wide = stored if stored.dtype.is_floating_point else stored.dequantize()
            b, a = self._factors(wide.T if self._transposed else wide.flatten(1))
            return a.clone(), b.clone()

    def extra_repr(self) -> str:
        """Rank, form, and what the bases cost."""
        return (
            f"r={len(self.sigma)}, {self.parameterisation}, {self.side}, t={self.t}, "
            f"frozen_bytes={self.frozen_bytes()}"
        )

    def _factors(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A) in the data type of the values or the base, whichever is wider."""
        kind = torch.promote_types(base.dtype, self.sigma.dtype)
        base, gain, own = base.to(kind), self.gain().to(kind), len(self.sigma) - self.t
        if self.side == "left":
            u = self.u.to(kind)
            rows = u[:, :own].T @ base
            a = torch.cat([rows, self.vh.to(kind)]) if self.t else rows
            return u, gain[:, None] * a
        vh = self.vh.to(kind)
        columns = base @ vh[:own].T
        b = torch.cat([columns, self.u.to(kind)], 1) if self.t else columns
        return b * gain, vh

    def _gain(self) -> Tensor:
        return self.gain().to((self.u if self.side == "left" else self.vh).dtype)

    def _tail(self, x: Tensor, plain: nn.Module) -> Tensor:
        """What the last t directions add to the output, from both vectors (side "right")."""
        own = len(self.sigma) - self.t
        return F.linear(project(x, self.vh[own:], plain) * self._gain()[own:], self.u)
