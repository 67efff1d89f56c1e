"""Adapters as PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`.

A method that PEFT has too is written as that method. Any other delta that is exactly low-rank is
written as LoRA. The rest is written so that PEFT refuses it by name. Beside them `outlay.json`
holds the settings, and where PEFT's form is not the method's own, `outlay.safetensors` its
state, so that outlay reloads the very method. PEFT itself is not needed here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import ConfigError, nearest
from ..nn.adapter import (
    DEFAULT,
    AdapterMethod,
    Delta,
    adapted_layers,
    adapter_names,
    bare,
    original_name,
    plain_layer,
)
from ..nn.targets import head_modules, is_conv1d, weight_of

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS, STATE = "outlay.json", "outlay.safetensors"
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base: str | Path | None = None,
    adapter_name: str = DEFAULT,
    peft_type: str | None = None,
) -> str:
    """Write one adapter and the modules trained beside it.

    Args:
        model: The adapted model; stays as it is.
        folder: Made if missing.
        base: Where the base model is, for `base_model_name_or_path`; the model's own by default.
        adapter_name: Which adapter.
        peft_type: "LORA" writes a low-rank delta as LoRA though PEFT has its method.

    Returns:
        The PEFT type that was written, or "OUTLAY" where only outlay can load the folder (a
        warning says so).

    Raises:
        ConfigError: If there is no such adapter, or it cannot be written as `peft_type`.
    """
    if not adapted_layers(model) and adapter_name in getattr(model, "peft_config", {}):
        return _save_injected(model, Path(folder), base, adapter_name)
    deltas, layers, methods = _collect(model, adapter_name)
    makers = dict.fromkeys(m for m in methods.values() if m is not None)
    method = next(iter(makers)) if len(makers) == 1 and None not in methods.values() else None
    own = method.to_peft(deltas, layers) if method is not None else None
    if own and peft_type in (None, own["peft_type"]):
        entries, tensors = own, _named(deltas, lambda delta: delta.peft_tensors())
    else:
        entries, tensors = _as_lora_or_none(deltas, layers, peft_type, tuple(makers))
    saved = trained_modules(model, tuple(makers))
    current = {original_name(n): t for n, t in model.state_dict().items()}
    for path in saved:
        tensors |= {n: t for n, t in current.items() if n.startswith(f"{path}.")}
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": str(base) if base is not None else _home(model),
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": list(saved) or None,
        "target_modules": sorted(deltas),
        "task_type": _task(model),
        **entries,
    }
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    for stale in (SETTINGS, STATE):
        (where / stale).unlink(missing_ok=True)
    digest = _write_tensors(where / WEIGHTS, {PREFIX + n: t for n, t in tensors.items()})
    if makers:
        if entries is not own:
            _write_tensors(where / STATE, _named(deltas, lambda delta: delta.state_dict()))
        specs = {name: made.spec() if made else None for name, made in methods.items()}
        facts = {"format": 1, "methods": specs, "weights": digest}
        _write_text(where / SETTINGS, json.dumps(facts, indent=2))
    _write_text(where / CONFIG, json.dumps(config, indent=2, sort_keys=True))
    if config["peft_type"] == "OUTLAY":
        warnings.warn(str(config["note"]), stacklevel=2)
    return str(config["peft_type"])


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _save_injected(
    model: nn.Module, where: Path, base: str | Path | None, adapter_name: str
) -> str:
    """An adapter that `peft(type=...)` injected, in PEFT's own words, with the trained modules."""
    from peft.utils import get_peft_model_state_dict

    kept: Any = model.peft_config[adapter_name]  # type: ignore[index]
    whole, shared = getattr(kept, "save_projection", False), {}
    if whole:
        # Projections that all layers share stand on PEFT's wrapper, which is not there: take
        # them from a layer.
        kept.save_projection = False
        for module in model.modules():
            for name in ("vera_A", "vera_B"):
                held = getattr(module, name, {})
                if name not in shared and adapter_name in held:
                    shared[f"base_model.{name}"] = held[adapter_name]
    try:
        tensors = get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        )
    finally:
        if whole:
            kept.save_projection = True
    saved = trained_modules(model, ())
    current = {original_name(n): t for n, t in model.state_dict().items()}
    for path in saved:
        tensors |= {n: t for n, t in current.items() if n.startswith(f"{path}.")}
    config = copy.deepcopy(kept)
    config.base_model_name_or_path = str(base) if base is not None else _home(model)
    config.modules_to_save, config.task_type = list(saved) or None, _task(model)
    config.inference_mode = True
    # The paths that were injected may lead through wrappers; the base model has none.
    config.target_modules = sorted(map(original_name, config.target_modules))
    where.mkdir(parents=True, exist_ok=True)
    for stale in (SETTINGS, STATE):
        (where / stale).unlink(missing_ok=True)
    prefixed = {PREFIX + n.removeprefix(PREFIX): t for n, t in tensors.items()}
    _write_tensors(where / WEIGHTS, prefixed | shared)
    config.save_pretrained(str(where))
    return str(getattr(config.peft_type, "value", config.peft_type))


