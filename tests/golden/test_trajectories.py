"""Losses through the real command stay what they were; how a step is split changes nothing.

`python tests/golden/test_trajectories.py` writes the file anew: only for a change that is meant
to change numbers, and then with the reason in its commit.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
from pathlib import Path

import pytest
import torch

from outlay.cli.app import run_app

STORED = Path(__file__).with_name("trajectories.json")
METHODS = {
    "bone": "bone(r=4)",
    "adalora": "adalora(init_r=4, target_r=2)",
    "svfit": "svfit(rank=8)",
    "lamda": "lamda(r=4, dropout=0.0)",
}
RECIPE = """\
name: golden
model: {config: bert, layers: 2, width: 32, heads: 2, dropout: 0.0}
task: sequence-classification
data: {path: rows.csv, text: text, label: kind}
methods: ["METHOD"]
optimizer: {lr: 0.01, weight_decay: 0.01}
batch: {size: 8, length: 24}
budget: 12steps
"""
KINDS = {"fruit": ("apple", "pear", "fig"), "sea": ("wave", "salt", "tide")}


def losses(folder: Path, method: str, micro: int = 8) -> list[float]:
    """One run of the command: the loss of every step, read from what it wrote."""
    with (folder / "rows.csv").open("w", newline="") as file:
        rows = [
            (f"{w} {KINDS[k][i % 2]} {i}", k) for i in range(12) for k in KINDS for w in KINDS[k]
        ]
        csv.writer(file).writerows([("text", "kind"), *rows])
    recipe = folder / "golden.yaml"
    recipe.write_text(RECIPE.replace("METHOD", method))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = run_app(
            ["run", str(recipe), "--json", "--quiet", "--threads", "1", "--device", "cpu",
             "--out", str(folder / "runs"), "--set", f"batch.micro={micro}"]
        )  # fmt: skip
    assert code == 0
    result = json.loads(said.getvalue().splitlines()[-1])
    assert result["status"] == "done" and result["meter"]["steps"] == 12
    lines = (Path(result["folder"]) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("name", list(METHODS))
def test_the_trajectory_is_the_stored_one(tmp_path, name):
    expected = json.loads(STORED.read_text())[name]
    found = losses(tmp_path, METHODS[name])
    assert len(found) == len(expected) == 12 and found[-1] < found[0]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", list(METHODS))
def test_one_by_eight_is_eight_by_one(tmp_path, name):
    """Float32, and AdamW amplifies its rounding: exact equality is tested in float64 elsewhere."""
    whole = losses(tmp_path, METHODS[name])
    assert losses(tmp_path, METHODS[name], micro=1) == pytest.approx(whole, rel=1e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    stored = {}
    for key, spec in METHODS.items():
        with tempfile.TemporaryDirectory() as place:
            stored[key] = losses(Path(place), spec)
    STORED.write_text(json.dumps(stored, indent=1) + "\n")
