"""Bad input: two lines on stderr, exit 2 or 3, no traceback, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from outlay.cli.errors import describe
from outlay.core.errors import NonFinite, OutlayError

USAGE = [
    ["lisst"],
    ["list", "--grup", "x"],
    ["list", "--group", "adaptors"],
    ["list", "surplus"],
    ["show"],
    ["show", "bome"],
    ["cite", "bone", "bome"],
    ["recipe", "kopy"],
    ["recipe", "copy", "digits-vt"],
    ["recipe", "check", "nowhere.yaml"],
    ["recipe", "check", "mine"],
    ["run"],
    ["run", "digits-vt"],
    ["run", "mine.yaml", "--budget", "60stepps"],
    ["run", "mine.yaml", "--budget", "many"],
    ["run", "mine.yaml", "--budget", "-3steps"],
    ["run", "mine.yaml", "--budget", "1000bytes"],
    ["run", "mine.yaml", "--seed", "x"],
    ["run", "mine.yaml", "--threads", "0"],
    ["run", "mine.yaml", "--device", "abacus"],
    ["run", "mine.yaml", "--method", "bome"],
    ["run", "mine.yaml", "--method", "bone(R=4)"],
    ["run", "mine.yaml", "--method", "bone(r=0)"],
    ["run", "mine.yaml", "--method", "bone(r='big')"],
    ["run", "mine.yaml", "--method", "bone(4)"],
    ["run", "mine.yaml", "--method", "bone(r=__import__('os'))"],
    ["run", "mine.yaml", "--method", "bone(r=4"],
    ["run", "mine.yaml", "--method", ""],
    ["run", "mine.yaml", "--set", "optimizer.lr"],
    ["run", "mine.yaml", "--set", "optimizer.learning_rate=1"],
    ["run", "mine.yaml", "--set", "optimizer.lr=-1"],
    ["run", "mine.yaml", "--set", "optimizer.lr=.nan"],
    ["run", "mine.yaml", "--set", "optimizer.lr=[1"],
    ["run", "mine.yaml", "--set", "optimizer=3"],
    ["run", "mine.yaml", "--set", "batch.micro=3"],
    ["run", "mine.yaml", "--set", "batch.length=0"],
    ["run", "mine.yaml", "--set", "model.config=gpt5"],
    ["run", "mine.yaml", "--set", "model.heads=5"],
    ["run", "mine.yaml", "--set", "model.path=nowhere"],
    ["run", "mine.yaml", "--set", "model.asset=minilmm"],
    ["run", "mine.yaml", "--set", "data.path=nowhere.csv"],
    ["run", "mine.yaml", "--set", "data.path=empty.csv"],
    ["run", "mine.yaml", "--set", "data.path=picture.png"],
    ["run", "mine.yaml", "--set", "data.asset=question"],
    ["run", "mine.yaml", "--set", "data.label=kin"],
    ["run", "mine.yaml", "--set", "data.text=sentences"],
    ["run", "mine.yaml", "--set", "task=poetry"],
    ["run", "mine.yaml", "--set", "task=regression"],
    ["run", "mine.yaml", "--set", "evaluate.metric=beauty"],
    ["run", "mine.yaml", "--set", "stages=[{name: a, start: 'stage:b'}]"],
    ["run", "mine.yaml", "--resume", "nowhere"],
    ["run", "--resume", "nowhere"],
    ["run", "no-config.yaml"],
    ["run", "pickled.yaml"],
    ["run", "broken.yaml"],
    ["run", "list.yaml"],
    ["run", "latin.yaml"],
    ["run", "unknown.yaml"],
    ["plan", "unknown.yaml"],
    ["plan", "mine.yaml", "--method", "bome"],
    ["compare", "mine.yaml"],
    ["compare", "mine.yaml", "--arm", "a=bone(r=2)"],
    ["compare", "mine.yaml", "--arm", "a=bone(r=2)", "--arm", "a=probe"],
    ["compare", "mine.yaml", "--arm", "a=bone(r=2)", "--arm", "b=bome"],
    ["compare", "mine.yaml", "--arm", "a=bone(r=2)", "--arm", "b=probe", "--seeds", "1"],
    ["compare", "mine.yaml", "--arm", "a=bone", "--arm", "b=probe", "--tune", "optimizer.lr=1"],
    ["evaluate", "nowhere"],
    ["evaluate", "runs"],
    ["predict", "nowhere", "--data", "new.csv"],
    ["predict", "nowhere"],
    ["export", "nowhere", "--out", "x"],
    ["export", "nowhere"],
    ["report", "nowhere"],
    ["report"],
]
REFUSED = [
    ["run", "mine.yaml", "--method", "bone(r=4, target_modules='nothing')"],
    ["run", "mine.yaml", "--method", "bone(r=4)"],
    ["run", "mine.yaml", "--method", "bone(r=4, variant='bat', adapter_name='b')"],
    ["run", "mine.yaml", "--set", "cap=10trainable_parameters"],
    ["recipe", "copy", "digits-vit", "mine.yaml"],
]


@pytest.fixture
def bad(work: Path) -> Path:
    """The small recipe, and broken things beside it."""
    (work / "empty.csv").write_text("")
    (work / "picture.png").write_bytes(b"\x89PNG")
    (work / "runs").mkdir()
    good = (work / "mine.yaml").read_text()
    (work / "broken.yaml").write_text("name: [mine\nmodel: }")
    (work / "list.yaml").write_text("- a\n- b\n")
    (work / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    (work / "unknown.yaml").write_text(good.replace("optimizer:", "optimiser:"))
    for name in ("no-config", "pickled"):
        (work / name).mkdir()
        place = good.replace("{config: bert, layers: 1, width: 32}", f"{{path: ./{name}}}")
        (work / f"{name}.yaml").write_text(place)
    (work / "pickled" / "config.json").write_text('{"model_type": "bert"}')
    (work / "pickled" / "pytorch_model.bin").write_bytes(b"never read")
    return work


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def _two_lines(answer) -> None:
    lines = [line for line in answer.err.splitlines() if line]
    assert len(lines) == 2, answer.err
    assert lines[0].startswith("error: ") and lines[1].startswith("  "), answer.err
    assert len(lines[0]) > len("error: ") + 5 and len(lines[1]) > 5
    assert "Traceback" not in answer.err + answer.out


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_bad_input_is_two_lines_and_exit_2(outlay, bad, arguments):
    before = _files(bad)
    answer = outlay(*arguments)
    _two_lines(answer)
    assert answer.code == 2, answer.err
    assert answer.out == ""
    assert _files(bad) == before


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_cannot_be_done_is_two_lines_and_exit_3(outlay, bad, arguments):
    before = _files(bad)
    answer = outlay(*arguments)
    _two_lines(answer)
    assert answer.code == 3, answer.err
    assert _files(bad) == before


def test_out_that_is_a_file_is_refused(outlay, bad):
    answer = outlay("run", "mine.yaml", "--out", "mine.yaml")
    _two_lines(answer)
    assert answer.code == 2


def test_nearest_spellings_are_named(outlay, work):
    assert "did you mean 'list'?" in outlay("lisst").err
    assert "did you mean '--group'?" in outlay("list", "--grup", "x").err
    assert "did you mean 'digits-vit'?" in outlay("run", "digits-vt").err
    assert "did you mean 'lr'?" in outlay("run", "mine.yaml", "--set", "optimizer.l=1").err


def test_debug_shows_the_traceback(outlay):
    answer = outlay("show", "bome", "--debug")
    assert answer.code == 2
    assert "Traceback" in answer.err and answer.err.splitlines()[-2].startswith("error: ")


def test_unforeseen_errors_are_two_lines_and_exit_1(outlay, monkeypatch):
    from outlay.core import registry

    def broken():
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(registry, "entries", broken)
    answer = outlay("list")
    _two_lines(answer)
    assert answer.code == 1 and "ZeroDivisionError: first second" in answer.err


def test_interrupts_exit_130(outlay, monkeypatch):
    from outlay.core import registry

    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "entries", stopped)
    answer = outlay("list")
    _two_lines(answer)
    assert answer.code == 130


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m outlay recipe schema | head -1", shell=True, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "{\n" and done.stderr == ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (NonFinite("loss nan", "lower lr"), 1, "loss nan"),
        (OutlayError("one\ntwo"), 1, "one two"),
        (MemoryError("4 GiB"), 1, "out of memory"),
        (OSError(28, "No space left on device", "x"), 1, "No space left"),
        (PermissionError(13, "Permission denied", "x"), 2, "Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_has_two_lines_and_a_code(error, code, words):
    complaint = describe(error)
    assert complaint.code == code and words in complaint.problem
    assert "\n" not in complaint.problem + complaint.remedy and complaint.remedy
