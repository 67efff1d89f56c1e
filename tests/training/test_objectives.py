"""The tasks' objectives: known answers, slow references, transformers' own losses."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from outlay.core.errors import ConfigError
from outlay.core.method import Step
from outlay.training.data.labels import Labels
from outlay.training.models.load import load_model
from outlay.training.objectives import objective_for
from outlay.training.specs import TASKS, ModelSpec

STEP = Step(index=0, share=0.0, seed=0)


class Fixed(nn.Module):
    """A model that gives the logits it was made with, and its inputs' names."""

    def __init__(self, logits, hidden=None):
        super().__init__()
        self.logits, self.hidden, self.seen = nn.Parameter(logits), hidden, set()

    def forward(self, **inputs):
        self.seen = set(inputs)
        return SimpleNamespace(logits=self.logits, hidden_states=self.hidden)


def batch_of(labels, **more):
    return {
        "ids": tuple(range(len(labels))),
        "domains": ("",) * len(labels),
        "labels": labels,
        **more,
    }


def term_of(objective, model, batch):
    losses = objective(model, batch, STEP)
    assert losses.primary == objective.term
    term = losses.terms[losses.primary]
    assert term.values.shape == term.weights.shape
    assert objective.weight_sums(batch) == {objective.term: float(term.weights.double().sum())}
    return losses, term


def test_classification_is_weighted_cross_entropy():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    objective = objective_for(
        "sequence-classification", {}, Labels(("a", "b", "c"), (1.0, 3.0, 0.5))
    )
    losses, term = term_of(objective, Fixed(logits), batch_of(torch.tensor([0, 1, -100])))
    first = math.log(math.exp(2) + 2) - 2
    second = math.log(math.exp(1) + 2) - 1
    assert torch.allclose(term.values.detach(), torch.tensor([first, second, 0.0]))
    assert term.weights.tolist() == [1.0, 3.0, 0.0]
    assert torch.equal(losses.outputs["targets"], torch.tensor([0, 1, -100]))
    assert losses.outputs["logits"].shape == (3, 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_against_its_formula(smoothing):
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 4, generator=draw, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 2, 2])
    objective = objective_for("image-classification", {"label_smoothing": smoothing})
    _, term = term_of(objective, Fixed(logits), batch_of(labels))
    assert term.values.dtype == torch.float64
    for row, label, value in zip(logits.log_softmax(-1), labels, term.values):
        expected = -(1 - smoothing) * row[label] - smoothing * row.mean()
        assert value.item() == pytest.approx(expected.item(), abs=1e-12)


def test_example_weights_multiply():
    objective = objective_for("sequence-classification")
    batch = batch_of(torch.tensor([0, 1]), example_weights=torch.tensor([0.5, 0.0]))
    _, term = term_of(objective, Fixed(torch.zeros(2, 2)), batch)
    assert term.weights.tolist() == [0.5, 0.0]


def test_multi_label_gives_one_value_a_label():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 0.5]])
    labels = torch.tensor([[1.0, 0.0], [-100.0, 1.0]])
    objective = objective_for("multi-label-classification", {}, Labels(("x", "y"), (4.0, 2.0)))
    _, term = term_of(objective, Fixed(logits), batch_of(labels))
    expected = [[math.log(2), math.log(1 + math.exp(2))], [0.0, math.log(1 + math.exp(-0.5))]]
    assert torch.allclose(term.values.detach(), torch.tensor(expected))
    assert term.weights.tolist() == [[4.0, 1.0], [0.0, 2.0]]


def test_regression_is_in_standard_deviations():
    objective = objective_for("regression", {}, Labels(("y",), (), (4.0,), (0.0,)))
    batch = batch_of(torch.tensor([8.0, float("nan"), -4.0]))
    model = Fixed(torch.tensor([[1.0], [3.0], [-1.5]]))
    losses, term = term_of(objective, model, batch)
    assert torch.allclose(term.values, torch.tensor([1.0, 0.0, 0.25]))
    assert term.weights.tolist() == [1.0, 0.0, 1.0]
    assert losses.outputs["logits"].shape == losses.outputs["targets"].shape == (3,)
    (term.values * term.weights).sum().backward()
    assert torch.allclose(model.logits.grad.flatten(), torch.tensor([-2.0, 0.0, -1.0]))


def test_huber_and_several_targets():
    objective = objective_for(
        "regression",
        {"loss": "huber", "delta": 0.5},
        Labels(("a", "b"), (), (1.0, 10.0), (0.0, 0.0)),
    )
    batch = batch_of(torch.tensor([[0.25, 20.0]]))
    _, term = term_of(objective, Fixed(torch.zeros(1, 2)), batch)
    # 0.25^2 / 2 below the threshold, 0.5 (2 - 0.25) above it.
    assert torch.allclose(term.values, torch.tensor([[0.03125, 0.875]]))


