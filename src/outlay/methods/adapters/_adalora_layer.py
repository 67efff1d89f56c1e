"""AdaLoRA's layer: singular values between two factors, and which of them are alive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...nn.adapter import Delta, plain_layer
from ...nn.lowrank import low_rank_output
from ...nn.targets import is_linear


class TripletDelta(Delta):
    r"""delta W = s B (E * A), s = alpha / (rho + 1e-5); without E the units are doublets.

    The 1e-5 is the authors' code's; rho is the initial rank and never changes: updating it with
    the live rank was tried by the author and hurt.

    Attributes:
        a: Right vectors as rows. Shape (r, in).
        e: Singular values, zeros at the start; None for doublets. Shape (r, 1).
        b: Left vectors as columns. Shape (out, r).
        keep: Units that the latest allocation left alive, of the initial ones. Shape (rho,).
    """

    keep: Tensor

    def __init__(
        self, a: Tensor, b: Tensor, triplets: bool, alpha: float, dropout: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        rho = len(a)
        self.a = nn.Parameter(a.to(dtype))
        self.e = nn.Parameter(torch.zeros(rho, 1, dtype=dtype)) if triplets else None
        self.b = nn.Parameter((b if triplets else torch.zeros_like(b)).to(dtype))
        self.scaling = (alpha if alpha > 0 else rho) / (rho + 1e-5)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.register_buffer("keep", torch.ones(rho, dtype=torch.bool))

    def scaled(self) -> Float[Tensor, "r in"]:
        """S (E * A)."""
        return self.a * (self.scaling if self.e is None else self.e * self.scaling)

    def forward(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """The product; dropout acts on x before A."""
        dropped = self.dropout(x)
        if not is_linear(plain_layer(base)):
            return super().forward(dropped, base)
        return (dropped.to(self.a.dtype) @ self.scaled().T) @ self.b.T

    def output(self, x: Float[Tensor, "*inputs"], base: nn.Module) -> Float[Tensor, "*outputs"]:
        """Base and product in one function."""
        return low_rank_output(self, x, base, self.a, self.b, self.dropout, self.e, self.scaling)

    def weight(self, base: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """S B (E * A)."""
        return self.b.to(base.dtype) @ self.scaled().to(base.dtype)

    def alive(self) -> Tensor:
        """Which of the present rows are alive: all of them once compacted."""
        held = len(self.a) == len(self.keep)
        return self.keep if held else torch.ones(len(self.a), dtype=torch.bool)

    @torch.no_grad()
    def compact(self) -> None:
        """Drop dead rows; the scaling stays."""
        alive = self.alive()
        self.a = nn.Parameter(self.a[alive].clone())
        self.b = nn.Parameter(self.b[:, alive].clone())
        if self.e is not None:
            self.e = nn.Parameter(self.e[alive].clone())

    def to_lora(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """A' = s (E * A) and B' = B over the live units: exact, scaling 1."""
        alive = self.alive()
        return self.scaled().detach()[alive], self.b.detach()[:, alive]

    def peft_tensors(self) -> dict[str, Tensor]:
        """The live units, as PEFT stores them beside a `rank_pattern`."""
        assert self.e is not None, "doublets are written as LoRA"
        alive = self.alive()
        return {"lora_A": self.a[alive], "lora_E": self.e[alive], "lora_B": self.b[:, alive]}

    @torch.no_grad()
    def load_peft_tensors(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
    ) -> None:
        """Put the live units at their places among the initial ones; dead ones are zero."""
        assert self.e is not None
        pattern = (config.get("rank_pattern") or {}).get(f"{name}.lora_E")
        if pattern is not None:
            self.keep.copy_(torch.tensor(pattern, dtype=torch.bool))
        for mine, other in ((self.a, "lora_A"), (self.e, "lora_E"), (self.b.T, "lora_B")):
            mine.zero_()
            mine[self.keep] = (tensors[other].T if other == "lora_B" else tensors[other]).to(mine)
