from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
from adapter_kit import batches, bert, fill, gpt2, llama, logits, minilm, tokens
from torch import nn
from torch.func import functional_call

from outlay import AdaLora, build, load_adapter, save_adapter
from outlay.core.allocate import allocate
from outlay.core.budget import Budget
from outlay.core.errors import ConfigError, NoEffect
from outlay.core.live import Live
from outlay.core.losses import Objective
from outlay.core.method import Context, Step
from outlay.methods.adapters._adalora_run import Allocation
from outlay.nn.adapter import merge_adapters, unmerge_adapters
from outlay.nn.lowrank import orthogonality_loss
from outlay.nn.sensitivity import UnitScores

# PEFT warns about its own AdaLoRA folders (pattern keys name tensors) and about rank 0.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.*invalid shape"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning"),
]


class Bare(Objective):
    """An objective without terms: only its penalties are read here."""


def begin(model: nn.Module, method: AdaLora, total: int, lr: float = 1e-2, seed: int = 0):
    """(adapted model, objective, optimizer, watcher) as the loop would build them."""
    context = Context(budget=Budget(total, "steps"), total_steps=total, seed=seed)
    model = method.adapt(model)
    objective = method.shape(Bare(), model, context)
    held = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in held], lr=lr, weight_decay=0.0)
    optimizer.param_groups[0]["names"] = [n for n, _ in held]
    live = Live(model, objective, [optimizer], None, context)
    return model, objective, optimizer, method.watch(live)


def step_of(index: int, total: int) -> Step:
    return Step(index=index, share=index / total, seed=0, total=total)


def one_step(model, objective, optimizer, watcher, index, total, loss) -> None:
    for penalty in objective.penalties(model, step_of(index, total)).values():
        loss = loss + penalty
    loss.backward()
    optimizer.step()
    watcher.after_update(step_of(index, total))
    optimizer.zero_grad()


def text_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    out = model(input_ids=ids).logits
    if out.dim() == 3:
        return nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return nn.functional.cross_entropy(out, ids[:, 0] % out.shape[1])


def run(model, method, total, stop=None, before=lambda index: None, parts=None) -> Any:
    parts = parts or begin(model, method, total)
    for index, ids in enumerate(batches(stop or total)):
        before(index)
        one_step(*parts, index, total, text_loss(parts[0], ids))
    return parts


def one_layer(method: AdaLora, width: int = 12, out: int = 8, dtype=torch.float32):
    torch.manual_seed(0)
    base = nn.Linear(width, out).to(dtype)
    return method.adapt(nn.Sequential(copy.deepcopy(base))), base


@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_zero_start_is_the_base_and_scores_nothing(make):
    model, ids = make(), tokens()
    before = logits(model, ids)
    model, _, _, watcher = begin(model, AdaLora(), 10)
    assert torch.equal(logits(model, ids), before)
    text_loss(model, ids).backward()
    for delta in watcher.deltas.values():
        assert not delta.a.grad.any() and not delta.b.grad.any()
    watcher.scores.update()
    assert not watcher.scores.scores().any()


def test_start_is_drawn_as_published():
    model, _ = one_layer(AdaLora(init_r=64, target_r=64), 400, 300)
    delta = model[0].deltas["default"]
    assert not delta.e.any()
    for factor in (delta.a, delta.b):
        assert float(factor.detach().std()) == pytest.approx(0.02, rel=0.02)


def test_budget_table():
    method = AdaLora(init_r=6, target_r=2, warmup_steps=2, final_steps=3, gamma=0.0)
    model = nn.Sequential(nn.Linear(12, 8))
    parts, seen = begin(model, method, 12), []
    for index in range(12):
        one_step(*parts, index, 12, parts[0](torch.randn(4, 12)).pow(2).sum())
        seen.append(method.ranks(model)["0"])
    assert seen == [6, 6, 4, 3, 2, 2, 2, 2, 2, 2, 2, 2]


def test_budget_falls_from_start_to_target():
    method = AdaLora(init_r=6, target_r=2, warmup_share=0.2, final_share=0.3)
    *_, watcher = begin(llama(), method, 50)
    found = [watcher.budget(step_of(i, 50)) for i in range(50)]
    count = len(watcher.deltas)
    assert found == sorted(found, reverse=True)
    assert found[9] == 6 * count > found[10]
    assert found[34] == found[-1] == 2 * count < found[20]


