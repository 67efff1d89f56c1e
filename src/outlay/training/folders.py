"""Folders of tensors and plain values: written whole or not at all, checksummed, never pickled.

A folder holds `state.json` (plain values), `tensors.safetensors` and `checksums.json`. It is
written under another name, synced and renamed, so a kill at any moment leaves what was there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError

FORMAT = 1
_TENSOR = "__tensor__"


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
