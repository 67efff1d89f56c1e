"""outlay: spend a pre-training or adaptation budget well.

Names resolve lazily, so importing outlay imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import Any

from ._version import __version__

_HOMES = {
    "Batch": "core.losses",
    "Budget": "core.budget",
    "CLASSPOptimizer": "methods.optimizers._classp_optimizer",
    "Card": "core.card",
    "Claim": "core.claims",
    "Context": "core.method",
    "Live": "core.live",
    "Losses": "core.losses",
    "Meter": "core.meter",
    "Method": "core.method",
    "MixtureOfDenoisers": "nn.denoising_collator",
    "Objective": "core.losses",
    "OnBatch": "core.method",
    "OnData": "core.method",
    "OnModel": "core.method",
    "OnObjective": "core.method",
    "OnOptimizer": "core.method",
    "OnReward": "core.method",
    "OnSchedule": "core.method",
    "OnStep": "core.method",
    "OutlayError": "core.errors",
    "Pool": "training.pool",
    "Recipe": "training.recipe",
    "Shaped": "core.losses",
    "Stage": "training.recipe",
    "Step": "core.method",
    "Term": "core.losses",
    "Watcher": "core.method",
    "allocate": "core.allocate",
    "build": "core.registry",
    "compare": "comparison.compare",
    "disable_adapters": "nn.adapter",
    "load_adapter": "bridges.peft",
    "merge_adapters": "nn.adapter",
    "plan": "training.planning.plan",
    "prepare_tokenizer": "nn.denoising_collator",
    "run": "training.runs",
    "save_adapter": "bridges.peft",
    "set_adapter": "nn.adapter",
    "share": "core.allocate",
    "unmerge_adapters": "nn.adapter",
}
__all__ = ["__version__", *sorted(_HOMES)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"outlay.{_HOMES[name]}"), name)
    if name.startswith("_"):
        raise AttributeError(name)
    from .core.registry import class_names

    if name in class_names():
        return class_names()[name].load()
    raise AttributeError(f"module 'outlay' has no attribute {name!r}")


def __dir__() -> list[str]:
    from .core.registry import class_names

    return sorted({*__all__, *class_names()})
