"""From PEFT's folders to adapted models: outlay's own adapters, MISS, ADALORA and plain LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core import registry
from ..core.errors import ConfigError, nearest
from ..nn.adapter import (
    DEFAULT,
    AdapterMethod,
    Delta,
    adapted_layers,
    bare,
    freeze_base,
    insert_deltas,
    original_name,
)
from ..nn.heads import load_head, plain_state
from ..nn.lowrank import LowRankDelta
from ..nn.targets import linear_shape, pattern_value
from .peft_save import CONFIG, PREFIX, SETTINGS, STATE, WEIGHTS, digest_of


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str = DEFAULT,
    trainable: bool = False,
) -> nn.Module:
    """Put a saved adapter into its base model; it acts alone until `set_adapter` says else.

    Args:
        model: The base model, adapted already or not; changed in place.
        folder: Written by `save_adapter`, or by PEFT for MISS, ADALORA and plain LORA.
        adapter_name: Name under which the deltas stand.
        trainable: Leave adapter and task head trainable; by default nothing is.

    Returns:
        The adapted model.

    Raises:
        ConfigError: If files are missing or broken, a layer or shape does not fit, or PEFT's
            config asks for something that outlay does not have.
    """
    where = Path(folder)
    config = _read_json(where / CONFIG)
    tensors = {_key(n): t for n, t in _read_tensors(where / WEIGHTS).items()}
    facts = _read_json(where / SETTINGS) if (where / SETTINGS).exists() else {}
    if facts and facts.get("weights") != digest_of(where / WEIGHTS):
        facts = {}  # PEFT trained on and wrote its own files anew: those are right
    modules = dict(bare(model).named_modules())
    if facts:
        deltas, methods = _own(facts, config, tensors, where, modules)
    else:
        deltas, methods = _from_peft(config, tensors, modules)
    rest = {n: t for n, t in tensors.items() if n.rpartition("#")[0] not in deltas}
    _load_rest(model, adapter_name, rest)
    model = insert_deltas(model, deltas, adapter_name)
    for name, layer in adapted_layers(model).items():
        layer.active = tuple(n for n in layer.active if n == adapter_name)
        layer.methods[adapter_name] = methods.get(original_name(name))
    freeze_base(model)
    if not trainable:
        model.requires_grad_(False)
    return model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent} has no {path.name}", "give an adapter folder, as save_adapter writes it"
        ) from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "save the adapter again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no object", "save the adapter again")
    return found


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        pickled = path.with_name("adapter_model.bin").exists()
        raise ConfigError(
            f"{path.parent} has no {path.name}" + (", only pickled weights" if pickled else ""),
            "save the adapter as safetensors; pickled files are never read",
        )
    try:
        return load_file(path)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read: {error}", "save the adapter again") from None


_UNKNOWN_LORA = (
    "use_dora", "lora_bias", "trainable_token_indices", "layer_replication", "target_parameters",
    "alora_invocation_tokens", "use_bdlora", "use_qalora",
)  # fmt: skip
_TENSOR_NAMES = ("miss_block", "lora_A", "lora_B", "lora_E")


def _key(name: str) -> str:
    """PEFT's key as `layer#tensor` for an adapter tensor, or the plain parameter name."""
    name = original_name(name.removeprefix(PREFIX)).replace(".modules_to_save.", ".")
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part in _TENSOR_NAMES or part.removeprefix("bone_") != part:
            leaf = part.replace("bone_", "miss_")
            return f"{'.'.join(parts[:index])}#{'.'.join([leaf, *parts[index + 1 :]])}"
    return name