def test_every_third_step_only():
    method = AdaLora(init_r=6, target_r=2, warmup_share=0.1, final_share=0.3, every=3)
    parts, ranks = begin(llama(), method, 20), []
    for index, ids in enumerate(batches(20)):
        one_step(*parts, index, 20, text_loss(parts[0], ids))
        ranks.append(sum(method.ranks(parts[0]).values()))
    changes = [i + 1 for i in range(1, 20) if ranks[i] != ranks[i - 1]]
    assert changes and all(t % 3 == 0 or t == 14 for t in changes)


def test_global_selection():
    scores = torch.tensor([1.0, 2, 3, 4, 5, 6])
    assert allocate(scores, None, 3.0).tolist() == [False] * 3 + [True] * 3
    assert allocate(torch.zeros(6), None, 2.0).tolist() == [True, True] + [False] * 4


def test_parameter_cost_meets_its_budget():
    method = AdaLora(init_r=6, target_r=2, cost="params", warmup_share=0.1, final_share=0.4)
    model, _, _, _ = run(llama(), method, 20)
    live = price = 0
    for delta in method.deltas(model).values():
        each = delta.a.shape[1] + delta.b.shape[0]
        live += int(delta.keep.sum()) * each
        price += 2 * each
    largest = max(d.a.shape[1] + d.b.shape[0] for d in method.deltas(model).values())
    assert price - largest < live <= price


