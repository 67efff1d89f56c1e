"""replicate: a real run of the smallest size, names, and what people and machines see."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outlay import replications
from outlay.comparison import replicate as comparison
from outlay.comparison.replicate import Replication, Size, Task
from outlay.comparison.verdicts import Claim

SIZE = {"digits-vit": 0.5}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Replication:
    """Bone's place taken by two arms of two steps on digits, with a verdict after two seeds."""
    task = Task(
        name="digits-vit", recipe="digits-vit", floor=-1.0, floor_source="nothing",
        arms=lambda size: ("LoRA=probe", "Bone=full @ optimizer.lr=1e-3"),
        changes={s: {"budget": "2steps", "every.evaluate": None, "data.limit": 64}
                 for s in comparison.SIZES},
    )  # fmt: skip
    made = Replication(
        paper=34, slug="bone", title="A title", arxiv="2409.15371", claim="one beats the other.",
        baseline="LoRA", method="Bone", tasks=(task,), grid={"optimizer.lr": (1e-3, 3e-3)},
        claims=(
            Claim(name="better", text="Bone is better than LoRA", arm="Bone", than="LoRA",
                  kind="better", size=SIZE),
            Claim(name="light", text="Bone is small", arm="Bone", than="LoRA", kind="at_most",
                  quantity="trainable_parameters", size=SIZE, role="secondary"),
            Claim(name="early", text="Bone is early", arm="Bone", than="LoRA", kind="better",
                  quantity="loss@0.5", size=SIZE, role="secondary"),
        ),
    )  # fmt: skip
    monkeypatch.setattr(replications, "load", lambda name: made)
    monkeypatch.setitem(comparison.SIZES, "cpu", Size("cpu", (2, 3), 1.0, 2, 0))
    return made


def test_smoke_runs_every_arm_and_concludes_nothing(outlay, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = outlay("replicate", "bone", "--size", "smoke", "--json", "--quiet", "--threads", "1")
    assert answer.code == 0, answer.err
    found = answer.json
    assert found["verdict"] is None and found["command"].startswith("outlay replicate bone")
    arms = found["tasks"]["digits-vit"]["arms"]
    assert [(arm["name"], arm["seeds"], arm["failed"]) for arm in arms] == [
        ("LoRA", 2, 0), ("Bone", 2, 0)
    ]  # fmt: skip
    refused = outlay("replicate", "bone", "--size", "smoke", "--record")
    assert refused.code == 2 and "no verdict" in refused.err


def test_a_verdict_is_shown_recorded_and_read_again(outlay, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledgers = tmp_path / "ledgers"
    monkeypatch.setattr(replications, "folder", lambda: ledgers)
    monkeypatch.setattr(replications, "find", lambda name: "34_bone")
    answer = outlay("replicate", "bone", "--record", "--no-progress", "--threads", "1")
    assert answer.code == 0, answer.err
    assert "Bone is better than LoRA" in answer.out and "report.html" in answer.out
    ledger: dict[str, Any] = json.loads((ledgers / "34_bone.json").read_text())
    assert ledger["verdict"] in answer.out
    shown = outlay("show", "bone")
    assert ledger["date"] in shown.out and ledger["verdict"] in shown.out
    assert "one beats the other" in shown.out
    listed = outlay("list").out
    assert ledger["date"] in listed and "one beats the other" in " ".join(listed.split())
    rows = {row["name"]: row["status"] for row in outlay("list", "--json").json}
    assert rows["bone"] == ledger["verdict"] and rows["probe"] == "untested"
    # The same command goes on from what is there: no run is made again.
    again = outlay("replicate", "bone", "--json", "--quiet", "--threads", "1").json
    assert again["tasks"]["digits-vit"]["claims"] == ledger["tasks"]["digits-vit"]["claims"]


def test_unknown_names_and_sizes_are_two_lines(outlay):
    answer = outlay("replicate", "bonne")
    assert answer.code == 2 and "did you mean 'bone'?" in answer.err
    assert len(answer.err.strip().splitlines()) == 2
    answer = outlay("replicate", "bone", "--size", "smok")
    assert answer.code == 2 and "did you mean 'smoke'?" in answer.err
