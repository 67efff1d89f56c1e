"""The hands that may change a model while it trains, and the masks that follow it.

Everything here keeps four things together: the module tree (with its ties), the optimizer's
groups and state, the masks, and the list of what was ever trained or written, which is what a
checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .context import Context, Example
from .errors import ConfigError, Conflict, nearest
from .losses import Batch, Losses, Objective
from .manifest import PREFIX, manifest, origins_of, rebuild
from .still import has_statistics, hold, release
from .surgery import edit, moved_state

_KINDS = ("hard", "soft", "held")
Name = str | nn.Parameter


@dataclass
class Mask:
    """Which entries of one parameter may change.

    Attributes:
        keep: True where the entry lives. Shape of the parameter.
        kind: "hard" (zero, stays zero) or "held" (keeps its value).
        held: Values to go back to, for "held".
    """

    keep: Tensor
    kind: str
    held: Tensor | None = None

    @cached_property
    def still(self) -> int:
        """Entries that may not change."""
        return int(self.keep.numel() - self.keep.sum())


@runtime_checkable
class Engine(Protocol):
    """What the loop lends to `Live`."""

    def term_gradients(
        self, batches: list[Batch], terms: Iterable[str] | None
    ) -> dict[str, dict[str, Tensor]]:
        """Gradients of each reduced term."""
        ...

    def pass_over(
        self, name: str, examples: Sequence[Example], use: Callable[[Losses], None]
    ) -> None:
        """Forward passes of one example each."""
        ...

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        ...


class Live:
    """Model, objective, optimizers and pool of a run in progress, for watchers alone.

    Structure changes only in `before_step`, `after_update` and `after_eval`; elsewhere a
    replaced parameter would lose its gradient without a word.

    A parameter is given by its original name (before methods adapted the model), its current
    or tied name, or as the object itself.

    Attributes:
        model: The adapted model.
        objective: The shaped objective.
        optimizers: One optimizer, or one a parameter for updates inside backward. Every group
            has a `names` list beside `params`.
        pool: Training examples.
        context: Facts and services.
        phase: "train", "pass" (no gradient), "evaluation" or "rollout".
        touched: Names of parameters that were ever trained or written.
        masks: Masks by parameter name.
        changed: True after a structural change, until the loop has rewired itself.
        open: False while structure may not change.
        origins: Modules by path as assembled.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizers: list[torch.optim.Optimizer],
        pool: Any,
        context: Context,
    ) -> None:
        self.model = model
        self.objective = objective
        self.optimizers = optimizers
        self.pool = pool
        self.context = context
        self.phase = "train"
        self.masks: dict[str, Mask] = {}
        self.changed = False
        self.open = True
        self.engine: Engine | None = None
        self.aliases: dict[str, str] = {}
        self.restful: dict[str, dict[str, Any]] = {}
        self.touched = {name for name, p in self.named_parameters() if p.requires_grad}
        self.origins = origins_of(self)

    # ---- names -------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the model, then of the objective under `objective.`; ties once."""
        mine = dict(self.model.named_parameters())
        yield from mine.items()
        known = {id(p) for p in mine.values()}
        for name, parameter in self.objective.named_parameters():
            if id(parameter) not in known:
                yield PREFIX + name, parameter

    def every_name(self) -> dict[str, nn.Parameter]:
        """Parameters under all their names, ties included."""
        found = dict(self.model.named_parameters(remove_duplicate=False))
        inner = self.objective.named_parameters(remove_duplicate=False)
        return found | {PREFIX + name: p for name, p in inner}

    def resolve(self, name: Name) -> str:
        """The current name of a parameter.

        Raises:
            ConfigError: If no parameter has that name, or two have it (one now, another on the
                original model).
        """
        return self._at(name)[0]

    def parameter(self, name: Name) -> nn.Parameter:
        """The parameter of a current, tied or original name."""
        return self._at(name)[1]

    def _at(self, name: Name) -> tuple[str, nn.Parameter]:
        named = dict(self.named_parameters())
        found = name if isinstance(name, nn.Parameter) else self._lookup(name)
        for current, parameter in named.items():
            if parameter is found:
                return current, parameter
        shown = "this parameter" if isinstance(name, nn.Parameter) else f"parameter {name!r}"
        close = "" if isinstance(name, nn.Parameter) else nearest(name, named)
        raise ConfigError(f"the model has no {shown}", f"{close}see live.named_parameters()")

    def _lookup(self, name: str) -> nn.Parameter | None:
        every = self.every_name()
        original, current = every.get(self.aliases.get(name, "")), every.get(name)
        if original is not None and current is not None and original is not current:
            raise ConfigError(
                f"{name!r} is one parameter now and was another on the original model, which is "
                f"now {self.aliases[name]!r}",
                "give the parameter itself instead of its name",
            )
        return current if original is None else original

    def alias_originals(self, originals: Mapping[str, int]) -> None:
        """Remember the original name of every parameter object (name -> id)."""
        current = {id(p): n for n, p in self.named_parameters()}
        self.aliases = {n: current[i] for n, i in originals.items() if i in current}

    def holders(self, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
        """Every (module, attribute) that holds this object: ties included."""
        return [
            (module, key)
            for root in (self.model, self.objective)
            for module in root.modules()
            for key, value in module._parameters.items()
            if value is parameter
        ]

    def slot(
        self, parameter: nn.Parameter
    ) -> tuple[torch.optim.Optimizer, dict[str, Any], int] | None:
        """Optimizer, group and place of a parameter that trains."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for index, candidate in enumerate(group["params"]):
                    if candidate is parameter:
                        return optimizer, group, index
        return None

    def _structural(self) -> None:
        if not self.open:
            raise Conflict(
                "structure may not change while gradients are pending",
                "change it in before_step, after_update or after_eval",
            )
        self.changed = True

    # ---- changes -----------------------------------------------------------------------------

    def replace(
        self, name: Name, new: Tensor, state: str | Callable[[Tensor], Tensor] = "reset"
    ) -> nn.Parameter:
        """Put a new tensor in the place of a parameter: position, ties and group are kept.

        A "hard" mask of the same shape goes on holding zeros; a "held" one holds the new values.

        Args:
            name: Which parameter.
            new: The new value; made contiguous.
            state: "keep" (same shape), "reset", or a function applied to each moment that has
                the old parameter's shape.

        Raises:
            Conflict: If a mask does not fit the new shape, the optimizer's state is factored,
                or the moment does not allow it.
        """
        self._structural()
        name, old = self._at(name)
        mask = self.masks.get(name)
        if mask is not None and mask.keep.shape != new.shape:
            raise Conflict(
                f"{name!r} is masked and its new shape {tuple(new.shape)} does not fit the mask",
                "lift the mask first: live.mask(name, None)",
            )
        fresh = nn.Parameter(
            new.detach().to(old.device).contiguous().clone(), requires_grad=old.requires_grad
        )
        slot, rest = self.slot(old), self.restful.get(name)
        before = slot[0].state.get(old, {}) if slot else rest["state"] if rest else {}
        moments = {} if state == "reset" else moved_state(before, old, fresh, state)
        for module, key in self.holders(old):
            module._parameters[key] = fresh
        if slot:
            optimizer, group, index = slot
            group["params"][index] = fresh
            optimizer.state.pop(old, None)
            if moments:
                optimizer.state[fresh] = moments
        elif rest:
            rest["state"] = moments
        if mask is not None:
            with torch.no_grad():
                if mask.kind == "held":
                    mask.held = fresh.detach().clone()
                else:
                    fresh.mul_(mask.keep)
        self.touched.add(name)
        self.objective.replaced(old, fresh)
        return fresh

    def reset(self, names: Iterable[Name]) -> None:
        """Drop the optimizer state of parameters."""
        for name in names:
            slot = self.slot(self.parameter(name))
            if slot:
                slot[0].state.pop(slot[1]["params"][slot[2]], None)

    def edit(self, module: str, function: Callable[[nn.Module], None]) -> None:
        """Let a function change the parameters or children of one module.

        New parameters join the optimizer group of the nearest one that they replace. A module
        that comes must have `settings() -> dict` of its keyword arguments (linear layers need
        none), so that resume can make it again. Objectives that hold a copy of the model are
        told (`Objective.edited`).

        Args:
            module: Path of the module in the model.
            function: Changes it in place.

        Raises:
            Conflict: If a module that comes cannot be made again, or a masked parameter goes.
        """
        self._structural()
        edit(self, module, function)

    def mask(self, name: Name, keep: Tensor | None, kind: str = "hard") -> None:
        """Hold entries of a parameter; None lifts the mask.

        Args:
            name: Which parameter.
            keep: True where the entry lives. Shape of the parameter.
            kind: "hard" (zero, stays zero, moments too), "soft" (zeroed now, may return) or
                "held" (keeps its value).
        """
        name, parameter = self._at(name)
        if keep is None:
            self.masks.pop(name, None)
            return
        if kind not in _KINDS or keep.shape != parameter.shape:
            raise ConfigError(
                f"mask of {name!r}: kind {kind!r}, shape {tuple(keep.shape)}",
                f"use one of {', '.join(_KINDS)} and shape {tuple(parameter.shape)}",
            )
        keep = keep.to(parameter.device, torch.bool)
        with torch.no_grad():
            held = parameter.detach().clone() if kind == "held" else None
            if kind != "held":
                parameter.mul_(keep)
        self.touched.add(name)
        if kind == "soft":
            self.masks.pop(name, None)
        else:
            self.masks[name] = Mask(keep, kind, held)

    def freeze(self, names: Iterable[Name], state: str = "drop") -> None:
        """Stop training parameters; "keep" puts their optimizer state aside for `thaw`.

        Running statistics of a normalization layer that no longer trains are held too.
        """
        self._structural()
        for name, parameter in [self._at(name) for name in names]:
            parameter.requires_grad_(False)
            parameter.grad = None
            slot = self.slot(parameter)
            if slot:
                optimizer, group, index = slot
                moments = dict(optimizer.state.pop(parameter, {}))
                del group["params"][index], group["names"][index]
                self.restful[name] = {
                    "optimizer": self.optimizers.index(optimizer),
                    "group": optimizer.param_groups.index(group),
                    "state": moments if state == "keep" else {},
                }
            for module, _ in self.holders(parameter):
                trains = any(p.requires_grad for p in module.parameters(recurse=False))
                if has_statistics(module) and not trains:
                    hold(module)

    def thaw(self, names: Iterable[Name]) -> None:
        """Train parameters again, in the group they came from."""
        self._structural()
        for name, parameter in [self._at(name) for name in names]:
            parameter.requires_grad_(True)
            self.touched.add(name)
            for module, _ in self.holders(parameter):
                if has_statistics(module):
                    release(module)
                    module.train(self.model.training)
            if self.slot(parameter):
                continue
            rest = self.restful.pop(name, {"optimizer": 0, "group": 0, "state": {}})
            optimizer = self.optimizers[rest["optimizer"]]
            group = optimizer.param_groups[rest["group"]]
            group["params"].append(parameter)
            group["names"].append(name)
            if rest["state"]:
                optimizer.state[parameter] = rest["state"]

    def zeros(self) -> dict[str, float]:
        """Share of each masked parameter's entries that are held at zero, by name."""
        return {
            name: mask.still / mask.keep.numel()
            for name, mask in self.masks.items()
            if mask.kind == "hard"
        }

    # ---- services ----------------------------------------------------------------------------

    def term_gradients(
        self, batches: list[Batch], terms: Iterable[str] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """{term: {name: gradient}} over a whole step and all ranks, no coefficients; charged."""
        if self.engine is None:
            raise Conflict(
                "there are no gradients outside a run", "ask for them in a watcher's moments"
            )
        return self.engine.term_gradients(batches, terms)

    def pass_over(
        self, name: str, examples: Sequence[Example], use: Callable[[Losses], None]
    ) -> None:
        """Call the objective on one example at a time, in evaluation mode and with gradients.

        Modes, running statistics and generators come back as they were.

        Args:
            name: What the passes are charged as, with what `use` computes.
            examples: Of the pool; shown and transformed as in training.
            use: Takes the losses of each, and must not keep them.
        """
        if self.engine is None:
            raise ConfigError("no run is in progress", "call this from a watcher's moments")
        self.engine.pass_over(name, examples, use)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        return tensor if self.engine is None else self.engine.all_sum(tensor)

    def before_update(self, name: str, parameter: nn.Parameter) -> None:
        """Mask the gradient of one parameter."""
        mask = self.masks.get(name)
        if mask is not None and parameter.grad is not None:
            parameter.grad.mul_(mask.keep)

    @torch.no_grad()
    def after_update(self, name: str, parameter: nn.Parameter) -> None:
        """Enforce the mask of one parameter on its value and its optimizer state.

        State of entries that are held goes to rest: to zero, or to what the optimizer's
        `resting(group)` names for it (an accumulator that is divided by does not start at zero).
        """
        mask = self.masks.get(name)
        if mask is None:
            return
        if mask.kind == "held":
            assert mask.held is not None
            parameter.copy_(torch.where(mask.keep, parameter, mask.held))
        else:
            parameter.mul_(mask.keep)
        slot = self.slot(parameter)
        if slot is None:
            return
        optimizer, group, _ = slot
        resting = getattr(optimizer, "resting", None)
        rest: Any = resting(group) if callable(resting) else {}
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.masked_fill_(~mask.keep, rest.get(key, 0.0))

    def manifest(self) -> dict[str, Any]:
        """Structure as JSON, from which `rebuild` makes it again."""
        return manifest(self)

    def rebuild(self, facts: Mapping[str, Any]) -> None:
        """Give model and optimizer the structure of a manifest; values come afterwards."""
        rebuild(self, facts)
