"""LaMDA and LaMDA++: known answers, freezing, ranks, equality with its peer, state, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_kit import MODELS, bert, llama, logits, tokens, train
from spectral_kit import Quantized, random, saved_by, unchecked
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from outlay.core.claims import check
from outlay.core.errors import CheckpointError, ConfigError, Conflict, NoEffect, NonFinite
from outlay.core.live import Live, Mask
from outlay.core.losses import Objective
from outlay.core.meter import Meter
from outlay.core.method import Context, Step, Watcher
from outlay.core.registry import build, construct, find
from outlay.methods.adapters._lamda_layer import LaMDADelta, SeededDropout
from outlay.methods.adapters.lamda import LaMDA
from outlay.nn.adapter import (
    adapted_layers,
    disable_adapters,
    merge_adapters,
    set_adapter,
    unmerge_adapters,
)
from outlay.nn.svd import decompose

INITS = ("svd_residual", "svd_zero", "code")


def lamda(**settings) -> LaMDA:
    return LaMDA(**({"r": 4, "alpha": 6.0, "dropout": 0.0} | settings))


def layer_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def adapted(weight: Tensor, **settings) -> tuple[nn.Module, LaMDADelta]:
    method = lamda(**settings)
    model = method.adapt(layer_of(weight))
    return model, next(iter(method.deltas(model).values()))


def noisy(model: nn.Module, method: LaMDA, scale: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for delta in method.deltas(model).values():
            for parameter in delta.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


# ---- a small loop that treats watchers and masks as a run does -----------------------------------


class Cross(Objective):
    """Only its name is needed: the loop below takes the loss itself."""


class Loop:
    """AdamW steps through `Live`, with masks around the update, and resume from a manifest."""

    def __init__(self, model: nn.Module, method: LaMDA, steps: int, lr: float = 1e-2) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        group = {"params": [p for _, p in named], "names": [n for n, _ in named]}
        optimizer = torch.optim.AdamW([group], lr=lr, weight_decay=0.1)
        self.live = Live(model, Cross(), [optimizer], None, Context(total_steps=steps))
        self.watcher: Watcher = method.watch(self.live)
        self.steps = steps

    def run(self, start: int, stop: int) -> list[float]:
        live, losses = self.live, []
        for t in range(start, stop):
            step = Step(t, t / self.steps, 0, total=self.steps)
            self.watcher.before_step(step)
            ids = tokens(seed=100 + t)
            live.open = False
            out = live.model(input_ids=ids).logits
            loss = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            named = dict(live.named_parameters())
            for name in live.masks:
                live.before_update(name, named[name])
            live.optimizers[0].step()
            for name in live.masks:
                live.after_update(name, named[name])
            live.optimizers[0].zero_grad()
            live.open = True
            self.watcher.after_update(step)
            losses.append(loss.item())
        return losses

    def save(self) -> dict:
        live = self.live
        named = dict(live.named_parameters())
        return {
            "manifest": live.manifest(),
            "tensors": {n: named[n].detach().clone() for n in live.touched},
            "masks": {
                n: (m.keep.clone(), m.kind, None if m.held is None else m.held.clone())
                for n, m in live.masks.items()
            },
            "moments": {
                n: {k: v.clone() for k, v in live.optimizers[0].state[named[n]].items()}
                for g in live.optimizers[0].param_groups for n in g["names"]
                if named[n] in live.optimizers[0].state
            },
            "watcher": self.watcher.state_dict(),
        }  # fmt: skip

    def load(self, saved: dict) -> None:
        live = self.live
        live.rebuild(saved["manifest"])
        named = dict(live.named_parameters())
        with torch.no_grad():
            for name, value in saved["tensors"].items():
                named[name].copy_(value)
        for name, (keep, kind, held) in saved["masks"].items():
            live.masks[name] = Mask(keep, kind, held)
        for name, moments in saved["moments"].items():
            live.optimizers[0].state[named[name]] = {k: v.clone() for k, v in moments.items()}
        self.watcher.load_state_dict(saved["watcher"])


# ---- known answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("init", INITS)
def test_the_start_is_the_base(name: str, init: str) -> None:
    model = MODELS[name]()
    before = logits(model, tokens())
    method = lamda(init=init)
    method.adapt(model)
    after = logits(model, tokens())
    if init == "svd_residual":
        assert (after - before).abs().max() <= 1e-5
        for delta, layer in zip(method.deltas(model).values(), adapted_layers(model).values()):
            weight = layer.base_weight()
            assert delta.weight(weight).abs().max() <= 1e-5 * weight.norm()
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("fraction", [0.3, None, 0.0])
def test_the_equation(init: str, fraction: float | None) -> None:
    """Y = W_remaining x + alpha / r * B S A x + b."""
    if init == "code" and fraction == 0:
        return
    weight, x = random(9, 7), random(5, 7, seed=1)
    method = lamda(init=init, freeze_fraction=fraction)
    model = method.adapt(layer_of(weight))
    noisy(model, method)
    delta = next(iter(method.deltas(model).values()))
    d = decompose(weight)
    taken = d.u[:, :4] @ torch.diag(d.s[:4]) @ d.vh[:4] if init == "svd_residual" else 0
    slow = x @ (weight - taken).T + 1.5 * x @ (delta.up @ delta.core @ delta.down).T
    assert torch.allclose(model(x), slow + model.base_layer.bias, atol=1e-5)
    if init == "svd_residual":
        assert torch.allclose(delta.remainder(weight), weight - taken, atol=1e-5)


def test_full_rank_leaves_no_remainder() -> None:
    weight = random(4, 4)
    _, delta = adapted(weight, r=4)
    assert delta.remainder(weight).abs().max() < 1e-6
    product = delta.scale * delta.up @ delta.core @ delta.down
    assert torch.allclose(product, weight, atol=1e-6)
    assert torch.allclose(delta.core.diag() * delta.scale, decompose(weight).s, atol=1e-6)


@pytest.mark.parametrize("init", INITS)
def test_gradients(init: str) -> None:
    weight = random(5, 6, dtype=torch.float64)
    for frozen in (False, True):
        method = lamda(init=init, r=3)
        model = noisy(method.adapt(layer_of(weight)), method)
        delta = next(iter(method.deltas(model).values()))
        delta.up.requires_grad_(not frozen)
        x = random(2, 3, 6, seed=1, dtype=torch.float64).requires_grad_()
        parameters = {n: p for n, p in delta.named_parameters() if p.requires_grad}

        def run(x: Tensor, *values: Tensor, names=tuple(parameters), model=model) -> Tensor:
            full = {f"deltas.default.{n}": v for n, v in zip(names, values)}
            return torch.func.functional_call(model, full, (x,))

        assert torch.autograd.gradcheck(run, (x, *parameters.values()), rtol=1e-6, atol=1e-8)


def test_a_never_moves_and_columns_stop_for_good() -> None:
    """50 steps of AdamW with weight decay 0.1; B is constant from 0.3 of them on."""
    model, method = llama(layers=1), lamda(r=5)
    method.adapt(model)
    loop = Loop(model, method, steps=50)
    deltas = list(method.deltas(model).values())
    downs = [d.down.clone() for d in deltas]
    before = [d.up.detach().clone() for d in deltas]
    for t in range(50):
        loop.run(t, t + 1)
        k = min(5, int(5 * t / 15 + 1e-9))
        for delta, old in zip(deltas, before):
            still = (delta.up == old).all(0).tolist()
            assert still[:k] == [True] * k and not any(still[k:])
        before = [d.up.detach().clone() for d in deltas]
        moments = loop.live.optimizers[0].state
        if k < 5:
            for delta in deltas:
                assert not moments[delta.up]["exp_avg"][:, :k].any()
                assert not moments[delta.up]["exp_avg_sq"][:, :k].any()
        else:
            assert not any(d.up in moments or d.up.requires_grad for d in deltas)
            assert not any(
                n.endswith(".up") for n in loop.live.optimizers[0].param_groups[0]["names"]
            )
        assert all(d.core in moments for d in deltas)
    assert all(torch.equal(d.down, a) and not d.down.requires_grad for d, a in zip(deltas, downs))
    loop.watcher.close()


def test_smallest_first() -> None:
    model, method = llama(), lamda(freeze_order="smallest_first", freeze_fraction=1.0)
    method.adapt(model)
    loop = Loop(model, method, steps=8)
    loop.run(0, 5)
    delta = next(iter(method.deltas(model).values()))
    before = delta.up.detach().clone()
    loop.run(5, 6)
    assert (delta.up == before).all(0).tolist() == [False, False, True, True]


def test_numbers_that_train_over_time() -> None:
    model, method = bert(), lamda(r=8)
    method.adapt(model)
    shapes = [layer.base_weight().shape for layer in adapted_layers(model).values()]
    for t, k in ((0, 0), (15, 4), (30, 8), (99, 8)):
        wanted = sum(64 + out * (8 - k) for out, _ in shapes)
        assert method.trainable_parameters(model, t / 100) == wanted
        assert method.trainable_parameters(model, Step(t, t / 100, 0)) == wanted
    whole = sum(
        64 * 100 + out * sum(8 - min(8, 8 * t // 30) for t in range(100)) for out, _ in shapes
    )
    assert method.parameter_updates(model, 100) == whole
    trainable = sum(
        p.numel() for n, p in model.named_parameters() if p.requires_grad and ".deltas." in n
    )
    assert method.costs(model)["trainable_parameters"] == trainable
    never = lamda(r=8, freeze_fraction=None)
    assert never.parameter_updates(model, 10) == 10 * trainable
    start = lamda(r=8, freeze_fraction=0.0)
    other = start.adapt(bert())
    assert start.trainable_parameters(other, 0.0) == 64 * len(shapes)
    assert not any(n.endswith(".up") for n, _ in other.named_parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("init", INITS)
def test_merge_unmerge_and_factors_agree(name: str, init: str) -> None:
    model, ids = MODELS[name](), tokens()
    plain, weights = logits(model, ids), {n: p.clone() for n, p in model.named_parameters()}
    method = lamda(init=init)
    noisy(method.adapt(model), method, 0.5)
    before = logits(model, ids)
    assert (before - plain).abs().max() > 1e-3
    for path, layer in adapted_layers(model).items():
        delta = method.deltas(model)[path]
        a, b = delta.to_lora()
        weight = delta.weight(layer.base_weight())
        assert a.shape[0] == b.shape[1] == 4
        assert (b @ a - weight).abs().max() <= 1e-6 * weight.abs().max().clamp_min(1)
        assert torch.linalg.matrix_rank(weight) <= 4
    merge_adapters(model)
    assert (logits(model, ids) - before).abs().max() <= 1e-5 * before.abs().max()
    unmerge_adapters(model)
    assert torch.equal(logits(model, ids), before)
    with disable_adapters(model):  # the original W, whatever the start took out
        assert torch.equal(logits(model, ids), plain)
    for path, parameter in model.named_parameters():
        original = path.replace(".base_layer", "")
        if original in weights and ".deltas." not in path:
            assert torch.equal(parameter, weights[original])
    exported = method.export(model)
    assert (logits(exported, ids) - before).abs().max() <= 1e-5 * before.abs().max()


# ---- equality with the peer ----------------------------------------------------------------------


@pytest.mark.parametrize("init", ["svd_zero", "svd_residual"])
def test_frozen_from_the_start_equals_eigentune(init: str) -> None:
    """LoRA-XS: y = W x + U C V^T x; with "svd_residual" C = scale S - Sigma."""
    eigentune = pytest.importorskip("eigentune", reason="pip install --no-deps eigentune==0.2.0")
    ours, theirs = llama(), llama()
    method = lamda(alpha=4.0, init=init, freeze_fraction=0.0)
    method.adapt(ours)
    config = eigentune.EigenTuneConfig(
        rank=4, method="spectral_core", svd_backend="exact", backend="torch"
    )
    theirs = eigentune.get_eigentune_model(theirs, config)
    # Its signs come from the right vectors: turn its bases to ours.
    mates = [m for m in theirs.modules() if type(m).__name__ == "EigenTuneLinear"]
    for delta, mate in zip(method.deltas(ours).values(), mates):
        mate.Vh.copy_(delta.down)
        mate.U.copy_(delta.up)
    first, second = train(ours, 20, lr=1e-2), train(theirs, 20, lr=1e-2)
    assert torch.allclose(torch.tensor(first), torch.tensor(second), atol=2e-5)
    for delta, mate in zip(method.deltas(ours).values(), mates):
        shift = decompose_diag(delta) if init == "svd_residual" else 0
        assert torch.allclose(delta.core - shift, mate.core, atol=2e-4)


def decompose_diag(delta: LaMDADelta) -> Tensor:
    """Sigma as a matrix, from what was taken out: U^T (U Sigma)."""
    return delta.up.T @ delta.taken


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("init", INITS)
def test_twenty_steps_equal_surgery(name: str, init: str) -> None:
    """Against the paper's picture: the remaining weight in the layer, B S A beside it."""
    ours, slow = MODELS[name](), MODELS[name]()
    method = lamda(init=init, freeze_fraction=None)
    method.adapt(ours)
    deltas = method.deltas(ours)
    for parameter in slow.parameters():
        parameter.requires_grad_(False)
    if hasattr(slow, "classifier"):
        slow.classifier.requires_grad_(True)
    for path, layer in lamda().targets(slow).items():
        torch.nn.utils.parametrize.register_parametrization(
            layer, "weight", Surgery(deltas[path], layer.weight.detach(), name == "gpt2"),
            unsafe=True,
        )  # fmt: skip
    first, second = train(ours, 20, lr=3e-3), train(slow, 20, lr=3e-3)
    assert torch.allclose(torch.tensor(first), torch.tensor(second), atol=5e-5)


