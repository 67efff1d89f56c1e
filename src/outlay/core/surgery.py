"""How optimizer groups, moments and everything kept by name follow parameters that change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .errors import ConfigError, Conflict
from .manifest import module_changes

if TYPE_CHECKING:
    from .live import Live


def edit(live: Live, module: str, function: Callable[[nn.Module], None]) -> None:
    """Apply a function to one module and bring groups, state and names after it."""
    before = dict(live.named_parameters())
    function(live.model.get_submodule(module))
    live.objective.edited(module, function)
    module_changes(live)
    after = dict(live.named_parameters())
    _rename(live, before, after)
    was, now = {id(p) for p in before.values()}, {id(p) for p in after.values()}
    gone = {n: p for n, p in before.items() if id(p) not in now}
    lost = sorted(n for n in gone if n in live.masks)
    if lost:
        raise Conflict(f"{lost[0]!r} is masked and was taken away", "lift the mask first")
    homes = {n: s for n, p in gone.items() if (s := live.slot(p))}
    near = homes or {n: s for n, p in after.items() if (s := live.slot(p))}
    for name, parameter in after.items():
        if id(parameter) in was:
            continue
        live.touched.add(name)
        if parameter.requires_grad and near:
            home = near[max(near, key=lambda other: _common(name, other))][1]
            home["params"].append(parameter)
            home["names"].append(name)
    for name, parameter in gone.items():
        slot = live.slot(parameter)
        if slot:
            optimizer, group, index = slot
            optimizer.state.pop(parameter, None)
            del group["params"][index], group["names"][index]
        live.restful.pop(name, None)
        if name in after:
            live.objective.replaced(parameter, after[name])


def _rename(
    live: Live, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]
) -> None:
    """Everything that is kept by name follows parameters that moved."""
    now = {id(p): n for n, p in after.items()}
    moved = {n: now[id(p)] for n, p in before.items() if now.get(id(p), n) != n}
    if not moved:
        return
    for optimizer in live.optimizers:
        for group in optimizer.param_groups:
            group["names"] = [moved.get(n, n) for n in group["names"]]
    live.masks = {moved.get(n, n): mask for n, mask in live.masks.items()}
    live.restful = {moved.get(n, n): rest for n, rest in live.restful.items()}
    live.aliases = {n: moved.get(current, current) for n, current in live.aliases.items()}
    live.touched = {moved.get(n, n) for n in live.touched} | set(moved.values())


def _common(name: str, other: str) -> int:
    """Number of leading path parts that two names share."""
    count = 0
    for a, b in zip(name.split("."), other.split(".")):
        if a != b:
            break
        count += 1
    return count


def moved_state(
    state: Mapping[str, Any],
    old: nn.Parameter,
    new: nn.Parameter,
    how: str | Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """Optimizer state of a replaced parameter."""
    if isinstance(how, str) and how != "keep":
        raise ConfigError(f"state = {how!r} is not allowed", 'use "keep", "reset" or a function')
    moved: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            moved[key] = value
            continue
        if value.shape != old.shape:
            raise Conflict(
                f"optimizer state {key!r} is factored: it cannot follow a replaced parameter",
                'use state="reset"',
            )
        moved[key] = value if isinstance(how, str) else how(value)
        if moved[key].shape != new.shape:
            raise Conflict(
                f"optimizer state {key!r} has shape {tuple(moved[key].shape)}, the new "
                f"parameter {tuple(new.shape)}",
                'give a function on each moment, or state="reset"',
            )
    return moved
