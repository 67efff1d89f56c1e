"""SVFit: known answers, equality with its peer, every variant, state, bad input."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from adapter_kit import MODELS, bert, fill, llama, logits, tokens, train
from safetensors.torch import load_file, save_file
from spectral_kit import Quantized, random, saved_by, unchecked
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from outlay.core.claims import check
from outlay.core.errors import CheckpointError, ConfigError, Conflict, NoEffect, NonFinite
from outlay.core.meter import Meter
from outlay.core.method import Context
from outlay.core.registry import build, construct, find
from outlay.methods.adapters.svfit import SVFit, SVFitDelta
from outlay.nn.adapter import (
    adapted_layers,
    disable_adapters,
    merge_adapters,
    set_adapter,
    unmerge_adapters,
)
from outlay.nn.svd import decompose

HOLDS = ("auto", "both")


def layer_of(weight: Tensor, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def adapted(
    weight: Tensor, delta: Tensor | None = None, **settings
) -> tuple[nn.Module, SVFitDelta]:
    """One adapted layer and its delta."""
    method = SVFit(**settings)
    model = method.adapt(layer_of(weight))
    found = next(iter(method.deltas(model).values()))
    if delta is not None:
        with torch.no_grad():
            found.delta.copy_(delta)
    return model, found


def noisy(model: nn.Module, method: SVFit, scale: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for delta in method.deltas(model).values():
            size = 1.0 if method.parameterisation == "relative" else delta.sigma.abs().mean()
            noise = torch.randn(delta.delta.shape, generator=generator)
            delta.delta.add_(noise * scale * size)
    return model


# ---- known answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("hold", ["auto", "both"])
def test_the_start_is_the_base_exactly(name: str, hold: str) -> None:
    model = MODELS[name]()
    before = logits(model, tokens())
    SVFit(hold=hold).adapt(model)
    assert torch.equal(logits(model, tokens()), before)


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (8, 8)])
def test_both_forms_of_the_paper(hold: str, shape: tuple[int, int]) -> None:
    weight, x = random(*shape), random(5, shape[1], seed=1)
    delta = torch.tensor([0.3, -0.2, 0.5])
    model, found = adapted(weight, delta, rank=3, hold=hold)
    bias = model.bias.detach()
    d = decompose(weight)
    u, s, vh = d.u[:, :3], d.s[:3], d.vh[:3]
    moved = x @ (weight + u @ torch.diag(delta) @ vh).T + bias
    remainder = weight - u @ torch.diag(s) @ vh
    sigma = x @ remainder.T + ((x @ vh.T) * (s + delta)) @ u.T + bias
    out = model(x).detach()
    assert (out - moved).abs().max() < 2e-6 and (out - sigma).abs().max() < 3e-6
    assert torch.allclose(found.singular_values(), s + delta)


@pytest.mark.parametrize("hold", HOLDS)
def test_diagonal_weight(hold: str) -> None:
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    model, _ = adapted(weight, torch.tensor([1.0, -1.0]), rank=2, hold=hold)
    merge_adapters(model)
    wanted = torch.diag(torch.tensor([5.0, 2.0, 2.0, 1.0]))
    assert torch.allclose(model.base_layer.weight, wanted, atol=1e-6)


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("parameterisation", ["additive", "relative", "softplus"])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_gradients(hold: str, parameterisation: str, shape: tuple[int, int]) -> None:
    weight = random(*shape, dtype=torch.float64)
    model, found = adapted(weight, rank=3, hold=hold, parameterisation=parameterisation)
    x = random(2, 4, shape[1], seed=1, dtype=torch.float64).requires_grad_()
    at = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64).requires_grad_()

    def run(x: Tensor, at: Tensor) -> Tensor:
        del found._parameters["delta"]
        found.delta = at
        try:
            return model(x)
        finally:
            del found.delta
            found.register_parameter("delta", parameter)

    parameter = found.delta
    assert torch.autograd.gradcheck(run, (x, at), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_gradients_where_one_value_has_both_vectors(shape: tuple[int, int]) -> None:
    u, _ = torch.linalg.qr(random(shape[0], 3, dtype=torch.float64))
    v, _ = torch.linalg.qr(random(shape[1], 3, seed=1, dtype=torch.float64))
    weight = (u * torch.tensor([2.0, 1.0, 1e-10])) @ v.T
    model, found = adapted(weight, rank=3)
    plain, whole = adapted(weight, rank=3, hold="both")
    assert found.t == 1 and whole.t == 3
    model.base_layer.bias.data.copy_(plain.base_layer.bias)
    at = torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64)
    x = random(2, 4, shape[1], seed=1, dtype=torch.float64)
    results = []
    for layer, delta in ((model, found), (plain, whole)):
        with torch.no_grad():
            delta.delta.copy_(at)
        own = x.clone().requires_grad_()
        out = layer(own)
        out.square().sum().backward()
        results.append((out, own.grad, delta.delta.grad, delta(own, layer.base_layer)))
    for first, second in zip(*results):
        assert torch.allclose(first, second, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hold", HOLDS)
def test_the_gradient_is_that_of_the_weight_along_the_directions(hold: str) -> None:
    """Entry i is u_i^T (dL/dW) v_i."""
    weight = random(6, 9, dtype=torch.float64)
    model, found = adapted(weight, rank=4, hold=hold)
    x, g = random(11, 9, seed=1, dtype=torch.float64), random(11, 6, seed=2, dtype=torch.float64)
    (model(x) * g).sum().backward()
    d = decompose(weight)
    wanted = torch.stack([d.u[:, i] @ (g.T @ x) @ d.vh[i] for i in range(4)])
    assert torch.allclose(found.delta.grad, wanted, rtol=1e-9)


def test_flipping_a_pair_changes_nothing() -> None:
    weight, x = random(6, 9), random(4, 9, seed=1)
    model, found = adapted(weight, torch.tensor([0.5, -0.3]), rank=2, hold="both")
    out = model(x)
    out.square().sum().backward()
    grad, found.delta.grad = found.delta.grad, None
    with torch.no_grad():
        found.u[:, 0] *= -1
        found.vh[0] *= -1
    again = model(x)
    again.square().sum().backward()
    assert torch.allclose(out, again, atol=1e-6) and torch.allclose(
        grad, found.delta.grad, atol=1e-5
    )


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
def test_rank_and_norms_of_the_change(hold: str, shape: tuple[int, int]) -> None:
    weight = random(*shape, dtype=torch.float64)
    delta = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    _, found = adapted(weight, delta, rank=3, hold=hold)
    change = found.weight(weight).detach()
    assert torch.linalg.matrix_rank(change) == 3
    assert torch.allclose(change.norm(), delta.norm())
    assert torch.allclose(torch.linalg.matrix_norm(change, 2), delta.abs().max())
    d = decompose(weight)
    core = d.u.T @ change @ d.vh.T
    assert torch.allclose(core, torch.diag(core.diag()), atol=1e-12)
    assert torch.allclose(core.diag()[:3], delta)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"hold": "both"}, {"rank": 3}, {"rank": 4, "selection": "minor"},
        {"rank": 4, "selection": "random"}, {"parameterisation": "relative"},
        {"parameterisation": "softplus", "rank": 5}, {"rank": ("energy", 0.7)},
        {"rank": 4, "basis": "random"},
    ],
    ids=str,
)  # fmt: skip
def test_merge_unmerge_and_factors_agree(name: str, settings: dict) -> None:
    model, ids = MODELS[name](), tokens()
    plain = logits(model, ids)
    method = SVFit(**settings)
    noisy(method.adapt(model), method)
    before = logits(model, ids)
    assert (before - plain).abs().max() > 3e-5
    for path, layer in adapted_layers(model).items():
        delta = method.deltas(model)[path]
        a, b = delta.to_lora()
        weight = delta.weight(layer.base_weight())
        assert (b @ a - weight).abs().max() <= 1e-6 * weight.abs().max().clamp_min(1)
    merge_adapters(model)
    merged = logits(model, ids)
    for path, layer in adapted_layers(model).items():  # factors stay those of the frozen weight
        delta = method.deltas(model)[path]
        a, b = delta.to_lora()
        assert (b @ a - delta.weight(layer._kept[0].T if name == "gpt2" else layer._kept[0])
                ).abs().max() < 1e-5  # fmt: skip
    assert (merged - before).abs().max() <= 1e-5 * before.abs().max()
    unmerge_adapters(model)
    assert torch.equal(logits(model, ids), before)
    with disable_adapters(model):
        assert torch.equal(logits(model, ids), plain)
    exported = method.export(model)
    assert not adapted_layers(exported)
    assert (logits(exported, ids) - before).abs().max() <= 1e-5 * before.abs().max()


def test_energy_rule() -> None:
    weight = torch.diag(torch.tensor([3.0, 1.0, 1.0]))
    for share, rank in {0.8: 1, 0.9: 2, 0.95: 3}.items():
        _, found = adapted(weight, rank=("energy", share))
        assert len(found.delta) == rank


def test_a_degenerate_spectrum_keeps_its_invariants() -> None:
    """Training W = I may end anywhere on the sphere of bases: norms alone are determined."""
    model, found = adapted(torch.eye(4), rank=2)
    assert found.embedded and {"u", "sigma"} <= set(found.state_dict())
    x, y = random(32, 4), random(32, 4, seed=1)
    optimizer = torch.optim.SGD([found.delta], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    change = found.weight(torch.eye(4)).detach()
    assert torch.allclose(change.norm(), found.delta.norm(), atol=1e-6)
    assert torch.linalg.matrix_rank(change) <= 2


# ---- equality with the peer ----------------------------------------------------------------------


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("update", ["additive", "relative"])
@pytest.mark.parametrize("selection", ["principal", "minor"])
def test_twenty_steps_equal_eigentune(hold: str, update: str, selection: str) -> None:
    eigentune = pytest.importorskip("eigentune", reason="pip install --no-deps eigentune==0.2.0")
    ids = tokens()
    ours, theirs = llama(), llama()
    method = SVFit(
        rank=4, hold=hold, parameterisation=update, selection=selection, modules_to_save=()
    )
    method.adapt(ours)
    config = eigentune.EigenTuneConfig(
        rank=4, method="diagonal", selection=selection, update=update, svd_backend="exact",
        backend="torch",
    )  # fmt: skip
    theirs = eigentune.get_eigentune_model(theirs, config)
    steps = 20
    first, second = train(ours, steps, lr=1e-2), train(theirs, steps, lr=1e-2)
    assert torch.allclose(torch.tensor(first), torch.tensor(second), atol=2e-5)
    assert first[-1] != first[0]
    assert (logits(ours, ids) - theirs(input_ids=ids).logits).abs().max() < 2e-4


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_twenty_steps_equal_the_formula(name: str) -> None:
    """Against W' built anew from the paper's equation in every step."""
    ours, slow = MODELS[name](), MODELS[name]()
    SVFit(rank=5).adapt(ours)
    method = SVFit(rank=5)
    targets = method.targets(slow)
    for parameter in slow.parameters():
        parameter.requires_grad_(False)
    for head in ("classifier",):
        if hasattr(slow, head):
            getattr(slow, head).requires_grad_(True)
    for layer in targets.values():
        torch.nn.utils.parametrize.register_parametrization(
            layer, "weight", Moved(layer.weight.detach(), name == "gpt2"), unsafe=True
        )
    for module in slow.modules():
        if isinstance(module, Moved):
            module.sigma.requires_grad_(True)
    first, second = train(ours, 20, lr=1e-2), train(slow, 20, lr=1e-2)
    assert torch.allclose(torch.tensor(first), torch.tensor(second), atol=5e-5)


class Moved(nn.Module):
    """W' = W_e + U diag(sigma) V^T, by the paper's own parameter sigma."""

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        super().__init__()
        matrix = weight.T if transposed else weight
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        self.u, self.vh, self.transposed = u[:, :5], vh[:5], transposed
        self.sigma = nn.Parameter(s[:5].clone())
        self.rest = matrix - self.u @ torch.diag(s[:5]) @ self.vh

    def forward(self, weight: Tensor) -> Tensor:
        moved = self.rest + self.u @ torch.diag(self.sigma) @ self.vh
        return moved.T if self.transposed else moved


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
@pytest.mark.parametrize("hold", HOLDS)
def test_the_backward_pass_keeps_only_rank_wide_activations(
    hold: str, shape: tuple[int, int]
) -> None:
    model, _ = adapted(random(*shape), rank=3, hold=hold)
    x = random(7, 5, shape[1], seed=1).requires_grad_()
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    _, kept = saved_by(lambda: model(x) * 1)
    wide = [t for t in kept if t.data_ptr() not in own and t.numel() > 7 * 5 * 3]
    assert not wide
    assert any(t.numel() == 7 * 5 * 3 for t in kept)


def test_full_rank_holds_one_basis_and_says_what_it_costs() -> None:
    context = Context(meter=Meter(), freezes=True)
    model, method = bert(), SVFit()
    method.adapt(model, context)
    costs = method.costs(model)
    shapes = [layer.base_weight().shape for layer in adapted_layers(model).values()]
    expected = 0
    for shape, delta in zip(shapes, method.deltas(model).values()):
        r, other = min(shape), max(shape)
        assert delta.side == ("right" if shape[1] < shape[0] else "left")
        assert delta.t == int((delta.sigma <= 1e-2 * delta.sigma[0]).sum()) < r / 3
        expected += 4 * (r * r + delta.t * other + r)
    assert costs["resident_frozen_bytes"] == expected
    assert costs["trainable_parameters"] == sum(min(s) for s in shapes)
    assert context.meter.facts["resident_frozen_bytes"] == costs["resident_frozen_bytes"]
    assert context.meter.charges["svd"]["matrices"] == len(shapes)
    assert context.meter.totals["flops"] > 0
    assert "frozen_bytes=" in repr(model)


def test_parameters_are_r_a_matrix() -> None:
    model = llama()
    SVFit(rank=4).adapt(model)
    layers = len(adapted_layers(model))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * layers


def test_ill_conditioned_weights_hold_both_bases() -> None:
    s = torch.tensor([1.0, 0.5, 1e-5])
    u, _ = torch.linalg.qr(random(6, 3))
    v, _ = torch.linalg.qr(random(5, 3, seed=1))
    weight = (u * s) @ v.T
    for settings, t in (
        ({"rank": 3}, 1), ({"rank": 2}, 0), ({"rank": 1, "selection": "minor"}, 1),
        ({"rank": 3, "parameterisation": "relative"}, 0), ({"rank": 3, "hold": "both"}, 3),
    ):  # fmt: skip
        assert adapted(weight, **settings)[1].t == t
    with pytest.raises(ConfigError, match="hold"):
        adapted(weight, rank=3, hold="one")


# ---- layers of other kinds -----------------------------------------------------------------------


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions(hold: str, stride: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=stride, padding=1), nn.ReLU())
    x = random(2, 3, 8, 8).requires_grad_()
    before = model(x).detach()
    method = SVFit(rank=4, hold=hold, target_modules=("0",))
    model = method.adapt(model)
    assert torch.equal(model(x), before)
    delta = noisy(model, method).get_submodule("0").deltas["default"]
    # The base convolution itself keeps its input, frozen or not.
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    out, kept = saved_by(lambda: model[0](x))
    size = (8 // stride) ** 2
    assert all(t.numel() <= 2 * size * 4 for t in kept if t.data_ptr() not in own)
    out.square().sum().backward()
    grads = x.grad.clone(), delta.delta.grad.clone()
    x.grad = delta.delta.grad = None
    kernel = (model[0].base_weight() + delta.weight(model[0].base_weight())).reshape(6, 3, 3, 3)
    slow = nn.functional.conv2d(x, kernel, model[0].bias, stride, 1)
    assert torch.allclose(out, slow, atol=1e-5)
    slow.square().sum().backward()
    assert torch.allclose(grads[0], x.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(grads[1], delta.delta.grad, rtol=1e-4, atol=1e-3)
    merged = merge_adapters(model)[0](x)
    assert torch.allclose(merged, out, atol=1e-5)


def test_quantized_weights_train_and_refuse_to_merge() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Quantized(nn.Linear(6, 4)))
    x = random(3, 6)
    before = model(x).detach()
    method = SVFit(rank=2)
    model = method.adapt(model)
    assert torch.equal(model(x), before)
    noisy(model, method)
    out = model(x)
    out.sum().backward()
    delta = method.deltas(model)["0"]
    assert delta.delta.grad.abs().max() > 0
    a, b = delta.to_lora()
    assert torch.allclose(out, before + x @ (b @ a).T, atol=1e-5)
    with pytest.raises(Conflict, match="quantized"):
        merge_adapters(model)


@pytest.mark.parametrize("hold", HOLDS)
def test_two_adapters_on_one_layer_add_up(hold: str) -> None:
    weight, x = random(6, 8), random(4, 8, seed=1)
    model = layer_of(weight)
    methods = [SVFit(rank=2, hold=hold, adapter_name=name) for name in "ab"]
    for method in methods:
        model = method.adapt(model)
    noisy(noisy(model, methods[0]), methods[1])
    parts = [next(iter(m.deltas(model).values())).weight(weight) for m in methods]
    assert torch.allclose(model(x), x @ (weight + parts[0] + parts[1]).T + model.bias, atol=1e-5)
    set_adapter(model, "b")
    assert torch.allclose(model(x), x @ (weight + parts[1]).T + model.bias, atol=1e-5)
    check(methods, layer_of(weight))


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("choice", ["float32", "base"])
def test_bfloat16_models(hold: str, choice: str) -> None:
    model = llama().bfloat16()
    before = logits(model, tokens())
    method = SVFit(rank=4, hold=hold, basis_dtype=choice)
    method.adapt(model)
    assert torch.equal(logits(model, tokens()), before)
    delta = next(iter(method.deltas(model).values()))
    assert delta.delta.dtype == torch.float32
    wanted = torch.bfloat16 if choice == "base" else torch.float32
    assert getattr(delta, "vh" if delta.side != "left" else "u").dtype == wanted
    assert logits(model, tokens()).dtype == torch.bfloat16
    losses = train(model, 8, lr=3e-2)
    assert all(map(math.isfinite, losses))
    assert all(d.delta.abs().max() > 0 for d in method.deltas(model).values())


@pytest.mark.parametrize("hold", HOLDS)
def test_autocast(hold: str) -> None:
    model, method = bert(), SVFit(rank=4, hold=hold)
    method.adapt(model)
    noisy(model, method)
    full = model(input_ids=tokens()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(input_ids=tokens()).logits
        half.float().square().sum().backward()
    assert (full - half).abs().max() < 0.05
    assert all(torch.isfinite(d.delta.grad).all() for d in method.deltas(model).values())


def test_function_transforms() -> None:
    model, found = adapted(random(5, 4), torch.tensor([0.3, -0.1]), rank=2)
    x = random(3, 4, seed=1)
    per_row = torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(x)
    wanted = (model.base_weight() + found.weight(model.base_weight())).sum(0).detach()
    assert torch.allclose(per_row, wanted.expand(3, -1), atol=1e-5)


# ---- training and state --------------------------------------------------------------------------


@pytest.mark.parametrize("parameterisation", ["additive", "relative", "softplus"])
def test_it_learns_and_only_values_move(parameterisation: str) -> None:
    model = llama()
    method = SVFit(rank=6, parameterisation=parameterisation)
    method.adapt(model)
    frozen = {n: p.detach().clone() for n, p in model.state_dict().items() if "delta" not in n[-6:]}
    start = method.singular_values(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    after = model.state_dict()
    assert all(torch.equal(after[n], v) for n, v in frozen.items())
    end = method.singular_values(model)
    assert all(not torch.equal(start[n], end[n]) for n in start)
    if parameterisation == "softplus":
        with torch.no_grad():
            for delta in method.deltas(model).values():
                delta.delta.fill_(-20.0)
        assert all((s > -1e-5).all() for s in method.singular_values(model).values())


def test_decay_pulls_to_the_pre_trained_values() -> None:
    model, found = adapted(random(5, 4), torch.tensor([1.0, -1.0]), rank=2)
    optimizer = torch.optim.AdamW([found.delta], lr=0.1, weight_decay=1.0)
    for _ in range(50):
        optimizer.zero_grad()
        (model(random(2, 4)) * 0).sum().backward()
        optimizer.step()
    assert found.delta.abs().max() < 0.01
    assert torch.allclose(found.singular_values(), found.sigma, atol=0.01)


def states(method: SVFit, model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{key}": value.detach().clone()
        for path, delta in method.deltas(model).items()
        for key, value in delta.state_dict().items()
    }


def load(method: SVFit, model: nn.Module, state: dict[str, Tensor]) -> None:
    for path, delta in method.deltas(model).items():
        own = {k.removeprefix(f"{path}."): v for k, v in state.items() if k.startswith(f"{path}.")}
        delta.load_state_dict(own)


@pytest.mark.parametrize("embed", ["auto", "always"])
def test_state_without_bases_comes_back_on_the_same_base(tmp_path: Path, embed: str) -> None:
    model, method = bert(), SVFit(rank=4, embed_bases=embed)
    noisy(method.adapt(model), method)
    file = tmp_path / "adapter.safetensors"
    save_file(states(method, model), file)
    carried = {key.rpartition(".")[2] for key in load_file(file)}
    bases = {"u", "vh", "sigma"} if embed == "always" else set()
    assert carried == {"delta", "fingerprint", "signature"} | bases
    again = bert()
    SVFit(rank=4).adapt(again)
    load(method, again, load_file(file))
    model.classifier.load_state_dict(again.classifier.state_dict())
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_another_base_is_refused_by_name() -> None:
    model, method = bert(), SVFit(rank=4)
    noisy(method.adapt(model), method)
    state = states(method, model)
    other = bert()
    with torch.no_grad():
        for parameter in other.bert.parameters():
            parameter.mul_(1 + 1e-5)
    method.adapt(other)
    before = states(method, other)
    with pytest.raises(CheckpointError, match="another base weight"):
        load(method, other, state)
    assert all(torch.equal(states(method, other)[k], v) for k, v in before.items())
    other = bert()
    with torch.no_grad():
        for parameter in other.bert.parameters():
            parameter.mul_(1 + 1e-5)
    loose = SVFit(rank=4, allow_rebuild=True)
    loose.adapt(other)
    load(loose, other, state)
    for path, delta in loose.deltas(other).items():
        assert torch.equal(delta.delta, state[f"{path}.delta"])
        assert not torch.equal(delta.fingerprint, state[f"{path}.fingerprint"])


def test_bases_that_came_out_differently_are_refused() -> None:
    """What another machine would do whose decomposition turned a vector."""
    _, found = adapted(random(6, 5), torch.tensor([0.4, 0.2]), rank=2)
    state = {k: v.clone() for k, v in found.state_dict().items()}
    state["signature"][0] *= -1
    with pytest.raises(CheckpointError, match="embed_bases"):
        found.load_state_dict(state)


def test_a_degenerate_adapter_brings_its_bases_along() -> None:
    weight = torch.eye(4)
    _, first = adapted(weight, torch.tensor([0.5, -0.5]), rank=2, hold="both")
    turned = {k: v.clone() for k, v in first.state_dict().items()}
    turn = torch.linalg.qr(random(2, 2))[0]
    turned["u"], turned["vh"] = turned["u"] @ turn, turn.T @ turned["vh"]
    turned["signature"] = turned["signature"] * -1
    _, second = adapted(weight, rank=2, hold="both")
    second.load_state_dict(turned)
    assert torch.equal(second.u, turned["u"]) and torch.equal(second.delta, turned["delta"])
    with pytest.raises(ConfigError, match="embed_bases"):
        adapted(weight, rank=2, embed_bases="never")


def test_embedded_bases_stay_embedded_after_loading() -> None:
    weight = random(6, 5)
    _, rich = adapted(weight, torch.tensor([0.4, 0.2]), rank=2, embed_bases="always")
    _, plain = adapted(weight, rank=2)
    plain.load_state_dict(rich.state_dict())
    assert set(plain.state_dict()) == set(rich.state_dict())
    rich.load_state_dict(adapted(weight, torch.tensor([1.0, 2.0]), rank=2)[1].state_dict())
    assert rich.delta.tolist() == [1.0, 2.0]


def test_copies_stand_alone() -> None:
    model, method = bert(), SVFit()
    noisy(method.adapt(model), method)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for delta in method.deltas(other).values():
        a, b = delta.to_lora()
        assert (b @ a).abs().max() > 1e-3


def test_random_choices_follow_the_seed() -> None:
    weight = random(12, 12)
    model = layer_of(weight)

    def chosen(seed: int, **settings) -> Tensor:
        method = SVFit(rank=3, hold="both", **settings)
        return method.make("x", model, Context(seed=seed)).vh

    for settings in ({"selection": "random"}, {"basis": "random"}):
        state = torch.get_rng_state()
        assert torch.equal(chosen(1, **settings), chosen(1, **settings))
        assert not torch.equal(chosen(1, **settings), chosen(2, **settings))
        assert torch.equal(torch.get_rng_state(), state)
    random_basis = adapted(weight, rank=12, basis="random")[1]
    assert torch.allclose(random_basis.u.T @ random_basis.u, torch.eye(12), atol=1e-5)


def test_minor_takes_the_smallest() -> None:
    weight = random(8, 6)
    _, found = adapted(weight, rank=2, selection="minor")
    assert torch.allclose(found.sigma, decompose(weight).s[-2:])


# ---- plans, cards, bad input ---------------------------------------------------------------------


def test_plans_need_no_values() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        for settings in (
            {}, {"rank": 2, "selection": "random"}, {"rank": ("energy", 0.5)},
            {"rank": 2, "basis": "random"}, {"rank": 3, "parameterisation": "softplus"},
        ):  # fmt: skip
            layer = nn.Linear(8, 16)
            delta = SVFit(**settings).make("x", layer, Context())
            out = delta.output(torch.randn(3, 8), layer)
            out.sum().backward()
            assert out.shape == (3, 16) and delta.frozen_bytes() > 0


def test_card_and_call_string() -> None:
    entry = find("svfit")
    assert entry.card.paper == 35 and entry.places == ("OnModel",)
    method = build("svfit(rank=('energy', 0.9), parameterisation='relative')")
    assert method.rank == ("energy", 0.9)
    assert build(method.spec()) == method
    names = {n for c in SVFit().claims(bert()) for n in c.parameters}
    assert "bert.encoder.layer.0.attention.self.query.weight" in names


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -3}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": "most"}, "rank"),
        ({"rank": ("energy", 0.0)}, "rank"),
        ({"rank": ("energy", 1.5)}, "rank"),
        ({"rank": ("power", 0.5)}, "rank"),
        ({"selection": "best"}, "selection"),
        ({"parameterisation": "square"}, "parameterisation"),
        ({"basis_dtype": "float16"}, "basis_dtype"),
        ({"hold": "none"}, "hold"),
        ({"embed_bases": True}, "embed_bases"),
        ({"allow_rebuild": 1}, "allow_rebuild"),
        ({"rank": ("energy", 0.9), "selection": "minor"}, "selection"),
        ({"basis": "random", "rank": 2, "parameterisation": "relative"}, "parameterisation"),
        ({"basis": "random", "rank": 2, "selection": "minor"}, "selection"),
        ({"basis": "random", "rank": ("energy", 0.9)}, "rank"),
        ({"basis": "random", "rank": 2, "hold": "one"}, "hold"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        unchecked(SVFit, **settings)
    assert caught.value.problem.startswith("svfit.") and caught.value.remedy
    with pytest.raises(ConfigError):
        construct(SVFit, settings)


def test_bad_models() -> None:
    with pytest.raises(ConfigError, match=r"svfit\.rank = 33.*query"):
        SVFit(rank=33, target_modules=("query",)).adapt(bert())
    with pytest.raises(NoEffect):
        SVFit(target_modules=("nowhere",)).adapt(bert())
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(NonFinite, match=r"layer\.1\.output\.dense"):
        SVFit().adapt(model)
    assert not adapted_layers(model)
    with pytest.raises(ConfigError, match="softplus"):
        adapted(torch.diag(torch.tensor([2.0, 1.0, 0.0])), parameterisation="softplus")
    with pytest.raises(Conflict, match="groups"):
        SVFit(rank=1, target_modules=("0",)).adapt(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))
    model = bert()
    SVFit(rank=2).adapt(model)
    with pytest.raises(Conflict, match="adapter_name"):
        SVFit(rank=2).adapt(model)


def test_same_seed_same_bits() -> None:
    results = []
    for _ in range(2):
        model = fill(llama(), 0.0)
        SVFit(rank=4).adapt(model)
        train(model, 5, lr=1e-2)
        results.append(logits(model, tokens()))
    assert torch.equal(*results)
