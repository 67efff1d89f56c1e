"""The report's files: numbers, escapes, sizes, refusals."""

import copy
import csv
import html
import io
import json
import re
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from outlay.comparison.formats import duration, prefixed, probability, signed, significant
from outlay.comparison.judge import judge
from outlay.comparison.report import write_report
from outlay.core.errors import ConfigError

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">\u2028&amp; {{ 7 * 7 }} |`x`|"


def read(path):
    """(page, inlined data) of a written report."""
    page = path.read_text(encoding="utf-8")
    inlined = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return page, json.loads(inlined[1])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.81234, "0.812"), (0.9996, "1.00"), (-0.00012345, "−0.000123"), (0, "0"), (150, "150"),
        (12345, "12300"), (1.5e9, "1.50e9"), (2e-7, "2.00e-7"), (float("nan"), "–"), (None, "–"),
    ],
)  # fmt: skip
def test_three_significant_digits(value, text):
    assert significant(value) == text


def test_units_and_signs():
    assert prefixed(98_304) == "98.3 k"
    assert prefixed(999_950) == "1.00 M"
    assert prefixed(150) == "150"
    assert prefixed(1.5e9, "B") == "1.50 GB"
    assert prefixed(0, "B") == "0 B"
    assert duration(8.25) == "8.25 s"
    assert duration(600) == "10.0 min"
    assert duration(9_000) == "2.50 h"
    assert signed(0.5) == "+0.500"
    assert probability(3e-9) == "< 0.0001"


def test_files_and_numbers_agree(comparison, tmp_path):
    data = comparison()
    path = write_report(data, tmp_path / "new" / "folder")
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "metrics.jsonl", "report.html", "report.json", "report.md", "results.parquet",
    ]  # fmt: skip
    _, inlined = read(path)
    twin = json.loads((path.parent / "report.json").read_text())
    assert twin["arms"] == data["arms"]
    assert twin["pairs"] == data["pairs"]
    assert {row["arm"]: row["mean"] for row in inlined["tables"]["arms"]} == {
        arm["name"]: arm["mean"] for arm in data["arms"]
    }
    shown = {(row["a"], row["b"]): row for row in inlined["tables"]["differences"]}
    for pair in data["pairs"]:
        row = shown[pair["a"], pair["b"]]
        assert row["difference"] == pair["difference"]
        assert [row["interval_low"], row["interval_high"]] == pair["interval"]
        assert row["p_holm"] == pair["p_holm"]
    runs = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    assert [run["metrics"] for run in runs] == [run["metrics"] for run in data["runs"]]
    text = (path.parent / "report.md").read_text()
    assert data["sentence"] in text
    assert significant(data["arms"][0]["mean"]) in text


def test_parquet_holds_every_point_unthinned(comparison, tmp_path):
    data = comparison(seeds=2, points=900)
    data["runs"][0]["curves"]["validation accuracy"][3][2] = None
    write_report(data, tmp_path)
    table = pq.read_table(tmp_path / "results.parquet")
    assert table.column_names[:3] == ["arm", "seed", "curve"]
    assert table.num_rows == sum(len(c) for r in data["runs"] for c in r["curves"].values())
    first = table.slice(0, 900).to_pylist()
    points = data["runs"][0]["curves"]["validation accuracy"]
    keys = ("step", "tokens", "flops", "seconds", "value")
    assert [[row[key] for key in keys] for row in first] == points
    assert first[3]["flops"] is None


