"""Metrics against scikit-learn and by hand; nothing is left changed by measuring."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from torch import nn

from outlay.core.errors import ConfigError, DataError
from outlay.training.data.labels import Labels
from outlay.training.evaluate import METRICS, evaluate, main_metric, predictions
from outlay.training.objectives import objective_for
from outlay.training.specs import TASKS


class Table(nn.Module):
    """Gives the logits of the rows whose numbers it is handed."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.modes = logits, []
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(2)

    def forward(self, rows, **_):
        self.modes.append((self.training, torch.is_grad_enabled()))
        torch.rand(1)
        return SimpleNamespace(logits=self.logits[rows])


def batches_of(labels, size=4, **more):
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        rows = torch.arange(len(labels))[part]
        yield {"ids": tuple(str(int(i)) for i in rows), "labels": labels[part], "rows": rows,
               **{key: value[part] for key, value in more.items()}}  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_classification_equals_scikit_learn():
    names = ("a", "b", "c", "never")
    logits = draw(50, 4)
    logits[:, 3] = -9
    target = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(1))
    labels = Labels(names)
    result = evaluate(
        Table(logits), objective_for("sequence-classification"), batches_of(target, 7),
        "sequence-classification", labels,
    )  # fmt: skip
    found = logits.argmax(-1)
    assert set(result.metrics) == set(METRICS["sequence-classification"])
    assert result.metrics["accuracy"] == pytest.approx(reference.accuracy_score(target, found))
    assert result.metrics["macro_f1"] == pytest.approx(
        reference.f1_score(target, found, average="macro")
    )
    assert result.metrics["loss"] == pytest.approx(
        reference.log_loss(target, logits.softmax(-1), labels=[0, 1, 2, 3])
    )
    table = result.table
    assert table["id"] == [str(i) for i in range(50)]
    assert table["prediction"] == [names[i] for i in found]
    assert table["correct"] == (found == target).long().tolist()
    assert {len(column) for column in table.values()} == {50}


def test_rows_without_a_label_count_nowhere():
    target = torch.tensor([0, -100, 1])
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    result = evaluate(
        Table(logits), objective_for("image-classification"), batches_of(target),
        "image-classification", Labels(("x", "y")),
    )  # fmt: skip
    assert result.metrics["accuracy"] == 0.5
    assert result.table["target"] == ["x", None, "y"]
    assert result.table["weight"] == [1.0, 0.0, 1.0]
    with pytest.raises(DataError, match="nothing to measure"):
        evaluate(
            Table(logits), objective_for("image-classification"),
            batches_of(torch.full((3,), -100)), "image-classification",
        )  # fmt: skip


def test_multi_label_equals_scikit_learn():
    logits = draw(40, 3)
    target = (draw(40, 3, seed=5) > 0.3).double()
    result = evaluate(
        Table(logits), objective_for("multi-label-classification"), batches_of(target),
        "multi-label-classification", Labels(("p", "q", "r")),
    ).metrics  # fmt: skip
    found = (logits > 0).long().numpy()
    assert result["micro_f1"] == pytest.approx(reference.f1_score(target, found, average="micro"))
    assert result["macro_f1"] == pytest.approx(reference.f1_score(target, found, average="macro"))
    assert result["exact_match"] == pytest.approx(reference.accuracy_score(target, found))


def test_regression_is_reported_in_the_targets_unit():
    scale = 25.0
    logits, target = draw(30, 1), 25 * draw(30, seed=4) + 3
    result = evaluate(
        Table(logits), objective_for("regression", {}, Labels(("y",), (), (scale,), (3.0,))),
        batches_of(target), "regression", Labels(("y",), (), (scale,), (3.0,)),
    )  # fmt: skip
    found = logits.flatten() * scale
    assert result.metrics["rmse"] == pytest.approx(reference.root_mean_squared_error(target, found))
    assert result.metrics["mae"] == pytest.approx(reference.mean_absolute_error(target, found))
    assert result.metrics["r2"] == pytest.approx(reference.r2_score(target, found))
    assert result.metrics["pearson"] == pytest.approx(np.corrcoef(target, found)[0, 1])
    assert result.table["target"] == pytest.approx(target.tolist())


def test_what_is_undefined_is_zero_and_never_nan():
    result = evaluate(
        Table(torch.zeros(3, 1)), objective_for("regression"), batches_of(torch.ones(3)),
        "regression",
    ).metrics  # fmt: skip
    assert (result["r2"], result["pearson"]) == (0.0, 0.0)


