"""Fitted heads and models outside the training loop; scikit-learn conventions.

Names resolve lazily, so that one estimator does not import what another needs.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

_HOMES = {
    "FeatureProbe": "feature_probe",
    "NearestClassMean": "nearest_class_mean",
    "StreamingLDA": "streaming_lda",
    "TfidfLogisticRegression": "tfidf",
}
__all__ = ["load", *sorted(_HOMES)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(folder: str | Path) -> Any:
    """Read an estimator that `save` wrote, whichever it is.

    Raises:
        DataError: If the folder holds none.
    """
    from ..core import registry
    from ._folder import read_settings

    cls: Any = registry.find(read_settings(Path(folder))["estimator"]).load()
    return cls.load(folder)
