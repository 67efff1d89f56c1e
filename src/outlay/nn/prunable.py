"""Which weights may be sparse: the linear layers of the repeated blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ..core.errors import ConfigError, NoEffect
from ..core.live import Live
from .targets import is_conv1d, is_linear, match_modules

_WRAPPED = ".base_layer"  # where adapters keep the layer that they stand around


def prunable_weights(
    model: nn.Module, exclude: Sequence[str] = (), head: bool = False
) -> dict[str, int]:
    """Weights that a mask may hold, with the axis of their inputs, in model order.

    Attention projections and feed-forward layers of the repeated blocks; in a model without
    blocks every linear layer outside the task's head. Embeddings, norms and biases never.

    Args:
        model: Any module.
        exclude: Expressions or ends of paths of layers that stay dense.
        head: The output layer of a language model too, as in the released code of arXiv
            2501.12486.

    Raises:
        NoEffect: If nothing is left.
        ConfigError: If `exclude` is broken, or a weight is tied to an embedding or quantized.
    """
    linear = match_modules(model)
    found = {name: m for name, m in linear.items() if _in_blocks(model, name)} or linear
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if head and output is not None and is_linear(output):
        found |= {name: m for name, m in model.named_modules() if m is output}
    try:
        dense = [re.compile(rf"(.*\.)?({text})") for text in exclude]
    except re.error as error:
        raise ConfigError(
            f"exclude = {tuple(exclude)} is no list of names or expressions ({error})",
            "give ends of paths, as q_proj, or regular expressions",
        ) from None
    found = {
        name: m for name, m in found.items()
        if not any(each.fullmatch(name.removesuffix(_WRAPPED)) for each in dense)
    }  # fmt: skip
    if not found:
        raise NoEffect(
            f"exclude = {tuple(exclude)} leaves no weight of {type(model).__name__} to prune",
            "exclude fewer layers",
        )
    embedded = {
        id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    for name, module in found.items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if id(weight) in embedded:
            raise ConfigError(
                f"{name!r} is tied to the embedding {embedded[id(weight)]!r}, which stays dense",
                "leave it out, or untie them",
            )
        if not weight.is_floating_point():
            raise ConfigError(
                f"the weight of {name!r} is quantized ({weight.dtype})",
                "load the model in float32 or bfloat16",
            )
    return {f"{name}.weight": 0 if is_conv1d(m) else 1 for name, m in found.items()}


def prunable_in(live: Live, exclude: Sequence[str] = (), head: bool = False) -> dict[str, int]:
    """Those of a run, by original name: what adapters brought is left out."""
    original = {current: name for name, current in live.aliases.items()}
    found = prunable_weights(live.model, exclude, head)
    return {original[name]: axis for name, axis in found.items() if name in original}


def _in_blocks(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    above = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return any(isinstance(model.get_submodule(path), nn.ModuleList) for path in above)
