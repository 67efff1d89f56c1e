"""run: JSON, changes on the command line, stopping, going on, failing."""

from __future__ import annotations

import json
import signal

import pytest

from outlay.cli import progress, run
from outlay.training.recipe import Recipe

KEYS = {"run", "folder", "metrics", "meter", "weights_sha256", "seconds", "status"}


def test_run_gives_one_json_object_last(outlay, work):
    answer = outlay("run", "mine.yaml", "--json")
    result = answer.last
    assert answer.code == 0 and len(answer.out.splitlines()) == 1
    assert set(result) >= KEYS and result["status"] == "done"
    assert result["meter"]["steps"] == 6 and len(result["weights_sha256"]) == 64
    assert "test/accuracy" in result["metrics"]
    assert (work / result["report"]).is_file()
    again = outlay("run", "mine.yaml", "--json")
    assert again.last["weights_sha256"] == result["weights_sha256"]
    assert "already done" in again.err


def test_the_plan_lies_beside_what_was_measured(outlay, work):
    planned = outlay("plan", "mine.yaml", "--json").json
    found = outlay("run", "mine.yaml", "--json", "--quiet").last
    written = json.loads((work / found["folder"] / "plan.json").read_text())
    free = {"memory_bytes", "fits", "notes"}
    assert {k: v for k, v in written.items() if k not in free} == {
        k: v for k, v in planned.items() if k not in free
    }
    assert written["flops"] == pytest.approx(found["meter"]["flops"], rel=0.01)


def test_a_run_that_cannot_be_planned_runs(outlay, work, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("an operator without a fake")

    monkeypatch.setattr("outlay.training.planning.plan.plan", broken)
    answer = outlay("run", "mine.yaml", "--json")
    assert answer.last["status"] == "done" and "no plan was made (RuntimeError)" in answer.err


def test_equal_runs_print_equal_weights(outlay, work):
    calls = [
        outlay("run", "mine.yaml", "--json", "--quiet", "--out", out, "--seed", seed).last
        for out, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, second, other = (call["weights_sha256"] for call in calls)
    assert first == second != other
    assert calls[0]["run"] == calls[1]["run"] != calls[2]["run"]


def test_people_see_a_table_and_quiet_shows_nothing(outlay, work):
    shown = outlay("run", "mine.yaml")
    assert "test/accuracy" in shown.out and "report.html" in shown.out
    quiet = outlay("run", "mine.yaml", "--quiet", "--out", "other")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_changes_reach_the_recipe(outlay, work):
    answer = outlay(
        "run", "mine.yaml", "--json", "--quiet", "--set", "methods=[]", "--method", "probe",
        "--set", "optimizer.weight-decay=0.5", "--budget", "4 steps", "--seed", "3",
    )  # fmt: skip
    read = Recipe.read(work / answer.last["folder"] / "recipe.yaml")
    assert [m.spec() for m in read.methods] == ["probe"]
    assert (read.optimizer.weight_decay, str(read.budget), read.seed) == (0.5, "4steps", 3)


def test_methods_come_after_those_of_the_recipe(outlay, work):
    plain = outlay(
        "run", "mine.yaml", "--json", "--quiet", "--method", "bone(r=2, adapter_name='second')"
    ).last
    read = Recipe.read(work / plain["folder"] / "recipe.yaml")
    assert [m.r for m in read.methods] == [4, 2]


def _interrupted_at(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Press Ctrl-C while step `index` is taken."""

    class Pressing(progress.Lines):
        def step(self, step, values, meter):
            if step.index == index:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run, "progress_for", lambda quiet, hidden=False: Pressing())


def test_stopped_and_resumed_gives_the_same_weights(outlay, work, monkeypatch):
    whole = outlay("run", "mine.yaml", "--json", "--quiet", "--out", "whole").last
    with monkeypatch.context() as patch:
        _interrupted_at(patch, 2)
        stopped = outlay("run", "mine.yaml", "--json")
    assert stopped.code == 130 and stopped.last["status"] == "stopped"
    assert stopped.last["meter"]["steps"] == 3
    command = stopped.err.splitlines()[-1].rpartition("to go on: ")[2].split()
    assert command[:3] == ["outlay", "run", "--resume"]
    unfinished = outlay("evaluate", stopped.last["folder"])
    assert unfinished.code == 2 and "--resume" in unfinished.err
    resumed = outlay(*command[1:], "--json")
    assert resumed.code == 0 and "going on at step 3" in resumed.err
    assert resumed.last["weights_sha256"] == whole["weights_sha256"]
    assert resumed.last["folder"] == stopped.last["folder"]


def test_resume_refuses_a_recipe_that_differs_by_name(outlay, work):
    folder = outlay("run", "mine.yaml", "--json", "--quiet").last["folder"]
    answer = outlay("run", "mine.yaml", "--resume", folder, "--set", "optimizer.lr=0.02")
    assert answer.code == 3 and "optimizer.lr" in answer.err


def test_a_run_that_breaks_down_is_failed(outlay, work):
    answer = outlay(
        "run", "mine.yaml", "--json", "--set", "optimizer.lr=1e30", "--set", "optimizer.clip=null"
    )
    assert answer.code == 1
    failed = answer.last
    assert set(failed) >= KEYS and failed["status"] == "failed" and failed["failure"]
    assert answer.err.splitlines()[-2].startswith("error: ")
    assert "Traceback" not in answer.err


def test_a_report_that_fails_does_not_fail_the_run(outlay, work, monkeypatch):
    from outlay.comparison import report

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_report", broken)
    answer = outlay("run", "mine.yaml", "--json")
    assert answer.code == 0 and answer.last["status"] == "done"
    assert "no report was written" in answer.err and "report" not in answer.last


def test_the_reports_numbers_are_the_runs(outlay, finished):
    result = json.loads((finished / "result.json").read_text())
    twin = json.loads((finished / "report.json").read_text())
    assert twin["runs"][0]["metrics"] == result["metrics"]
    assert twin["arms"][0]["mean"] == result["metrics"]["test/accuracy"]
    assert "bone(r=4)" in (finished / "report.html").read_text()