@pytest.mark.parametrize("make", [llama, gpt2])
def test_merge_and_compact(make):
    method = AdaLora(init_r=4, target_r=1, warmup_share=0.1, final_share=0.4)
    model, *_ = run(make(), method, 12)
    ids = tokens()
    before = logits(model, ids)
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    merge_adapters(model)
    assert torch.allclose(logits(model, ids), before, atol=1e-5)
    unmerge_adapters(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    ranks = method.ranks(model)
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == len(ranks)
    method.compact(model)
    assert {n: len(d.a) for n, d in method.deltas(model).items()} == ranks == method.ranks(model)
    assert torch.allclose(logits(model, ids), before, atol=1e-6)
    for delta in method.deltas(model).values():
        a, b = delta.to_lora()
        base = torch.zeros(b.shape[0], a.shape[1])
        assert torch.allclose(b @ a, delta.weight(base), atol=1e-7)


def test_scaling_ignores_the_live_rank():
    model, base = one_layer(AdaLora(init_r=4, target_r=2, alpha=8.0))
    delta = model[0].deltas["default"]
    with torch.no_grad():
        delta.e.fill_(1.0)
        delta.keep[1:] = False
        delta.e.mul_(delta.keep[:, None])
    expected = 8 / (4 + 1e-5) * delta.b[:, :1] @ delta.a[:1]
    assert torch.allclose(delta.weight(base.weight), expected)
    delta.compact()
    assert torch.allclose(delta.weight(base.weight), expected)
    plain, _ = one_layer(AdaLora(init_r=4, target_r=2, alpha=0.0))
    assert plain[0].deltas["default"].scaling == pytest.approx(1.0, rel=1e-5)


def test_orthogonality():
    model, _ = one_layer(AdaLora(init_r=2, target_r=2), 2, 2)
    delta = model[0].deltas["default"]
    with torch.no_grad():
        delta.a.copy_(torch.eye(2))
        delta.b.copy_(torch.eye(2))
    loss = orthogonality_loss([delta.a], [delta.b])
    assert float(loss.detach()) == 0
    loss.backward()
    assert torch.isfinite(delta.a.grad).all()
    both = [2 * delta.a.detach()], [delta.b.detach()]
    assert float(orthogonality_loss(*both)) == pytest.approx(3 * math.sqrt(2) / 2)
    assert float(orthogonality_loss(*both, "squared_sum")) == pytest.approx(18)


@pytest.mark.parametrize("norm", ["mean_fro", "squared_sum"])
def test_gradient_of_the_penalty(norm):
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 5), (2, 5), (3, 4), (5, 2), (6, 3)]
    held = [
        torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    loss = orthogonality_loss(held[:3], held[3:], norm)
    parts = [
        torch.linalg.matrix_norm((m @ m.T if i < 3 else m.T @ m) - torch.eye(min(m.shape)))
        for i, m in enumerate(held)
    ]
    plain = sum(parts) / 5 if norm == "mean_fro" else sum(p.square() for p in parts)
    assert torch.allclose(loss, plain)
    for ours, slow in zip(
        torch.autograd.grad(loss, held), torch.autograd.grad(plain, held), strict=True
    ):
        assert torch.allclose(ours, slow)


def test_moving_averages():
    """With constant I = c the mean after t steps is c (1 - beta1^t)."""
    layer = nn.Module()
    layer.e = nn.Parameter(torch.full((3, 1), 2.0))
    layer.e.grad = torch.full((3, 1), -0.5)
    scores = UnitScores([layer], {"e": 0}, beta1=0.9, beta2=0.8)
    spread = 0.0
    for t in range(1, 8):
        scores.update()
        mean = 1 - 0.9**t
        spread = 0.8 * spread + 0.2 * abs(1 - mean)
        assert torch.allclose(scores.scores(), torch.full((3,), mean * spread))


def test_scores_against_a_slow_reference():
    torch.manual_seed(0)
    layers = []
    for r, width, out in ((3, 5, 4), (3, 5, 4), (2, 6, 4)):
        layer = nn.Module()
        layer.e = nn.Parameter(torch.randn(r, 1))
        layer.a = nn.Parameter(torch.randn(r, width))
        layer.b = nn.Parameter(torch.randn(out, r))
        layers.append(layer)
    scores = UnitScores(layers, {"e": 0, "a": 0, "b": 1}, 0.85, 0.7)
    mean: dict[tuple[int, str], torch.Tensor] = {}
    spread: dict[tuple[int, str], torch.Tensor] = {}
    for _ in range(3):
        for index, layer in enumerate(layers):
            for name, p in layer.named_parameters():
                p.grad = torch.randn_like(p)
                now, key = (p * p.grad).abs().detach(), (index, name)
                mean[key] = 0.85 * mean.get(key, torch.zeros_like(now)) + 0.15 * now
                off = (now - mean[key]).abs()
                spread[key] = 0.7 * spread.get(key, torch.zeros_like(now)) + 0.3 * off
        scores.update()
    expected = []
    for index in range(3):
        s = {name: mean[index, name] * spread[index, name] for name in "eab"}
        expected.append(s["e"][:, 0] + s["a"].mean(1) + s["b"].mean(0))
    assert torch.allclose(scores.scores(), torch.cat(expected), rtol=1e-5)
    other = UnitScores(layers, {"e": 0, "a": 0, "b": 1}, 0.85, 0.7)
    other.load_state_dict(scores.state_dict())
    assert torch.equal(other.scores(), scores.scores())


def test_a_pruned_unit_returns():
    method = AdaLora(init_r=2, target_r=1, warmup_share=0.0, final_share=0.1, gamma=0.0)
    model = nn.Sequential(nn.Linear(4, 4))
    model, _objective, _, watcher = begin(model, method, 100)
    delta = watcher.deltas["0"]
    history = []
    for index in range(20):
        # The second unit's gradient is large from the start of the falling phase on.
        with torch.no_grad():
            if index == 0:
                delta.e.copy_(torch.tensor([[1.0], [0.0]]))
            delta.e[delta.e == 0] = 1e-3 if index > 2 else 0.0
        for p in (delta.a, delta.b):
            p.grad = torch.zeros_like(p)
        delta.e.grad = torch.tensor([[1e-6], [1e3 + index]]) if index > 2 else torch.ones(2, 1)
        watcher.after_update(step_of(index, 100))
        history.append(delta.keep.tolist())
    assert [True, False] in history and history[-1][1]


def test_random_importance_keeps_what_it_drew_and_draws_anew_for_another_seed():
    method = AdaLora(init_r=6, target_r=2, importance="random", warmup_share=0.1)
    patterns = []
    for seed in (0, 0, 1):
        model, *_ = run(llama(), method, 15, parts=begin(llama(), method, 15, seed=seed))
        patterns.append(torch.stack(list(method.rank_pattern(model).values())))
    assert torch.equal(patterns[0], patterns[1]) and not torch.equal(patterns[0], patterns[2])


@pytest.mark.parametrize(
    "importance", ["uncertain_sensitivity", "sensitivity", "magnitude", "random"]
)
def test_importance_variants_choose_differently(importance):
    method = AdaLora(init_r=6, target_r=2, importance=importance, warmup_share=0.1)
    model, *_ = run(llama(), method, 15)
    assert sum(method.ranks(model).values()) == 2 * len(method.ranks(model))
    if importance == "magnitude":
        sizes = torch.cat([d.e[:, 0].abs() for d in method.deltas(model).values()])
        assert int((sizes > 0).sum()) == 2 * len(method.ranks(model))


def test_doublets_stay_dead():
    method = AdaLora(init_r=4, target_r=1, units="doublets", gamma=0.0, warmup_share=0.1)
    model, *_ = run(llama(), method, 15)
    for delta in method.deltas(model).values():
        assert delta.e is None
        assert not delta.a[~delta.keep].any() and not delta.b[:, ~delta.keep].any()


def test_missing_gradients_count_as_zero_with_one_warning():
    method = AdaLora(init_r=3, target_r=1, warmup_share=0.0, final_share=0.5, gamma=0.0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parts = begin(model, method, 10)
    with pytest.warns(UserWarning, match="took no part") as caught:
        for index in range(10):
            one_step(*parts, index, 10, parts[0][0](torch.randn(5, 4)).pow(2).sum())
    assert len(caught) == 1
    assert method.ranks(model) == {"0": 2 if method.ranks(model)["0"] == 2 else 3, "1": 0} or (
        method.ranks(model)["0"] + method.ranks(model)["1"] == 2
    )


def test_resume_is_exact():
    method = AdaLora(init_r=5, target_r=2, warmup_share=0.1, final_share=0.3, every=2)
    whole, *_ = run(llama(layers=1), method, 20)
    for stop in (1, 7, 15):
        first = run(llama(layers=1), method, 20, stop=stop)
        state = copy.deepcopy(first[3].state_dict())
        second = begin(llama(layers=1), method, 20)
        second[0].load_state_dict(first[0].state_dict())
        second[2].load_state_dict(copy.deepcopy(first[2].state_dict()))
        second[3].load_state_dict(state)
        for index, ids in enumerate(batches(20)):
            if index >= stop:
                one_step(*second, index, 20, text_loss(second[0], ids))
        for name, value in whole.state_dict().items():
            assert torch.equal(value, second[0].state_dict()[name]), (stop, name)


def test_may_stop_only_in_the_final_phase():
    method = AdaLora(init_r=4, target_r=2, warmup_share=0.2, final_share=0.4)
    parts, allowed = begin(llama(), method, 10), []
    for index, ids in enumerate(batches(10)):
        one_step(*parts, index, 10, text_loss(parts[0], ids))
        allowed.append(parts[3].may_stop(step_of(index, 10)))
    assert allowed == [False] * 5 + [True] * 5
    parts[3].close()


def test_no_effect_if_never_allocated():
    *_, watcher = begin(llama(), AdaLora(), 10)
    with pytest.raises(NoEffect, match="never called"):
        watcher.close()
    parts = run(llama(), AdaLora(warmup_share=0.5, final_share=0.2), 10, stop=4)
    with pytest.raises(NoEffect, match="never allocated in 4 steps"):
        parts[3].close()


def test_never_prune_is_legal():
    method = AdaLora(init_r=3, target_r=3)
    model, _, _, watcher = run(llama(), method, 10)
    watcher.close()
    assert set(method.ranks(model).values()) == {3}


def test_pattern_stays_in_the_final_phase_and_compaction_changes_nothing():
    outs = []
    for compact in (False, True):
        method = AdaLora(
            init_r=4,
            target_r=1,
            warmup_share=0.1,
            final_share=0.4,
            gamma=0.0,
            compact_final=compact,
        )
        model, _, optimizer, _ = run(llama(), method, 20)
        outs.append(logits(model, tokens()))
        sizes = {n: len(d.a) for n, d in method.deltas(model).items()}
        assert sizes == (method.ranks(model) if compact else dict.fromkeys(sizes, 4))
        assert len(optimizer.param_groups[0]["params"]) == len(optimizer.param_groups[0]["names"])
    assert torch.allclose(*outs, atol=2e-5)


def peft_model(model: nn.Module, method: AdaLora, total: int, names: list[str]) -> nn.Module:
    """PEFT's twin; without a task type PEFT would leave its penalty out."""
    task = "SEQ_CLS" if hasattr(model, "classifier") else "CAUSAL_LM"
    config = peft.AdaLoraConfig(
        init_r=method.init_r, target_r=method.target_r, lora_alpha=16, beta1=method.beta1,
        beta2=method.beta2, orth_reg_weight=method.gamma, tinit=method.warmup_steps,
        tfinal=method.final_steps, total_step=total, deltaT=method.every, target_modules=names,
        task_type=task,
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config)
    for name, parameter in theirs.named_parameters():
        if ".ranknum." in name:
            # PEFT 0.21.2 leaves its constant rho trainable: an optimizer would move it.
            parameter.requires_grad_(False)
    return theirs


def copy_start(deltas, theirs) -> None:
    for name, delta in deltas.items():
        layer = theirs.base_model.model.get_submodule(name)
        with torch.no_grad():
            layer.lora_A["default"].copy_(delta.a)
            layer.lora_B["default"].copy_(delta.b)
            layer.lora_E["default"].copy_(delta.e)


@pytest.mark.parametrize("which", ["llama", pytest.param("minilm", marks=pytest.mark.assets)])
def test_twenty_steps_equal_peft(which):
    make, vocabulary = (llama, 50) if which == "llama" else (minilm, 30_000)
    method = AdaLora(
        init_r=4, target_r=2, warmup_steps=3, final_steps=7, gamma=0.3,
        layers_to_transform=(-1,),
    )  # fmt: skip
    # float64: Adam divides by gradients near zero at the start and so amplifies rounding.
    theirs = peft_model(make().double(), method, 20, list(method.targets(make())))
    model, objective, optimizer, watcher = begin(make().double(), method, 20, lr=1e-3)
    copy_start(watcher.deltas, theirs)
    other = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0
    )
    theirs.eval()
    for index, ids in enumerate(batches(20, vocabulary=vocabulary)):
        one_step(model, objective, optimizer, watcher, index, 20, text_loss(model, ids))
        labels = ids if which == "llama" else ids[:, 0] % 6
        theirs(input_ids=ids, labels=labels).loss.backward()
        other.step()
        theirs.base_model.update_and_allocate(index + 1)
        other.zero_grad()
        for name, delta in watcher.deltas.items():
            layer = theirs.base_model.model.get_submodule(name)
            alive = layer.lora_E["default"][:, 0] != 0
            assert torch.equal(alive, delta.e[:, 0] != 0), (index, name)
            assert torch.allclose(layer.lora_E["default"], delta.e, atol=1e-9), (index, name)
    for name, delta in watcher.deltas.items():
        layer = theirs.base_model.model.get_submodule(name)
        weight = delta.weight(layer.base_layer.weight)
        assert torch.allclose(layer.get_delta_weight("default"), weight, atol=1e-9)
    ids = tokens(vocabulary=vocabulary)
    assert torch.allclose(logits(model, ids), logits(theirs, ids), atol=1e-9)


@pytest.mark.parametrize("make", [bert, llama, gpt2])
@pytest.mark.parametrize("compact", [False, True])
def test_folder_in_plain_peft(make, compact, tmp_path):
    method = AdaLora(init_r=4, target_r=1, warmup_share=0.1, final_share=0.4)
    model, *_ = run(make(), method, 12)
    ids = tokens()
    before = logits(model, ids)
    if compact:
        method.compact(model)
    assert save_adapter(model, tmp_path / "own") == "ADALORA"
    assert save_adapter(model, tmp_path / "lora", peft_type="LORA") == "LORA"
    for name in ("own", "lora"):
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / name).eval()
        assert torch.allclose(logits(theirs, ids), before, atol=2e-6)
        ours = load_adapter(make(), tmp_path / name)
        assert torch.allclose(logits(ours, ids), before, atol=1e-6)
        assert method.ranks(ours) == method.ranks(model)


