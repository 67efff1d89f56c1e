"""LaMDA: frozen singular vectors around a small trained square; ranks from spectra (LaMDA++)."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from ...core.card import Card
from ...core.errors import ConfigError, Conflict, NoEffect
from ...core.live import Live
from ...core.method import Context, OnModel, OnStep, Step, Watcher
from ...nn.adapter import AdapterMethod, adapted_layers, delta_dtype
from ...nn.freezing import ColumnFreezer, ColumnFreezeSchedule, Order
from ...nn.ranks import Policy, allocate_ranks, square_cost
from ...nn.spectral import (
    Embed,
    account,
    basis_type,
    check_rank,
    embeds,
    random_bases,
    seed_for,
)
from ...nn.svd import (
    fingerprint,
    float_matrix,
    hollow,
    is_quantized,
    matrix_shape,
    shared_cache,
)
from ...nn.targets import pattern_value
from ._lamda_layer import LaMDADelta, kaiming

Init = Literal["svd_residual", "svd_zero", "code"]


@dataclass(frozen=True, kw_only=True)
class LaMDA(AdapterMethod, OnModel, OnStep):
    r"""Spectrally decomposed low-dimensional adaptation. arXiv 2406.12832.

    $y = W x + s\,B S A x$ with s = alpha / r: A (r, in) is frozen, the square S (r, r) trains, B
    (out, r) trains at first and is frozen column by column over the first `freeze_fraction` of
    the budget. Then r^2 numbers a matrix train and the optimizer holds nothing for B.

    Starts (the paper's exact one is not established; its title and a digest say singular
    vectors):

    - "svd_residual": A = V_r^T, B = U_r, S = Sigma_r / s on the remaining weight
      W - U_r Sigma_r V_r^T. The weight itself is not touched: the part taken out stands in the
      delta, s B S - U_r Sigma_r in one factor, so disabling, switching, unmerging and other
      adapters beside it find the original W. The function is kept up to rounding.
    - "svd_zero": A = V_r^T, B = U_r, S = 0. Works on quantized weights. With
      `freeze_fraction=0` only S trains, as in LoRA-XS (arXiv 2405.17604), without its noise.
    - "code": A and S Kaiming-uniform, B = 0, what the released code does.

    Freezing: at the share t / T of the budget, k = min(r, floor(r t / (eta T))) columns of B keep
    their values against gradient, momentum and weight decay. The released code leaves out the
    factor r, counts micro-batches, and clears gradients alone. Which columns go first is not
    established; its order is "largest_first". In anyone's own loop, without a run, B trains
    throughout unless `freeze_fraction=0`.

    LaMDA++ gives matrices different ranks from their spectra before training (`allocate`); its
    exact rule is not established, see `allocate_ranks`.

    Counting: "parameter updates" are summed over steps (`parameter_updates`); the file holds B
    as well, unless it was frozen from the start.

    Attributes:
        r: Rank; the released scripts use 16, 32 and 64.
        alpha: Numerator of the scale. Each matrix's own rank divides it.
        dropout: On the input of A; the part that was taken out is not dropped.
        init: Start.
        freeze_fraction: Share eta of the budget after which B is frozen; 0 from the start, 1 at
            the end only, None never.
        freeze_order: Which columns of B are frozen first.
        rank_pattern: (expression or end of a path, rank) pairs; they win over `r` and `allocate`.
        allocate: How ranks are set: "uniform" (LaMDA), or from spectra (LaMDA++).
        rank_budget: Sum of r^2 that the ranks may cost; by default what `r` everywhere costs.
        r_min: Smallest allocated rank.
        r_max: Largest allocated rank; the layer's own bound by default.
        multiple_of: Allocated ranks are multiples of this.
        basis: Singular vectors, or with "svd_zero" random orthonormal ones as a control.
        basis_dtype: "float32" (float64 on a float64 base), or "base" for the weight's own type.
        embed_bases: Keep A in the state: where singular values repeat ("auto"), or always;
            "never" refuses such weights.
        allow_rebuild: Load a state that was trained on another base weight.
    """

    card: ClassVar[Card] = Card(
        name="lamda",
        title="LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation",
        paper=3,
        arxiv="2406.12832",
        group="adapters",
        summary="A small trained square between singular vectors; one side freezes on the way.",
        authors="Seyedarmin Azizi, Souvik Kundu and Massoud Pedram",
        year=2024,
        claims=("delta.additive",),
        saves=("trainable parameters", "optimizer memory", "activation memory"),
        freezes_base=True,
    )

    r: Annotated[int, Ge(1)] = 64
    alpha: Annotated[float, Gt(0.0)] = 16.0
    dropout: Annotated[float, Ge(0.0), Lt(1.0)] = 0.1
    init: Init = "svd_residual"
    freeze_fraction: Annotated[float, Ge(0.0), Le(1.0)] | None = 0.3
    freeze_order: Order = "largest_first"
    rank_pattern: (
        tuple[tuple[str, Annotated[int, Ge(1)]], ...] | dict[str, Annotated[int, Ge(1)]]
    ) = ()
    allocate: Policy = "uniform"
    rank_budget: Annotated[float, Gt(0.0)] | None = None
    r_min: Annotated[int, Ge(1)] = 1
    r_max: Annotated[int, Ge(1)] | None = None
    multiple_of: Annotated[int, Ge(1)] = 1
    basis: Literal["singular", "random"] = "singular"
    basis_dtype: Literal["float32", "base"] = "float32"
    embed_bases: Embed = "auto"
    allow_rebuild: bool = False

    def validate(self) -> None:
        """Refuse what could never train, and settings that contradict each other."""
        if self.init == "code" and self.freeze_fraction == 0:
            raise ConfigError(
                "lamda.freeze_fraction = 0.0 with init 'code', whose B is 0: nothing would train",
                "give freeze_fraction above 0, or init='svd_zero'",
            )
        if self.basis == "random" and self.init != "svd_zero":
            raise ConfigError(
                f"lamda.basis = 'random' with init {self.init!r}",
                "set init='svd_zero', the start whose bases may be any",
            )
        if self.r_min % self.multiple_of:
            raise ConfigError(
                f"lamda.r_min = {self.r_min} is no multiple of multiple_of = {self.multiple_of}",
                "give r_min as a multiple of multiple_of",
            )
        if self.r_max is not None and self.r_max < self.r_min:
            raise ConfigError(
                f"lamda.r_max = {self.r_max} is below r_min = {self.r_min}", "give r_max >= r_min"
            )

    @property
    def schedule(self) -> ColumnFreezeSchedule:
        """How many columns of B are frozen when."""
        return ColumnFreezeSchedule(self.freeze_fraction)

    def kinds(self) -> tuple[type[nn.Module], ...]:
        """Convolutions too, as the matrix (out, in * kernel)."""
        return (nn.Conv2d,)

    def adapt(self, model: nn.Module, context: Context | None = None) -> nn.Module:
        """Set the ranks, wrap the matched layers in place and account for the bases.

        Raises:
            NoEffect: If no module matches, or an entry of rank_pattern matches none.
            ConfigError: If a rank is above a layer's directions or the budget pays for none.
            Conflict: If init is "svd_residual" and a weight is quantized.
            NonFinite: If a weight holds NaN or infinity.
        """
        targets = self.targets(model)
        for key, _ in self.rank_pattern:
            if not any(pattern_value([(key, 1)], name, 0) for name in targets):
                raise NoEffect(
                    f"lamda.rank_pattern has {key!r}, which matches no adapted layer",
                    f"adapted are {', '.join(list(targets)[:6])} ...",
                )
        if self.allocate != "uniform" or self.rank_budget is not None:
            return self.with_ranks(model, context).adapt(model, context)
        shapes = [matrix_shape(layer) for layer in targets.values()]
        model = super().adapt(model, context)
        spectral = self.init != "code" and self.basis == "singular"
        account(model, shapes if spectral else (), context)
        return model

    def with_ranks(self, model: nn.Module, context: Context | None = None) -> LaMDA:
        """The same settings with every layer's rank written out: LaMDA++'s allocation.

        Args:
            model: The model as it will be adapted.
            context: Keeps the ranks in the run's checkpoint.
        """
        free = {
            name: float_matrix(layer, name)
            for name, layer in self.targets(model).items()
            if not pattern_value(self.rank_pattern, name, 0)
        }
        if context is None or any(hollow(weight) for weight in free.values()):
            ranks = self._allocated(free)
        else:
            kept = context.once(
                f"lamda.{self.adapter_name}.ranks",
                lambda: {"ranks": torch.tensor(list(self._allocated(free).values()))},
            )
            ranks = dict(zip(free, kept["ranks"].tolist()))
        # Longer paths first: a pattern also fits paths that end in it.
        pairs = sorted(ranks.items(), key=lambda item: -len(item[0]))
        pattern = (*self.rank_pattern, *((re.escape(name), rank) for name, rank in pairs))
        return dataclasses.replace(self, rank_pattern=pattern, allocate="uniform", rank_budget=None)

    def _allocated(self, weights: dict[str, Tensor]) -> dict[str, int]:
        budget = len(weights) * self.r**2 if self.rank_budget is None else self.rank_budget
        spectra = {name: shared_cache().get(w, None, name).s for name, w in weights.items()}
        return allocate_ranks(
            spectra, budget, self.r_min, self.r_max, self.multiple_of, self.allocate, square_cost
        )

    def make(self, name: str, layer: nn.Module, context: Context | None = None) -> LaMDADelta:
        """The delta of one layer at its start."""
        shape = matrix_shape(layer)
        rank = pattern_value(self.rank_pattern, name, self.r)
        check_rank("lamda", "r", rank, shape, name)
        quantized = is_quantized(layer)
        if quantized and self.init == "svd_residual":
            raise Conflict(
                f"lamda.init = 'svd_residual', but the weight of {name!r} is quantized: what "
                "remains of it would carry the rounding errors of the whole",
                "set init='svd_zero'",
            )
        matrix, scale = float_matrix(layer, name), self.alpha / rank
        kept, kind = delta_dtype(layer), basis_type(layer, self.basis_dtype)
        like = matrix.new_empty(0, dtype=kept)
        taken, travels, mark = None, self.embed_bases == "always", ""
        if self.init == "code":
            seeds = (0 if context is None else context.seed, "lamda", name)
            down, up = (
                kaiming((rank, shape[1]), (*seeds, "A"), like),
                like.new_zeros(shape[0], rank),
            )
            core, travels = kaiming((rank, rank), (*seeds, "S"), like), True
        elif self.basis == "random":
            up, down = random_bases(shape, rank, seed_for(context, "lamda", name), like)
            core = like.new_zeros(rank, rank)
        else:
            found = shared_cache().get(matrix, rank, name)
            travels, mark = embeds(found, range(rank), self.embed_bases, name), found.fingerprint
            up, s, down = found.u[:, :rank], found.s[:rank], found.vh[:rank]
            core = torch.zeros_like(s.diag())
            if self.init == "svd_residual":
                core, taken = s.diag() / scale, (up * s).contiguous()
        trains_up = self.freeze_fraction != 0
        return LaMDADelta(
            down.to(kind).clone(),
            core.to(kept),
            up.to(kept if trains_up else kind, copy=True).contiguous(),
            taken,
            scale,
            self.dropout,
            trains_up,
            name=name,
            mark=mark or fingerprint(matrix),
            embed=travels,
            allow_rebuild=self.allow_rebuild,
            quantized=quantized,
        )

    def watch(self, live: Live) -> Watcher:
        """Freezes B column by column.

        Raises:
            NoEffect: If the model has no layer of this method.
            ConfigError: If it is not known how long the run is.
        """
        if not self.deltas(live.model):
            raise NoEffect(
                f"lamda has no adapter {self.adapter_name!r} in the model to freeze",
                "adapt the model with the same settings first",
            )
        if self.freeze_fraction in (None, 0):
            return Watcher()
        if live.context.total_steps is None and self.freeze_fraction != 1:
            raise ConfigError(
                f"lamda.freeze_fraction = {self.freeze_fraction}, but how many steps the run has "
                "is not known",
                "give a budget in steps, tokens or examples, or set freeze_fraction to 0 or 1",
            )
        names = tuple(
            f"{path}.deltas.{self.adapter_name}.up".removeprefix(".")
            for path, layer in adapted_layers(live.model).items()
            if self.adapter_name in layer.deltas
        )
        return ColumnFreezer(live, names, self.schedule, self.freeze_order, "lamda")

    def trainable_parameters(self, model: nn.Module, step: Step | float) -> int:
        """Numbers that train during a step: r^2 + out (r - k) over all layers, head left out.

        Args:
            model: The adapted model.
            step: The step, or the share of the budget spent before it.
        """
        share = step.share if isinstance(step, Step) else step
        return sum(
            len(d.core) ** 2 + len(d.up) * (len(d.core) - self._frozen(d, share))
            for d in self.deltas(model).values()
        )

    def parameter_updates(self, model: nn.Module, steps: int) -> int:
        """Trained numbers summed over a run's steps, which the paper's claim is about."""
        return sum(self.trainable_parameters(model, t / steps) for t in range(steps))

    def costs(self, model: nn.Module) -> dict[str, int]:
        """What the adapter holds at its start, in numbers and bytes."""
        deltas = list(self.deltas(model).values())
        return {
            "trainable_parameters": self.trainable_parameters(model, 0.0),
            "adapter_bytes": sum(
                t.numel() * t.element_size() for d in deltas for t in d.state_dict().values()
            ),
            "resident_frozen_bytes": sum(d.frozen_bytes() for d in deltas),
        }

    def _frozen(self, delta: Any, share: float) -> int:
        return self.schedule.frozen(len(delta.core), share)