class Surgery(nn.Module):
    """W' = (W - U Sigma V^T) + scale B S A, as the paper has it."""

    def __init__(self, delta: LaMDADelta, weight: Tensor, transposed: bool) -> None:
        super().__init__()
        matrix = weight.T if transposed else weight
        taken = delta.taken @ delta.down if delta.residual else torch.zeros(())
        self.rest, self.down = matrix - taken, delta.down.clone()
        self.core = nn.Parameter(delta.core.detach().clone())
        self.up = nn.Parameter(delta.up.detach().clone())
        self.scale, self.transposed = delta.scale, transposed

    def forward(self, weight: Tensor) -> Tensor:
        whole = self.rest + self.scale * self.up @ self.core @ self.down
        return whole.T if self.transposed else whole


# ---- ranks (LaMDA++) -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["energy_threshold", "greedy_energy", "uniform"])
def test_ranks_from_spectra_keep_the_budget(policy: str) -> None:
    model, method = bert(), lamda(r=6, allocate=policy)
    with torch.no_grad():  # one matrix of few directions
        flat = model.bert.encoder.layer[0].attention.self.query.weight
        flat.copy_(random(32, 1) @ random(1, 32, seed=1))
    method.adapt(model)
    ranks = {path: len(d.core) for path, d in method.deltas(model).items()}
    assert sum(r * r for r in ranks.values()) <= 36 * len(ranks)
    if policy == "uniform":
        assert set(ranks.values()) == {6}
    else:
        assert ranks["bert.encoder.layer.0.attention.self.query"] == 1
        assert len(set(ranks.values())) > 2
    maker = next(iter(adapted_layers(model).values())).methods["default"]
    spelled = 0 if policy == "uniform" else len(ranks)
    assert maker.allocate == "uniform" and len(maker.rank_pattern) == spelled
    again = build(maker.spec()).adapt(bert())
    assert {path: len(d.core) for path, d in maker.deltas(again).items()} == ranks


