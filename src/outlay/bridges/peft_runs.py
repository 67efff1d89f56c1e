"""PEFT folders from finished runs: PEFT's own adapters, and outlay's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ..core.errors import ConfigError
from ..nn.adapter import adapter_names
from ..nn.targets import head_modules
from ..training.finished import Finished
from .peft_save import PREFIX, WEIGHTS, save_adapter


def injected_adapters(model: nn.Module) -> list[str]:
    """Names of PEFT's adapters in a model."""
    found = getattr(model, "peft_config", None)
    return list(found) if isinstance(found, dict) else []


def save_injected(model: nn.Module, folder: Path, base: str | None, adapter_name: str) -> str:
    """Write adapter and trained head as PEFT's `save_pretrained` would.

    Args:
        model: The model that PEFT's layers were injected into; stays as it is.
        folder: Made if missing.
        base: Where the base model is, for `base_model_name_or_path`.
        adapter_name: Which adapter.

    Returns:
        The PEFT type.

    Raises:
        ConfigError: If PEFT cannot take this type out of a plain model.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict

    config: Any = copy.copy(model.peft_config[adapter_name])  # type: ignore[index]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    try:
        tensors = get_peft_model_state_dict(
            model,
            state_dict=_with_shared(model, adapter_name),
            adapter_name=adapter_name,
            save_embedding_layers=False,
        )
    except (KeyError, AttributeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"PEFT cannot take {kind} out of the model it was injected into "
            f"({type(error).__name__})",
            "export the whole model with --format transformers",
        ) from None
    heads = [
        name
        for name in head_modules(model)
        if any(p.requires_grad for p in model.get_submodule(name).parameters())
    ]
    tensors = {
        name if name.startswith("base_model.") else f"{PREFIX}{name}": value
        for name, value in tensors.items()
    }
    for head in heads:
        for name, value in model.get_submodule(head).state_dict().items():
            tensors[f"{PREFIX}{head}.{name}"] = value
    config.base_model_name_or_path = base
    config.modules_to_save = heads or None
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return kind


def _with_shared(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The model's state, with VeRA's shared projections where PEFT's own wrapper has them."""
    state = dict(model.state_dict())
    for part in ("vera_A", "vera_B"):
        ending = f".{part}.{adapter_name}"
        shared = next((value for name, value in state.items() if name.endswith(ending)), None)
        if shared is not None:
            state[f"base_model{ending}"] = shared
    return state


def save_run_adapter(finished: Finished, folder: Path) -> str:
    """Write the adapter of a finished run alone as a PEFT folder.

    Args:
        finished: As from `training.finished.open_run`.
        folder: Made if missing.

    Returns:
        The PEFT type that was written.

    Raises:
        ConfigError: If the run trained no adapter, or several.
    """
    model = finished.assembly.model
    injected = injected_adapters(model)
    names = [*adapter_names(model), *injected]
    if len(names) != 1:
        raise ConfigError(
            f"run {finished.folder.name} holds "
            + (f"the adapters {', '.join(names)}" if names else "no adapter"),
            "export the whole model with --format transformers",
        )
    save = save_injected if injected else save_adapter
    kind = save(model, folder, finished.base_reference(), names[0])
    if finished.tokenizer is not None:
        finished.tokenizer.save_pretrained(str(folder))
    return kind
