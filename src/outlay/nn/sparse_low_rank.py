"""Linear layers that hold no weight: a low-rank product, alone or with a sparse matrix added.

W = (alpha / rank) * B A + S, S on a fixed random support (SLTrain, arXiv 2406.02214, section 3).
Shapes: m is `out_features`, n `in_features`, r the rank, k the number of entries of S, t the
tokens of a call. `sparse_products` holds the sparse kernels, `low_rank_functions` the gradients.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.context import generator_of
from ..core.errors import ConfigError
from .low_rank_functions import Factored, Materialized, cast
from .sparse_products import has_sparse_products

Init = Literal["both", "zero_b"]
Mode = Literal["materialize", "factored", "auto"]

# A multiply-add of the sparse kernels takes as long as this many of a dense product, on one core in
# float32 (`benchmarks/sparse_low_rank.py`).
_SPARSE_COST = 20


class LowRankLinear(nn.Module):
    """y = x W^T + bias with W = (alpha / rank) * B A. The backward pass keeps x and the parameters.

    Args:
        in_features: n.
        out_features: m.
        rank: r.
        alpha: Numerator of the product's factor; None takes the rank, so that W = B A.
        bias: Add a trainable bias.
        init: "both" draws A and B as Kaiming (a = sqrt 5) does; "zero_b" leaves B at zero.
        seed: Of everything drawn; None draws one from torch's default generator.
        device: Where the parameters lie; nothing is drawn on "meta".
        dtype: Type of the parameters.

    Attributes:
        a: Right factor A. Shape (r, n).
        b: Left factor B. Shape (m, r).
        bias: Shape (m,), or None.
        conv1d: True if the layer stands for transformers' `Conv1D`.

    Raises:
        ConfigError: If the rank is below 1.
    """

    # Drawn once and never trained: a checkpoint must hold them all the same.
    drawn: tuple[str, ...] = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float | None = None,
        bias: bool = True,
        *,
        init: Init = "both",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"rank = {rank} is not allowed", "give a rank of at least 1")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.alpha = float(rank if alpha is None else alpha)
        self.init: Init = init
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.conv1d = False
        self._placed = {
            "device": torch.get_default_device() if device is None else torch.device(device),
            "dtype": torch.get_default_dtype() if dtype is None else dtype,
        }
        self.a = self._uniform("a", (rank, in_features), 1 / math.sqrt(in_features))
        bound = 1 / math.sqrt(rank) if init == "both" else 0.0
        self.b = self._uniform("b", (out_features, rank), bound)
        width = 1 / math.sqrt(out_features)
        self.bias = self._uniform("bias", (out_features,), width) if bias else None

    def _uniform(self, stream: str, shape: tuple[int, ...], bound: float) -> nn.Parameter:
        """Uniform in [-bound, bound], the same numbers whatever the device and type."""
        if self._placed["device"].type == "meta" or not bound:
            return nn.Parameter(torch.zeros(shape, **self._placed))
        blank = torch.empty(shape, dtype=torch.float32, device="cpu")
        drawn = blank.uniform_(-bound, bound, generator=generator_of(self.seed, stream))
        return nn.Parameter(drawn.to(**self._placed))

    @property
    def scaling(self) -> float:
        """Alpha / rank: part of the trained function, it does not follow a rank changed later."""
        return self.alpha / self.rank

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight as a matrix, for code that reads it past `forward`."""
        return self.weight_dense()

    def weight_dense(self) -> Float[Tensor, "out in"]:
        """The weight that the parameters stand for, with gradient."""
        return self.b @ (self.a * self.scaling)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """X times the weight, transposed; x may be of any floating type."""
        return Factored.apply(cast(x), self.a, self.b, None, None, self.bias, self.scaling)  # type: ignore[return-value]

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain linear layer that answers as this one does; this one stays as it is."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight_dense())
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain.train(self.training)

    def settings(self) -> dict[str, Any]:
        """Keyword arguments that make the layer again."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "alpha": self.alpha,
            "bias": self.bias is not None,
            "init": self.init,
            "seed": self.seed,
        }

    def extra_repr(self) -> str:
        """Settings without the seed."""
        return ", ".join(f"{k}={v}" for k, v in self.settings().items() if k != "seed")


class SparseLowRankLinear(LowRankLinear):
    """y = x W^T + bias with W = (alpha / rank) * B A + S, S of `int(density * m * n)` entries.

    The support of S is drawn without replacement, sorted, and never changes. Both modes give one
    result up to rounding:

    - "materialize" forms W in the forward and again in the backward pass: dense products of
      constant shape, as published. 8 r m n FLOPs more than the dense layer's 6 t m n.
    - "factored" never forms W or its gradient. Its sparse products run in float32 where the input
      is narrower.
    - "auto" takes "factored" on a CPU with sparse kernels where its count, sparse work weighed by
      its measured cost, is the smaller; "materialize" elsewhere.

    Args:
        in_features: n.
        out_features: m.
        rank: r; 128 to 1024 in the paper, a quarter of the width.
        density: Share of the entries that S holds, in (0, 1]; 0.03 in the paper.
        alpha: Numerator of the product's factor; None takes the rank.
        bias: Add a trainable bias.
        init: "zero_b" as published, so that W = S at the start, or "both".
        seed: Of everything drawn, the support included; None draws one from torch's default
            generator.
        mode: "materialize", "factored" or "auto".
        device: Where the parameters lie; nothing is drawn on "meta".
        dtype: Type of the parameters.

    Attributes:
        values: Entries of S. Shape (k,).
        positions: Their places in the flattened weight, increasing; int32 where m n < 2^31.

    Raises:
        ConfigError: If the density is out of range or gives no entry.
    """

    drawn = ("positions",)
    positions: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        density: float = 0.03,
        alpha: float | None = None,
        bias: bool = True,
        *,
        init: Init = "zero_b",
        seed: int | None = None,
        mode: Mode = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, rank, alpha, bias,
            init=init, seed=seed, device=device, dtype=dtype,
        )  # fmt: skip
        size = in_features * out_features
        if not 0 < density <= 1:
            raise ConfigError(f"density = {density} is not allowed", "give a share in (0, 1]")
        if int(density * size) == 0:
            raise ConfigError(
                f"density = {density} leaves no entry of a {out_features} x {in_features} weight",
                f"give at least {1 / size:.2g}, or use LowRankLinear",
            )
        self.density, self.mode = density, mode
        count = int(density * size)
        self.values = self._uniform("values", (count,), 1 / math.sqrt(in_features))
        self.register_buffer("positions", self._support(count, size))

    def _support(self, count: int, size: int) -> Tensor:
        device = self._placed["device"]
        kind = torch.int32 if size < 2**31 else torch.int64
        if device.type == "meta":
            return torch.empty(count, dtype=kind, device=device)
        drawn = torch.randperm(size, generator=generator_of(self.seed, "support"), device="cpu")
        return drawn[:count].sort().values.to(device, kind)

    def weight_dense(self) -> Float[Tensor, "out in"]:
        """The weight that the parameters stand for, with gradient."""
        weight = super().weight_dense()
        return weight.flatten().index_add(0, self.positions, self.values).view_as(weight)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """X times the weight, transposed; x may be of any floating type."""
        x = cast(x)
        function = Factored if self._factored(x) else Materialized
        return function.apply(  # type: ignore[return-value]
            x, self.a, self.b, self.values, self.positions, self.bias, self.scaling
        )

    def _factored(self, x: Tensor) -> bool:
        if self.mode != "auto":
            return self.mode == "factored"
        if not has_sparse_products(x):
            return False
        m, n, r, tokens = self.out_features, self.in_features, self.rank, x.numel() // x.shape[-1]
        apart = tokens * (r * (m + n) + _SPARSE_COST * self.values.numel())
        # A third of what forming W and pulling its gradient back costs over the three products.
        return apart < m * n * (tokens + 4 / 3 * r)

    def settings(self) -> dict[str, Any]:
        """Keyword arguments that make the layer again; the support comes from the checkpoint."""
        return {**super().settings(), "density": self.density, "mode": self.mode}
