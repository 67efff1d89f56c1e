"""Heads that belong to adapters: modules saved whole beside one, switched together with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_adapter_heads"


class Heads:
    """Values of whole modules by adapter name; `None` is the base model's own.

    Attributes:
        states: Tensors by plain parameter name, by adapter.
        current: Whose values the model holds now.
    """

    def __init__(self) -> None:
        self.states: dict[str | None, dict[str, Tensor]] = {None: {}}
        self.current: str | None = None


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names without wrappers, live and not copied."""
    state = model.state_dict(keep_vars=True)
    return {".".join(p for p in n.split(".") if p != "base_layer"): t for n, t in state.items()}


@torch.no_grad()
def load_head(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's whole modules into the model and remember what they replace.

    Args:
        model: Holds every name with the same shape.
        adapter: Whose they are.
        tensors: By plain parameter name.
    """
    heads: Heads = model.__dict__.setdefault(_ATTRIBUTE, Heads())
    switch_head(model, None)
    live = plain_state(model)
    for name in tensors:
        heads.states[None].setdefault(name, live[name].detach().clone())
    heads.states[adapter] = {name: tensor.clone() for name, tensor in tensors.items()}
    switch_head(model, adapter)


@torch.no_grad()
def switch_head(model: nn.Module, adapter: str | None) -> str | None:
    """Let the model hold an adapter's whole modules, or the base's; what it held is kept.

    Returns:
        Whose values it held before.
    """
    heads: Heads | None = model.__dict__.get(_ATTRIBUTE)
    if heads is None or heads.current == adapter:
        return None if heads is None else heads.current
    live, before = plain_state(model), heads.current
    for name in heads.states.get(before, {}):
        heads.states[before][name] = live[name].detach().clone()
    for name, base in heads.states[None].items():
        live[name].copy_(heads.states.get(adapter, {}).get(name, base))
    heads.current = adapter
    return before
