"""Where a number first went wrong: the step, the rows and the first module that is not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import NonFinite
from ..core.losses import Batch
from ..core.method import Step

if TYPE_CHECKING:
    from .gradients import Gradients


def refuse_non_finite(
    gradients: Gradients, step: Step, loss: float, batches: list[Batch], norm: float = 0.0
) -> None:
    """Stop at a loss or gradient norm that is NaN or infinite.

    Raises:
        NonFinite: Naming step, rows and the first module or gradient that is not finite.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    culprit = _first_module(gradients, step, batches) or _first_gradient(gradients)
    ids = ", ".join(str(i) for b in batches for i in b["ids"][:3])
    found = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
    raise NonFinite(
        f"step {step.index}: {found}; first seen in {culprit or 'the loss itself'}; rows {ids}",
        "lower optimizer.lr, or look at these rows; the last checkpoint is from before this step",
    )


def _first_module(gradients: Gradients, step: Step, batches: list[Batch]) -> str | None:
    """Name of the first module whose output is not finite, found by running the rows again."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = _tensors(output)
            if not found and not all(bool(torch.isfinite(t).all()) for t in tensors):
                found.append(name)

        return hook

    model = gradients.live.model
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                handle = module.register_forward_hook(look(name))
                stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(gradients.phase("pass"))
        for batch in batches:
            with gradients.bound(batch), gradients.backend.autocast():
                gradients.live.objective(model, batch, step)
    return found[0] if found else None


def _tensors(output: Any) -> Iterable[Tensor]:
    parts = output if isinstance(output, (tuple, list)) else [output]
    return [p for p in parts if isinstance(p, Tensor) and p.is_floating_point()]


def _first_gradient(gradients: Gradients) -> str | None:
    for name, parameter in gradients.live.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of {name}"
    return None