def test_the_page_asks_for_nothing(comparison, tmp_path):
    page, _ = read(write_report(comparison(seeds=2), tmp_path))
    outside = re.sub(r"<!--.*?-->|<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r'(src|href|action)="(?!#|data:)', outside)
    assert "url(" not in outside
    assert "default-src 'none'" in html.unescape(page)


def test_hostile_text_stays_text(comparison, tmp_path):
    arms = {HOSTILE: (0.08, 10, 2.0, 40), "plain": (0.0, 5, 1.0, 20)}
    data = comparison(arms, seeds=3)
    data |= dict.fromkeys(("title", "budget", "hardware", "command"), HOSTILE)
    data |= {"notes": [HOSTILE], "versions": {HOSTILE: HOSTILE}, "arm_notes": {HOSTILE: HOSTILE}}
    data["recipes"] = {HOSTILE: HOSTILE, "plain": "name: plain"}
    data["runs"][0]["curves"][HOSTILE] = [[1, None, None, None, 0.5]]
    data["runs"][0]["metrics"][HOSTILE] = 1.0
    data["runs"][0]["failure"] = HOSTILE
    page, inlined = read(write_report(data, tmp_path))
    assert inlined["arms"] == [HOSTILE, "plain"]
    assert "<img" not in page
    assert "{{ 7 * 7 }}" in html.unescape(page)
    prose = (tmp_path / "report.md").read_text().split("```")[0]
    assert not re.search(r"(?<!\\)<", prose)


def test_one_run_is_described_and_not_compared(comparison, tmp_path):
    page, inlined = read(write_report(comparison({"only": (0.1, 7, 1.0, 28)}, seeds=1), tmp_path))
    assert "only reaches" in page
    assert "differences" not in inlined["tables"]
    assert 'id="quality"' not in page


def test_records_of_a_run_folder_are_left_alone(comparison, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("the run's own log\n")
    write_report(comparison({"only": (0.1, 7, 1.0, 28)}, seeds=1), tmp_path, records=False)
    assert (tmp_path / "metrics.jsonl").read_text() == "the run's own log\n"
    assert not (tmp_path / "results.parquet").exists()


def test_special_outcomes_are_said_on_the_page(comparison, tmp_path):
    data = comparison()
    table = {}
    for run in data["runs"]:
        table.setdefault(run["arm"], {})[run["seed"]] = run["metrics"]["test accuracy"]
    table["SVFit"][2] = None
    failed = next(r for r in data["runs"] if (r["arm"], r["seed"]) == ("SVFit", 2))
    failed |= {"status": "failed", "failure": "the loss became NaN at step 41"}
    failed["metrics"] = {"test accuracy": float("nan")}
    spent = {name: {"steps": 300 if name == "frozen probe" else 150} for name in table}
    data |= judge(table, metric="test accuracy", spent=spent)
    page, _ = read(write_report(data, tmp_path))
    text = html.unescape(page)
    assert "1 of 6 runs of SVFit failed" in text
    assert "budgets differ (150 and 300 steps)" in text
    assert "the loss became NaN at step 41" in text
    assert json.loads((tmp_path / "report.json").read_text())["runs"]


def test_a_constant_metric_and_many_arms_can_be_drawn(comparison, tmp_path):
    data = comparison({"a": (0.1, 7, 1.0, 28), "b": (0.1, 7, 1.0, 28)}, seeds=2, points=2)
    data |= judge({name: {0: 1.0, 1: 1.0} for name in "ab"}, metric="test accuracy")
    page, _ = read(write_report(data, tmp_path / "constant"))
    assert "give the same test accuracy at each of 2 seeds" in page
    arms = {f"arm {i}": (0.01 * i, 10 * i, 1.0, 0) for i in range(17)}
    page, inlined = read(write_report(comparison(arms, seeds=3, points=3), tmp_path / "many"))
    assert "16 more pairs stand in the table only" in page
    assert len(inlined["tables"]["differences"]) == 136


def test_zero_costs_stand_apart_on_a_logarithmic_axis(comparison, tmp_path):
    page, _ = read(write_report(comparison(), tmp_path))
    assert "Trainable parameters, logarithmic" in page
    assert "TF-IDF + logistic regression: 0.7" in page


def test_downloads_split_intervals_into_two_columns(comparison, tmp_path):
    _, inlined = read(write_report(comparison(), tmp_path))
    row = inlined["tables"]["arms"][0]
    assert "interval" not in row
    assert row["interval_low"] < row["mean"] < row["interval_high"]
    writer = csv.DictWriter(io.StringIO(), list(row))
    writer.writerows(inlined["tables"]["arms"])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data.pop("budget"), "lacks budget"),
        (lambda data: data.update(runs=[]), "at least one run"),
        (lambda data: data.update(sofa=1), "no sofa"),
        (lambda data: data["runs"][0].pop("meter"), "run 0 of the report lacks meter"),
        (lambda data: data["runs"][0].update(arm="stranger"), "stranger"),
        (lambda data: data["runs"][0]["curves"].update(x=[[1, 2]]), "curve 'x' of"),
        (lambda data: data["runs"][0]["curves"].update(x=[[1, 2], [3]]), "curve 'x' of"),
    ],
)
def test_malformed_data_is_refused_and_nothing_is_written(comparison, tmp_path, spoil, said):
    data = copy.deepcopy(comparison(seeds=2))
    spoil(data)
    with pytest.raises(ConfigError, match=said):
        write_report(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fifty_runs_stay_small_and_quick(comparison, tmp_path):
    arms = {f"arm {i}": (0.08 - 0.01 * i, 2000 * 3**i, 5.0 + i, 8000 * 3**i) for i in range(10)}
    data = comparison(arms, seeds=5, points=1000, curves=3)
    assert len(data["runs"]) == 50
    start = time.process_time()
    path = write_report(data, tmp_path)
    assert time.process_time() - start < 2
    assert path.stat().st_size <= 1_500_000


def test_writing_a_report_needs_no_torch():
    code = (
        "import sys, outlay.comparison.report, outlay.comparison.judge; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
