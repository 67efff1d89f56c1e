"""The documentation's own build: a page for every registry entry, and no broken link."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from outlay.core import registry

ROOT = Path(__file__).resolve().parents[2]
BODIES = ROOT / "docs" / "methods"


CALL = re.compile(r"\b([a-z_]+|[A-Z]\w+)\((\w+=[^()]*(?:\([^()]*\))?[^()]*)\)")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_entry_has_a_body_and_every_body_an_entry() -> None:
    ours = {n for n, e in registry.entries().items() if e.module.startswith("outlay.")}
    assert {path.stem for path in BODIES.glob("*.md")} == ours


@pytest.mark.parametrize("name", sorted(registry.entries()))
def test_a_body_says_when_what_it_costs_and_shows_how(name: str) -> None:
    text = (BODIES / f"{name}.md").read_text(encoding="utf-8")
    for part in ("## When to use it", "## What it costs", "```"):
        assert part in text, f"{name}: {part}"


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_call_string_names_settings_that_exist(page: Path) -> None:
    """Also in running text and tables, where nothing is executed."""
    names = registry.entries()
    classes = {entry.qualname: name for name, entry in names.items()}
    for call in CALL.finditer(page.read_text(encoding="utf-8")):
        name = classes.get(call[1], call[1])
        if name in names and names[name].kind == "method" and "..." not in call[2]:
            registry.build(f"{name}({' '.join(call[2].split())})")


@pytest.mark.parametrize(
    "name", sorted(n for n, e in registry.entries().items() if e.kind == "method")
)
def test_every_setting_has_a_meaning(build: ModuleType, name: str) -> None:
    cls = registry.entries()[name].load()
    rows = [line for line in build.setting_lines(cls) if line.startswith("| `")]
    assert len(rows) == len(dataclasses.fields(cls))
    assert not [row for row in rows if row.endswith("|  |")]


def test_it_builds_without_a_warning(build: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='pip install "outlay[docs]"')
    build.main(tmp_path / "site_source")
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text())
    found = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=tmp_path,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "WARNING" not in found.stderr
    pages = {path.stem for path in (tmp_path / "site" / "methods").glob("*.html")}
    assert pages == set(registry.entries())
