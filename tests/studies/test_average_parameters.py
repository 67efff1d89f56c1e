"""The study of average parameters: its plan, its judgement and its command."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from outlay.cli.app import run_app
from outlay.core.errors import ConfigError, DataError
from outlay.methods.sparse.gradual_pruning import GradualPruning
from outlay.nn.masks import average_density
from outlay.recipes import get
from outlay.studies import average_parameters as study
from outlay.studies.scaling_laws import ScalingLaw

LAW = ScalingLaw("chinchilla", 1.5, 40.0, 0.35, 60.0, 0.4)
TINY = study.StudySize(
    (16, 24, 32), (3, 6, 12), (0.5,), 4, events=2, resamples=5, verdict=False
)  # fmt: skip


def rows(decides: str) -> list[dict]:
    """Runs whose loss follows the law in one of the three parameter counts."""
    found = [
        {"kind": "dense", "width": w, "steps": t, "params_initial": n, "params_final": n,
         "avg_params": n, "tokens": t * 1000, "name": "", "loss": LAW.predict(n, t * 1000)}
        for (w, n), t in itertools.product(((32, 2e4), (64, 8e4), (128, 3e5)), (50, 200, 800))
    ]  # fmt: skip
    for sparsity, t in itertools.product((0.4, 0.8), (50, 200, 800)):
        n = 3e5
        average = n * GradualPruning(final_sparsity=sparsity).average_density()
        row = {"kind": "sparse", "width": 128, "steps": t, "tokens": t * 1000, "name": ""}
        row |= {"params_initial": n, "params_final": n * (1 - sparsity), "avg_params": average}
        found.append({**row, "loss": LAW.predict(row[decides], row["tokens"])})
    for name, seed in itertools.product(("25 to 75 %", "0 to 25 %"), (0, 1)):
        loss = 2.0 + (name[0] == "0") * 0.1 + 0.01 * seed
        found.append({"kind": "placement", "name": name, "seed": seed, "loss": loss})
    return found


@pytest.mark.parametrize(
    ("decides", "verdict"),
    [("avg_params", "supported"), ("params_final", "refuted"), ("params_initial", "refuted")],
)
def test_the_verdict_is_that_of_the_count_that_decides(decides, verdict):
    found = study.judge(rows(decides), replace(TINY, verdict=True, resamples=0))
    assert found["verdict"] == verdict
    assert found["errors"][decides] == min(found["errors"].values()) < 1e-6
    assert found["dense_error"] < 1e-4
    assert [p["window"] for p in found["placements"]] == ["25 to 75 %", "0 to 25 %"]
    assert found["placements"][0]["loss"] == pytest.approx(2.005)


def test_the_planner_says_cost_equal_model_and_loss():
    plan = study.plan_pruning("gradual_pruning(final_sparsity=0.8)", 1_000_000, 60_000, 500, LAW)
    assert plan.average_density == pytest.approx(0.3991, abs=1e-3)
    assert plan.avg_params == pytest.approx(399_100, rel=3e-3)
    assert (plan.params_initial, plan.params_final) == (1_000_000, 200_000)
    assert plan.loss == LAW.predict(plan.avg_params, 30_000_000)
    assert study.plan_pruning("gradual_pruning", 1000, 60_000).loss is None
    assert average_density([(0, 0.5), (5, 0.25)], 10) == pytest.approx(0.375)
    assert average_density([], 10) == 1 and average_density([(10, 0.5)], 10) == 1


def test_placements_cost_the_same():
    arms = study._arms(study.SIZES["cpu"])
    for arm in arms:
        if arm.kind == "placement":
            plan = study.plan_pruning(arm.method, 1, arm.steps)
            assert plan.average_density * arm.steps == pytest.approx(200, rel=0.01), arm.name
    assert len({arm.steps for arm in arms if arm.kind == "placement"}) > 3
    assert len(arms) == 3 * (4 * 3 + 4 * 3 + 6)


def test_what_cannot_be_studied_is_refused():
    with pytest.raises(ConfigError, match="give smoke, cpu, gpu"):
        study.average_parameters("huge")
    with pytest.raises(ConfigError, match="'glass-lm' is not from scratch"):
        study.average_parameters("smoke", get("glass-lm"))
    with pytest.raises(DataError, match="distinct values of avg_params"):
        study.judge([row for row in rows("avg_params") if row.get("width") != 64], TINY)


def test_the_command(tmp_path, monkeypatch, capsys):
    """Real runs, and the same command again runs none of them."""
    monkeypatch.setitem(study.SIZES, "smoke", TINY)
    typed = ["study", "average-parameters", "--size", "smoke", "--out", str(tmp_path), "--json",
             "--set", "batch.size=4", "--set", "data.limit=200", "--quiet"]  # fmt: skip
    assert run_app(typed) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["runs"]) == 3 * 3 + 3 + len(study.PLACEMENTS)
    pruned = [row for row in found["runs"] if row["kind"] == "sparse"]
    for row in pruned:
        assert row["params_final"] < row["avg_params"] < row["params_initial"]
        assert row["effective_flops"] < row["flops"]
    dense = [row for row in found["runs"] if row["kind"] == "dense"]
    assert all(row["avg_params"] == row["params_initial"] == row["params_final"] for row in dense)
    assert found["verdict"] is None
    assert (tmp_path / "average_parameters-smoke.json").is_file()
    monkeypatch.setattr("outlay.training.runs.Runner", None)
    assert run_app(typed) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["runs"] == found["runs"] and again["errors"] == found["errors"]
    assert run_app(["study", "average_parametres"]) == 2
    assert "did you mean 'average_parameters'?" in capsys.readouterr().err
