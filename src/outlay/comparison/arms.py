"""Arms of a comparison: a name, the methods that it adds to the shared recipe, its own settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core import callspec, registry
from ..core.errors import ConfigError
from ..training.recipe import Recipe


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison.

    Attributes:
        name: How the report calls it.
        methods: Call strings joined by "+", method objects, or the name of an estimator.
        settings: Dotted recipe settings of this arm alone, as {"optimizer.lr": 3e-3}.
        note: A remark beside the name, as "lr from the validation grid".
    """

    name: str
    methods: str | tuple[Any, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read `NAME=bone(r=16)+loss_weights @ optimizer.lr=3e-3, batch.size=8`.

        Raises:
            ConfigError: If there is no name.
        """
        import yaml

        body, _, tail = text.partition("@")
        name, equals, methods = body.partition("=")
        if not equals or "(" in name:
            name, methods = body.strip(), body.strip()
        settings = {}
        for part in filter(None, (p.strip() for p in tail.split(","))):
            key, found, value = part.partition("=")
            if not found:
                raise ConfigError(f"arm setting {part!r} has no value", "write key=value")
            settings[key.strip()] = yaml.safe_load(value)
        if not name.strip():
            raise ConfigError(f"arm {text!r} has no name", 'write "NAME=bone(r=16)"')
        return cls(name.strip(), methods.strip(), settings)

    def parts(self) -> tuple[Any, ...]:
        """The methods, built."""
        if isinstance(self.methods, str):
            return tuple(registry.build(part) for part in callspec.split_sum(self.methods))
        return tuple(registry.build(part) for part in self.methods)

    def estimator(self) -> Any | None:
        """The estimator that this arm fits instead of training, or None."""
        if isinstance(self.methods, str) and self.methods and "+" not in self.methods:
            name, settings = callspec.parse(self.methods)
            entry = registry.entries().get(name.replace("-", "_"))
            if entry is not None and entry.kind == "estimator":
                return registry.construct(entry.load(), settings)
        return None

    def recipe(self, shared: Recipe) -> Recipe:
        """The shared recipe with this arm's methods and settings."""
        settings: dict[str, Any] = {"methods": (*shared.methods, *self.parts()), **self.settings}
        return shared.changed(settings)

    def facts(self) -> list[Any]:
        """What distinguishes it, JSON-able: name, methods, settings."""
        methods: Any = self.methods
        if self.estimator() is None:
            methods = [part.spec() if hasattr(part, "spec") else repr(part)
                       for part in self.parts()]  # fmt: skip
        return [self.name, methods, dict(self.settings)]


def arms_of(arms: Mapping[str, Any] | Sequence[Arm | str]) -> list[Arm]:
    """Arms from objects, strings, or a mapping of names to methods.

    Raises:
        ConfigError: With fewer than two, or if two have one name.
    """
    if isinstance(arms, Mapping):
        chosen = [
            value
            if isinstance(value, Arm)
            else Arm(name, value if isinstance(value, (str, tuple)) else tuple(value))
            for name, value in arms.items()
        ]
    else:
        chosen = [arm if isinstance(arm, Arm) else Arm.parse(arm) for arm in arms]
    names = [arm.name for arm in chosen]
    if len(chosen) < 2 or len(set(names)) != len(names):
        raise ConfigError(
            f"arms {names}: a comparison needs two arms of different names",
            'give --arm "NAME=bone(r=16)" twice or more',
        )
    return chosen
