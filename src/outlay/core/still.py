"""What must not move while a model trains: normalization statistics and teachers.

`.train()` on a parent sets every child; a module that is held here stays in evaluation mode.
Normalization layers are found by type (running statistics), never by name.
"""

from __future__ import annotations

import types

from torch import nn


def _stay(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)


def hold(module: nn.Module) -> None:
    """Keep a module in evaluation mode through any later `.train()`."""
    module.train = types.MethodType(_stay, module)  # type: ignore[method-assign]
    module.eval()


def release(module: nn.Module) -> None:
    """Let `.train()` reach a module again."""
    module.__dict__.pop("train", None)


def is_held(module: nn.Module) -> bool:
    """True between `hold` and `release`."""
    return "train" in module.__dict__


def has_statistics(module: nn.Module) -> bool:
    """True for a normalization layer that keeps running statistics."""
    return bool(getattr(module, "track_running_stats", False))


def hold_statistics(model: nn.Module) -> None:
    """Keep running statistics of frozen normalization layers, through any later `.train()`."""
    for module in model.modules():
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        if has_statistics(module) and not trains:
            hold(module)


def still(model: nn.Module) -> nn.Module:
    """Freeze a teacher: no gradient, and evaluation mode even inside a training objective."""
    model.requires_grad_(False)
    hold(model)
    return model
