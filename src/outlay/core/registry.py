"""Which methods there are: cards are literals in the source, read without importing anything."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import callspec
from .card import Card
from .errors import ConfigError, nearest

ROOT = Path(__file__).resolve().parents[1]
ENTRY_POINTS = "outlay.methods"
PLACE_NAMES = (
    "OnData", "OnBatch", "OnModel", "OnObjective", "OnOptimizer", "OnSchedule", "OnStep",
    "OnReward",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One thing that the registry knows.

    Attributes:
        card: Its card.
        module: Dotted module that defines it.
        qualname: Name of the class in that module.
        places: Places where it acts; empty for estimators.
        path: Source file.
        kind: "method" or "estimator".
    """

    card: Card
    module: str
    qualname: str
    places: tuple[str, ...]
    path: Path
    kind: str = "method"

    def load(self) -> type:
        """Import the class."""
        return getattr(importlib.import_module(self.module), self.qualname)


def _cards(path: Path, module: str, kind: str) -> list[Entry]:
    """Entries of one source file: classes with `card ... = Card(<literals>)`."""
    entries = []
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(
            f"cannot read methods from {module!r} ({error})", "repair or uninstall its package"
        ) from None
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for line in node.body:
            target = line.target if isinstance(line, ast.AnnAssign) else None
            if not (isinstance(target, ast.Name) and target.id == "card"):
                continue
            value = line.value  # type: ignore[union-attr]
            if isinstance(value, ast.Call):
                try:
                    facts = {k.arg: ast.literal_eval(k.value) for k in value.keywords if k.arg}
                    card = Card(**facts)
                except (ValueError, TypeError) as error:
                    raise ConfigError(
                        f"the card of {module}.{node.name} cannot be read ({error})",
                        "write it as literals, with a name and a title",
                    ) from None
                bases = {ast.unparse(b).rpartition(".")[2] for b in node.bases}
                places = tuple(place for place in PLACE_NAMES if place in bases)
                entries.append(Entry(card, module, node.name, places, path, kind))
    return entries


def _sources() -> list[tuple[Path, str, str]]:
    found = [(p, "method") for p in sorted((ROOT / "methods").glob("*/[!_]*.py"))]
    found += [(p, "method") for p in sorted((ROOT / "bridges").glob("[!_]*.py"))]
    found += [(p, "estimator") for p in sorted((ROOT / "estimators").glob("[!_]*.py"))]
    return [
        (path, ".".join(("outlay", *path.relative_to(ROOT).with_suffix("").parts)), kind)
        for path, kind in found
    ]


@functools.cache
def entries() -> dict[str, Entry]:
    """All entries by card name: outlay's own and those of installed packages.

    Raises:
        ConfigError: If two of them have one name.
    """
    table: dict[str, Entry] = {}
    found = [entry for source in _sources() for entry in _cards(*source)]
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        module, _, qualname = point.value.partition(":")
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"entry point {point.name!r} names a missing module {module!r}",
                "repair or uninstall the package that declares it",
            )
        cards = _cards(Path(spec.origin), module, "method")
        found += [entry for entry in cards if entry.qualname == qualname]
    for entry in found:
        if entry.card.name in table:
            raise ConfigError(
                f"two methods are named {entry.card.name!r}: {table[entry.card.name].module} "
                f"and {entry.module}",
                "rename one of them",
            )
        table[entry.card.name] = entry
    return table


def find(name: str) -> Entry:
    """The entry of a name; dashes and underscores are equal.

    Raises:
        ConfigError: With the nearest spelling.
    """
    key = name.replace("-", "_")
    table = entries()
    if key not in table:
        raise ConfigError(
            f"there is no method {name!r}",
            f"{nearest(key, table)}`outlay list` shows all of them",
        )
    return table[key]


def build(spec: str | Any) -> Any:
    """Make a method from a call string; objects that are methods already pass through.

    Raises:
        ConfigError: Unknown name, unknown setting, or a value that is not allowed.
    """
    if not isinstance(spec, str):
        return spec
    name, settings = callspec.parse(spec)
    cls = find(name).load()
    return construct(cls, settings)


def construct(cls: type, settings: Mapping[str, Any]) -> Any:
    """Call a settings class, naming unknown settings."""
    import dataclasses
    import inspect

    known = (
        [f.name for f in dataclasses.fields(cls)]
        if dataclasses.is_dataclass(cls)
        else [p for p in inspect.signature(cls).parameters if p != "self"]
    )
    open_ended = any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(cls).parameters.values()
    )
    for key in settings:
        if key not in known and not open_ended:
            name = getattr(getattr(cls, "card", None), "name", cls.__name__)
            raise ConfigError(
                f"{name} has no setting {key!r}",
                f"{nearest(key, known)}its settings are {', '.join(known) or 'none'}",
            )
    try:
        return cls(**settings)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}: {error}", "give the settings that it needs") from None


def class_names() -> dict[str, Entry]:
    """Entries by class name, for `from outlay import Bone`."""
    return {entry.qualname: entry for entry in entries().values()}
