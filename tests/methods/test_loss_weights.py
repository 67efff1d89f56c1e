"""Loss weights: known answers of arXiv:2502.06733, and that they are the run's own losses."""

from __future__ import annotations

import math
import socket
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import kit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from outlay.core.errors import ConfigError, NonFinite
from outlay.core.method import Step
from outlay.methods.objectives.loss_weights import (
    CURVES,
    LossReweighter,
    LossWeights,
    loss_weights,
    sequence_losses,
)
from outlay.training.runs import run

FIVE = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize(
    ("curve", "temperature", "expected"),
    [
        ("linupper", 1.0, [0.0926, 0.1526, 0.2516, 0.2516, 0.2516]),
        ("quadratic", 1.0, [0.1117, 0.2365, 0.3036, 0.2365, 0.1117]),
        ("middle", 1.0, [0.1117, 0.2365, 0.3036, 0.2365, 0.1117]),
        ("extremes", 1.0, [0.2793, 0.1694, 0.1027, 0.1694, 0.2793]),
        ("linupper", 0.4, [0.0244, 0.0851, 0.2969, 0.2969, 0.2969]),
    ],
)
def test_known_weights(curve, temperature, expected):
    found = loss_weights(FIVE, curve, temperature)
    assert found.tolist() == pytest.approx(expected, abs=5e-5)
    assert float(found.sum()) == pytest.approx(1, abs=1e-6) and not found.requires_grad


def test_equal_losses_and_single_sequences_are_uniform():
    for curve in CURVES:
        assert loss_weights(torch.full((4,), 2.5), curve).tolist() == [0.25] * 4
        assert loss_weights(torch.tensor([3.0]), curve).tolist() == [1.0]
    assert loss_weights(FIVE, temperature=1e6).tolist() == pytest.approx([0.2] * 5, abs=1e-6)
    assert loss_weights(FIVE, "uniform").tolist() == pytest.approx([0.2] * 5, abs=1e-7)


LOSSES = st.lists(st.floats(0, 20, width=32), min_size=2, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    values=LOSSES, curve=st.sampled_from(sorted(CURVES)), scale=st.floats(0.1, 9),
    shift=st.floats(-5, 5), seed=st.integers(0, 9),
)  # fmt: skip
def test_units_and_order_do_not_matter(values, curve, scale, shift, seed):
    losses = torch.tensor(values, dtype=torch.float64)
    if 0 < float(losses.max() - losses.min()) < 1e-3:
        return
    found = loss_weights(losses, curve, 0.5)
    again = loss_weights(scale * losses + shift, curve, 0.5)
    assert torch.allclose(found, again, atol=1e-9)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(found[order], loss_weights(losses[order], curve, 0.5))
    assert float(found.max() / found.min()) <= math.exp(1 / 0.5) * (1 + 1e-9)


def test_priors_multiply_and_zero_leaves_out():
    prior = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    found = loss_weights(torch.tensor([1.0, 2.0, 3.0, 5.0, math.nan]), prior=prior)
    alone = loss_weights(torch.tensor([1.0, 2.0, 3.0, 5.0]))
    expected = alone * prior[:4] / (alone * prior[:4]).sum()
    assert found[4] == 0 and torch.allclose(found[:4], expected)


def test_one_corrupt_sequence_squeezes_the_range_but_not_the_quantiles():
    losses = torch.cat([torch.linspace(2, 3, 99), torch.tensor([60.0])])
    published = loss_weights(losses)
    assert float(published[-1] / published[:99].mean()) > 0.95 * math.e
    ours = loss_weights(losses, loss_range="quantile")
    assert float(ours[-1] / ours[70:99].mean()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"temperature": 0.0}, "temperature"), ({"delta": 0.0}, "delta"),
        ({"curve": "linuper"}, "did you mean 'linupper'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, text):
    for make in (LossReweighter, lambda **s: loss_weights(FIVE, **s)):
        with pytest.raises(ConfigError, match=text):
            make(**settings)


def test_a_loss_that_is_not_finite_names_its_sequence():
    with pytest.raises(NonFinite, match="sequence 2 of 3"):
        loss_weights(torch.tensor([1.0, 2.0, math.inf]))


# ---- in a run ------------------------------------------------------------------------------------


def gradients(method: LossWeights | None, micro: int) -> tuple[dict[str, Tensor], Any]:
    """Gradients of one step of ragged sequences, the model and the micro-batches."""
    of = kit.recipe(
        "llama", (method,) if method else (), batch={"size": 8, "micro": micro, "length": 48},
        optimizer={"lr": 0.01, "clip": None}, precision="float64",
    )  # fmt: skip
    stage = kit.stage(of)
    loop = stage.loop
    step = Step(0, 0.0, 0)
    batches = loop.drawer.draw(step)
    loop.gradients.accumulate(step, batches)
    found = {n: p.grad.clone() for n, p in stage.model.named_parameters() if p.grad is not None}
    return found, (stage.model, batches)


def by_hand(model: nn.Module, batch: Any, weigh: Any) -> dict[str, Tensor]:
    """The weighted gradient written out: weights from losses, held constant."""
    model.zero_grad()
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits[:, :-1]  # fmt: skip
    losses, _ = sequence_losses(logits, batch["labels"][:, 1:])
    (weigh(losses) * losses).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_step_follows_the_formula_and_not_through_the_weights():
    method = LossWeights(temperature=0.4)
    found, (model, (batch,)) = gradients(method, 8)
    expected = by_hand(model, batch, lambda ls: loss_weights(ls, temperature=0.4))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-10), name

    def through(losses: Tensor) -> Tensor:
        low, high = losses.min(), losses.max()
        h = (2 * losses - (high + low)) / (high - low)
        return torch.softmax((h + 1).clamp(max=1) / 0.4, 0)

    other = by_hand(model, batch, through)
    assert any(not torch.allclose(found[n], other[n], rtol=1e-3) for n in expected)


