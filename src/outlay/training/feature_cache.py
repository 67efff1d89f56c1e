"""Features on disk: memory-mapped matrices and JSON, written whole or not at all.

A set of features is found again by what it depends on: the model's files, the layer, the pooling,
the preprocessing and the data. Anything else is another set.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ConfigError, DataError

FORMAT = 1  # raised when features are computed in another way
_FACTS = "features.json"
_READ = (".json", ".safetensors", ".txt", ".model", ".onnx")


@dataclass(frozen=True)
class FeatureSet:
    """Features of the splits of one data set.

    Attributes:
        folder: Where they are.
        splits: float32, memory-mapped, read-only. Shape (rows, width) each.
        facts: What they depend on, and what was noted while they were made.
        fresh: True if they were computed just now.
    """

    folder: Path
    splits: dict[str, np.ndarray]
    facts: dict[str, Any]
    fresh: bool


def files_fingerprint(folder: Path) -> str:
    """SHA-256 of a model's files: names and content of weights, settings and tokenizer.

    Args:
        folder: Its folder, or an ONNX file: then of that file and the settings beside it.
    """
    digest = hashlib.sha256()
    weights = {folder.name} if folder.is_file() else None
    for file in sorted((folder.parent if weights else folder).iterdir()):
        own = weights is None or file.suffix in (".json", ".txt", ".model") or file.name in weights
        if own and file.is_file() and file.suffix in _READ:
            with file.open("rb") as content:
                inner = hashlib.file_digest(content, "sha256").hexdigest()
            digest.update(f"{file.name}\0{inner}\0".encode())
    return digest.hexdigest()


def cached_features(
    root: Path,
    depends: Mapping[str, Any],
    counts: Mapping[str, int],
    compute: Callable[[], tuple[int, dict[str, Iterable[np.ndarray]], dict[str, Any]]],
) -> FeatureSet:
    """Features from the cache, else computed into it.

    Args:
        root: Folder of the cache.
        depends: Everything that the features depend on, as plain JSON.
        counts: Rows of each split.
        compute: Gives the width, batches of features by split, and notes.

    Raises:
        ConfigError: If the folder cannot be written.
        DataError: If a batch holds NaN or infinity, naming the rows.
    """
    text = json.dumps({"format": FORMAT, **depends}, sort_keys=True)
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
    if (found := _read(folder, counts)) is not None:
        return FeatureSet(folder, *found, fresh=False)
    try:
        root.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
    except OSError as error:
        raise ConfigError(
            f"the feature cache {str(root)!r} cannot be written ({error.strerror})",
            "set OUTLAY_CACHE to a folder that can",
        ) from None
    try:
        width, batches, notes = compute()
        for split, parts in batches.items():
            _fill(draft / f"{split}.npy", split, counts[split], width, parts)
        facts = {"depends": dict(depends), "rows": dict(counts), "width": width, "notes": notes}
        (draft / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        try:
            os.replace(draft, folder)
        except OSError:
            if _read(folder, counts) is None:
                raise
            # Another process was first; what it wrote is the same.
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    made = _read(folder, counts)
    assert made is not None
    return FeatureSet(folder, *made, fresh=True)


def _fill(place: Path, split: str, rows: int, width: int, parts: Iterable[np.ndarray]) -> None:
    if not rows:
        np.save(place, np.zeros((0, width), dtype=np.float32))
        return
    matrix = np.lib.format.open_memmap(place, mode="w+", dtype=np.float32, shape=(rows, width))
    start = 0
    for part in parts:
        bad = np.flatnonzero(~np.isfinite(part).all(axis=1)) + start
        if len(bad):
            shown = ", ".join(map(str, bad[:10]))
            raise DataError(
                f"the model gives NaN or inf for {split} rows {shown}",
                "mend these rows, or use a model that is finite in float32",
            )
        matrix[start : start + len(part)] = part
        start += len(part)
    matrix.flush()


def _read(
    folder: Path, counts: Mapping[str, int]
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """A complete set, or None; what is damaged counts as not there."""
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        splits = {
            split: np.load(
                folder / f"{split}.npy", mmap_mode="r" if rows else None, allow_pickle=False
            )
            for split, rows in counts.items()
        }
    except (OSError, ValueError):
        return None
    width = facts.get("width")
    if any(found.shape != (counts[split], width) for split, found in splits.items()):
        return None
    return splits, facts