def test_rank_settings() -> None:
    pinned = lamda(
        allocate="greedy_energy", rank_budget=400, r_min=2, r_max=6, multiple_of=2,
        rank_pattern=(("query", 3),),
    )  # fmt: skip
    model = pinned.adapt(bert())
    ranks = {path: len(d.core) for path, d in pinned.deltas(model).items()}
    queries = {r for path, r in ranks.items() if path.endswith("query")}
    others = [r for path, r in ranks.items() if not path.endswith("query")]
    assert queries == {3} and set(others) <= {2, 4, 6}
    assert sum(r * r for r in others) <= 400
    assert {d.scale for d in pinned.deltas(model).values()} == {6.0 / r for r in ranks.values()}
    context = Context(freezes=True)
    pinned.adapt(bert(), context)
    assert list(context.kept) == ["lamda.default.ranks"]
    context.kept["lamda.default.ranks"]["ranks"].fill_(2)
    kept = pinned.adapt(bert(), context)  # a resumed run takes the ranks of its checkpoint
    assert {len(d.core) for p, d in pinned.deltas(kept).items() if "query" not in p} == {2}
    with pytest.raises(NoEffect, match="qeury"):
        lamda(rank_pattern=(("qeury", 2),)).adapt(bert())
    with pytest.raises(ConfigError, match="budget"):
        lamda(allocate="greedy_energy", rank_budget=3).adapt(bert())


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_backward_pass_keeps_only_rank_wide_activations(
    init: str, frozen: bool, dropout: float
) -> None:
    model, delta = adapted(random(40, 32), init=init, r=3, dropout=dropout)
    model.train()
    delta.up.requires_grad_(not frozen)
    x = random(7, 5, 32, seed=1).requires_grad_()
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    out, kept = saved_by(model, x)
    rows = 7 * 5
    extra = [t for t in kept if t.data_ptr() not in own]
    assert all(t.shape[-1] in (3, 40) and t.numel() <= max(rows, 40) * 3 for t in extra)
    assert not any(t.numel() >= rows * 32 for t in extra)
    out.sum().backward()
    assert x.grad is not None