def test_causal_values_stand_where_the_prediction_is_made():
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 4, 7, generator=draw, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3, 4], [-100, 5, 6, -100]])
    objective = objective_for("causal-language-modeling")
    losses, term = term_of(
        objective, Fixed(logits), batch_of(labels, input_ids=labels.clamp(min=0))
    )
    assert term.values.shape == (2, 4)
    assert term.weights.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    for row in range(2):
        for place in range(3):
            target = int(labels[row, place + 1])
            expected = 0.0 if target == -100 else -float(logits[row, place].log_softmax(-1)[target])
            assert term.values[row, place].item() == pytest.approx(expected, abs=1e-12)
    assert losses.outputs["targets"].tolist() == [[2, 3, 4, -100], [5, 6, -100, -100]]
    scores = torch.arange(8.0).view(2, 4)
    assert objective.align(scores).tolist() == [[1, 2, 3, 0], [5, 6, 7, 0]]


def test_average_over_sequences_and_packed_segments():
    labels = torch.tensor([[1, 2, 3, 4, -100], [1, 2, -100, -100, -100]])
    objective = objective_for("causal-language-modeling", {"average": "sequences"})
    batch = batch_of(labels)
    assert torch.allclose(
        objective.weights(batch), torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0], [1.0, 0, 0, 0, 0]])
    )
    # Two texts in one row: the first token of the second is predicted from nothing.
    packed = batch_of(
        torch.tensor([[1, 2, 3, -100, 5, 6]]), segment_ids=torch.tensor([[0, 0, 0, 1, 1, 1]])
    )
    assert torch.allclose(objective.weights(packed), torch.tensor([[0.5, 0.5, 0.0, 0.5, 0.5, 0.0]]))
    assert objective.weight_sums(packed)["cross_entropy"] == pytest.approx(2.0)


