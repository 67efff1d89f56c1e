"""SVFit: train the leading singular values of each weight and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card
from ...core.errors import ConfigError
from ...core.method import Context, OnModel
from ...nn.adapter import AdapterMethod, delta_dtype
from ...nn.spectral import (
    Embed,
    Selection,
    account,
    basis_type,
    check_rank,
    choose,
    embeds,
    random_bases,
    seed_for,
)
from ...nn.svd import (
    energy_rank,
    float_matrix,
    hollow,
    is_quantized,
    matrix_shape,
    shared_cache,
)
from ...nn.targets import is_linear
from ._svfit_layer import Parameterisation, Side, SVFitDelta

Rank = (
    Annotated[int, Ge(1)]
    | Literal["full"]
    | tuple[Literal["energy"], Annotated[float, Gt(0.0), Le(1.0)]]
)

_SINGULAR = 1e-6
"""Share of the largest singular value below which one counts as zero."""

_CARRIED = 1e-2
"""Smallest share of the largest singular value whose second vector the weight can carry: W v_i /
sigma_i stands for u_i, and float32 rounding in it grows with sigma_1 / sigma_i."""


@dataclass(frozen=True, kw_only=True)
class SVFit(AdapterMethod, OnModel):
    r"""Fine-tune the singular values of pre-trained weights. arXiv 2409.05926.

    $W = U \Sigma V^\top$ is decomposed once. $U_r$, $V_r$ and the remainder
    $W_e = W - U_r \Sigma_r V_r^\top$ are frozen, the r values sigma train:
    $y = W_e x + U_r(\sigma \odot V_r^\top x) + b$. There is no scaling and no further loss.

    Here the same function is computed as $y = W x + U_r((\sigma - \Sigma_r) \odot V_r^\top x) + b$
    and the difference trains, from 0: the base weight stays as it is (so it may be quantized, and
    other adapters may add to it), the start is the base exactly, and weight decay pulls towards
    the pre-trained model instead of shrinking it.

    Not established from the sources: which measure of information "99 %" means (here
    `("energy", p)` is the share of the squared singular values), which r was used (16 times fewer
    parameters than LoRA of rank 8 on the query and value of RoBERTa-base is r = 768, all of them:
    hence "full"), and the learning rate. Only r numbers a matrix move the function, so expect 10 to
    100 times LoRA's.

    What it costs: r trained numbers a matrix, and frozen bases in memory. Both bases are
    r (out + in) numbers. One is r min(out, in): with "full", W and one basis are as many numbers
    as both bases without W, and W stays in its place. `costs` says it in bytes, the meter keeps
    it as "resident_frozen_bytes".

    Attributes:
        rank: Values that train: a number, "full", or ("energy", share of the squared values).
        selection: The largest values (paper), the smallest, or a random choice.
        parameterisation: sigma = Sigma + delta (paper), Sigma (1 + delta), or a softplus whose
            argument moves by delta, which keeps sigma positive.
        basis: Singular vectors (paper), or random orthonormal ones as a control.
        basis_dtype: "float32" (float64 on a float64 base), or "base" for the weight's own type;
            bfloat16 bases are orthogonal to 4e-3 only.
        hold: One basis, and the other for values below 1e-2 of the largest, where one would not
            be precise ("auto"), or always one or both.
        embed_bases: Keep the bases in the state: where singular values repeat ("auto"), or
            always; "never" refuses such weights.
        allow_rebuild: Load a state that was trained on another base weight.
    """

    card: ClassVar[Card] = Card(
        name="svfit",
        title="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular "
        "Values",
        paper=35,
        arxiv="2409.05926",
        group="adapters",
        summary="Trains the singular values of each weight; the directions stay.",
        authors="Chengwei Sun and others",
        year=2024,
        claims=("delta.additive",),
        saves=("trainable parameters", "optimizer memory", "adapter bytes"),
        freezes_base=True,
    )

    rank: Rank = "full"
    selection: Selection = "principal"
    parameterisation: Parameterisation = "additive"
    basis: Literal["singular", "random"] = "singular"
    basis_dtype: Literal["float32", "base"] = "float32"
    hold: Literal["auto", "one", "both"] = "auto"
    embed_bases: Embed = "auto"
    allow_rebuild: bool = False

    def validate(self) -> None:
        """Refuse settings that need singular values where there are none."""
        if self.basis == "random":
            for field, usual in {"parameterisation": "additive", "selection": "principal"}.items():
                if getattr(self, field) != usual:
                    raise ConfigError(
                        f"svfit.{field} = {getattr(self, field)!r} with random bases, which have "
                        "no singular values",
                        f"set {field}={usual!r} or basis='singular'",
                    )
            if isinstance(self.rank, tuple) or self.hold == "one":
                raise ConfigError(
                    f"svfit.rank = {self.rank!r}, hold = {self.hold!r} with random bases",
                    "give rank as a number or 'full', and hold='auto' or 'both'",
                )
        if isinstance(self.rank, tuple) and self.selection != "principal":
            raise ConfigError(
                f"svfit.rank = {self.rank!r} with selection {self.selection!r}",
                "the energy rule counts the largest values: set selection='principal' or a number",
            )

    def kinds(self) -> tuple[type[nn.Module], ...]:
        """Convolutions too, as the matrix (out, in * kernel)."""
        return (nn.Conv2d,)

    def adapt(self, model: nn.Module, context: Context | None = None) -> nn.Module:
        """Wrap the matched layers in place and account for the bases.

        Raises:
            NoEffect: If no module matches.
            ConfigError: If a rank is above a layer's directions, or the settings do not fit its
                spectrum.
            NonFinite: If a weight holds NaN or infinity.
        """
        shapes = [matrix_shape(layer) for layer in self.targets(model).values()]
        model = super().adapt(model, context)
        account(model, shapes if self.basis == "singular" else (), context)
        return model

    def make(self, name: str, layer: nn.Module, context: Context | None = None) -> SVFitDelta:
        """The delta of one layer, at zero."""
        matrix = float_matrix(layer, name)
        shape = matrix_shape(layer)
        small, kept = min(shape), delta_dtype(layer)
        if isinstance(self.rank, int):
            check_rank("svfit", "rank", self.rank, shape, name)
        leading = (
            self.rank if isinstance(self.rank, int) and self.selection == "principal" else None
        )
        found = shared_cache().get(matrix, leading, name)
        if isinstance(self.rank, tuple):
            rank = energy_rank(found.s, self.rank[1], found.energy)
        else:
            rank = small if self.rank == "full" else self.rank
        seed = seed_for(context, "svfit", name)
        indices = choose(len(found.s) if leading is None else rank, rank, self.selection, seed)
        if self.basis == "random":
            u, vh = random_bases(shape, rank, seed, found.u)
            sigma = torch.einsum("or,oi,ri->r", u, matrix.to(u.dtype), vh)
            travels = self.embed_bases == "always"
        else:
            u, sigma, vh = found.u[:, indices], found.s[indices], found.vh[indices]
            travels = embeds(found, indices, self.embed_bases, name)
            self._check_zeros(sigma, found.s, name)
        # On the output side nothing runs back through W where the input needs no gradient; a
        # convolution's patches exist on the input side only inside the convolution.
        t = self._tail(sigma, found.s, name)
        one_sided = t < rank and is_linear(layer)
        side: Side = "right" if shape[1] < shape[0] and one_sided else "left"
        kind = basis_type(layer, self.basis_dtype)
        bases = {"u": u.to(kind), "vh": vh.to(kind)}
        if side == "left":
            bases["vh"] = bases["vh"][rank - t :]
        else:
            bases["u"] = bases["u"][:, rank - t :]
        bases = {key: value.clone() for key, value in bases.items() if value.numel()}
        return SVFitDelta(
            {**bases, "sigma": sigma.to(kept).clone()},
            side,
            self.parameterisation,
            layer,
            name=name,
            mark=found.fingerprint,
            embed=travels,
            allow_rebuild=self.allow_rebuild,
            quantized=is_quantized(layer),
        )

    def singular_values(self, model: nn.Module) -> dict[str, Float[Tensor, " r"]]:
        """The trained singular values by the original path of their layer."""
        return {n: d.singular_values().detach() for n, d in self.deltas(model).items()}

    def costs(self, model: nn.Module) -> dict[str, int]:
        """What the adapter holds: numbers that train, bytes it is saved in, bytes kept frozen."""
        deltas = list(self.deltas(model).values())
        return {
            "trainable_parameters": sum(d.delta.numel() for d in deltas),
            "adapter_bytes": sum(
                t.numel() * t.element_size() for d in deltas for t in d.state_dict().values()
            ),
            "resident_frozen_bytes": sum(d.frozen_bytes() for d in deltas),
        }

    def _check_zeros(self, sigma: Tensor, s: Tensor, name: str) -> None:
        if self.parameterisation != "softplus" or hollow(sigma):
            return
        zeros = int((sigma <= _SINGULAR * s[0]).sum())
        if zeros:
            raise ConfigError(
                f"svfit.parameterisation = 'softplus', but {zeros} of the {len(sigma)} chosen "
                f"singular values of {name!r} are zero, which no softplus reaches",
                f"give rank up to {int((s > _SINGULAR * s[0]).sum())} with selection='principal', "
                "or set parameterisation='additive'",
            )

    def _tail(self, sigma: Tensor, s: Tensor, name: str) -> int:
        """How many of the chosen values, the last ones, have both vectors held."""
        if self.hold == "both" or self.basis == "random":
            return len(sigma)
        if self.parameterisation == "relative" or hollow(sigma):
            return 0
        wide = sigma.dtype == torch.float64
        small = int((sigma <= (1e-9 if wide else _CARRIED) * s[0]).sum())
        if small and self.hold == "one":
            raise ConfigError(
                f"svfit.hold = 'one', but {small} chosen singular values of {name!r} are too small "
                "for the weight to stand in for their vectors",
                "set hold='auto', a smaller rank, or parameterisation='relative'",
            )
        return small