def test_dropout_is_dropout_without_a_mask() -> None:
    x = torch.ones(50, 40).requires_grad_()
    torch.manual_seed(3)
    out, kept = saved_by(SeededDropout.apply, x, 0.25)
    assert not kept
    assert torch.equal(out.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs(float((out == 0).float().mean()) - 0.25) < 0.05
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    torch.manual_seed(3)
    assert torch.equal(SeededDropout.apply(x, 0.25), out)


@pytest.mark.parametrize("init", INITS)
def test_dropout_acts_on_what_trains(init: str) -> None:
    """W_remaining x + s B S A drop(x): at p near 1 the trained part is gone."""
    weight, x = random(6, 5), random(4, 5, seed=1)
    method = lamda(init=init, dropout=0.999999, r=3)
    model = noisy(method.adapt(layer_of(weight)), method)
    delta = next(iter(method.deltas(model).values()))
    model.train()
    torch.manual_seed(0)
    wanted = x @ delta.remainder(weight).T + model.base_layer.bias
    assert torch.allclose(model(x), wanted, atol=1e-5)
    model.eval()
    assert not torch.allclose(model(x), wanted, atol=1e-2)


def test_accounting() -> None:
    context = Context(meter=Meter(), freezes=True)
    model, method = bert(), lamda()
    method.adapt(model, context)
    costs = method.costs(model)
    shapes = [layer.base_weight().shape for layer in adapted_layers(model).values()]
    assert costs["resident_frozen_bytes"] == sum(4 * 4 * (out + width) for out, width in shapes)
    assert context.meter.facts["resident_frozen_bytes"] == costs["resident_frozen_bytes"]
    per_layer = [4 * (16 + 4 * out) + 16 + 4 * 4 for out, _ in shapes]
    assert costs["adapter_bytes"] == sum(per_layer)
    fresh = Context(meter=Meter(), freezes=True)
    lamda(init="code").adapt(bert(), fresh)
    assert fresh.meter.charges["svd"]["flops"] == 0


# ---- layers of other kinds, other types ----------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_convolutions(init: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1))
    x = random(2, 3, 8, 8).requires_grad_()
    before = model(x).detach()
    method = lamda(init=init, target_modules=("0",))
    model = method.adapt(model)
    assert torch.allclose(model(x), before, atol=1e-5)
    delta = method.deltas(noisy(model, method))["0"]
    out = model(x)
    out.square().sum().backward()
    grads = [x.grad.clone(), delta.core.grad.clone(), delta.up.grad.clone()]
    x.grad = delta.core.grad = delta.up.grad = None
    kernel = (model[0].base_weight() + delta.weight(model[0].base_weight())).reshape(6, 3, 3, 3)
    slow = nn.functional.conv2d(x, kernel, model[0].bias, 2, 1)
    assert torch.allclose(out, slow, atol=1e-5)
    slow.square().sum().backward()
    for first, second in zip(grads, (x.grad, delta.core.grad, delta.up.grad)):
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-3)
    assert torch.allclose(merge_adapters(model)(x), out, atol=1e-5)
    with pytest.raises(Conflict, match="pads"):
        model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"))
        method.adapt(model)(x)


