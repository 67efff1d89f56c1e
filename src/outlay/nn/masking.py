"""One controller of weight masks, for methods inside runs and for loops of one's own.

The weight stays a plain parameter under its own name: nothing is computed from a mask in the
forward pass, so graphs compile, state dicts keep their names, and densifying is forgetting the
mask. A mask holds the gradient before an update and the value and moments after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..core.context import generator_of
from ..core.errors import CheckpointError, ConfigError, Conflict, NonFinite
from ..core.live import Mask
from .masks import (
    Distribution,
    densities,
    keep_largest,
    packed,
    random_mask,
    regrown,
    two_of_four,
    unpacked,
)
from .prunable import prunable_weights

Start = Literal["random", "magnitude"]
Scope = Literal["global", "layer"]
Score = Literal["magnitude", "random"]
Rule = Literal["set", "rigl"]

_SPARSE_ALREADY = 0.01  # share of exact zeros that no dense training leaves


@runtime_checkable
class MaskHost(Protocol):
    """Who enforces masks: a run's `Live`, or `HookedModel` outside of one."""

    masks: dict[str, Mask]

    def resolve(self, name: str) -> str:
        """The current name of a parameter."""
        ...

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of a name."""
        ...

    def mask(self, name: str, keep: Tensor | None, kind: str = "hard") -> None:
        """Hold entries of a parameter at zero; None lifts the mask."""
        ...

    def after_update(self, name: str, parameter: nn.Parameter) -> None:
        """Enforce the mask of one parameter on its value and its optimizer state."""
        ...


class HookedModel:
    """Masks on a bare model: hooks mask gradients as they come, and values after each update.

    A masked entry gets no gradient, so it and its moments stay at zero under any of torch's
    optimizers. What an optimizer already holds when a mask comes is cleared where it was told of
    (`attach`).

    Args:
        model: Any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.masks: dict[str, Mask] = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.dense_gradients = False
        self._hooks: dict[str, Any] = {}

    def resolve(self, name: str) -> str:
        """Names do not change here."""
        return name

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of a name."""
        return self.model.get_parameter(name)

    def mask(self, name: str, keep: Tensor | None, kind: str = "hard") -> None:
        """See `MaskHost`."""
        hook = self._hooks.pop(name, None)
        if hook is not None:
            hook.remove()
        if keep is None:
            self.masks.pop(name, None)
            return
        parameter = self.parameter(name)
        self.masks[name] = Mask(keep.to(parameter.device, torch.bool), kind)
        if parameter.requires_grad:
            self._hooks[name] = parameter.register_post_accumulate_grad_hook(self._hook(name))
        self.after_update(name, parameter)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def hold(parameter: Tensor) -> None:
            if parameter.grad is not None and not self.dense_gradients:
                parameter.grad.mul_(self.masks[name].keep)

        return hold

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Enforce the masks after each of this optimizer's steps."""
        self.optimizers.append(optimizer)
        optimizer.register_step_post_hook(self._enforce)

    def _enforce(self, *_: Any) -> None:
        for name in self.masks:
            self.after_update(name, self.parameter(name))

    @torch.no_grad()
    def after_update(self, name: str, parameter: nn.Parameter) -> None:
        """Zero value, gradient and moments where the mask says so."""
        keep = self.masks[name].keep
        parameter.mul_(keep)
        if parameter.grad is not None:
            parameter.grad.mul_(keep)
        for optimizer in self.optimizers:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.mul_(keep)


