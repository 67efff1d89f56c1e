"""What the documentation shows runs: every fenced block of a page, in order, in one folder.

Python blocks share a namespace. A YAML block with a `name` and a `model` is a recipe: it must read,
and is written to `NAME.yaml`, so that the commands below it run what the page shows. Of a shell
block, `outlay` lines go through the real command and `make` lines must name a target. A block with
a title is the file of that name; `pip install -e FOLDER` makes its entry points known as pip would,
and `python -m pytest FILE` calls the tests of such a file.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from outlay.cli.app import run_app
from outlay.core import registry
from outlay.training.data.labels import Labels
from outlay.training.models.load import load_model, save_model
from outlay.training.recipe import Recipe
from outlay.training.specs import ModelSpec

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^```(\w*)(?: title=\"([^\"\n]+)\")?[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
KNOWN = ("python", "sh", "yaml", "text", "json", "toml")
# What a reader types beside outlay and make; it is not run here.
BESIDE = (("pip", "install"), ("python", "-m"))
WORDS = {
    "fruit": ("apple", "pear", "plum", "fig"),
    "sea": ("wave", "salt", "fish", "tide"),
    "tool": ("saw", "file", "drill", "axe"),
}


@dataclass(frozen=True)
class Block:
    """One fenced block and where it stands."""

    language: str
    text: str
    where: str
    line: int
    file: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(3)) + 1
        name = page.relative_to(ROOT)
        found.append(Block(match[1], match[3], f"{name}:{line}", line, match[2] or ""))
    return found


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's ./my-model: a BERT of one small block, without a head for the task."""
    folder = tmp_path_factory.mktemp("saved") / "my-model"
    spec = ModelSpec(config="bert", layers=1, width=32)
    model, tokenizer = load_model(spec, "sequence-classification", Labels(("a", "b")))
    save_model(model.get_submodule("bert"), tokenizer, folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, saved_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the pages take for granted: rows.csv, new.csv and ./my-model."""
    rows = [
        (f"{words[i % 4]} {words[(i * 3 + 1) % 4]} {i}", kind)
        for i in range(20)
        for kind, words in WORDS.items()
    ]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("sentence", "kind"), *rows])
    (tmp_path / "new.csv").write_text("sentence\napple pear\nsaw axe\nsalt tide\n")
    (tmp_path / "my-model").symlink_to(saved_model)
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    yield tmp_path
    if (tmp_path / "installed").exists():
        registry.entries.cache_clear()
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
                del sys.modules[name]


def commands(block: Block) -> Iterator[list[str]]:
    """The lines of a shell block as arguments, globs filled in as a shell does."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        yield [w for word in words for w in (sorted(glob.glob(word)) if "*" in word else [word])]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip install -e` leaves of a package: a path, and metadata with its entry points."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    facts = folder.parent / "installed" / f"{project['name'].replace('-', '_')}-0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (facts / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for path in (folder, facts.parent):
        monkeypatch.syspath_prepend(str(path.resolve()))
    registry.entries.cache_clear()


def run_tests(file: Path) -> None:
    """Call every test of a file that takes nothing."""
    module = importlib.import_module(file.stem)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert tests, f"{file} holds no test"
    for test in tests:
        test()


def run_shell(
    block: Block, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(block):
        if words[0] == "make":
            assert set(words[1:]) <= targets, f"{block.where}: no target {words[1:]}"
        elif words[0] == "outlay":
            capfd.readouterr()
            code = run_app(words[1:])
            out, err = capfd.readouterr()
            assert code == 0, f"{block.where}: {shlex.join(words)} exits {code}\n{out}\n{err}"
        elif words[:3] == ["pip", "install", "-e"] and Path(words[3], "pyproject.toml").exists():
            install(Path(words[3]), monkeypatch)
        elif words[:3] == ["python", "-m", "pytest"] and Path(words[-1]).exists():
            run_tests(Path(words[-1]))
        else:
            assert tuple(words[:2]) in BESIDE, f"{block.where}: {words[0]!r} is not checked"


def run_yaml(block: Block, folder: Path) -> None:
    plain = yaml.safe_load(block.text)
    if isinstance(plain, dict) and {"name", "model"} <= set(plain):
        recipe = Recipe.from_yaml(block.text, block.where, folder)
        assert Recipe.from_yaml(recipe.to_yaml(), block.where) == recipe
        (folder / f"{recipe.name}.yaml").write_text(block.text)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_every_example_of_a_page_runs(
    page: Path,
    place: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        assert block.language in KNOWN, f"{block.where}: say what language the block is in"
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text)
        elif block.language == "python":
            # Lines of an error are those of the page.
            source = "\n" * (block.line - 1) + block.text
            with contextlib.redirect_stdout(None):
                exec(compile(source, str(page), "exec"), names)
        elif block.language == "sh":
            run_shell(block, capfd, monkeypatch)
        elif block.language == "yaml":
            run_yaml(block, place)


def test_no_example_is_overlooked() -> None:
    """An unclosed or indented fence would hide blocks."""
    found = {block.language for block in blocks_of(ROOT / "README.md")}
    assert {"python", "sh", "yaml"} <= found
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(page)), page