def test_quantized_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Quantized(nn.Linear(6, 5)))
    with pytest.raises(Conflict, match="quantized") as caught:
        lamda().adapt(model)
    assert "svd_zero" in caught.value.remedy
    x = random(3, 6)
    before = model(x).detach()
    method = lamda(init="svd_zero")
    model = method.adapt(model)
    assert torch.equal(model(x), before)
    noisy(model, method)
    a, b = method.deltas(model)["0"].to_lora()
    assert torch.allclose(model(x), before + x @ (b @ a).T, atol=1e-5)
    with pytest.raises(Conflict, match="merged"):
        merge_adapters(model)


def test_two_adapters_on_one_layer_add_up() -> None:
    weight, x = random(6, 8), random(4, 8, seed=1)
    model = layer_of(weight)
    methods = [lamda(adapter_name="a"), lamda(adapter_name="b", init="svd_zero", r=2)]
    for method in methods:
        model = method.adapt(model)
    noisy(noisy(model, methods[0]), methods[1])
    parts = [next(iter(m.deltas(model).values())).weight(weight) for m in methods]
    assert torch.allclose(model(x), x @ (weight + parts[0] + parts[1]).T + model.bias, atol=1e-5)
    set_adapter(model, "b")
    assert torch.allclose(model(x), x @ (weight + parts[1]).T + model.bias, atol=1e-5)
    check(methods, layer_of(weight))
    assert {c.word for m in methods for c in m.claims(layer_of(weight))} == {"delta.additive"}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("choice", ["float32", "base"])
