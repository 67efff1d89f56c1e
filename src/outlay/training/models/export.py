"""Plain transformers folders out, written whole or not at all; and the hash of weights."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.drafts import drafted
from ...core.errors import ConfigError
from ..data.labels import Labels
from .heads import output_layer
from .quiet import quiet_transformers


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's values as little-endian bytes in row order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.int16)
    array = flat.numpy()
    if sys.byteorder == "big":
        array = array.byteswap()
    return array.tobytes()


def fingerprint(
    model: nn.Module | Mapping[str, Tensor], keep: Callable[[str], bool] | None = None
) -> str:
    """SHA-256 over named tensors in name order: name, dtype, shape, little-endian bytes.

    Args:
        model: A module (its parameters; a tied one counts once, under its first name) or
            tensors by name.
        keep: Names that count; all by default.
    """
    tensors = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if keep is not None and not keep(name):
            continue
        tensor = tensors[name]
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{kind}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def save_model(
    model: nn.Module,
    tokenizer: Any,
    folder: str | Path,
    labels: Labels | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a plain transformers folder: weights, config with label names, tokenizer.

    The folder appears whole or not at all. A regression head is multiplied by the targets'
    scale, so that the saved model predicts in the target's own unit.

    Args:
        model: A transformers model without adapters.
        tokenizer: Its tokenizer, or None.
        folder: Where to write; must not exist or be empty unless `overwrite`.
        labels: Label space; names default to what the config holds.
        overwrite: Replace a folder that is there.

    Raises:
        ConfigError: If the folder holds something, or the model cannot be saved.
    """
    folder = Path(folder)
    if not hasattr(model, "save_pretrained"):
        raise ConfigError(
            f"{type(model).__name__} is no transformers model and has no folder format",
            "save its state_dict() with safetensors",
        )
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{str(folder)!r} is there already", "give another folder")
    with drafted(folder) as draft:
        _write(model, tokenizer, draft, labels)
    return folder


def _write(model: Any, tokenizer: Any, draft: Path, labels: Labels | None) -> None:
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if labels is not None and labels.scale:
        state |= _in_own_units(model, state, labels)
    config = model.config
    try:
        model.config = copy.deepcopy(config)
        if labels is not None and labels.names:
            model.config.id2label, model.config.label2id = labels.id2label, labels.label2id
        if hasattr(config, "use_cache"):
            model.config.use_cache = True
        with quiet_transformers():
            model.save_pretrained(str(draft), state_dict=state)
    finally:
        model.config = config
    if tokenizer is not None:
        tokenizer.save_pretrained(str(draft))
    if getattr(model, "main_input_name", "") == "pixel_values":
        contract = json.dumps(_image_contract(config), indent=2)
        (draft / "preprocessor_config.json").write_text(contract + "\n", encoding="utf-8")


def _image_contract(config: Any) -> dict[str, Any]:
    """What the model was trained on: images of one size, values from 0 to 1."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }


def _in_own_units(model: nn.Module, state: Mapping[str, Tensor], labels: Labels) -> dict[str, Any]:
    layer = output_layer(model)
    path = next(name for name, module in model.named_modules() if module is layer)
    scale = torch.tensor(labels.scale, dtype=torch.float64)
    scaled = {}
    for name, column in ((f"{path}.weight", scale[:, None]), (f"{path}.bias", scale)):
        if name in state:
            tensor = state[name]
            scaled[name] = (tensor.double() * column.to(tensor.device)).to(tensor.dtype)
    return scaled
