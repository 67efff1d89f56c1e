"""A method's page tells the verdict with its figures, and says untested where there is none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from outlay import replications
from outlay.core import registry

BUILD = Path(__file__).resolve().parents[2] / "docs" / "build.py"


def test_a_page_shows_verdict_figures_and_date(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("docs_build_of_verdicts", BUILD)
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    monkeypatch.setattr(replications, "folder", lambda: tmp_path)
    bone = registry.find("bone")
    assert "**untested**" in build.page(bone)
    claims = [
        {"text": "one", "role": "main", "seeds": 30, "gain": 0.0123, "interval": [0.01, 0.02],
         "verdict": "supported"},
        {"text": "two", "role": "secondary", "seeds": 30, "ratio": 0.5,
         "ratio_interval": [0.4, 0.6], "verdict": "refuted"},
        {"text": "three", "role": "secondary", "reason": "a run failed", "verdict": "not resolved"},
    ]  # fmt: skip
    ledger = {
        "verdict": "partly", "sentences": ["Partly: seen.", "And more."], "date": "2026-01-02",
        "hardware": "two cores", "command": "outlay replicate bone", "limits": ["no download"],
        "tasks": {"t": {"claims": claims}},
    }  # fmt: skip
    (tmp_path / "34_bone.json").write_text(json.dumps(ledger))
    page = build.page(bone)
    for part in (
        "Replication: **partly**", "**Partly: seen.**", "And more.", "0.0123 (0.01 to 0.02)",
        "0.5 (0.4 to 0.6)", "a run failed", "Not done: no download.", "2026-01-02, two cores",
    ):  # fmt: skip
        assert part in page, part
