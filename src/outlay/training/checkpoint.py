"""Checkpoints: written whole or not at all, checksummed, rebuilt from a manifest.

A checkpoint is a folder `step-N` with `state.json` (plain values), `tensors.safetensors` and
`checksums.json`. It is written under another name, synced and renamed, so a kill at any moment
leaves the last good one. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError, OutlayError
from ..core.live import Live, Mask
from ..core.manifest import PREFIX
from .folders import (
    locked,
    pack,
    read_folder,
    tensors_sha256,
    unpack,
    write_folder,
    write_json,
)

_SMALL = 1 << 20


# ---- a run's checkpoints ------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one stage, newest kept.

    Args:
        folder: Where `step-N` folders go.
        keep: How many stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.kept = folder, keep

    def all(self) -> list[Path]:
        """Complete checkpoint folders, oldest first."""
        if not self.folder.exists():
            return []
        for aside in self.folder.glob(".step-*.old"):
            whole = self.folder / aside.name[1:-4]
            if not whole.exists():
                aside.rename(whole)
        found = [p for p in self.folder.glob("step-*") if p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def save(self, step: int, tree: Any) -> Path:
        """Write one; drop the oldest, what a kill left, and later ones that were not usable."""
        target = self.folder / f"step-{step:08d}"
        write_folder(target, {"step": step, "tree": tree})
        found = self.all()
        later = [path for path in found if int(path.name[5:]) > step]
        older = [path for path in found if path not in later][: -self.kept]
        for old in (*older, *later, *self.folder.glob(".step-*")):
            shutil.rmtree(old, ignore_errors=True)
        return target

    def newest(self) -> tuple[Path, Any, list[str]] | None:
        """The newest good one, its tree, and what was wrong with newer ones.

        Raises:
            CheckpointError: If there are checkpoints and none is usable.
        """
        complaints: list[str] = []
        found = self.all()
        for path in reversed(found):
            try:
                sealed = read_folder(path)
                if sealed.get("step") != int(path.name[5:]):
                    raise CheckpointError(
                        f"checkpoint {path.name} holds step {sealed.get('step')}", ""
                    )
                return path, sealed["tree"], complaints
            except CheckpointError as error:
                complaints.append(error.problem)
        if found:
            raise CheckpointError(
                f"no usable checkpoint in {self.folder}: {complaints[0]}",
                "start afresh with another --out or delete the folder",
            )
        return None


# ---- what a live run's state is -----------------------------------------------------------------


Mark = tuple["weakref.ref[Tensor]", int, str]
Marks = Mapping[str, Mark]


def buffer_marks(*modules: nn.Module) -> dict[str, Mark]:
    """Every buffer and parameter as it is now, to tell later which were written.

    Buffers that a module names in `drawn` get no mark: a checkpoint holds what was drawn, since
    another version of torch may draw otherwise from the same seed.
    """
    drawn = {
        id(inner._buffers[name])
        for module in modules
        for inner in module.modules()
        for name in getattr(inner, "drawn", ())
    }
    return {
        f"{index}:{name}": (weakref.ref(tensor), tensor._version, _small_digest(tensor))
        for index, module in enumerate(modules)
        for name, tensor in (*module.named_buffers(), *module.named_parameters())
        if id(tensor) not in drawn
    }


def _small_digest(tensor: Tensor) -> str:
    """Content of a small buffer: batch normalization writes its own without a new version."""
    large = tensor.numel() * tensor.element_size() > _SMALL
    if isinstance(tensor, nn.Parameter) or large or tensor.device.type == "meta":
        return ""
    return tensors_sha256({"": tensor})


def _written(marks: Marks, key: str, tensor: Tensor) -> bool:
    """True unless this very tensor was there at the start and nobody wrote to it."""
    mark = marks.get(key)
    if mark is None or mark[0]() is not tensor or mark[1] != tensor._version:
        return True
    return mark[2] != _small_digest(tensor)


def capture(live: Live, marks: Marks) -> dict[str, Any]:
    """Structure, everything ever trained or written, masks and optimizer state."""
    buffers = {
        f"{index}:{name}": buffer
        for index, module in enumerate((live.model, live.objective))
        for name, buffer in module.named_buffers()
        if _written(marks, f"{index}:{name}", buffer)
    }
    # A moving average is no parameter that trains, and is written all the same.
    for name, parameter in live.named_parameters():
        inner = name.startswith(PREFIX)
        if _written(marks, f"{int(inner)}:{name.removeprefix(PREFIX)}", parameter):
            live.touched.add(name)
    named = dict(live.named_parameters())
    return {
        "manifest": live.manifest(),
        "parameters": {name: named[name] for name in sorted(live.touched) if name in named},
        "buffers": buffers,
        "masks": {
            name: {"keep": mask.keep, "held": mask.held} for name, mask in live.masks.items()
        },
        "optimizers": [_optimizer_state(optimizer) for optimizer in live.optimizers],
        "restful": {name: rest["state"] for name, rest in live.restful.items()},
    }


def restore(live: Live, state: Mapping[str, Any]) -> None:
    """Rebuild the structure, then put every value and the optimizers' state back.

    Raises:
        CheckpointError: If the state does not fit the model that its recipe makes.
    """
    restore_weights(live, state)
    with _fitting():
        for optimizer, saved in zip(live.optimizers, state["optimizers"], strict=True):
            _load_optimizer(optimizer, saved)
        named = dict(live.named_parameters())
        for name, moments in state["restful"].items():
            live.restful[name]["state"] = _on(named[name].device, moments)


def restore_weights(live: Live, state: Mapping[str, Any]) -> None:
    """Rebuild the structure and put parameters, buffers and masks back.

    Raises:
        CheckpointError: If the state does not fit the model that its recipe makes.
    """
    with _fitting():
        _restore(live, state, state["manifest"])


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, OutlayError):
            raise
        raise CheckpointError(
            f"the checkpoint does not fit this model ({type(error).__name__}: {error})",
            "resume with the recipe that made it, or start afresh with another --out",
        ) from error


def _restore(live: Live, state: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    live.rebuild(manifest)
    named = dict(live.named_parameters())
    with torch.no_grad():
        for name, value in state["parameters"].items():
            if named[name].shape != value.shape:
                raise ValueError(f"shape of {name}")
            named[name].copy_(value)
        roots = (live.model, live.objective)
        for key, value in state["buffers"].items():
            index, _, name = key.partition(":")
            _write_buffer(roots[int(index)], name, value)
    for name, kind in manifest["masks"].items():
        device = named[name].device
        held = state["masks"][name]["held"]
        live.masks[name] = Mask(
            state["masks"][name]["keep"].to(device),
            kind,
            None if held is None else held.to(device),
        )


def _on(device: torch.device, moments: Mapping[str, Any]) -> dict[str, Any]:
    """Moments where their parameter is; step counts stay where the optimizer keeps them."""
    return {
        key: value.to(device) if isinstance(value, Tensor) and value.dim() else value
        for key, value in moments.items()
    }


def _write_buffer(root: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    current = module._buffers.get(leaf)
    if current is not None and current.shape == value.shape and current.dtype == value.dtype:
        current.copy_(value)
    else:
        near = current if current is not None else next(root.parameters(), value)
        module._buffers[leaf] = value.to(near.device, copy=True)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    groups, moments = [], {}
    for group in optimizer.param_groups:
        plain = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in group.items()
            if key not in ("params", "names")
        }
        groups.append({k: v for k, v in plain.items() if _storable(v)})
        for name, parameter in zip(group["names"], group["params"]):
            if optimizer.state.get(parameter):
                moments[name] = dict(optimizer.state[parameter])
    shared = {key: value for key, value in optimizer.state.items() if isinstance(key, str)}
    return {"groups": groups, "moments": moments, "shared": shared}


def _storable(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, Tensor))


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in values.items():
            group[key] = tuple(value) if isinstance(value, list) else value
        for name, parameter in zip(group["names"], group["params"]):
            moments = saved["moments"].get(name)
            if moments:
                optimizer.state[parameter] = _on(parameter.device, moments)
    for key, value in saved["shared"].items():
        optimizer.state[key] = value  # type: ignore[index]


def weights_sha256(live: Live) -> str:
    """Digest over the trained weights in name order: name, dtype, shape, little-endian bytes."""
    named = dict(live.named_parameters())
    return tensors_sha256({name: named[name] for name in live.touched if name in named})


__all__ = [
    "Checkpoints", "Mark", "Marks", "buffer_marks", "capture", "locked", "pack", "read_folder",
    "restore", "restore_weights", "tensors_sha256", "unpack", "weights_sha256", "write_folder",
    "write_json",
]  # fmt: skip
