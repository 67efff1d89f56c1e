"""CLASSP as a torch optimizer: small gradients are skipped, much moved weights slow down."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from ...core.errors import ConfigError, NonFinite

_QUANTILE = "quantile:"


def quantile_of(threshold: float | str) -> float | None:
    """The level of a threshold `"quantile:LEVEL"`; None if the threshold is a number.

    Raises:
        ConfigError: If it is neither, or out of range.
    """
    if not isinstance(threshold, str):
        if not threshold >= 0:
            raise ConfigError(f"threshold = {threshold} is not allowed", "give a number >= 0")
        return None
    try:
        level = float(threshold.removeprefix(_QUANTILE))
    except ValueError:
        level = -1.0
    if not threshold.startswith(_QUANTILE) or not 0 < level < 1:
        raise ConfigError(
            f"threshold = {threshold!r} is not allowed",
            "give a number >= 0, or 'quantile:LEVEL' with 0 < LEVEL < 1",
        )
    return level


class CLASSPOptimizer(torch.optim.Optimizer):
    """Adjustment suppression and sparsity promotion. arXiv 2405.09637, its algorithm and equation.

    For each element w with gradient g and accumulator A, which starts at eps: if g^2 > threshold,

        A <- A + |g|^p
        w <- w - lr * g / A^(1/p)     (w - lr * g without `apply_decay`)

    and otherwise neither w nor A changes. A is added to before the division, as in the paper's
    pseudo-code; its equation sums up to the step before, which would make the first step
    lr * g / eps^(1/p). With p = 2 and no threshold this is AdaGrad with eps inside the root.

    Keep the optimizer when the task changes: its accumulators are what protects earlier tasks.
    With scaled losses, unscale the gradients before `step`, as for clipping.

    Args:
        params: Parameters, or groups of them; a group may have any setting but `mode`, `foreach`
            and `nonfinite` of its own.
        lr: Learning rate. The published class has 0.2, for p = 1.
        threshold: Least squared gradient, exclusive, of an element that moves; or
            `"quantile:LEVEL"`, the LEVEL quantile of g^2 within each tensor (ours: it does not
            depend on batch size or loss reduction).
        p: Power of the accumulator.
        eps: What the accumulators start from; it keeps the division finite.
        apply_decay: Divide by the accumulator; it grows in either case.
        weight_decay: Decoupled, applied to every element whatever the threshold says; 0 in the
            paper.
        maximize: Ascend instead.
        mode: "elementwise", or "tensor_any": what the published class computes. There the test is
            made once a tensor (any g^2 != 0 passes below a threshold of 1, nothing passes from 1
            on), |g| is accumulated whatever `p` is, and all groups follow the first one's settings.
        foreach: False takes tensors one by one, with less memory for intermediate values.
        nonfinite: "skip" leaves out a step with an infinite or NaN gradient and counts it in
            `skipped_steps`, "raise" refuses it, "unchecked" saves the check.

    Attributes:
        moments: Tensors of state a weight.
        skipped_steps: Steps left out because a gradient was not finite.

    Raises:
        ConfigError: A setting out of range, complex parameters, or sparse gradients.
        NonFinite: A gradient is not finite and `nonfinite` is "raise".
    """

    moments = 1

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        *,
        threshold: float | str = 0.0,
        p: float = 1.0,
        eps: float = 1e-5,
        apply_decay: bool = True,
        weight_decay: float = 0.0,
        maximize: bool = False,
        mode: str = "elementwise",
        foreach: bool = True,
        nonfinite: str = "skip",
    ) -> None:
        if mode not in ("elementwise", "tensor_any"):
            raise ConfigError(f"mode = {mode!r} is not allowed", "use elementwise or tensor_any")
        if nonfinite not in ("skip", "raise", "unchecked"):
            raise ConfigError(
                f"nonfinite = {nonfinite!r} is not allowed", "use skip, raise or unchecked"
            )
        self.mode, self.foreach, self.nonfinite = mode, foreach, nonfinite
        self.skipped_steps = 0
        settings = {
            "lr": lr, "threshold": threshold, "p": p, "eps": eps, "apply_decay": apply_decay,
            "weight_decay": weight_decay, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own."""
        settings = {**self.defaults, **param_group}
        for name, allowed, rule in (
            ("lr", settings["lr"] >= 0, "a number >= 0"),
            ("p", 0 < settings["p"] < math.inf, "a finite number > 0"),
            ("eps", settings["eps"] > 0, "a number > 0"),
            ("weight_decay", settings["weight_decay"] >= 0, "a number >= 0"),
        ):
            if not allowed:
                raise ConfigError(f"{name} = {settings[name]} is not allowed", f"give {rule}")
        level = quantile_of(settings["threshold"])
        if level is not None and self.mode == "tensor_any":
            raise ConfigError(
                f"threshold = {settings['threshold']!r} needs single elements",
                "use mode elementwise, or give a number",
            )
        super().add_param_group(param_group)
        if any(parameter.is_complex() for parameter in self.param_groups[-1]["params"]):
            raise ConfigError("CLASSP has no rule for complex parameters", "give real ones")

    # ---- update ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what `closure` gave."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [
            [parameter for parameter in group["params"] if parameter.grad is not None]
            for group in self.param_groups
        ]
        if self._usable([p.grad for some in members for p in some if p.grad is not None]):
            for group, some in zip(self.param_groups, members, strict=True):
                self._update(some, self._settings_of(group))
        return loss

    def _settings_of(self, group: dict[str, Any]) -> dict[str, Any]:
        return self.param_groups[0] if self.mode == "tensor_any" else group

    def _usable(self, gradients: list[Tensor]) -> bool:
        if any(gradient.is_sparse for gradient in gradients):
            raise ConfigError("CLASSP has no rule for sparse gradients", "use dense embeddings")
        if self.nonfinite == "unchecked" or not gradients:
            return True
        # A norm that overflows is no proof; every element is looked at then.
        norms = torch._foreach_norm(gradients)
        if bool(torch.isfinite(torch.stack([n.float().to(norms[0].device) for n in norms])).all()):
            return True
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            return True
        if self.nonfinite == "raise":
            raise NonFinite("a gradient is not finite", "lower lr, or clip the gradients")
        self.skipped_steps += 1
        return False

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Move parameters by one group's settings."""
        for weights in self._parted(parameters):
            gradients = self._gated(weights, group["threshold"])
            sums = [self._accumulator(weight, group["eps"]) for weight in weights]
            _accumulate(sums, gradients, 1.0 if self.mode == "tensor_any" else group["p"])
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            rate = group["lr"] if group["maximize"] else -group["lr"]
            if group["apply_decay"]:
                torch._foreach_addcdiv_(weights, gradients, _roots(sums, group["p"]), value=rate)
            else:
                torch._foreach_add_(weights, gradients, alpha=rate)

    def _parted(self, parameters: list[Tensor]) -> list[list[Tensor]]:
        """What is updated together: all of one device and type, or each alone."""
        if not self.foreach:
            return [[parameter] for parameter in parameters]
        parts: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            assert parameter.grad is not None
            key = (parameter.device, parameter.dtype, parameter.grad.dtype)
            parts.setdefault(key, []).append(parameter)
        return list(parts.values())

    def _accumulator(self, parameter: Tensor, eps: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["accumulator"] = torch.full_like(
                parameter, eps, memory_format=torch.preserve_format
            )
        return state["accumulator"]

    def resting(self, group: dict[str, Any]) -> dict[str, float]:
        """What state of entries that a mask holds goes to: an accumulator is divided by."""
        return {"accumulator": group["eps"]}

    def _gated(self, parameters: list[Tensor], threshold: float | str) -> list[Tensor]:
        """Gradients with 0 where an element may not move, which then changes nothing."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        level = quantile_of(threshold)
        if level is not None:
            return [_above_quantile(gradient, level) for gradient in gradients]
        limit = float(threshold)
        if self.mode == "tensor_any":
            return [gradient * ((gradient**2).any() > limit) for gradient in gradients]
        if limit == 0:
            return gradients
        # One pass a tensor: new memory and passes over it are what a step costs.
        return [hardshrink(gradient, math.sqrt(limit)) for gradient in gradients]

    # ---- looking at it -------------------------------------------------------------------------

    @torch.no_grad()
    def update_density(self, group: int | None = None) -> float:
        """Share of elements that the gradients which are there let move.

        Ask after `step` and before `zero_grad`. Nothing is counted in a step itself.

        Args:
            group: Index of one parameter group; all of them by default.

        Returns:
            A share of the elements that have a gradient; NaN if none has.
        """
        groups = self.param_groups if group is None else [self.param_groups[group]]
        moved = total = 0
        for each in groups:
            threshold = self._settings_of(each)["threshold"]
            for parameter in each["params"]:
                if parameter.grad is not None:
                    moved += int(self._gated([parameter], threshold)[0].count_nonzero())
                    total += parameter.numel()
        return moved / total if total else math.nan

    def saturation(self, levels: Iterable[float] = (0.05, 0.5, 0.95)) -> dict[float, float]:
        """Quantiles, over all elements, of what gradients are divided by: A^(1/p).

        Args:
            levels: In [0, 1].

        Returns:
            By level; empty before the first step.
        """
        roots = [
            _roots([state["accumulator"]], group["p"])[0].flatten().float().cpu()
            for group in self.param_groups
            for parameter in group["params"]
            if (state := self.state.get(parameter))
        ]
        if not roots:
            return {}
        ordered = torch.cat(roots).sort().values
        return {level: float(ordered[round(level * (len(ordered) - 1))]) for level in levels}

    @torch.no_grad()
    def consolidate(self, decay: float) -> None:
        """Give plasticity back: A <- eps + decay * (A - eps). Ours; the paper's A only grows.

        Args:
            decay: In [0, 1]; 1 changes nothing, 0 forgets every earlier update.
        """
        if not 0 <= decay <= 1:
            raise ConfigError(f"decay = {decay} is not allowed", "give a number from 0 to 1")
        for group in self.param_groups:
            for parameter in group["params"]:
                if state := self.state.get(parameter):
                    state["accumulator"].mul_(decay).add_((1 - decay) * group["eps"])


def _accumulate(sums: list[Tensor], gradients: list[Tensor], power: float) -> None:
    if power == 2:
        torch._foreach_addcmul_(sums, gradients, gradients)
        return
    sizes = torch._foreach_abs(gradients)
    if power != 1:
        torch._foreach_pow_(sizes, power)
    torch._foreach_add_(sums, sizes)


def _roots(sums: list[Tensor], power: float) -> list[Tensor]:
    if power == 1:
        return sums
    return list(torch._foreach_sqrt(sums) if power == 2 else torch._foreach_pow(sums, 1 / power))


def _above_quantile(gradient: Tensor, level: float) -> Tensor:
    """The gradient where g^2 is above the quantile of its tensor, so that a share `level` stays."""
    squares = gradient.square()
    held = int(level * squares.numel())
    if held == 0:
        return gradient
    return gradient * (squares > squares.flatten().kthvalue(held).values)
