"""The mask controller in a loop of one's own, and which weights it takes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from outlay.core.context import generator_of
from outlay.core.errors import CheckpointError, ConfigError, Conflict, NoEffect
from outlay.nn.masking import HookedModel, MaskController, sparsify
from outlay.nn.prunable import prunable_weights


def perceptron(*sizes: int, seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for first, second in itertools.pairwise(sizes):
        layers += [nn.Linear(first, second), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    generator = generator_of("perceptron", seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def held(controller: MaskController, model: nn.Module) -> bool:
    return all(
        bool((model.get_parameter(name)[~controller.keep(name)] == 0).all())
        for name in controller.axes
    )


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5, centered=True),
}


def steps(model: nn.Module, optimizer: Any, count: int, seen: Any = None) -> None:
    data = torch.randn(count, 2, 6, model[0].in_features, generator=generator_of("data"))
    for pair in data:
        for batch in pair:  # two micro-batches
            (model(batch).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if seen is not None:
            seen()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_masked_entries_stay_zero_in_value_gradient_and_moments(name):
    model = perceptron(8, 12, 4)
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 2)  # moments of a dense start
    controller = sparsify(model, 0.75, optimizer=optimizer)
    count = 0

    def look() -> None:
        nonlocal count
        count += 1
        assert held(controller, model)
        for path in controller.axes:
            parameter, keep = model.get_parameter(path), controller.keep(path)
            assert bool((parameter.grad[~keep] == 0).all()) and bool((parameter.grad != 0).any())
            for value in optimizer.state[parameter].values():
                if isinstance(value, torch.Tensor) and value.shape == keep.shape:
                    assert bool((value[~keep] == 0).all())

    steps(model, optimizer, 4, look)
    assert count == 4
    assert controller.density() == pytest.approx(0.25)
    assert all(
        int(controller.keep(n).sum()) == round(0.25 * model.get_parameter(n).numel())
        for n in controller.axes
    )


def test_the_clip_norm_is_that_of_masked_gradients():
    model = perceptron(8, 12, 4)
    controller = sparsify(model, 0.5)
    model(torch.ones(3, 8)).square().mean().backward()
    masked = [p.grad for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in masked]).norm()
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)) == pytest.approx(float(norm))
    assert all(bool((model.get_parameter(n).grad[~controller.keep(n)] == 0).all())
               for n in controller.axes)  # fmt: skip


def test_no_sparsity_is_the_dense_run_bit_by_bit():
    states = []
    for sparse in (False, True):
        model = perceptron(8, 12, 4)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        if sparse:
            assert sparsify(model, 0.0, optimizer=optimizer).density() == 1
        steps(model, optimizer, 5)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_names_and_classes_stay_and_densifying_changes_no_output():
    model = perceptron(8, 12, 4)
    before, x = set(model.state_dict()), torch.ones(2, 8)
    controller = sparsify(model, 0.75)
    assert set(model.state_dict()) == before and type(model[0]) is nn.Linear
    sparse = model(x)
    controller.densify()
    assert torch.equal(model(x), sparse) and controller.density() == 1
    model(x).square().sum().backward()
    weight = model.get_parameter("0.weight")
    assert bool((weight.grad[weight == 0] != 0).any()), "masked entries learn again"


def test_least_squares_on_the_support():
    """Gradient descent under a mask ends at the closed form on each row's support."""
    generator = generator_of("toy")
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 3, bias=False, dtype=torch.float64))
    controller = sparsify(model, 0.5)
    rate = float(0.5 / torch.linalg.eigvalsh(x.T @ x)[-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(400):
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        optimizer.step()
    keep = controller.keep("0.weight")
    for row, support in enumerate(keep):
        exact = torch.linalg.lstsq(x[:, support], y[:, row]).solution
        torch.testing.assert_close(model[0].weight[row][support], exact, rtol=1e-9, atol=1e-12)
        assert bool((model[0].weight[row][~support] == 0).all())


def test_magnitude_finds_the_masks_of_sparse_training_again():
    model = perceptron(8, 12, 4)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    first = sparsify(model, 0.75, optimizer=optimizer)
    steps(model, optimizer, 3)
    keeps = {n: first.keep(n) for n in first.axes}
    fresh = perceptron(8, 12, 4, seed=1)
    fresh.load_state_dict(model.state_dict())
    with pytest.raises(Conflict, match='init="magnitude"') as refusal:
        sparsify(fresh, 0.75, seed=3)
    assert "exactly 0" in refusal.value.problem
    again = sparsify(fresh, 0.75, init="magnitude")
    assert all(torch.equal(again.keep(n), keeps[n]) for n in keeps)


def test_state_comes_back_and_other_weights_are_refused():
    model = perceptron(8, 12, 4)
    controller = sparsify(model, 0.6)
    state = controller.state_dict()
    assert sum(bits.numel() for bits in state["masks"].values()) == 96 // 8 + 48 // 8
    fresh = perceptron(8, 12, 4, seed=1)
    empty = sparsify(fresh, 0.0)
    with pytest.raises(CheckpointError, match="where its mask says zero"):
        empty.load_state_dict(state)
    with pytest.raises(CheckpointError, match="state_dict"):
        empty.load_state_dict({"masks": {}, "shapes": {}})
    fresh.load_state_dict(model.state_dict())
    empty.load_state_dict(state)
    assert empty.per_layer() == controller.per_layer() and empty.alive == controller.alive
    assert all(torch.equal(empty.keep(n), controller.keep(n)) for n in empty.axes)


def test_growing_by_the_dense_gradient_by_hand():
    model = perceptron(8, 12, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = sparsify(model, 0.5, optimizer=optimizer)
    steps(model, optimizer, 2)
    with controller.dense_gradients():
        model(torch.ones(3, 8)).square().sum().backward()
    weight = model.get_parameter("0.weight")
    before, gradient = controller.keep("0.weight").clone(), weight.grad.abs().clone()
    controller.regrow(0.25)
    after = controller.keep("0.weight")
    came = after & ~before
    assert int(after.sum()) == int(before.sum()) and bool(came.any())
    assert float(gradient[came].min()) >= float(gradient[~after].max())
    assert bool((weight[came] == 0).all()) and held(controller, model)
    assert bool((optimizer.state[weight]["momentum_buffer"][came] == 0).all())
    optimizer.zero_grad()
    with pytest.raises(Conflict, match="no gradient"):
        controller.regrow(0.25)
    controller.regrow(0.25, "set", "now")
    assert int(controller.keep("0.weight").sum()) == int(before.sum())


def two_layers(first: torch.Tensor, second: torch.Tensor) -> MaskController:
    model = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(first.view(2, 5))
        model[1].weight.copy_(second.view(5, 2))
    return MaskController(HookedModel(model), prunable_weights(model))


def test_a_threshold_that_empties_a_layer_is_refused():
    numbers = torch.arange(1.0, 21.0)
    controller = two_layers(numbers[:10], numbers[10:])
    with pytest.raises(Conflict, match=r"no entry of '0\.weight' is left"):
        controller.prune(0.5)
    assert controller.density() == 1, "nothing was touched"
    controller.prune(0.5, scope="layer")
    assert controller.per_layer() == {"0.weight": 0.5, "1.weight": 0.5}
    assert controller.keep("0.weight").flatten().tolist() == [False] * 5 + [True] * 5


def test_nothing_overshoots_at_ties_and_nothing_comes_back():
    controller = two_layers(torch.ones(10), -torch.ones(10))
    controller.prune(0.75)
    kept = [controller.keep(n).clone() for n in controller.axes]
    assert controller.alive == 15 and kept[0].all() and kept[1].flatten().tolist()[:5] == [True] * 5
    controller.prune(0.6)
    assert controller.alive == 12
    assert not bool((controller.keep("1.weight") & ~kept[1]).any())
    controller.prune(0.9)
    assert controller.alive == 12, "a looser density does not bring anything back"


def test_random_scores_differ_between_weights_of_one_shape():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    controller = MaskController(HookedModel(model), prunable_weights(model))
    controller.prune(0.5, score="random", scope="layer")
    assert not torch.equal(controller.keep("0.weight"), controller.keep("1.weight"))


def test_two_of_four_keeps_two_of_four():
    model = perceptron(8, 12, 4)
    controller = MaskController(HookedModel(model), prunable_weights(model))
    for density in (0.8, 0.6, 0.5):
        controller.prune(density, structure="2:4")
        groups = [controller.keep(n).unflatten(-1, (-1, 4)).sum(-1) for n in controller.axes]
        assert all(int(g.min()) >= 2 for g in groups)
        assert controller.alive == round(density * controller.total)
    assert all(int(g.max()) == 2 for g in groups)
    with pytest.raises(ConfigError, match="below the half"):
        controller.prune(0.4, structure="2:4")
    odd = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ConfigError, match="6 inputs are not a multiple of 4"):
        MaskController(HookedModel(odd), prunable_weights(odd)).prune(0.5, structure="2:4")


# ---- which weights -------------------------------------------------------------------------------


def small(kind: str, **more: Any) -> Any:
    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, **more,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)
    return transformers.AutoModelForCausalLM.from_config(config)


def test_linear_weights_of_the_blocks():
    llama = prunable_weights(small("llama", tie_word_embeddings=False))
    assert len(llama) == 14 and all(".layers." in name for name in llama)
    assert set(llama.values()) == {1}
    gpt = prunable_weights(small("gpt2"))
    assert len(gpt) == 8 and set(gpt.values()) == {0}, "Conv1D holds (in, out)"
    some = prunable_weights(small("llama"), exclude=("k_proj", r".*layers\.0\.mlp\..*"))
    assert len(some) == 14 - 2 - 3
    assert len(prunable_weights(small("llama", tie_word_embeddings=False), head=True)) == 15


def test_what_cannot_be_pruned_is_named():
    with pytest.raises(ConfigError, match="'lm_head' is tied to the embedding"):
        prunable_weights(small("gpt2"), head=True)
    with pytest.raises(NoEffect, match="leaves no weight"):
        prunable_weights(small("llama"), exclude=(".*",))
    with pytest.raises(ConfigError, match="no list of names"):
        prunable_weights(small("llama"), exclude=("(",))
    with pytest.raises(ConfigError, match=r"sparsity = 1\.0"):
        sparsify(perceptron(4, 4), 1.0)
    with pytest.raises(ConfigError, match="without a live one"):
        sparsify(perceptron(4, 1), 0.9)