class MaskController:
    """Draws, tightens, regrows and lifts the masks of some weights of one model.

    Args:
        host: Who enforces them.
        axes: Weights by name, each with the axis of its inputs (`prunable_weights`).
        seed: Of everything that is drawn; each weight has a stream of its own.

    Attributes:
        alive: Entries that live, over all weights.
        total: Entries of all weights.
    """

    def __init__(self, host: MaskHost, axes: Mapping[str, int], seed: int = 0) -> None:
        self.host, self.axes, self.seed = host, dict(axes), seed
        self.total = sum(host.parameter(name).numel() for name in axes)
        self.alive = self.total

    # ---- what there is -----------------------------------------------------------------------

    def keep(self, name: str) -> Tensor:
        """The mask of a weight; all True where it has none."""
        mask = self.host.masks.get(self.host.resolve(name))
        if mask is None:
            return torch.ones_like(self.host.parameter(name), dtype=torch.bool)
        return mask.keep

    def density(self) -> float:
        """Share of all entries that live."""
        return self.alive / self.total

    def per_layer(self) -> dict[str, float]:
        """Share of each weight's entries that live."""
        return {name: float(self.keep(name).double().mean()) for name in self.axes}

    def recount(self) -> None:
        """Count again, after masks came back from a checkpoint."""
        self.alive = sum(int(self.keep(name).sum()) for name in self.axes)

    def _set(self, keeps: Mapping[str, Tensor]) -> None:
        for name, keep in keeps.items():
            if bool(keep.all()):
                self.host.mask(name, None)
            else:
                self._hold(name, keep)
        self.recount()

    def _hold(self, name: str, keep: Tensor) -> None:
        """Mask a weight, and its moments now rather than after the next update."""
        self.host.mask(name, keep)
        self.host.after_update(self.host.resolve(name), self.host.parameter(name))

    # ---- changes -----------------------------------------------------------------------------

    def draw(
        self, sparsity: float, distribution: Distribution = "uniform", start: Start = "random"
    ) -> None:
        """Start with masks of an exact count, round((1 - sparsity) * entries) a weight.

        Args:
            sparsity: Share of all entries that is held at zero, in [0, 1).
            distribution: How it is spread over weights, see `densities`.
            start: Which entries live: "random" ones, or those of largest "magnitude". The latter
                finds the masks of weights again that come from sparse training.

        Raises:
            Conflict: If random masks would be drawn over weights that are sparse already.
            ConfigError: If a weight would be left without a live entry.
        """
        shapes = {name: self.host.parameter(name).shape for name in self.axes}
        wanted = densities(shapes, sparsity, distribution)
        if sparsity == 0:
            return
        if start == "random":
            self._refuse_sparse()
            drawn = {
                name: random_mask(shape, wanted[name], generator_of(self.seed, "mask", name))
                for name, shape in shapes.items()
            }
        else:
            magnitudes = {name: self._magnitudes(name) for name in shapes}
            drawn = {
                name: keep_largest([size], round(wanted[name] * size.numel()))[0]
                for name, size in magnitudes.items()
            }
        self._set(drawn)

    def _refuse_sparse(self) -> None:
        zeros = sum(int((self.host.parameter(name) == 0).sum()) for name in self.axes)
        if zeros > _SPARSE_ALREADY * self.total:
            raise Conflict(
                f"{zeros:,} of {self.total:,} weights are exactly 0, as sparse training leaves "
                "them, and their masks are not here: random ones would hold others",
                'continue sparsely with init="magnitude" at the same sparsity and distribution '
                "(or load_state_dict), or train densely without masks",
            )

    def prune(
        self,
        density: float,
        *,
        scope: Scope = "global",
        score: Score = "magnitude",
        structure: Literal["2:4"] | None = None,
        draw: str = "",
    ) -> None:
        """Tighten the masks so that round(density * entries) live; what was dead stays dead.

        Args:
            density: Of all prunable entries, not of those that still live.
            scope: One threshold over all weights ("global") or one a weight ("layer").
            score: "magnitude", or "random" numbers, independent for each weight and `draw`.
            structure: "2:4" never takes the two largest of four consecutive inputs.
            draw: Names the random numbers.

        Raises:
            Conflict: If a weight would be left without a live entry.
            ConfigError: If "2:4" does not fit a weight's inputs, or the density is below a half.
        """
        names = list(self.axes)
        keeps = {name: self.keep(name) for name in names}
        scores = {name: self._scores(name, keeps[name], score, draw) for name in names}
        if structure == "2:4":
            for name in names:
                saved = two_of_four(scores[name], self._two_of_four_axis(name))
                scores[name] = scores[name].masked_fill(saved & keeps[name], torch.inf)
        groups = [names] if scope == "global" else [[name] for name in names]
        found: dict[str, Tensor] = {}
        for group in groups:
            live = [scores[name][keeps[name]] for name in group]
            entries = sum(scores[name].numel() for name in group)
            alive = sum(len(values) for values in live)
            count = min(alive, round(density * entries))
            if structure == "2:4" and count < min(alive, entries // 2):
                raise ConfigError(
                    f"density {density} is below the half that 2:4 keeps", "give 0.5 or more"
                )
            for name, kept in zip(group, keep_largest(live, count)):
                found[name] = torch.zeros_like(keeps[name])
                found[name][keeps[name]] = kept
        for name, keep in found.items():
            if not bool(keep.any()):
                raise Conflict(
                    f"at density {density:.3g} no entry of {name!r} is left: nothing would pass it",
                    'use scope="layer", exclude it, or prune less',
                )
        self._set(found)

    def _magnitudes(self, name: str) -> Tensor:
        return self.host.parameter(name).detach().abs()

    def _scores(self, name: str, keep: Tensor, score: Score, draw: str) -> Tensor:
        """Scores of a weight, -1 where it is dead."""
        sizes = self._magnitudes(name)
        if score == "random":
            generator = generator_of(self.seed, "prune", name, draw)
            sizes = torch.rand(sizes.shape, generator=generator).to(sizes.device)
        elif not bool(sizes.isfinite().all()):
            raise NonFinite(f"{name!r} is not finite", "lower the learning rate")
        return torch.where(keep, sizes, -1.0)

    def _two_of_four_axis(self, name: str) -> int:
        axis, shape = self.axes[name], self.host.parameter(name).shape
        if shape[axis] % 4:
            raise ConfigError(
                f'structure "2:4" does not fit {name!r}: its {shape[axis]} inputs are not a '
                "multiple of 4",
                "exclude it",
            )
        return axis

    def regrow(self, fraction: float, rule: Rule = "rigl", draw: str = "") -> None:
        """Drop the smallest live entries of each weight and let as many others live, from zero.

        Weights that are dense or do not train are left as they are.

        Args:
            fraction: Share of the live entries of each weight.
            rule: "set" grows at random, "rigl" where the dense gradient is largest.
            draw: Names the random numbers.

        Raises:
            Conflict: If "rigl" finds no gradient on a weight that trains.
        """
        for name in self.axes:
            parameter = self.host.parameter(name)
            if not parameter.requires_grad or self.host.resolve(name) not in self.host.masks:
                continue
            if rule == "set":
                generator = generator_of(self.seed, "grow", name, draw)
                growth = torch.rand(parameter.shape, generator=generator).to(parameter.device)
            elif parameter.grad is None:
                raise Conflict(
                    f"{name!r} has no gradient, by which RigL chooses what grows",
                    "regrow after backward and before gradients are cleared",
                )
            else:
                growth = parameter.grad.detach().abs()
            keep = self.keep(name)
            stays, fresh = regrown(keep, self._magnitudes(name), growth, fraction)
            # First without what is dropped, so that what returns starts from zero with no moments.
            self._hold(name, stays)
            self._hold(name, fresh)
        self.recount()

    def densify(self) -> None:
        """Lift all masks; every value stays, so no output changes."""
        for name in self.axes:
            self.host.mask(name, None)
        self.alive = self.total

    # ---- in a loop of one's own ----------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> MaskController:
        """Keep an optimizer's moments clean when masks change while it runs. Returns itself."""
        self._hooked().attach(optimizer)
        return self

    @contextlib.contextmanager
    def dense_gradients(self) -> Iterator[None]:
        """Inside, backward leaves the gradients of masked entries too; for `regrow`."""
        host = self._hooked()
        host.dense_gradients = True
        try:
            yield
        finally:
            host.dense_gradients = False

    def _hooked(self) -> HookedModel:
        if not isinstance(self.host, HookedModel):
            raise Conflict("a run enforces these masks itself", "leave this call out")
        return self.host

    def state_dict(self) -> dict[str, Any]:
        """Masks as packed bits, and the shapes that they have."""
        keeps = {name: self.keep(name) for name in self.axes}
        return {
            "masks": {name: packed(keep) for name, keep in keeps.items()},
            "shapes": {name: list(keep.shape) for name, keep in keeps.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put masks back on weights that were loaded before.

        Raises:
            CheckpointError: If masks are missing, have other shapes, or belong to other weights.
        """
        shapes = {name: list(self.host.parameter(name).shape) for name in self.axes}
        if state.get("shapes") != shapes or set(state["masks"]) != set(shapes):
            raise CheckpointError(
                "the state holds masks of other weights or shapes than the model's, or none",
                "give the state_dict() of the controller that these weights were trained under",
            )
        keeps = {name: unpacked(state["masks"][name], shape) for name, shape in shapes.items()}
        for name, keep in keeps.items():
            weight = self.host.parameter(name)
            lost = int((weight[~keep.to(weight.device)] != 0).sum())
            if lost:
                raise CheckpointError(
                    f"{name!r} has {lost} values where its mask says zero",
                    "load the weights that belong to these masks first",
                )
        self._set(keeps)


def sparsify(
    model: nn.Module,
    sparsity: float = 0.75,
    *,
    distribution: Distribution = "uniform",
    init: Start = "random",
    exclude: Sequence[str] = (),
    head: bool = False,
    seed: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> MaskController:
    """Hold a share of a model's weights at zero, in any training loop.

    Args:
        model: Changed in place; names and classes of its modules stay.
        sparsity: Share of the prunable weights that is held at zero, in [0, 1).
        distribution: See `densities`.
        init: Which entries live, see `MaskController.draw`.
        exclude: Layers that stay dense, see `prunable_weights`.
        head: The output layer too.
        seed: Of the draw; equal on every machine and device.
        optimizer: Told of the masks (`MaskController.attach`).

    Raises:
        ConfigError: If the sparsity is not allowed or would empty a weight.
        NoEffect: If no weight is left to prune.
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity = {sparsity} is not allowed", "give 0 <= sparsity < 1")
    axes = prunable_weights(model, exclude, head)
    controller = MaskController(HookedModel(model), axes, seed)
    if optimizer is not None:
        controller.attach(optimizer)
    controller.draw(sparsity, distribution, init)
    return controller
