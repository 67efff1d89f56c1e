"""The registry: cards read as literals, entry points, and what is refused."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from outlay.core import registry
from outlay.core.errors import ConfigError

SOURCE = """
from dataclasses import dataclass
from typing import ClassVar
from outlay.core import method
from outlay.core.card import Card

@dataclass(frozen=True, kw_only=True)
class Outside(method.OnStep):
    card: ClassVar[Card] = Card(name={name!r}, title={title})
    r: int = 1
    def watch(self, live):
        return method.Watcher()
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Declares an entry point of a package that is not outlay's."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def declare(name="outside", title="'toy'", value="plugged:Outside", source=SOURCE):
        (tmp_path / "plugged.py").write_text(source.format(name=name, title=title))
        sys.modules.pop("plugged", None)
        point = importlib.metadata.EntryPoint("outside", value, registry.ENTRY_POINTS)
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
        registry.entries.cache_clear()

    yield declare
    registry.entries.cache_clear()


def test_methods_of_other_packages(plugin):
    plugin()
    entry = registry.find("outside")
    assert entry.places == ("OnStep",) and "plugged" not in sys.modules
    made = registry.build("outside(r=3)")
    assert type(made).__name__ == "Outside" and made.r == 3
    assert registry.build(made) is made
    assert registry.class_names()["Outside"] is entry


def test_one_name_twice(plugin):
    plugin(name="full")
    with pytest.raises(ConfigError, match=r"two methods are named 'full'.*plugged"):
        registry.entries()


@pytest.mark.parametrize(("settings", "text"), [
    ({"value": "nowhere.at.all:X"}, "missing module"),
    ({"title": "1 + name"}, "cannot be read"),
    ({"source": "class Broken(:"}, "cannot read methods"),
])  # fmt: skip
def test_broken_packages_are_named(plugin, settings, text):
    plugin(**settings)
    with pytest.raises(ConfigError, match=text):
        registry.entries()


def test_unknown_names_and_settings():
    with pytest.raises(ConfigError, match="did you mean 'bone'"):
        registry.find("bonne")
    with pytest.raises(ConfigError, match="did you mean 'r'"):
        registry.build("bone(R=3)")
    with pytest.raises(ConfigError, match="its settings are"):
        registry.build("bone(thing=3)")


def test_cards_in_the_source_are_what_the_classes_say():
    for entry in registry.entries().values():
        cls = entry.load()
        assert cls.card == entry.card
        if entry.kind == "method":
            assert cls.places() == entry.places, entry.card.name
