"""Trackers: what they are told, and that none of them can hold up or end a run."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from outlay.bridges.trackers import dotted, tracking
from outlay.cli.app import run_app
from outlay.core.errors import ConfigError
from outlay.training.recipe import Recipe
from outlay.training.runs import run

RECIPE = Recipe(
    name="tracked", model={"config": "cnn", "layers": 1, "width": 8}, task="image-classification",
    data={"asset": "digits", "limit": 40}, budget="4steps", every={"evaluate": 2},
)  # fmt: skip


class Recorder:
    """Stands for a tracker's module: every call with its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.__spec__ = ModuleSpec("recorder", None)  # others look whether the module is there
        self.info = types.SimpleNamespace(run_id="r1")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **named: Any) -> Recorder:
            self.calls.append((name, arguments, named))
            return self

        return call


def tracked(names: list[str], folder: Any, notes: list[str]) -> dict[str, Any]:
    with tracking(names, folder, RECIPE.name, RECIPE.resolved(), notes.append) as trackers:
        return run(RECIPE, out=folder.parent, device="cpu", trackers=trackers).metrics


@pytest.mark.parametrize(
    ("name", "opening", "line", "closing"),
    [
        ("mlflow", "start_run", "log_metrics", "end_run"),
        ("wandb", "init", "log", "finish"),
        ("trackio", "init", "log", "finish"),
    ],
)
def test_a_tracker_gets_every_line(tmp_path, monkeypatch, name, opening, line, closing):
    module = Recorder()
    monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    tracked([name], tmp_path / "run", [])
    called = [call for call, *_ in module.calls]
    assert opening in called and called[-1] == closing
    told = [(a[0], named["step"]) for call, a, named in module.calls if call == line]
    assert [step for values, step in told if "loss" in values] == [0, 1, 2, 3]
    assert [step for values, step in told if "validation/accuracy" in values] == [1, 3]
    assert all(type(v) is float for values, _ in told for v in values.values())


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    tracked(["tensorboard"], folder, [])
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    lines = {e.step: e.value for e in found.Scalars("loss")}
    done = run(RECIPE, out=tmp_path, device="cpu")
    ours = {line["step"]: line["loss"] for line in done.curves if "loss" in line}
    assert lines == pytest.approx(ours, rel=1e-5) and len(lines) == 4


def test_one_that_breaks_does_not_touch_the_run(tmp_path, monkeypatch):
    class Broken(Recorder):
        def log(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("no route")

        def finish(self) -> None:
            raise ConnectionError("no route")

    class Closed(Recorder):
        def init(self, **_: Any) -> None:
            raise ConnectionError("no login")

    monkeypatch.setitem(sys.modules, "wandb", Broken())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "trackio", Closed())  # type: ignore[arg-type]
    notes: list[str] = []
    metrics = tracked(["wandb", "trackio"], tmp_path / "run", notes)
    assert metrics["test/accuracy"] >= 0
    assert "trackio does not open (ConnectionError: no login)" in notes[0]
    assert "WeightsAndBiases did not close" in notes[1]


def test_what_cannot_be_tracked_is_said_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs the package") as refused:
        tracked(["wandb"], tmp_path / "run", [])
    assert "pip install wandb" in str(refused.value)
    asked = ["run", "digits-cnn", "--track", "tensorbored", "--out", str(tmp_path / "runs")]
    assert run_app(asked) == 2
    assert "tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_fields_are_named_by_their_path():
    assert dotted({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}