def test_language_modeling_counts_tokens_and_bytes():
    logits = draw(3, 5, 6)
    labels = torch.tensor([[1, 2, 3, 4, 5], [1, 2, -100, -100, -100], [0, 0, 0, 0, -100]])
    sizes = torch.tensor([0, 1, 2, 3, 4, 5])
    results = [
        evaluate(
            Table(logits), objective_for("causal-language-modeling", {"average": average}),
            batches_of(labels, 2), "causal-language-modeling", token_bytes=sizes,
        )
        for average in ("tokens", "sequences")
    ]  # fmt: skip
    nats, count, right, size = 0.0, 0, 0, 0
    for row in range(3):
        for place in range(4):
            target = int(labels[row, place + 1])
            if target != -100:
                nats -= float(logits[row, place].log_softmax(-1)[target])
                right += int(logits[row, place].argmax()) == target
                count, size = count + 1, size + target
    for result in results:
        assert result.metrics["perplexity"] == pytest.approx(math.exp(nats / count))
        assert result.metrics["next_token_accuracy"] == pytest.approx(right / count)
        assert result.metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
    assert results[0].metrics["loss"] == pytest.approx(nats / count)
    assert results[0].table["tokens"] == [4, 1, 3]
    rows = results[1].table["loss"]
    assert results[1].metrics["loss"] == pytest.approx(sum(rows) / 3)


def test_batch_size_and_padding_change_nothing():
    logits = draw(5, 4, 6)
    labels = torch.tensor([[1, 2, 3, 4]] * 5)
    wide = torch.cat([logits, draw(5, 3, 6, seed=8)], dim=1)
    padded = torch.cat([labels, torch.full((5, 3), -100)], dim=1)
    objective = objective_for("causal-language-modeling")
    one = evaluate(Table(logits), objective, batches_of(labels, 5), "causal-language-modeling")
    two = evaluate(Table(wide), objective, batches_of(padded, 2), "causal-language-modeling")
    assert one.metrics == pytest.approx(two.metrics)


def test_modes_and_generator_are_put_back():
    model = Table(torch.zeros(4, 2))
    model.train()
    model.norm.training = False
    before = torch.random.get_rng_state()
    objective = objective_for("sequence-classification").train()
    entered = []

    @contextlib.contextmanager
    def around(batch):
        entered.append(batch["ids"])
        yield

    evaluate(
        model, objective, batches_of(torch.zeros(4).long(), 2), "sequence-classification",
        around=around,
    )  # fmt: skip
    assert model.modes == [(False, False)] * 2
    assert (model.training, model.drop.training, model.norm.training) == (True, True, False)
    assert objective.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert entered == [("0", "1"), ("2", "3")]
    model.logits = None
    with pytest.raises(TypeError):
        evaluate(model, objective, batches_of(torch.zeros(4).long()), "sequence-classification")
    assert (model.training, model.drop.training, model.norm.training) == (True, True, False)


def test_predictions_need_no_labels():
    def rows():
        for batch in batches_of(torch.zeros(3).long(), 2):
            del batch["labels"]
            yield batch

    logits = torch.tensor([[0.0, math.log(3)], [5.0, 0.0], [0.0, 0.0]])
    model = Table(logits).train()
    first, *_ = found = list(
        predictions(model, rows(), "sequence-classification", Labels(("no", "yes")))
    )
    assert [row["id"] for row in found] == ["0", "1", "2"]
    assert first["prediction"] == "yes"
    assert first["probabilities"] == pytest.approx({"no": 0.25, "yes": 0.75})
    assert model.training
    several = list(predictions(model, rows(), "multi-label-classification", Labels(("p", "q"))))
    assert several[0]["prediction"] == ["p", "q"]
    assert several[0]["probabilities"] == pytest.approx({"p": 0.5, "q": 0.75})
    pair = Labels(("p", "q"), (), (10.0, 2.0), (0.0, 0.0))
    values = list(predictions(model, rows(), "regression", pair))
    assert values[1]["prediction"] == {"p": 50.0, "q": 0.0}
    single = Table(logits[:, :1])
    values = list(predictions(single, rows(), "regression", Labels(("p",), (), (10.0,), (0.0,))))
    assert [row["prediction"] for row in values] == [0.0, 50.0, 0.0]


def test_text_is_scored_and_not_classified():
    labels = torch.tensor([[1, 2, 3], [1, 2, -100]])
    model = Table(torch.zeros(2, 3, 4))
    found = list(
        predictions(
            model, batches_of(labels), "causal-language-modeling",
            objective=objective_for("causal-language-modeling"),
        )
    )  # fmt: skip
    assert [row["tokens"] for row in found] == [2, 1]
    assert found[0]["loss"] == pytest.approx(math.log(4))
    assert found[0]["perplexity"] == pytest.approx(4)
    with pytest.raises(ConfigError, match="objective"):
        list(predictions(model, batches_of(labels), "causal-language-modeling"))


def test_main_metrics():
    for task in TASKS:
        name, higher = main_metric(task)
        assert name in METRICS[task]
        assert main_metric(task, name) == (name, higher)
    assert main_metric("regression", "r2") == ("r2", True)
    assert main_metric("regression", "mae") == ("mae", False)
    with pytest.raises(ConfigError, match="did you mean 'macro_f1'"):
        main_metric("sequence-classification", "macrof1")
