"""PEFT: its adapters as the method `peft(type=...)`, and its folders read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..core import callspec
from ..core.card import Card
from ..core.claims import Claim
from ..core.errors import ConfigError, Conflict, nearest, require
from ..core.losses import Objective
from ..core.method import Context, OnModel, OnObjective, OnStep, Watcher, hashable, seed_of
from ..nn.adapted import swap, untie
from ..nn.adapter import DEFAULT, TargetedMethod, plain_layer
from ..nn.targets import head_modules, is_conv1d, weight_of
from .peft_load import load_adapter
from .peft_save import save_adapter

# Additions to the weight that know nothing of its value; everything else counts as a product.
_ADDITIVE = (
    "LORA", "ADALORA", "MISS", "VERA", "LOHA", "LOKR", "FOURIERFT", "RANDLORA", "VBLORA", "SHIRA",
    "C3A", "WAVEFT", "GRALORA", "UNILORA", "PVERA",
)  # fmt: skip
# Settings that only work through PEFT's own wrapper, or need data that is not at hand.
_REFUSED = ("kasa_config", "monteclora_config", "megatron_config", "layer_replication")
_PLAIN: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
_NEED_DATA = ("eva", "corda", "lora_ga", "loftq")


@dataclass(frozen=True, kw_only=True, init=False)
class Peft(TargetedMethod, OnModel, OnObjective, OnStep):
    """Any adapter of PEFT that lives in layers: `peft(type='LORA', r=8, lora_alpha=16)`.

    Layers are chosen in outlay's words (the same as PEFT's), are injected into the model in
    place, and merge back into plain layers on export. The task's head trains as it does beside
    outlay's own adapters. AdaLoRA gets the call and the penalty that PEFT leaves to its user.

    Attributes:
        type: PEFT's name of the method, any case; "DORA" is LoRA with `use_dora=True`.
        options: Every other keyword, as PEFT's config of that type takes it.
    """

    card: ClassVar[Card] = Card(
        name="peft",
        title="Adapters of the PEFT library",
        group="adapters",
        summary="Any adapter of PEFT that lives in layers (LoRA, DoRA, VeRA and others).",
        claims=("delta.additive",),
        saves=("trainable parameters", "optimizer memory"),
        freezes_base=True,
    )

    type: str
    options: tuple[tuple[str, Any], ...] = ()

    def __init__(
        self,
        *,
        type: str,
        target_modules: Any = "all-linear",
        layers_to_transform: Any = None,
        modules_to_save: Any = (),
        adapter_name: str = DEFAULT,
        options: Any = (),
        **others: Any,
    ) -> None:
        kind = type.upper() if isinstance(type, str) else type
        try:
            given = {**{str(key): value for key, value in dict(options).items()}, **others}
        except (TypeError, ValueError):
            raise ConfigError(
                f"peft.options = {callspec.shown(options)} is not allowed",
                "give PEFT's own keywords beside type, as in peft(type='LORA', r=8)",
            ) from None
        if kind == "DORA":
            kind, given = "LORA", {**given, "use_dora": True}
        values = {
            "type": kind,
            "target_modules": target_modules,
            "layers_to_transform": layers_to_transform,
            "modules_to_save": modules_to_save or (),
            "adapter_name": adapter_name,
            "options": tuple(sorted((key, hashable(value)) for key, value in given.items())),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def spec(self) -> str:
        """The call string: type, PEFT's keywords, and what else differs from the defaults."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {f.name: hashable(f.default) for f in dataclasses.fields(self)}
        own.pop("options")
        changed = {k: v for k, v in own.items() if k == "type" or v != plain[k]}
        first = {"type": changed.pop("type")}
        return callspec.render(self.card.name, {**first, **dict(self.options), **changed})

    def validate(self) -> None:
        """Refuse what PEFT does not know, what it refuses, and what needs its own wrapper."""
        require("peft", "peft")
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
        from peft.tuners.tuners_utils import BaseTuner

        known = {str(getattr(k, "value", k)): k for k in PEFT_TYPE_TO_CONFIG_MAPPING}
        if self.type not in known:
            raise ConfigError(
                f"peft.type = {self.type!r} is not a method of the installed PEFT",
                f"{nearest(self.type, known)}it has {', '.join(sorted(known))}",
            )
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[known[self.type]]
        needs_wrapper = not issubclass(tuner, BaseTuner) or (
            {"forward", "update_and_allocate"} & set(vars(tuner)) and self.type != "ADALORA"
        )
        if needs_wrapper:
            raise ConfigError(
                f"peft.type = {self.type!r} works only inside PEFT's own model wrapper",
                "use a type whose adapters live in layers, such as LORA, VERA or IA3",
            )
        cls = PEFT_TYPE_TO_CONFIG_MAPPING[known[self.type]]
        fields = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        given = dict(self.options)
        for name, value in given.items():
            if name not in fields or name == "peft_type":
                raise ConfigError(
                    f"PEFT's {self.type} has no setting {name!r}",
                    f"{nearest(name, fields)}its settings are {', '.join(sorted(fields))}",
                )
            plain = _PLAIN.get(fields[name])
            rank = name in ("r", "init_r", "target_r")
            fits = plain is None or (isinstance(value, plain) and isinstance(value, bool) == (
                plain is bool))  # fmt: skip
            if not fits or (rank and value < 1):
                raise ConfigError(
                    f"peft.{name} = {value!r} is not allowed",
                    f"give {fields[name]}" + (" >= 1" if rank else ""),
                )
        data = given.get("init_lora_weights") in _NEED_DATA
        refused = [n for n in _REFUSED if given.get(n)] + ["init_lora_weights"] * data
        if given.get("bias", "none") != "none":
            refused.append("bias")
        if refused:
            raise ConfigError(
                f"peft.{refused[0]} = {given[refused[0]]!r} cannot be injected into a plain model",
                "leave it out, or train through PEFT itself",
            )
        self.config(["any"], total_steps=given.get("total_step") or 10**9)

    def config(self, targets: list[str], total_steps: int | None = None, **extra: Any) -> Any:
        """PEFT's config of these settings.

        Raises:
            ConfigError: With PEFT's reason, if it refuses a value.
        """
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        cls: Any = next(c for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if k == self.type)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        given = {name: _thaw(value, fields[name]) for name, value in self.options}
        given |= {name: value for name, value in extra.items() if name in fields}
        if self.type == "ADALORA":
            given.setdefault("total_step", total_steps)
        if "feedforward_modules" in given:
            # PEFT wants a subset of the targets, which are whole paths here.
            ends = tuple(f".{name}" for name in given["feedforward_modules"])
            given["feedforward_modules"] = [t for t in targets if f".{t}".endswith(ends)]
        try:
            return cls(target_modules=targets, **given)
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{self.spec()}: PEFT refuses it", " ".join(str(error).split())
            ) from None

    def kinds(self) -> tuple[type[nn.Module], ...]:
        """Any module where targets are named: PEFT knows which of them its method can adapt."""
        return () if self.target_modules == "all-linear" else (nn.Module,)

    def adapt(self, model: nn.Module, context: Context | None = None) -> nn.Module:
        """Inject PEFT's layers in place; the base is frozen only when called by hand.

        Raises:
            ConfigError: If PEFT refuses the layers.
            NoEffect: If no module matches.
            Conflict: If PEFT already put an adapter into this model.
        """
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        if hasattr(model, "peft_config"):
            raise Conflict(
                "the model already has an adapter of PEFT, and 'peft' would bring a second",
                "use one peft(...) method a model",
            )
        found = self.targets(model)
        paths = {id(module): path for path, module in model.named_modules()}
        turned = all(is_conv1d(layer) for layer in found.values())
        extra = {"fan_in_fan_out": True} if turned else {}
        keep, heads = set(self.trains(model)), head_modules(model)
        config = self.config(
            [paths[id(layer)] for layer in found.values()],
            context.total_steps if context is not None else None,
            **extra,
        )
        before = {id(p): (n, p.requires_grad) for n, p in model.named_parameters()}
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        seed = seed_of(context.seed if context is not None else 0, "peft", self.adapter_name)
        devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
        # PEFT draws from the global generator: lend it one that only this seed decides.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            try:
                tuner(model, config, adapter_name=self.adapter_name, low_cpu_mem_usage=False)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{self.spec()}: PEFT refuses these layers", " ".join(str(error).split())
                ) from None
        by_hand = context is None or not context.freezes
        for name, parameter in model.named_parameters():
            if id(parameter) in before:
                original, trained = before[id(parameter)]
                head = original in keep or original.split(".")[0] in heads
                parameter.requires_grad_(head if by_hand else trained)
            elif ".ranknum." in name:
                # PEFT 0.21 marks AdaLoRA's constant rho trainable: an optimizer would move it.
                parameter.requires_grad_(False)
        return model

    def export(self, model: nn.Module) -> nn.Module:
        """Merge, put the base layers back and leave nothing of PEFT behind."""
        for module in list(_layers(model)):
            layer = plain_layer(module)
            if isinstance(getattr(layer, "weight", None), nn.Parameter):
                # PEFT merges in place: a weight tied to another layer's must not follow.
                layer.weight = nn.Parameter(weight_of(layer).detach().clone(), False)
            with torch.no_grad():
                module.merge(safe_merge=False, adapter_names=[self.adapter_name])
            model = swap(model, module, module.base_layer)
        for name in ("peft_config", "_hf_peft_config_loaded"):
            if name in vars(model):
                delattr(model, name)
        untie(model)
        return model

    def shape(self, objective: Objective, model: nn.Module, context: Context) -> Objective:
        """AdaLoRA's penalty; other types leave the objective alone."""
        if self.type != "ADALORA":
            return objective
        from ._peft_run import PeftPenalty

        weight = model.peft_config[self.adapter_name].orth_reg_weight  # type: ignore[index]
        return PeftPenalty(objective, self.adapter_name, weight) if weight else objective

    def watch(self, live: Any) -> Watcher:
        """AdaLoRA's allocation; other types watch nothing."""
        if self.type != "ADALORA":
            return Watcher()
        from ._peft_run import PeftAllocation

        return PeftAllocation(live.model, self.adapter_name)

    def claims(self, model: nn.Module | None) -> list[Claim]:
        """An addition that stacks, or a product with the frozen weight that does not."""
        given = dict(self.options)
        product = given.get("use_dora") or given.get("init_weights") == "bat"
        if self.type in _ADDITIVE and not product:
            return super().claims(model)
        return [Claim("delta.multiplicative", c.parameters) for c in super().claims(model)]


def _layers(model: nn.Module) -> Iterator[Any]:
    """PEFT's layers, outermost first."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    yield from (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def _thaw(value: Any, field: dataclasses.Field[Any]) -> Any:
    """A frozen setting as PEFT's config wants it: maps where the field is a map, else lists."""
    if not isinstance(value, tuple):
        return value
    pairs = all(isinstance(item, tuple) and len(item) == 2 for item in value)
    if value and pairs and "dict" in str(field.type):
        return {key: list(v) if isinstance(v, tuple) else v for key, v in value}
    return list(value)


__all__ = ["Peft", "load_adapter", "save_adapter"]
