"""Curves on disk: fast, torn lines, trackers that fail, dawdle or never come back."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
import torch

from outlay.core.errors import CheckpointError
from outlay.training.log import Log, read


def test_a_hundred_thousand_points_a_second_and_none_lost(tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    values = {"loss": 0.123456789, "lr": 1e-3, "gradient_norm": 1.5, "tokens": 12345}
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        for step in range(5_000):
            log.log(values, step)
        rates.append(5_000 * len(values) / (time.perf_counter() - began))
    log.close()
    assert max(rates) > 100_000
    lines = read(tmp_path / "metrics.jsonl")
    assert len(lines) == 25_000 and lines[7]["step"] == 7 and lines[0]["tokens"] == 12345


def test_lines_are_json_whatever_is_logged(tmp_path):
    log = Log(tmp_path / "m.jsonl")
    log.log({"nan": float("nan"), "inf": float("-inf"), "t": torch.tensor(2.5), "n": np.int64(3),
             "f": np.float32(0.5), 'quote"': "a\nb", "many": torch.zeros(2), "none": None,
             "yes": True}, 1)  # fmt: skip
    log.flush()
    text = (tmp_path / "m.jsonl").read_text()
    assert text.count("\n") == 1
    line = json.loads(text)
    assert line["nan"] is None and line["inf"] is None and line["t"] == 2.5 and line["n"] == 3
    assert line["f"] == 0.5 and line["yes"] is True and line["none"] is None
    log.close()


def test_torn_lines_and_lines_that_come_again(tmp_path):
    path = tmp_path / "m.jsonl"
    log = Log(path)
    for step in range(10):
        log.log({"loss": 1.0}, step)
    log.close()
    with path.open("a") as file:
        file.write('{"step":10,"lo')
    assert [line["step"] for line in read(path)] == list(range(10))
    log = Log(path, start=6)
    log.log({"loss": 2.0}, 6)
    log.close()
    assert [line["step"] for line in read(path)] == list(range(7))
    assert read(path)[-1]["loss"] == 2.0 and read(tmp_path / "none.jsonl") == []


class Fails:
    def log(self, values, step):
        if step == 2:
            raise RuntimeError("server gone")


class Keeps:
    def __init__(self):
        self.steps = []

    def log(self, values, step):
        self.steps.append(step)


def test_a_tracker_that_fails_is_dropped_and_the_others_go_on(tmp_path):
    keeps = Keeps()
    log = Log(tmp_path / "m.jsonl", [Fails(), keeps])
    for step in range(5):
        log.log({"loss": 1.0}, step)
    log.close()
    lines = read(tmp_path / "m.jsonl")
    assert keeps.steps == list(range(5))
    assert sum("loss" in line for line in lines) == 5
    assert [line["tracker_failed"] for line in lines if "tracker_failed" in line] == [
        "RuntimeError: server gone"
    ]


def test_a_slow_tracker_holds_up_neither_loop_nor_file(tmp_path):
    gate = threading.Event()

    class Hangs:
        def log(self, values, step):
            gate.wait(30)

    log = Log(tmp_path / "m.jsonl", [Hangs()])
    began = time.perf_counter()
    for step in range(1000):
        log.log({"loss": 1.0}, step)
    log.flush()
    assert time.perf_counter() - began < 1.0
    assert len(read(tmp_path / "m.jsonl")) == 1000
    log.close(patience=0.1)
    gate.set()


def test_a_tracker_without_a_file():
    keeps = Keeps()
    log = Log(None, [keeps])
    log.log({"loss": 1.0}, 0)
    log.close()
    assert keeps.steps == [0]


def test_a_full_disk_is_said(tmp_path):
    log = Log(tmp_path / "m.jsonl")

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    assert log._file is not None
    log._file.close()
    log._file = Full()  # type: ignore[assignment]
    log.log({"loss": 1.0}, 0)
    with pytest.raises(CheckpointError, match="No space left"):
        log.flush()
    log.close()