def test_bfloat16_and_autocast(init: str, choice: str) -> None:
    model = llama().bfloat16()
    before = logits(model, tokens())
    method = lamda(init=init, basis_dtype=choice)
    method.adapt(model)
    after = logits(model, tokens())
    assert (after - before).float().abs().max() <= 0.02 and after.dtype == torch.bfloat16
    assert all(map(math.isfinite, train(model, 6, lr=1e-2)))
    assert all(d.core.dtype == torch.float32 for d in method.deltas(model).values())
    full, method = bert(), lamda(init=init)
    noisy(method.adapt(full), method)
    wide = full(input_ids=tokens()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = full(input_ids=tokens()).logits
        half.float().square().sum().backward()
    assert (wide - half).abs().max() < 0.05
    assert all(torch.isfinite(d.core.grad).all() for d in method.deltas(full).values())


# ---- state and resume ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kill", "order"), [(0, "largest_first"), (4, "largest_first"), (4, "smallest_first"),
                        (9, "largest_first")],
)  # fmt: skip
def test_a_killed_run_goes_on_with_the_same_bits(order: str, kill: int) -> None:
    """Before a column froze at all, between columns, and after the last."""

    def fresh() -> tuple[nn.Module, Loop]:
        model, method = llama(layers=1), lamda(freeze_fraction=0.5, freeze_order=order)
        method.adapt(model)
        return model, Loop(model, method, steps=12)

    whole, loop = fresh()
    losses = loop.run(0, 12)
    _, first = fresh()
    first.run(0, kill)
    resumed, second = fresh()
    second.load(first.save())
    assert second.run(kill, 12) == losses[kill:]
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("embed", ["auto", "always"])
def test_state_comes_back_on_the_same_base(init: str, embed: str) -> None:
    weight, x = random(7, 6), random(3, 6, seed=1)
    method = lamda(init=init, embed_bases=embed)
    model = noisy(method.adapt(layer_of(weight)), method)
    state = next(iter(method.deltas(model).values())).state_dict()
    carried = init == "code" or embed == "always"
    assert ("down" in state) == carried and {"core", "up", "fingerprint"} <= set(state)
    again, delta = adapted(weight, init=init)
    again.base_layer.load_state_dict(model.base_layer.state_dict())
    delta.load_state_dict({k: v.clone() for k, v in state.items()})
    assert torch.equal(again(x), model(x))
    _, delta = adapted(weight * 1.01, init=init)
    with pytest.raises(CheckpointError, match="another base weight"):
        delta.load_state_dict(state)
    _, loose = adapted(weight * 1.01, init=init, allow_rebuild=True)
    loose.load_state_dict(state)
    assert torch.equal(loose.core, state["core"])


def test_a_flipped_direction_is_noticed() -> None:
    """A rebuilt with another sign would not fit the stored S and B."""
    _, delta = adapted(random(7, 6))
    state = {k: v.clone() for k, v in delta.state_dict().items()}
    state["signature"][1] *= -1
    with pytest.raises(CheckpointError, match="made again"):
        delta.load_state_dict(state)