def _collect(
    model: nn.Module, name: str
) -> tuple[dict[str, Delta], dict[str, nn.Module], dict[str, AdapterMethod | None]]:
    """Deltas, plain layers and what made each, by the layer's original path."""
    wrapped = {original_name(n): m for n, m in adapted_layers(model).items() if name in m.deltas}
    if not wrapped:
        known = adapter_names(model)
        raise ConfigError(
            f"no adapter {name!r} to save",
            f"{nearest(name, known)}the model has {', '.join(known) or 'none'}",
        )
    deltas: dict[str, Any] = {n: m.deltas[name] for n, m in wrapped.items()}
    layers = {n: plain_layer(m.base_layer) for n, m in wrapped.items()}
    return deltas, layers, {n: m.methods.get(name) for n, m in wrapped.items()}


def _named(
    deltas: Mapping[str, Delta], pick: Callable[[Delta], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    return {f"{name}.{k}": t for name, delta in deltas.items() for k, t in pick(delta).items()}


def _as_lora_or_none(
    deltas: Mapping[str, Delta],
    layers: Mapping[str, nn.Module],
    wanted: str | None,
    makers: tuple[AdapterMethod, ...],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LoRA where every delta is exactly low-rank, else a config that PEFT refuses by name."""
    factors = {name: delta.to_lora() for name, delta in deltas.items()}
    exact = all(f is not None for f in factors.values()) and all(
        getattr(layer, "groups", 1) == 1 for layer in layers.values()
    )
    if exact and wanted in (None, "LORA"):
        return _as_lora({n: f for n, f in factors.items() if f}, layers)
    what = " + ".join(maker.spec() for maker in makers) or "this adapter"
    if wanted is not None:
        raise ConfigError(
            f"{what} cannot be written as PEFT's {wanted}",
            "leave peft_type out" + (', or use "LORA"' if exact else ""),
        )
    note = (
        f"{what} is neither one of PEFT's methods nor exactly low-rank: PEFT cannot load this "
        "folder. Load it with outlay.load_adapter, or export a merged model."
    )
    return {"peft_type": "OUTLAY", "note": note}, {}


def _as_lora(
    factors: Mapping[str, tuple[Tensor, Tensor]], layers: Mapping[str, nn.Module]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LoRA with scaling 1 everywhere (alpha = r); a rank of 0 is written as one row of zeros."""
    tensors, ranks = {}, {}
    for name, (a, b) in factors.items():
        if not len(a):
            a, b = a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1)
        layer, ranks[name] = layers[name], len(a)
        if isinstance(layer, nn.Conv2d):
            a, b = a.reshape(len(a), *weight_of(layer).shape[1:]), b[:, :, None, None]
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in sorted(ranks.items()) if rank != usual}
    entries = {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "rank_pattern": other,
        "alpha_pattern": other,
        "fan_in_fan_out": any(is_conv1d(layer) for layer in layers.values()),
        "init_lora_weights": True,
    }
    return entries, tensors


def trained_modules(model: nn.Module, methods: tuple[AdapterMethod, ...]) -> tuple[str, ...]:
    """Paths of modules to save whole beside the deltas: the head, and whatever else trains."""
    view = dict(bare(model).named_modules())
    wrapped = {original_name(n) for n in adapted_layers(model)}
    wanted = [*head_modules(model), *(n for m in methods for n in m.modules_to_save)]
    paths = [n for n in view if any(n == w or n.endswith(f".{w}") for w in wanted)]
    for name, parameter in model.named_parameters():
        path = original_name(name.rpartition(".")[0])
        if parameter.requires_grad and path in view:
            paths.append(path)
    kept: dict[str, None] = {}
    for path in dict.fromkeys(paths):
        if path not in wrapped and not any(p == path or path.startswith(f"{p}.") for p in kept):
            kept[path] = None
    # PEFT takes a name for every module whose path ends in it, so those must be there too.
    also = [n for n in view if n not in kept and any(n.endswith(k) for k in kept) and n]
    return (*kept, *(n for n in also if next(view[n].parameters(), None) is not None))


def _task(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


def _home(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    part = path.with_name(path.name + ".part")
    save_file(
        {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()},
        part,
        metadata={"format": "pt"},
    )
    os.replace(part, path)
    return digest_of(path)
