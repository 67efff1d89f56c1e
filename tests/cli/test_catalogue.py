"""list, show, cite: shapes, and no heavy import."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outlay.cli import catalogue
from outlay.cli.settings import attribute_texts, described, summary_of
from outlay.core import registry

KEYS = {"name", "paper", "title", "arxiv", "group", "places", "claims", "saves", "status"}
PROBE = """
import sys, runpy
sys.argv = ["outlay", *{arguments!r}]
try:
    runpy.run_module("outlay", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
heavy = [m for m in ("torch", "transformers", "numpy", "pyarrow", "sklearn") if m in sys.modules]
sys.stderr.write("heavy: " + ",".join(heavy))
"""


def test_list_is_an_array_of_cards(outlay):
    rows = outlay("list", "--json").json
    assert all(set(row) >= KEYS for row in rows)
    bone = next(row for row in rows if row["name"] == "bone")
    assert (bone["paper"], bone["arxiv"], bone["group"]) == (34, "2409.15371", "adapters")
    assert bone["places"] == ["OnModel"] and bone["claims"] == ["delta.additive"]
    assert {row["name"] for row in rows} == set(registry.entries())


def test_list_shows_groups_to_people(outlay):
    answer = outlay("list")
    assert answer.code == 0
    assert answer.out.index("adapters:") < answer.out.index("baselines:")
    only = outlay("list", "--group", "baselines", "--json").json
    assert {row["group"] for row in only} == {"baselines"}


def test_status_is_the_verdict_of_the_replication(outlay, tmp_path, monkeypatch):
    (tmp_path / "replications").mkdir()
    record = tmp_path / "replications" / "34_bone.json"
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    assert catalogue.verdict(34)["status"] == "untested"
    record.write_text("{ broken")
    assert catalogue.verdict(34)["status"] == "untested"
    record.write_text(json.dumps({"verdict": "partly", "sentence": "Seen at r = 16."}))
    assert catalogue.verdict(34)["status"] == "partly"
    assert catalogue.verdict(None)["status"] == "untested"
    assert "Seen at r = 16." in outlay("show", "bone").out


@pytest.mark.parametrize("name", sorted(registry.entries()))
def test_show_explains_every_method(outlay, name):
    shown = outlay("show", name, "--json").json
    call = shown["example"].split('"')[1]
    assert shown["description"] and call.startswith(name)
    assert registry.build(call).card.name == name
    assert all(s["text"] for s in shown["settings"]), shown["settings"]
    assert name in outlay("show", name).out


@pytest.mark.parametrize("name", sorted(registry.entries()))
def test_settings_read_from_source_are_those_of_the_class(name):
    import dataclasses

    entry = registry.find(name)
    cls = entry.load()
    if not dataclasses.is_dataclass(cls):
        pytest.skip("not a dataclass: its signature is open")
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    assert {s.name for s in described(entry).settings} == fields


def test_ranges_and_choices_come_from_annotations():
    settings = {s.name: s for s in described(registry.find("bone")).settings}
    assert settings["r"].allowed == ">= 1" and settings["r"].type == "int"
    assert settings["variant"].choices == ("shard", "mini", "bat")
    assert settings["dropout"].bounds == {">=": 0.0, "<": 1.0}
    assert settings["target_modules"].default == "'all-linear'"
    assert settings["adapter_name"].default == "'default'"


def test_docstring_sections_are_read():
    text = "One.\n\nTwo.\n\nAttributes:\n    a: First\n        line.\n    b (int): B.\n\nRaises:\n"
    assert attribute_texts(text) == {"a": "First line.", "b": "B."}
    assert summary_of(text) == "One.\n\nTwo."


def test_cite_gives_bibtex_once_a_paper(outlay):
    answer = outlay("cite", "bone", "bone", "probe")
    assert answer.out.count("@misc{") == 1 and "2409.15371" in answer.out
    assert re.match(r"@misc\{\w+,\n", answer.out)
    assert "probe has no paper" in answer.err
    assert answer.out.count("{") == answer.out.count("}")
    assert outlay("cite", "probe", "--json").json == {"probe": None}


def test_dashes_and_underscores_are_equal(outlay):
    one, other = (
        outlay("show", "tfidf-logistic-regression"),
        outlay("show", "tfidf_logistic_regression"),
    )
    assert one.out == other.out and one.code == 0
    assert outlay("list", "--js_on").code == 2


@pytest.mark.parametrize(
    "arguments", [["--help"], [], ["list"], ["list", "--json"], ["show", "bone"],
                  ["cite", "bone"], ["run", "--help"], ["--version"]],
)  # fmt: skip
def test_nothing_heavy_is_imported(arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(arguments=arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("heavy: "), done.stderr


def _cost(arguments: list[str], limit: float) -> tuple[float, float]:
    """Wall-clock and processor seconds of the best of up to 12 calls."""
    wall = processor = float("inf")
    for _ in range(12):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "outlay", *arguments], capture_output=True, check=True
        )
        wall = min(wall, time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        processor = min(processor, used)
        if wall <= limit:
            break
    return wall, processor


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], 0.4), (["list"], 1.0)])
def test_help_and_list_are_fast(arguments, limit):
    wall, processor = _cost(arguments, limit)
    # On a machine that is busy with something else, the processor's time tells.
    assert wall <= limit or processor <= 0.75 * limit


def test_bibtex_of_several_authors():
    entry = registry.find("bone")
    text = catalogue.bibtex(entry)
    assert "author = {Jiale Kang and Qingyu Yin}" in text
    assert Path(entry.path).name == "bone.py"