def test_folder_from_peft(tmp_path):
    method = AdaLora(init_r=4, target_r=2, warmup_steps=1, final_steps=2)
    theirs = peft_model(llama(), method, 8, list(method.targets(llama())))
    fill(theirs, seed=1)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3)
    for index, ids in enumerate(batches(8)):
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(index + 1)
        optimizer.zero_grad()
    theirs.eval().save_pretrained(tmp_path)
    ours = load_adapter(llama(), tmp_path)
    assert torch.allclose(logits(ours, tokens()), logits(theirs, tokens()), atol=2e-6)
    assert sum(method.ranks(ours).values()) == 2 * len(method.ranks(ours))


def test_convolution():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Flatten())
    model = fill(AdaLora(init_r=3, target_r=3).adapt(net))
    x = torch.randn(2, 4, 5, 5)
    out = model(x)
    assert torch.allclose(merge_adapters(model)(x), out, atol=1e-5)


def test_fused_equals_plain():
    results = []
    for hooked in (False, True):
        model, _ = one_layer(AdaLora(init_r=3, target_r=3), dtype=torch.float64)
        fill(model)
        if hooked:
            model[0].base_layer.register_forward_hook(lambda *args: None)
        x = torch.randn(2, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        x.requires_grad_()
        out = model(x)
        out.sin().sum().backward()
        delta = model[0].deltas["default"]
        results.append((out.detach(), x.grad, delta.a.grad, delta.e.grad, delta.b.grad))
    for fused, plain in zip(*results, strict=True):
        assert torch.allclose(fused, plain, rtol=1e-12, atol=1e-13)


def test_finite_differences():
    model, _ = one_layer(AdaLora(init_r=2, target_r=2), 4, 3, torch.float64)
    fill(model)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    names = [f"0.deltas.default.{leaf}" for leaf in "aeb"]
    held = [model.get_parameter(name) for name in names]

    def out(x, *values):
        return functional_call(model, dict(zip(names, values, strict=True)), (x,)).sin()

    assert torch.autograd.gradcheck(out, (x, *held))
    assert torch.autograd.gradgradcheck(out, (x, *held))


def test_parameters_and_dtype():
    model, _ = one_layer(AdaLora(init_r=3, target_r=2), dtype=torch.bfloat16)
    held = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in held) == 3 * (12 + 8 + 1)
    assert {p.dtype for p in held} == {torch.float32}
    x = torch.randn(5, 12, dtype=torch.bfloat16, requires_grad=True)
    out = model(x)
    out.float().sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("text", [
    "adalora(target_r=13)", "adalora(init_r=0)", "adalora(beta1=1.0)", "adalora(beta2=0.0)",
    "adalora(warmup_share=0.6, final_share=0.4)", "adalora(gamma=-0.1)", "adalora(every=0)",
    "adalora(importance='uncertainty')", "adalora(cost='bytes')", "adalora(orth_norm='l1')",
    "adalora(units='doublets')", "adalora(units='doublets', gamma=0.0, importance='magnitude')",
    "adalora(r=8)", "adalora(alpha=-1.0)", "adalora(dropout=1.0)", "adalora(warmup_share=-0.1)",
])  # fmt: skip
def test_bad_settings(text):
    with pytest.raises(ConfigError) as error:
        build(text)
    assert "adalora" in error.value.problem and error.value.remedy


def test_bad_schedule_for_the_run():
    with pytest.raises(ConfigError, match="warmup_steps = 5 needs the number of steps"):
        AdaLora(warmup_steps=5).phases(None)
    with pytest.raises(ConfigError, match="leave no phase"):
        begin(llama(), AdaLora(warmup_steps=8, final_steps=4), 12)
    with pytest.raises(NoEffect):
        AdaLora(target_modules=("nothing",)).adapt(llama())


def test_call_string_round_trip():
    for text in ("adalora", "adalora(target_r=2, cost='params')", "adalora(warmup_steps=5)"):
        assert build(build(text).spec()) == build(text)
    assert AdaLora.places() == ("OnModel", "OnObjective", "OnStep")


def test_log_of_a_step():
    parts = run(llama(), AdaLora(init_r=4, target_r=2, warmup_share=0.1), 10)
    watcher = parts[3]
    assert isinstance(watcher, Allocation)
    assert watcher.last["rank"] == watcher.last["budget"] == 2 * len(watcher.deltas)
