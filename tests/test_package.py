"""The wheel: built, looked into, installed elsewhere, and used from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"


def call(*words: str | Path, folder: Path, path: Path | None = None) -> str:
    """Run a program from a folder where the source tree is not in reach."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `python -m build` makes it, with the backend that is installed here."""
    out = tmp_path_factory.mktemp("dist")
    found = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT],
        cwd=out,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return next(out.glob("outlay-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a folder of its own; what it needs stays where it is."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    call(*pip, "--no-deps", "--no-index", "--target", target, wheel, folder=target)
    return target


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    source = {
        str(path.relative_to(SOURCE))
        for path in (SOURCE / "outlay").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert source <= names
    assert {"outlay/py.typed", "outlay/comparison/page/assets/report.html"} <= names
    assert "outlay/comparison/page/assets/uplot/LICENSE" in names
    others = names - source
    assert all(name.split("/")[0].endswith(".dist-info") for name in others), others
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in others)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in others)


def test_its_version_is_the_packages(wheel: Path) -> None:
    from outlay import __version__

    assert wheel.name == f"outlay-{__version__}-py3-none-any.whl"


def test_it_works_where_the_source_is_not(installed: Path, tmp_path: Path) -> None:
    from outlay import __version__
    from outlay.core import registry

    def outlay(*words: str) -> str:
        return call(sys.executable, "-m", "outlay", *words, folder=tmp_path, path=installed)

    where = "import outlay; print(outlay.__file__)"
    home = call(sys.executable, "-c", where, folder=tmp_path, path=installed).strip()
    assert Path(home).is_relative_to(installed)
    assert outlay("--version").split() == ["outlay", __version__]
    names = {entry["name"] for entry in json.loads(outlay("list", "--json"))}
    assert names == set(registry.entries())
    script = (installed / "bin" / "outlay").resolve()
    assert script.exists()


def test_a_run_and_its_report_work_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """The report's template and script are read from the package."""
    recipe = """
name: words
model: {config: bert, layers: 1, width: 32}
data: {path: rows.csv}
methods: ["probe"]
budget: 2steps
"""
    rows = "\n".join(f"{word} {n},{word}" for n in range(10) for word in ("salt", "plum"))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}\n")
    (tmp_path / "words.yaml").write_text(recipe)
    command = (sys.executable, "-m", "outlay", "run", "words.yaml", "--json", "--quiet")
    answer = json.loads(call(*command, folder=tmp_path, path=installed).splitlines()[-1])
    assert answer["status"] == "done"
    page = (tmp_path / answer["folder"] / "report.html").read_text(encoding="utf-8")
    assert "uPlot" in page
