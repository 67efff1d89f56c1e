"""Checkpoints: written whole or not at all, checksummed, rebuilt from a manifest.

A checkpoint is a folder `step-N` with `state.json` (plain values), `tensors.safetensors` and
`checksums.json`. It is written under another name, synced and renamed, so a kill at any moment
leaves the last good one. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
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

FORMAT = 1
_TENSOR = "__tensor__"
_SMALL = 1 << 20


# ---- trees of plain values and tensors -----------------------------------------------------------


def pack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Move the tensors of a tree into `tensors`, leaving their keys.

    Raises:
        CheckpointError: If the tree holds anything but tensors and JSON values.
    """
    if isinstance(tree, Tensor):
        # Keys may hold slashes themselves; tensors that share memory are stored apart.
        key = path if path not in tensors else f"{path}#{len(tensors)}"
        tensors[key] = tree.detach().cpu().contiguous()
        return {_TENSOR: key}
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str) or key == _TENSOR:
                raise CheckpointError(
                    f"state key {key!r} at {path!r} is not allowed", f"use text, not {_TENSOR!r}"
                )
        return {key: pack(value, tensors, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [pack(value, tensors, f"{path}/{i}") for i, value in enumerate(tree)]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise CheckpointError(
        f"state at {path!r} is a {type(tree).__name__}", "keep tensors and JSON values only"
    )


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put the tensors back."""
    if isinstance(tree, dict):
        if set(tree) == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: unpack(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    return tree


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory with one before: safetensors refuses those."""
    seen: set[int] = set()
    apart = {}
    for key, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        apart[key] = value.clone() if place in seen else value
        seen.add(place)
    return apart


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    spare = path.with_name(f".{path.name}.part")
    spare.write_text(json.dumps(value, indent=1), encoding="utf-8")
    _sync(spare)
    spare.rename(path)


def write_folder(folder: Path, tree: Any) -> None:
    """Write a tree as a checksummed folder, whole or not at all.

    Raises:
        CheckpointError: If the disk does not take it; what was there before is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    plain = pack(tree, tensors)
    spare = folder.with_name(f".{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(spare, ignore_errors=True)
        spare.mkdir()
        (spare / "state.json").write_text(json.dumps(plain), encoding="utf-8")
        save_file(_apart(tensors), spare / "tensors.safetensors")
        names = ("state.json", "tensors.safetensors")
        sums = {"format": FORMAT, **{name: _digest(spare / name) for name in names}}
        text = json.dumps(sums, sort_keys=True)
        seal = hashlib.sha256(text.encode()).hexdigest()
        (spare / "checksums.json").write_text(json.dumps({"sums": text, "seal": seal}))
        for name in (*names, "checksums.json"):
            _sync(spare / name)
        _sync(spare)
        # The old one steps aside for a moment: a kill in between leaves it to be put back.
        aside = folder.with_name(f".{folder.name}.old")
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        spare.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(spare, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {folder.name}: {getattr(error, 'strerror', None) or error}",
            "free space on the disk and run the same command: it goes on from the last good one",
        ) from None


def read_folder(folder: Path) -> Any:
    """Read a tree and check every byte of it.

    Raises:
        CheckpointError: If a file is missing, cut or changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    aside = folder.with_name(f".{folder.name}.old")
    if aside.exists() and not folder.exists():
        aside.rename(folder)
    try:
        sealed = json.loads((folder / "checksums.json").read_text())
        text = sealed["sums"]
        sums = json.loads(text)
        if hashlib.sha256(text.encode()).hexdigest() != sealed["seal"]:
            raise ValueError("checksums.json was changed")
        if sums["format"] != FORMAT:
            raise ValueError(f"format {sums['format']}, this version reads {FORMAT}")
        for name in ("state.json", "tensors.safetensors"):
            if _digest(folder / name) != sums[name]:
                raise ValueError(f"{name} was cut or changed")
        plain = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return unpack(plain, load_file(folder / "tensors.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint {folder.name} is damaged: {reason}", "an older one is used if there is one"
        ) from None


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
    """Every buffer and parameter as it is now, to tell later which were written."""
    return {
        f"{index}:{name}": (weakref.ref(tensor), tensor._version, _small_digest(tensor))
        for index, module in enumerate(modules)
        for name, tensor in (*module.named_buffers(), *module.named_parameters())
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


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Digest over tensors in name order: name, dtype, shape, little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        head = f"{name}\0{str(value.dtype).removeprefix('torch.')}\0{tuple(value.shape)}\0"
        digest.update(head.encode())
        flat = value.reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Any:
    """Hold a run's folder; the lock goes with its process, however that ends.

    Raises:
        CheckpointError: If another process holds it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"another process is running in {folder}", "wait for it, or give another --out"
            ) from None
        yield