def test_the_whole_step_is_seen_through_micro_batches():
    whole, _ = gradients(LossWeights(), 8)
    parts, _ = gradients(LossWeights(), 2)
    alone, _ = gradients(LossWeights(scope="micro"), 2)
    for name, value in whole.items():
        assert torch.allclose(parts[name], value, atol=1e-10), name
    assert any(not torch.allclose(alone[n], whole[n], rtol=1e-3) for n in whole)
    micro, _ = gradients(LossWeights(scope="micro"), 8)
    for name, value in whole.items():
        assert torch.allclose(micro[name], value, atol=1e-10), name


def test_uniform_weights_are_the_mean_over_sequences():
    found, (model, (batch,)) = gradients(LossWeights(curve="uniform"), 8)
    mean = by_hand(model, batch, lambda losses: torch.full_like(losses, 1 / len(losses)))
    assert all(torch.allclose(found[n], mean[n], atol=1e-12) for n in mean)
    tokens, _ = gradients(None, 8)
    assert any(not torch.allclose(found[n], tokens[n], rtol=1e-3) for n in mean)


def test_before_the_warm_up_ends_the_loss_is_the_plain_one():
    plain, _ = gradients(None, 4)
    for scope in ("step", "micro"):
        warm, _ = gradients(LossWeights(warmup_steps=1, scope=scope), 4)
        assert all(torch.allclose(warm[n], plain[n], atol=1e-12) for n in plain)
    flat, _ = gradients(LossWeights(warmup_steps=1, warmup_temperature=1e9), 4)
    uniform, _ = gradients(LossWeights(curve="uniform"), 4)
    assert all(torch.allclose(flat[n], uniform[n], atol=1e-8) for n in plain)


def test_the_log_keeps_the_plain_loss_and_shows_the_weights(tmp_path):
    of = kit.recipe("llama", (LossWeights(temperature=0.3),))
    done = run(of, out=tmp_path, device="cpu")
    first = done.curves[0]
    plain = run(kit.recipe("llama"), out=tmp_path, device="cpu").curves[0]
    assert first["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert first["objective"] != pytest.approx(first["loss"], rel=1e-5)
    assert 1 <= first["effective_sample_size"] <= 8
    assert 1 / 8 <= first["largest_weight"] <= 1
    assert 0 < first["lowest_quartile_weight"] < 0.25


def test_weights_of_two_kinds_multiply(tmp_path):
    """Class weights inside the objective are the prior of the loss weights."""
    of = kit.recipe("bert", (LossWeights(),), batch={"size": 12, "length": 48})
    heavy = of.changed({"data.class_weights": {"a": 50.0, "b": 1.0, "c": 1.0}})
    even = run(of, out=tmp_path, device="cpu").curves[0]["largest_weight"]
    more = run(heavy, out=tmp_path, device="cpu").curves[0]
    assert more["largest_weight"] > 1.3 * even


# ---- in a loop of one's own ----------------------------------------------------------------------


def test_sequence_losses_are_exact_and_lean():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7), generator=draw)
    labels[0, 4:] = -100
    labels[2] = -100
    losses, tokens = sequence_losses(logits, labels, chunk=4)
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 7)
    expected = each.sum(1) / torch.tensor([4.0, 7.0, 1.0])
    assert tokens.tolist() == [4, 7, 0] and torch.allclose(losses, expected)
    (ours,) = torch.autograd.grad(losses.sum(), logits)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    assert torch.allclose(ours, theirs)
    assert sequence_losses(logits.bfloat16(), labels)[0].dtype == torch.float32


def test_a_reweighter_reduces_warms_up_and_follows_a_schedule():
    losses = torch.tensor([1.0, 2.0, 3.0, math.nan], requires_grad=True)
    tokens = torch.tensor([5, 5, 5, 0])
    reweighter = LossReweighter(
        warmup_steps=2, temperature_schedule=lambda step: 0.4 if step > 3 else 1e9
    )
    assert float(reweighter.reduce(losses, 0, tokens).detach()) == pytest.approx(2.0)
    late = reweighter.weights(losses, 9, tokens)
    assert torch.allclose(late[:3], loss_weights(losses[:3], temperature=0.4)) and late[3] == 0
    reweighter.reduce(losses, 9, tokens).backward()
    assert torch.allclose(losses.grad, late)
    steep = LossReweighter(curve=lambda h: 3 * h).weights(FIVE)
    assert torch.allclose(steep, torch.softmax(3 * torch.linspace(-1, 1, 5), 0))


def _rank(rank: int, port: int, blocks: list[list[float]], answers: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=len(blocks))
    theta = torch.tensor(2.0, requires_grad=True)
    loss = LossReweighter(temperature=0.7).reduce(theta * torch.tensor(blocks[rank]))
    loss.backward()
    assert theta.grad is not None
    dist.all_reduce(theta.grad)
    answers.put((rank, float(theta.grad) / len(blocks)))
    dist.destroy_process_group()


def test_ranks_with_ragged_blocks_give_the_gradient_of_one():
    import torch.multiprocessing as mp

    values = [1.0, 2.5, 3.0, 4.0, 7.0]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn = mp.get_context("spawn")
    answers = spawn.Queue()
    blocks = [values[:3], values[3:]]
    ranks = [spawn.Process(target=_rank, args=(r, port, blocks, answers)) for r in range(2)]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    theta = torch.tensor(2.0, requires_grad=True)
    LossReweighter(temperature=0.7).reduce(theta * torch.tensor(values)).backward()
    assert theta.grad is not None
    assert list(found.values()) == pytest.approx([float(theta.grad)] * 2, rel=1e-5)
