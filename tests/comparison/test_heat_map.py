"""The matrix of tasks in a report."""

from __future__ import annotations

import re

from outlay.comparison.page.heat_map import heat_map, matrices_of


def texts(figure):
    return re.findall(r"<text[^>]*>([^<]*)</text>", figure)


def test_values_stand_in_rows_after_each_task_and_blanks_stay_blank():
    figure = heat_map("what", [[0.5, None], [0.25, 1.0]], ["a", "<b>"], "{:.2f}".format)
    assert texts(figure) == ["a", "&lt;b&gt;", "after a", "0.50", "after &lt;b&gt;", "0.25", "1.00"]
    assert re.findall(r'fill-opacity="([^"]*)"', figure) == ["0.500", "0.250", "1.000"]
    losses = heat_map("what", [[4.0, 1.0], [2.0, 3.0]], ["a", "b"], str)
    assert re.findall(r'fill-opacity="([^"]*)"', losses) == ["1.000", "0.250", "0.500", "0.750"]


def entries(values, split="test"):
    names = ("one", "two")
    return {
        f"{split}/accuracy after {after} on {on}": values[i][j]
        for i, after in enumerate(names)
        for j, on in enumerate(names)
    }


def test_an_arm_shows_the_means_of_its_runs_on_the_judged_split():
    runs = [
        {"arm": "classp", "metrics": {"test/accuracy": 0.5, **entries([[0.8, 0.0], [0.4, 0.9]])}},
        {"arm": "classp", "metrics": {**entries([[0.6, 0.1], [0.2, 0.7]]),
                                      **entries([[0, 0], [0, 0]], "validation")}},
        {"arm": "plain", "metrics": {"test/accuracy": 0.5}},
        {"arm": "failed", "metrics": {}},
    ]  # fmt: skip
    arms = [{"name": name} for name in ("classp", "plain", "failed")]
    (figure,) = matrices_of({"metric": "test/accuracy", "arms": arms, "runs": runs})
    assert texts(figure)[2:] == ["after one", "0.700", "0.0500", "after two", "0.300", "0.800"]
    assert "classp: test/accuracy on each task" in figure and "mean of 2 runs" in figure
