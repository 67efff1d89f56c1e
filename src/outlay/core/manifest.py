"""The manifest from which resume rebuilds a model that changed while it trained.

It holds the final structure alone (modules that came, went or moved, names, shapes, dtypes,
ties, frozen set, groups), compared with the model as it was assembled; nothing is replayed.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import CheckpointError, Conflict
from .still import has_statistics, hold, is_held, release

if TYPE_CHECKING:
    from .live import Live

PREFIX = "objective."
Origins = dict[str, "weakref.ref[nn.Module]"]


def join(path: str, leaf: str) -> str:
    """Dotted path of a child."""
    return f"{path}.{leaf}" if path else leaf


def origins_of(live: Live) -> Origins:
    """Every module of model and objective by path, as assembled."""
    return {path: weakref.ref(m) for path, m in _modules(live).items()}


def _modules(live: Live) -> dict[str, nn.Module]:
    found = dict(live.model.named_modules(remove_duplicate=False))
    inner = live.objective.named_modules(remove_duplicate=False)
    return found | {PREFIX + path: module for path, module in inner if path}


def _root(live: Live, path: str) -> tuple[nn.Module, str]:
    if path.startswith(PREFIX):
        return live.objective, path.removeprefix(PREFIX)
    return live.model, path


def _parent(live: Live, path: str) -> tuple[nn.Module, str]:
    root, local = _root(live, path)
    above, _, leaf = local.rpartition(".")
    return root.get_submodule(above), leaf


# ---- modules that came, went or moved ------------------------------------------------------------


def module_changes(live: Live) -> dict[str, Any]:
    """How the module tree differs from the assembled one.

    Returns:
        "gone" and "empty" (paths), "moved" (path -> path as assembled) and "added"
        (path -> class and settings).

    Raises:
        Conflict: If a module that came cannot be made again.
    """
    alive = {path: module for path, ref in live.origins.items() if (module := ref()) is not None}
    where: dict[int, str] = {}
    for path, module in alive.items():
        where.setdefault(id(module), path)
    below: dict[str, set[str]] = {}
    for path in live.origins:
        above, _, leaf = path.rpartition(".")
        below.setdefault(above, set()).add(leaf)
    found: dict[str, Any] = {"gone": [], "empty": [], "moved": {}, "added": {}}

    def walk(module: nn.Module, path: str, origin: str) -> None:
        present = set()
        for leaf, child in module._modules.items():
            here, there = join(path, leaf), join(origin, leaf)
            present.add(leaf)
            if child is None:
                if there in live.origins:
                    found["empty"].append(here)
            elif child is alive.get(there):
                walk(child, here, there)
            elif id(child) in where:
                found["moved"][here] = where[id(child)]
                walk(child, here, where[id(child)])
            else:
                found["added"][here] = described(child, here)
        lost = below.get(origin, set()) - present - {""}
        found["gone"] += [join(path, leaf) for leaf in sorted(lost)]

    walk(live.model, "", "")
    walk(live.objective, "objective", "objective")
    return found


def described(child: nn.Module, path: str) -> dict[str, Any]:
    """Class and keyword arguments that make a module again."""
    kind = type(child)
    if kind is nn.Linear:
        settings: Any = {
            "in_features": child.in_features,
            "out_features": child.out_features,
            "bias": child.bias is not None,
        }
    elif kind is nn.Identity:
        settings = {}
    elif callable(getattr(child, "settings", None)):
        settings = child.settings()  # type: ignore[operator]
    else:
        raise Conflict(
            f"{kind.__name__} at {path!r} cannot be made again on resume",
            "give it settings() -> dict of its keyword arguments",
        )
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "settings": settings}


def _made(facts: Mapping[str, Any]) -> nn.Module:
    """Make a module from its class and settings; only classes that are already loaded."""
    module, _, qualname = str(facts["class"]).partition(":")
    kind: Any = sys.modules.get(module)
    for part in qualname.split("."):
        kind = getattr(kind, part, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise CheckpointError(
            f"the checkpoint names {facts['class']!r}, which is no loaded module class",
            "resume with the methods that made it",
        )
    with torch.random.fork_rng([]):
        return kind(**facts["settings"])


def _rebuild_modules(live: Live, changes: Mapping[str, Any]) -> None:
    moved = {path: _at(live, there) for path, there in changes["moved"].items()}
    for path in changes["gone"]:
        parent, leaf = _parent(live, path)
        del parent._modules[leaf]
    for path in changes["empty"]:
        parent, leaf = _parent(live, path)
        parent._modules[leaf] = None
    for path, module in moved.items():
        parent, leaf = _parent(live, path)
        parent._modules[leaf] = module
    for path, facts in changes["added"].items():
        parent, leaf = _parent(live, path)
        parent._modules[leaf] = _made(facts).to(live.context.device)


def _at(live: Live, path: str) -> nn.Module:
    root, local = _root(live, path)
    return root.get_submodule(local)


# ---- parameters ----------------------------------------------------------------------------------


def manifest(live: Live) -> dict[str, Any]:
    """Structure as JSON: modules, names, shapes, dtypes, ties, frozen set, masks, groups."""
    first = {id(p): name for name, p in live.named_parameters()}
    every = live.every_name()
    return {
        "modules": module_changes(live),
        "parameters": {
            name: {
                "shape": list(p.shape),
                "dtype": str(p.dtype).removeprefix("torch."),
                "trains": p.requires_grad,
            }
            for name, p in live.named_parameters()
        },
        "ties": {name: first[id(p)] for name, p in every.items() if first[id(p)] != name},
        "empty": _empty_slots(live),
        "held": [path for path, m in _modules(live).items() if has_statistics(m) and is_held(m)],
        "masks": {name: mask.kind for name, mask in live.masks.items()},
        "groups": [[list(g["names"]) for g in o.param_groups] for o in live.optimizers],
        "touched": sorted(live.touched),
        "restful": {
            n: {"optimizer": r["optimizer"], "group": r["group"]} for n, r in live.restful.items()
        },
    }


def _empty_slots(live: Live) -> list[str]:
    """Parameter slots that are None, as the bias of a layer without one."""
    return [
        join(path, leaf)
        for path, module in _modules(live).items()
        for leaf, value in module._parameters.items()
        if value is None
    ]


def rebuild(live: Live, facts: Mapping[str, Any]) -> None:
    """Give model and optimizer the structure of a manifest; values come afterwards."""
    _rebuild_modules(live, facts["modules"])
    wanted, ties, empty = facts["parameters"], facts["ties"], set(facts["empty"])
    for name in live.every_name():
        if name not in wanted and name not in ties:
            parent, leaf = _parent(live, name)
            if name in empty:
                parent._parameters[leaf] = None
            else:
                del parent._parameters[leaf]
    settled: set[int] = set()
    for name, about in wanted.items():
        parameter = _settle(live, name, about, settled)
        parameter.requires_grad_(about["trains"])
        settled.add(id(parameter))
    for name, source in ties.items():
        parent, leaf = _parent(live, name)
        above, key = _parent(live, source)
        parent._parameters[leaf] = above._parameters[key]
    for path, module in _modules(live).items():
        if has_statistics(module) and is_held(module) != (path in facts["held"]):
            (hold if path in facts["held"] else release)(module)
    named = dict(live.named_parameters())
    for optimizer, groups in zip(live.optimizers, facts["groups"], strict=True):
        optimizer.state.clear()
        for group, names in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [named[n] for n in names]
            group["names"] = list(names)
    live.touched = set(facts["touched"])
    live.restful = {n: {**r, "state": {}} for n, r in facts["restful"].items()}
    live.masks = {}
    live.changed = True


def _settle(live: Live, name: str, about: Mapping[str, Any], settled: set[int]) -> nn.Parameter:
    """The parameter of a name, made anew where it is missing, tied wrongly or of another shape."""
    parent, leaf = _parent(live, name)
    old, dtype = parent._parameters.get(leaf), getattr(torch, about["dtype"])
    shared = old is not None and id(old) in settled
    if old is not None and not shared and list(old.shape) == about["shape"] and old.dtype == dtype:
        return old
    fresh = nn.Parameter(
        torch.zeros(about["shape"], dtype=dtype, device=live.context.device),
        requires_grad=about["trains"],
    )
    if old is None or shared:
        parent.register_parameter(leaf, fresh)
    else:
        for module, key in live.holders(old):
            module._parameters[key] = fresh
        live.objective.replaced(old, fresh)
    return fresh
