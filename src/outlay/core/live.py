"""The hands that may change a model while it trains, and the masks that follow it.

Everything here keeps four things together: the module tree (with its ties), the optimizer's
groups and state, the masks, and the list of what was ever trained or written, which is what a
checkpoint holds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import ConfigError, Conflict, nearest
from .losses import Batch, Objective
from .method import Context

PREFIX = "objective."
_KINDS = ("hard", "soft", "held")


@dataclass
class Mask:
    """Which entries of one parameter may change.

    Attributes:
        keep: True where the entry lives. Shape of the parameter.
        kind: "hard" (zero, stays zero), "soft" (zeroed once, may return) or "held" (keeps its
            value).
        held: Values to go back to, for "held".
    """

    keep: Tensor
    kind: str
    held: Tensor | None = None


class Engine(Protocol):
    """What the loop lends to `Live`."""

    def term_gradients(
        self, batches: list[Batch], terms: Iterable[str] | None
    ) -> dict[str, dict[str, Tensor]]:
        """Gradients of each reduced term."""
        ...

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        ...


class Live:
    """Model, objective, optimizers and pool of a run in progress, for watchers alone.

    Structure changes only in `before_step`, `after_update` and `after_eval`; elsewhere a
    replaced parameter would lose its gradient without a word.

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
        self.added: dict[str, dict[str, Any]] = {}
        self.touched = {name for name, p in self.named_parameters() if p.requires_grad}

    # ---- names -------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the model, then of the objective under `objective.`; ties once."""
        yield from self.model.named_parameters()
        for name, parameter in self.objective.named_parameters():
            yield PREFIX + name, parameter

    def resolve(self, name: str) -> str:
        """The current name of a parameter given its current, tied or original name.

        Raises:
            ConfigError: If no parameter has that name.
        """
        name = self.aliases.get(name, name)
        owner = self._root(name)
        found = dict(owner.named_parameters(remove_duplicate=False)).get(self._local(name))
        if found is None:
            known = [n for n, _ in self.named_parameters()]
            raise ConfigError(
                f"no parameter {name!r}", f"{nearest(name, known)}see named_parameters"
            )
        return next(n for n, p in self.named_parameters() if p is found)

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of a current, tied or original name."""
        return dict(self.named_parameters())[self.resolve(name)]

    def alias_originals(self, originals: Mapping[str, int]) -> None:
        """Remember the original name of every parameter object (name -> id)."""
        current = {id(p): n for n, p in self.named_parameters()}
        self.aliases = {n: current[i] for n, i in originals.items() if i in current}

    def _root(self, name: str) -> nn.Module:
        return self.objective if name.startswith(PREFIX) else self.model

    @staticmethod
    def _local(name: str) -> str:
        return name.removeprefix(PREFIX)

    def _holders(self, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
        """Every (module, attribute) that holds this object: ties included."""
        return [
            (module, key)
            for root in (self.model, self.objective)
            for module in root.modules()
            for key, value in module._parameters.items()
            if value is parameter
        ]

    def _slot(
        self, parameter: nn.Parameter
    ) -> tuple[torch.optim.Optimizer, dict[str, Any], int] | None:
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
        self, name: str, new: Tensor, state: str | Callable[[Tensor], Tensor] = "reset"
    ) -> nn.Parameter:
        """Put a new tensor in the place of a parameter: position, ties and group are kept.

        Args:
            name: Current, tied or original name.
            new: The new value; made contiguous.
            state: "keep" (same shape), "reset", or a function applied to each moment that has
                the old parameter's shape.

        Raises:
            Conflict: If a mask does not fit the new shape, the optimizer's state is factored,
                or the moment does not allow it.
        """
        self._structural()
        name = self.resolve(name)
        old = self.parameter(name)
        if name in self.masks and self.masks[name].keep.shape != new.shape:
            raise Conflict(
                f"{name!r} is masked and its new shape {tuple(new.shape)} does not fit the mask",
                "lift the mask first: live.mask(name, None)",
            )
        fresh = nn.Parameter(
            new.detach().to(old.device).contiguous().clone(), requires_grad=old.requires_grad
        )
        slot = self._slot(old)
        moments: dict[str, Any] | None = None
        if slot and state != "reset":
            moments = self._moved(slot[0].state.get(old, {}), old, fresh, state)
        for module, key in self._holders(old):
            module._parameters[key] = fresh
        if slot:
            optimizer, group, index = slot
            group["params"][index] = fresh
            optimizer.state.pop(old, None)
            if moments:
                optimizer.state[fresh] = moments
        self.touched.add(name)
        self.objective.replaced(old, fresh)
        return fresh

    @staticmethod
    def _moved(
        state: Mapping[str, Any],
        old: nn.Parameter,
        new: nn.Parameter,
        how: str | Callable[[Tensor], Tensor],
    ) -> dict[str, Any]:
        moved = {}
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                moved[key] = value
                continue
            if value.shape != old.shape:
                raise Conflict(
                    f"optimizer state {key!r} is factored: it cannot follow a replaced parameter",
                    'use state="reset"',
                )
            moved[key] = value if how == "keep" else how(value)  # type: ignore[operator]
            if moved[key].shape != new.shape:
                raise Conflict(
                    f"optimizer state {key!r} has shape {tuple(moved[key].shape)}, the new "
                    f"parameter {tuple(new.shape)}",
                    'give a function on each moment, or state="reset"',
                )
        return moved

    def reset(self, names: Iterable[str]) -> None:
        """Drop the optimizer state of parameters."""
        for name in names:
            slot = self._slot(self.parameter(name))
            if slot:
                slot[0].state.pop(slot[1]["params"][slot[2]], None)

    def edit(self, module: str, function: Callable[[nn.Module], None]) -> None:
        """Let a function change the parameters or children of one module.

        New parameters join the optimizer group of those they replace. A child module that comes
        must have `settings() -> dict` and accept it as keyword arguments, so that resume can
        make it again.

        Args:
            module: Path of the module in the model.
            function: Changes it in place.
        """
        self._structural()
        target = self.model.get_submodule(module)
        before = dict(self.named_parameters())
        modules = set(dict(target.named_modules()))
        function(target)
        for path, child in target.named_modules():
            if path not in modules:
                self._record(f"{module}.{path}" if module else path, child)
        after = dict(self.named_parameters())
        home: dict[str, Any] | None = None
        for name, parameter in before.items():
            if after.get(name) is not parameter and not any(p is parameter for p in after.values()):
                slot = self._slot(parameter)
                if slot:
                    home = home or slot[1]
                    slot[0].state.pop(parameter, None)
                    del slot[1]["params"][slot[2]], slot[1]["names"][slot[2]]
                self.masks.pop(name, None)
        home = home or self.optimizers[0].param_groups[0]
        for name, parameter in after.items():
            if before.get(name) is not parameter:
                self.touched.add(name)
                if parameter.requires_grad:
                    home["params"].append(parameter)
                    home["names"].append(name)

    def _record(self, path: str, child: nn.Module) -> None:
        settings = getattr(child, "settings", None)
        if not callable(settings):
            raise Conflict(
                f"{type(child).__name__} at {path!r} cannot be made again on resume",
                "give it settings() -> dict of its keyword arguments",
            )
        kind = type(child)
        self.added[path] = {
            "class": f"{kind.__module__}:{kind.__qualname__}",
            "settings": settings(),
        }

    def mask(self, name: str, keep: Tensor | None, kind: str = "hard") -> None:
        """Hold entries of a parameter; None lifts the mask.

        Args:
            name: Current, tied or original name.
            keep: True where the entry lives. Shape of the parameter.
            kind: "hard" (zero, stays zero, moments too), "soft" (zeroed now, may return) or
                "held" (keeps its value).
        """
        name = self.resolve(name)
        if keep is None:
            self.masks.pop(name, None)
            return
        parameter = self.parameter(name)
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

    def freeze(self, names: Iterable[str], state: str = "drop") -> None:
        """Stop training parameters; "keep" puts their optimizer state aside for `thaw`."""
        self._structural()
        for name in map(self.resolve, list(names)):
            parameter = self.parameter(name)
            parameter.requires_grad_(False)
            parameter.grad = None
            slot = self._slot(parameter)
            if slot:
                optimizer, group, index = slot
                moments = dict(optimizer.state.pop(parameter, {}))
                del group["params"][index], group["names"][index]
                self.restful[name] = {
                    "optimizer": self.optimizers.index(optimizer),
                    "group": optimizer.param_groups.index(group),
                    "state": moments if state == "keep" else {},
                }

    def thaw(self, names: Iterable[str]) -> None:
        """Train parameters again, in the group they came from."""
        self._structural()
        for name in map(self.resolve, list(names)):
            parameter = self.parameter(name)
            parameter.requires_grad_(True)
            self.touched.add(name)
            if self._slot(parameter):
                continue
            rest = self.restful.pop(name, {"optimizer": 0, "group": 0, "state": {}})
            optimizer = self.optimizers[rest["optimizer"]]
            group = optimizer.param_groups[rest["group"]]
            group["params"].append(parameter)
            group["names"].append(name)
            if rest["state"]:
                optimizer.state[parameter] = rest["state"]

    # ---- services ----------------------------------------------------------------------------

    def term_gradients(
        self, batches: list[Batch], terms: Iterable[str] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """{term: {name: gradient}} over a whole step and all ranks, no coefficients; charged."""
        assert self.engine is not None, "the loop lends the engine"
        return self.engine.term_gradients(batches, terms)

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
        """Enforce the mask of one parameter on its value and its optimizer state."""
        mask = self.masks.get(name)
        if mask is None:
            return
        if mask.kind == "held":
            assert mask.held is not None
            parameter.copy_(torch.where(mask.keep, parameter, mask.held))
        else:
            parameter.mul_(mask.keep)
        slot = self._slot(parameter)
        for value in (slot[0].state.get(parameter, {}) if slot else {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.mul_(mask.keep)

    # ---- the manifest from which resume rebuilds -----------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Structure as JSON: names, shapes, dtypes, frozen set, masks, groups, added modules."""
        return {
            "parameters": {
                name: {
                    "shape": list(p.shape),
                    "dtype": str(p.dtype).removeprefix("torch."),
                    "trains": p.requires_grad,
                }
                for name, p in self.named_parameters()
            },
            "masks": {name: mask.kind for name, mask in self.masks.items()},
            "groups": [[list(g["names"]) for g in o.param_groups] for o in self.optimizers],
            "touched": sorted(self.touched),
            "added": self.added,
            "restful": {
                n: {"optimizer": r["optimizer"], "group": r["group"]}
                for n, r in self.restful.items()
            },
        }

    def rebuild(self, manifest: Mapping[str, Any]) -> None:
        """Give model and optimizer the structure of a manifest; values come afterwards."""
        for path, made in manifest["added"].items():
            module, _, qualname = made["class"].partition(":")
            parent, _, leaf = path.rpartition(".")
            kind: Any = importlib.import_module(module)
            for part in qualname.split("."):
                kind = getattr(kind, part)
            setattr(self.model.get_submodule(parent), leaf, kind(**made["settings"]))
        self.added = dict(manifest["added"])
        wanted = manifest["parameters"]
        for name, parameter in list(self.named_parameters()):
            if name not in wanted:
                for module, key in self._holders(parameter):
                    del module._parameters[key]
        present = dict(self.named_parameters())
        for name, facts in wanted.items():
            dtype = getattr(torch, facts["dtype"])
            old = present.get(name)
            if old is None or list(old.shape) != facts["shape"] or old.dtype != dtype:
                fresh = nn.Parameter(torch.zeros(facts["shape"], dtype=dtype))
                if old is None:
                    path, _, leaf = self._local(name).rpartition(".")
                    self._root(name).get_submodule(path).register_parameter(leaf, fresh)
                else:
                    for module, key in self._holders(old):
                        module._parameters[key] = fresh
                    self.objective.replaced(old, fresh)
                old = fresh
            old.requires_grad_(facts["trains"])
        named = dict(self.named_parameters())
        for optimizer, groups in zip(self.optimizers, manifest["groups"], strict=True):
            optimizer.state.clear()
            for group, names in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = [named[n] for n in names]
                group["names"] = list(names)
        self.touched = set(manifest["touched"])
        self.restful = {n: {**r, "state": {}} for n, r in manifest["restful"].items()}
        self.masks = {}
        self.changed = True
