"""A small live recipe, one finished run of it, and the command called in this process."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outlay.cli.app import run_app

RECIPE = """\
name: mine
model: {config: bert, layers: 1, width: 32}
task: sequence-classification
data: {path: rows.csv, text: sentence, label: kind}
methods: ["bone(r=4)"]
optimizer: {lr: 0.01}
batch: {size: 8, length: 24}
budget: 6steps
"""
WORDS = {
    "fruit": ("apple", "pear", "plum", "fig"),
    "sea": ("wave", "salt", "fish", "tide"),
    "tool": ("saw", "file", "drill", "axe"),
}


@dataclass
class Answer:
    """What a call of the command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The JSON document on stdout."""
        assert self.out, self.err
        return json.loads(self.out)

    @property
    def last(self) -> Any:
        """The JSON object on the last line of stdout."""
        assert self.out, self.err
        return json.loads(self.out.splitlines()[-1])


Outlay = Callable[..., Answer]


def write_material(folder: Path) -> None:
    """rows.csv, new.csv and mine.yaml."""
    rows = [
        (f"{words[i % 4]} {words[(i * 3 + 1) % 4]} {i}", kind)
        for i in range(16)
        for kind, words in WORDS.items()
    ]
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("sentence", "kind"), *rows])
    (folder / "new.csv").write_text("sentence\napple pear\nsaw axe\nsalt tide\n")
    (folder / "mine.yaml").write_text(RECIPE)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the small recipe, made the current one."""
    write_material(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def outlay(capfd: pytest.CaptureFixture[str]) -> Outlay:
    """Call the command and get exit code, stdout and stderr."""

    def call(*arguments: str | Path) -> Answer:
        capfd.readouterr()
        code = run_app([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Answer(code, out, err)

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one finished run of the small recipe."""
    folder = tmp_path_factory.mktemp("finished")
    write_material(folder)
    out = folder / "runs"
    assert run_app(["run", str(folder / "mine.yaml"), "--out", str(out), "--quiet"]) == 0
    return next(out.glob("mine-*"))