def test_degenerate_spectra_embed_their_bases() -> None:
    _, delta = adapted(torch.eye(5), r=2)
    assert {"down", "taken"} <= set(delta.state_dict())
    with pytest.raises(ConfigError, match="embed_bases"):
        adapted(torch.eye(5), r=2, embed_bases="never")


def test_starts_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    layer = layer_of(random(8, 8))
    for settings in ({"init": "code"}, {"init": "svd_zero", "basis": "random"}):
        state = torch.get_rng_state()
        downs = [lamda(**settings).make("x", layer, Context(seed=s)).down for s in (1, 1, 2)]
        assert torch.equal(downs[0], downs[1]) and not torch.equal(downs[0], downs[2])
        assert torch.equal(torch.get_rng_state(), state)
    delta = lamda(init="code").make("x", layer, Context())
    assert delta.down.abs().max() <= 8**-0.5 and delta.core.abs().max() <= 0.5
    assert not delta.up.any() and delta.core.std() > 0.1


# ---- plans, cards, bad input ---------------------------------------------------------------------


def test_plans_need_no_values() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        for settings in ({}, {"init": "svd_zero"}, {"init": "code"}, {"freeze_fraction": 0.0},
                         {"init": "svd_zero", "basis": "random"}):  # fmt: skip
            layer = nn.Linear(8, 16)
            delta = lamda(dropout=0.1, **settings).make("x", layer, Context())
            out = delta.output(torch.randn(3, 8), layer)
            out.sum().backward()
            assert out.shape == (3, 16)
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
        ranks = lamda(allocate="greedy_energy").with_ranks(model, Context()).rank_pattern
        assert [r for _, r in ranks] == [4, 4]


def test_card_and_call_string() -> None:
    entry = find("lamda")
    assert entry.card.paper == 3 and entry.places == ("OnModel", "OnStep")
    assert entry.load() is LaMDA and LaMDA.places() == ("OnModel", "OnStep")
    text = "lamda(r=8, init='svd_zero', rank_pattern={'query': 2}, freeze_fraction=None)"
    method = build(text)
    assert method.rank_pattern == (("query", 2),) and build(method.spec()) == method


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 0}, "r"), ({"r": 1.5}, "r"), ({"alpha": 0.0}, "alpha"), ({"alpha": -1.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"), ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"), ({"init": "svd"}, "init"),
        ({"freeze_fraction": -0.1}, "freeze_fraction"),
        ({"freeze_fraction": 1.1}, "freeze_fraction"),
        ({"freeze_order": "random"}, "freeze_order"), ({"allocate": "best"}, "allocate"),
        ({"rank_budget": 0.0}, "rank_budget"), ({"r_min": 0}, "r_min"), ({"r_max": 0}, "r_max"),
        ({"r_min": 4, "r_max": 2}, "r_max"), ({"multiple_of": 2}, "r_min"),
        ({"rank_pattern": {"query": 0}}, "rank_pattern"), ({"basis": "random"}, "basis"),
        ({"init": "code", "freeze_fraction": 0.0}, "freeze_fraction"),
        ({"embed_bases": "maybe"}, "embed_bases"), ({"basis_dtype": "int8"}, "basis_dtype"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings(settings: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=rf"lamda\.{match}") as caught:
        unchecked(LaMDA, **settings)
    assert caught.value.remedy
    with pytest.raises(ConfigError):
        construct(LaMDA, settings)


def test_bad_models_and_runs() -> None:
    with pytest.raises(ConfigError, match=r"lamda\.r = 33.*query"):
        lamda(r=33, target_modules=("query",)).adapt(bert())
    with pytest.raises(NoEffect):
        lamda(target_modules=("nowhere",)).adapt(bert())
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = math.inf
    with pytest.raises(NonFinite, match=r"layer\.1\.output\.dense"):
        lamda().adapt(model)
    live = Live(bert(), Cross(), [], None, Context(total_steps=10))
    with pytest.raises(NoEffect, match="adapt"):
        lamda().watch(live)
    model = lamda().adapt(llama())
    live = Live(model, Cross(), [], None, Context())
    with pytest.raises(ConfigError, match="steps"):
        lamda().watch(live)
    for fraction in (None, 0.0, 1.0):
        assert isinstance(lamda(freeze_fraction=fraction).watch(live), Watcher)
    live.context.total_steps = 10
    with pytest.raises(NoEffect, match="never told"):
        lamda().watch(live).close()
