"""Packed training is a setting of the batch: fewer positions, the same weights."""

from __future__ import annotations

import json
import random

import pytest
import torch

from outlay import Recipe, plan, run
from outlay.core.errors import ConfigError, Conflict
from outlay.core.losses import per_example
from outlay.training.data.packed import packed
from outlay.training.finished import open_run
from outlay.training.objectives import CausalObjective


@pytest.fixture
def rows(tmp_path):
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdef ", k=draw.choice((2, 5, 9, 30)))) for _ in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def recipe(rows, packing, kind="llama", **changes):
    fields = {
        "model": {"config": kind, "layers": 1, "width": 32, "dropout": 0.0},
        "task": "causal-language-modeling",
        "data": {"path": str(rows), "text": "text"},
        "batch": {"size": 8, "micro": 4, "length": 32, "packing": packing},
        "precision": "float64", "budget": "4steps", "optimizer": {"lr": 0.01},
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


@pytest.mark.parametrize(
    ("kind", "methods"),
    [("llama", ()), ("gpt2", ()), ("llama", ("loss_weights",)), ("llama", ("bone(r=4)",))],
)
def test_a_packed_run_ends_where_the_unpacked_one_does(rows, tmp_path, kind, methods):
    results = [
        run(recipe(rows, packing, kind, methods=methods), out=tmp_path / str(packing), device="cpu")
        for packing in (False, True)
    ]
    plain, dense = (
        dict(open_run(result.folder, rows=False, device="cpu").model.named_parameters())
        for result in results
    )
    for name, value in plain.items():
        torch.testing.assert_close(dense[name], value, atol=1e-9, rtol=0)
    for key in ("tokens", "examples", "steps"):
        assert results[0].meter[key] == results[1].meter[key]
    assert results[1].meter["flops"] < 0.8 * results[0].meter["flops"]
    for name, value in results[0].metrics.items():
        assert results[1].metrics[name] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_every_example_keeps_its_weight(average):
    examples = [
        {"id": str(n), "input_ids": list(range(1, n + 2)), "labels": list(range(1, n + 2)),
         "example_weights": n / 3}
        for n in range(1, 7)
    ]  # fmt: skip
    batch = packed(examples, pad_to=4)
    objective = CausalObjective(average)
    found = per_example(objective.weights(batch), batch, objective.align)
    expected = [n / 3 * (n if average == "tokens" else 1) for n in range(1, 7)]
    assert found.tolist() == pytest.approx(expected)
    assert len(batch["input_ids"]) < len(examples)


def test_a_plan_sees_the_packed_batches(rows):
    flops = [plan(recipe(rows, packing), device="cpu").flops for packing in (False, True)]
    assert flops[1] < 0.8 * flops[0]


def test_packing_where_it_cannot_be_is_refused(rows, tmp_path):
    with pytest.raises(ConfigError, match="packing is for causal"):
        recipe(rows, True, task="sequence-to-sequence", model={"config": "t5"})
    from outlay.training.data.packed import check_packing

    with pytest.raises(Conflict, match="'eager'"):
        import packing_kit

        check_packing(packing_kit.tiny(implementation="eager"))
