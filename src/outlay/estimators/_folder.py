"""Estimators on disk: settings and classes as JSON, statistics as safetensors, no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..core.drafts import drafted
from ..core.errors import ConfigError, DataError

SETTINGS, ARRAYS = "estimator.json", "statistics.safetensors"
_FORMAT = 1


def save(estimator: Any, folder: Path, overwrite: bool) -> Path:
    """Write an estimator on class statistics, whole or not at all."""
    from safetensors.numpy import save_file

    if folder.exists() and not (overwrite and (folder / SETTINGS).is_file()):
        raise ConfigError(f"{str(folder)!r} is there already", "give another folder")
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "estimator": estimator.card.name,
        "settings": estimator.get_params(),
        "width": None,
    }
    arrays = {}
    if hasattr(estimator, "statistics_"):
        found = estimator.statistics_
        facts |= {
            "width": found.width,
            "labels": found.labels.tolist(),
            "labels_type": "text" if found.labels.dtype.kind in "UO" else str(found.labels.dtype),
            "names": getattr(estimator, "feature_names_in_", np.zeros(0)).tolist() or None,
        }
        arrays = {
            "counts": found.counts, "zero_rows": found.zero_rows, "sums": found.sums,
            "deviations": found.deviations,
        }  # fmt: skip
    with drafted(folder) as draft:
        save_file(arrays, str(draft / ARRAYS))
        text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
        (draft / SETTINGS).write_text(text + "\n", encoding="utf-8")
    return folder


def load(cls: type, folder: Path) -> Any:
    """Read an estimator of this class."""
    facts = read_settings(folder)
    name = cls.card.name  # type: ignore[attr-defined]
    if facts["estimator"] != name:
        raise DataError(
            f"{str(folder)!r} holds {facts['estimator']!r}, not {name!r}",
            "load it with its own class, or with outlay.estimators.load",
        )
    try:
        return _restored(cls, folder, facts)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(
            f"the estimator in {str(folder)!r} cannot be read ({type(error).__name__}: {error})",
            "save it again",
        ) from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise DataError(
            f"{str(folder / ARRAYS)!r} cannot be read ({error})", "save the estimator again"
        ) from None


def read_settings(folder: Path) -> dict[str, Any]:
    """What an estimator's folder says of itself.

    Raises:
        DataError: If there is no estimator, or one of a later version.
    """
    try:
        facts = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        known = facts["format"], facts["estimator"], facts["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{str(folder)!r} holds no saved estimator", "give a folder that save() wrote"
        ) from None
    if known[0] != _FORMAT:
        raise DataError(
            f"{str(folder)!r} is of format {known[0]}, this version reads {_FORMAT}",
            "read it with the version that wrote it",
        )
    return facts


def _restored(cls: type, folder: Path, facts: dict[str, Any]) -> Any:
    from safetensors.numpy import load_file

    made = cls(**facts["settings"])
    if facts["width"] is None:
        return made
    arrays = load_file(str(folder / ARRAYS))
    found = made._fresh(facts["width"])
    kind = facts["labels_type"]
    labels = np.array(facts["labels"], dtype=None if kind == "text" else kind)
    labels = labels.astype(str) if kind == "text" else labels
    shapes = {
        "counts": (len(labels),), "zero_rows": (len(labels),), "sums": (len(labels), found.width),
        "deviations": found._no_deviations(len(labels)).shape,
    }  # fmt: skip
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape} and {shape} is needed")
        setattr(found, name, arrays[name])
    found.labels = labels
    made.statistics_, made.n_features_in_ = found, found.width
    if facts["names"]:
        made.feature_names_in_ = np.array(facts["names"], dtype=object)
    return made
