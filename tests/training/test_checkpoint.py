"""Checkpoints on a hostile disk: cut, flipped, emptied, swapped, locked, full."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.core.errors import CheckpointError
from outlay.training import checkpoint, keeper
from outlay.training.checkpoint import Checkpoints, locked, pack, read_folder, unpack, write_folder
from outlay.training.recipe import Recipe
from outlay.training.runs import run


def tree(step: int) -> dict:
    return {
        "weights": {"a": torch.arange(6.0).reshape(2, 3) + step, "b": torch.zeros(0)},
        "plain": [1, 2.5, None, True, "text", float("inf")],
        "step": torch.tensor(float(step)),
    }


@pytest.fixture
def store(tmp_path):
    found = Checkpoints(tmp_path / "main", keep=3)
    for step in (10, 20):
        found.save(step, tree(step))
    return found


def good(store, step):
    path, kept, complaints = store.newest()
    assert path.name == f"step-{step:08d}" and float(kept["step"]) == step
    assert torch.equal(kept["weights"]["a"], tree(step)["weights"]["a"])
    return complaints


def test_round_trip(store):
    assert good(store, 20) == []
    _, kept, _ = store.newest()
    assert kept["plain"] == [1, 2.5, None, True, "text", float("inf")]
    assert kept["weights"]["b"].shape == (0,) and kept["step"].dim() == 0


FILES = ("state.json", "tensors.safetensors", "checksums.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["missing", "empty", "cut", "folder"])
def test_a_damaged_one_is_said_and_the_one_before_is_used(store, name, harm):
    path = store.all()[-1] / name
    data = path.read_bytes()
    path.unlink()
    if harm == "empty":
        path.write_bytes(b"")
    elif harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "folder":
        path.mkdir()
    complaints = good(store, 10)
    assert len(complaints) == 1 and "step-00000020 is damaged" in complaints[0]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(store, name):
    path = store.all()[-1] / name
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(data) * 8, (120,), generator=generator).tolist()
    for place in places:
        harmed = bytearray(data)
        harmed[place // 8] ^= 1 << (place % 8)
        path.write_bytes(bytes(harmed))
        assert good(store, 10), f"bit {place} of {name}"
    path.write_bytes(data)
    assert good(store, 20) == []


def test_swapped_folders_are_found(store):
    ten, twenty = store.all()
    shutil.rmtree(twenty)
    shutil.copytree(ten, twenty)
    assert "holds step 10" in good(store, 10)[0]


def test_none_and_none_usable(tmp_path, store):
    assert Checkpoints(tmp_path / "nowhere").newest() is None
    for path in store.all():
        (path / "state.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        store.newest()


def test_a_damaged_later_one_never_pushes_out_a_good_one(tmp_path):
    store = Checkpoints(tmp_path, keep=1)
    store.save(10, tree(10))
    store.save(20, tree(20))
    (store.all()[-1] / "state.json").write_bytes(b"")
    store.save(15, tree(15))
    assert [p.name for p in store.all()] == ["step-00000015"]
    assert good(store, 15) == []


def test_only_the_newest_stay(store):
    for step in (30, 40):
        store.save(step, tree(step))
    assert [int(p.name[5:]) for p in store.all()] == [20, 30, 40]
    store.save(40, tree(40))
    assert good(store, 40) == [] and len(list(store.folder.iterdir())) == 3


def test_a_kill_while_one_is_replaced_leaves_the_old_one(store, monkeypatch):
    class Killed(BaseException):
        pass

    from pathlib import Path

    rename = Path.rename

    def kill(self, target):
        if self.name.endswith(".part"):
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        with pytest.raises(Killed):
            store.save(20, tree(99))
    assert good(store, 20) == []
    store.save(30, tree(30))
    assert not [p for p in store.folder.iterdir() if p.name.startswith(".")]


def test_a_full_disk_is_said_and_leaves_the_last_good_one(store, monkeypatch):
    from pathlib import Path

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(CheckpointError, match="No space left"):
            store.save(30, tree(30))
    assert good(store, 20) == [] and len(list(store.folder.iterdir())) == 2


class Pickled:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("value", [Pickled(), {1, 2}, b"bytes", {1: 2}, {"__tensor__": "x"}, 1j])
def test_python_objects_are_refused(tmp_path, value):
    with pytest.raises(CheckpointError):
        write_folder(tmp_path / "x", {"state": value})
    assert not (tmp_path / "x").exists()


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    whole = torch.arange(12.0)
    made = {"a": whole, "again": whole, "part": whole[3:6], "a/b": whole[:2], "c": {"d": whole[1:]}}
    made["c/d"] = torch.ones(2)
    write_folder(tmp_path / "x", made)
    kept = read_folder(tmp_path / "x")
    assert torch.equal(kept["part"], whole[3:6]) and torch.equal(kept["again"], whole)
    assert torch.equal(kept["c"]["d"], whole[1:]) and torch.equal(kept["c/d"], torch.ones(2))
    assert kept["a"].data_ptr() != kept["again"].data_ptr()


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(TREES)
@settings(max_examples=60, deadline=None)
def test_any_tree_comes_back(value):
    if "__tensor__" in str(value):
        return
    tensors: dict[str, torch.Tensor] = {}
    import json

    assert unpack(json.loads(json.dumps(pack({"x": value}, tensors))), tensors) == {"x": value}


HOLD = """
import sys, time
from pathlib import Path
from outlay.training.checkpoint import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_refuses_a_second_process_and_dies_with_its_owner(tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    try:
        assert owner.stdout.readline().strip() == "held"
        with pytest.raises(CheckpointError, match="another process"), locked(tmp_path):
            pass
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
    finally:
        owner.kill()
        owner.wait(10)
        owner.stdout.close()
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began < 5


def test_marks_tell_what_was_written():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    marks = checkpoint.buffer_marks(model)

    def written():
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        return {n for n, t in tensors.items() if checkpoint._written(marks, f"0:{n}", t)}

    assert written() == set()
    with torch.no_grad():
        model[0].bias.add_(1)
    model(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    assert written() == {
        "0.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip
    model[1].running_mean = torch.zeros(2)
    assert "1.running_mean" in written()


def test_a_run_of_minutes_saves_by_itself(tmp_path, monkeypatch):
    saved = []
    real = checkpoint.Checkpoints.save

    def counted(store, step, tree):
        saved.append(step)
        real(store, step, tree)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", counted)
    of = Recipe(
        name="saved", model={"config": "cnn", "layers": 1, "width": 8},
        task="image-classification", data={"asset": "digits", "limit": 40}, budget="6steps",
    )  # fmt: skip
    run(of, out=tmp_path / "short", device="cpu")
    assert saved == []
    monkeypatch.setattr(keeper, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(keeper, "_SAVE_SHARE", 1e9)
    run(of, out=tmp_path / "long", device="cpu")
    assert saved == [1, 2, 3, 4, 5]  # the last step is followed by the result itself