def _grouped(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, mark, leaf = name.partition("#")
        if mark:
            groups.setdefault(layer, {})[leaf] = tensor
    yield from groups.items()


def _layer(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        raise ConfigError(
            f"the adapter has a layer {name!r}, the model has none",
            f"{nearest(name, modules)}load the base model that it was trained on",
        )
    return modules[name]


Loaded = tuple[dict[str, Delta], dict[str, AdapterMethod | None]]


def _own(
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    where: Path,
    modules: Mapping[str, nn.Module],
) -> Loaded:
    """The very methods that were saved."""
    specs = {spec for spec in facts["methods"].values() if spec}
    made = {spec: registry.build(str(spec)) for spec in specs}
    methods = {name: made.get(spec) for name, spec in facts["methods"].items()}
    state = _read_tensors(where / STATE) if (where / STATE).exists() else None
    deltas: dict[str, Delta] = {}
    for name, method in methods.items():
        layer = _layer(modules, name)
        part = {k[len(name) + 1 :]: t for k, t in (state or {}).items() if k.startswith(f"{name}.")}
        if method is None:
            deltas[name] = LowRankDelta(part["a"], part["b"])
        else:
            deltas[name] = method.make(name, layer, None)
        if state is not None:
            _reshape(deltas[name], part)
            deltas[name].load_state_dict(part)
    if state is None:
        _fill(deltas, config, tensors)
    return deltas, methods


def _reshape(delta: Delta, state: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers the shapes of a saved state: ranks may have changed."""
    for path, tensor in state.items():
        owner_path, _, leaf = path.rpartition(".")
        owner = delta.get_submodule(owner_path)
        for table in (owner._parameters, owner._buffers):
            old = table.get(leaf)
            if old is not None and old.shape != tensor.shape:
                new = torch.empty_like(tensor, dtype=old.dtype)
                table[leaf] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new  # type: ignore[assignment]


def _from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> Loaded:
    """The method that PEFT's config names, or plain LoRA."""
    kind = str(config.get("peft_type")).replace("BONE", "MISS")
    config = {**config, "peft_type": kind}
    if kind == "LORA":
        return _from_lora(config, tensors, modules), {}
    method = None
    for entry in registry.entries().values():
        cls = entry.load() if entry.card.group == "adapters" else None
        if isinstance(cls, type) and issubclass(cls, AdapterMethod):
            method = method or cls.from_peft(config)
    if method is None:
        raise ConfigError(
            f"PEFT's {kind} is not a method that outlay can load",
            "load it with PEFT, merge it, and save the plain model",
        )
    groups = dict(_grouped(tensors))
    deltas = {name: method.make(name, _layer(modules, name), None) for name in groups}
    _fill(deltas, config, tensors)
    return deltas, dict.fromkeys(deltas, method)


def _fill(
    deltas: Mapping[str, Delta], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    groups = dict(_grouped(tensors))
    for name, delta in deltas.items():
        try:
            delta.load_peft_tensors(groups[name], config, name)
        except (KeyError, RuntimeError) as error:
            raise ConfigError(
                f"the saved tensors of {name!r} do not fit the layer: {error}",
                "load the base model that the adapter was trained on",
            ) from None


def _from_lora(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> dict[str, Delta]:
    found = [key for key in _UNKNOWN_LORA if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append("bias")
    if found:
        raise ConfigError(
            f"the LoRA folder uses {', '.join(found)}, which outlay does not load",
            "load it with PEFT, merge it, and save the plain model",
        )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    deltas: dict[str, Delta] = {}
    for name, group in _grouped(tensors):
        layer = _layer(modules, name)
        out, width = linear_shape(layer)
        a, b = (group[k].flatten(1).float() for k in ("lora_A.weight", "lora_B.weight"))
        if a.shape[1] != width or b.shape[0] != out:
            raise ConfigError(
                f"LoRA of {name!r} is {b.shape[0]} x {a.shape[1]}, the layer {out} x {width}",
                "load the base model that the adapter was trained on",
            )
        r = pattern_value(ranks, name, config["r"])
        alpha = pattern_value(alphas, name, config.get("lora_alpha", 8))
        scaling = alpha / (r**0.5 if config.get("use_rslora") else r)
        deltas[name] = LowRankDelta(a, b, scaling, float(config.get("lora_dropout", 0.0)))
    return deltas


def _load_rest(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Modules that were saved whole."""
    current = plain_state(model)
    for name, tensor in tensors.items():
        target = current.get(name)
        if target is None or target.shape != tensor.shape:
            have = "has none" if target is None else f"has {tuple(target.shape)}"
            hint = nearest(name, current) if target is None else ""
            raise ConfigError(
                f"the adapter holds {name!r} {tuple(tensor.shape)}, the model {have}",
                f"{hint}load the base model that it was trained on",
            )
    load_head(model, adapter_name, tensors)