def test_token_weights_of_a_batch_are_aligned():
    objective = objective_for("causal-language-modeling")
    batch = batch_of(torch.tensor([[1, 2, 3]]), example_weights=torch.tensor([[9.0, 0.25, 0.5]]))
    assert objective.weights(batch).tolist() == [[0.25, 0.5, 0.0]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_causal_loss_equals_that_of_transformers(kind):
    model, _ = load_model(
        ModelSpec(config=kind, layers=2, width=32, dropout=0.0), "causal-language-modeling",
        precision="float64",
    )  # fmt: skip
    ids = torch.randint(4, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    _, term = term_of(
        objective_for("causal-language-modeling"), model,
        batch_of(labels, input_ids=ids, attention_mask=mask),
    )  # fmt: skip
    ours = (term.values * term.weights).sum() / term.weights.sum()
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    # Theirs is computed in float32.
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_sequence_to_sequence_loss_equals_that_of_transformers():
    model, _ = load_model(
        ModelSpec(config="t5", layers=2, width=32, dropout=0.0), "sequence-to-sequence"
    )
    draw = torch.Generator().manual_seed(0)
    ids, labels = (
        torch.randint(4, 200, (3, 9), generator=draw),
        torch.randint(4, 200, (3, 5), generator=draw),
    )
    labels[1, 3:] = -100
    batch = batch_of(labels, input_ids=ids, attention_mask=torch.ones_like(ids))
    losses, term = term_of(
        objective_for("sequence-to-sequence", requests={"hidden:-1", "encoder_hidden:0"}),
        model,
        batch,
    )
    ours = (term.values * term.weights).sum() / term.weights.sum()
    theirs = model(input_ids=ids, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert losses.outputs["hidden:-1"].shape == (3, 5, 32)
    assert losses.outputs["encoder_hidden:0"].shape == (3, 9, 32)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    "task", ["sequence-classification", "multi-label-classification", "regression"]
)
def test_text_heads_equal_the_losses_of_transformers(kind, task):
    labels = Labels(("y",), (), (1.0,), (0.0,)) if task == "regression" else Labels(("a", "b", "c"))
    model, tokenizer = load_model(
        ModelSpec(config=kind, layers=2, width=32, dropout=0.0), task, labels
    )
    ids = torch.randint(4, 200, (4, 6), generator=torch.Generator().manual_seed(0))
    if kind == "t5":
        ids[:, -1] = tokenizer.eos_token_id
    target = {
        "sequence-classification": torch.tensor([0, 2, 1, 1]),
        "multi-label-classification": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
        "regression": torch.tensor([0.5, -1.0, 2.0, 0.0]),
    }[task]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _, term = term_of(objective_for(task, {}, labels), model, batch_of(target, **inputs))
    ours = (term.values * term.weights).sum() / term.weights.sum()
    theirs = model(**inputs, labels=target).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_one_batch_of_sixteen_equals_four_of_four(average):
    model, _ = load_model(
        ModelSpec(config="llama", layers=1, width=32), "causal-language-modeling",
        precision="float64",
    )  # fmt: skip
    objective = objective_for("causal-language-modeling", {"average": average})
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 200, (16, 10), generator=draw)
    labels = ids.clone()
    for row in range(16):
        labels[row, 2 + row % 8 :] = -100

    def gradients(sizes):
        batches = [batch_of(y, input_ids=x) for x, y in zip(ids.split(sizes), labels.split(sizes))]
        total = sum(objective.weight_sums(b)["cross_entropy"] for b in batches)
        model.zero_grad()
        for b in batches:
            term = objective(model, b, STEP).terms["cross_entropy"]
            ((term.values * term.weights).sum() / total).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, parts = gradients(16), gradients(4)
    assert float((whole - parts).abs().max()) < 1e-12


def test_nothing_but_padding_gives_no_weight_and_no_gradient():
    objective = objective_for("causal-language-modeling")
    model = Fixed(torch.zeros(2, 3, 5))
    batch = batch_of(torch.full((2, 3), -100))
    _, term = term_of(objective, model, batch)
    (term.values * term.weights).sum().backward()
    assert objective.weight_sums(batch) == {"cross_entropy": 0.0}
    assert float(model.logits.grad.abs().sum()) == 0


def test_half_precision_logits_are_scored_in_float32():
    objective = objective_for("sequence-classification")
    logits = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    losses, term = term_of(objective, Fixed(logits), batch_of(torch.tensor([0])))
    assert term.values.dtype == losses.outputs["logits"].dtype == torch.float32


def test_requested_outputs_come_and_the_set_may_grow():
    requests: set[str] = {"clean"}
    objective = objective_for("sequence-classification", requests=requests)
    hidden = (torch.zeros(2, 3, 4), torch.arange(24.0).view(2, 3, 4))
    model = Fixed(torch.zeros(2, 2), hidden)
    batch = batch_of(torch.tensor([0, 1]), attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert set(objective(model, batch, STEP).outputs) == {"logits", "targets"}
    assert model.seen == {"attention_mask"}
    requests |= {"hidden:-1", "features"}
    outputs = objective(model, batch, STEP).outputs
    assert torch.equal(outputs["hidden:-1"], hidden[1])
    assert torch.equal(outputs["features"][0], hidden[1][0, :2].mean(0))
    assert "output_hidden_states" in model.seen


@pytest.mark.parametrize("name", ["hidden:7", "hidden:x", "attention:0", "hiden:-1", "features"])
def test_outputs_that_do_not_exist_are_refused(name):
    hidden = None if name == "features" else (torch.zeros(1, 2, 3),)
    objective = objective_for("sequence-classification", requests={name})
    with pytest.raises(ConfigError, match="requested output"):
        objective(Fixed(torch.zeros(1, 2), hidden), batch_of(torch.tensor([0])), STEP)


def test_only_model_inputs_reach_the_model():
    objective = objective_for("sequence-classification")
    model = Fixed(torch.zeros(1, 2))
    objective(model, batch_of(torch.tensor([0]), input_ids=torch.zeros(1, 1), clean={}), STEP)
    assert model.seen == {"input_ids"}


@pytest.mark.parametrize(
    ("task", "settings", "words"),
    [
        ("causal-language-modeling", {"averag": "tokens"}, "did you mean 'average'"),
        ("causal-language-modeling", {"average": "rows"}, "tokens or sequences"),
        ("sequence-classification", {"label_smoothing": 1.0}, r"\[0, 1\)"),
        ("sequence-classification", {"label_smoothing": True}, r"\[0, 1\)"),
        ("sequence-classification", {"average": "tokens"}, "known here: label_smoothing"),
        ("multi-label-classification", {"x": 1}, "known here: none"),
        ("regression", {"loss": "mea"}, "mse or huber"),
        ("regression", {"delta": 0}, "> 0"),
        ("regresion", {}, "did you mean 'regression'"),
    ],
)
def test_settings_are_refused_by_name(task, settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        objective_for(task, settings)
    assert len(str(caught.value).splitlines()) == 2


def test_every_task_has_an_objective_without_state():
    for task in TASKS:
        objective = objective_for(task, {}, Labels(("a", "b")))
        assert not objective.state_dict()
        assert not list(objective.parameters())
