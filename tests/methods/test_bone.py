from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from adapter_kit import bert, gpt2, llama, logits, minilm, tokens, train
from torch import nn
from torch.func import functional_call

from outlay import Bone, build, merge_adapters, unmerge_adapters
from outlay.core.claims import check
from outlay.core.errors import ConfigError, Conflict, NoEffect
from outlay.methods.adapters._bone_math import guided, unguided
from outlay.nn.adapter import adapted_layers

VARIANTS = ("shard", "mini", "bat")


def layer(width: int, out: int, method: Bone, scale: float = 0.1, dtype=torch.float32):
    """An adapted layer (block filled with noise) and its plain base."""
    torch.manual_seed(width + out)
    base = nn.Linear(width, out).to(dtype)
    model = method.adapt(nn.Sequential(copy.deepcopy(base)))
    block = model[0].deltas["default"].block
    with torch.no_grad():
        block.normal_(0, scale)
    return model, base, block


def settings(variant: str, r: int = 4, q: int = 2) -> Bone:
    return Bone(r=r, variant=variant, mini_r=q if variant == "mini" else 1)  # type: ignore[arg-type]


def peft_twin(base: nn.Linear, method: Bone, block: torch.Tensor) -> nn.Module:
    entries = method.to_peft({}, {"0": base})
    assert entries is not None and entries.pop("peft_type") == "MISS"
    config = peft.MissConfig(target_modules=["0"], **entries)
    twin = peft.inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(base)))
    with torch.no_grad():
        twin[0].miss_block["default"].copy_(block)
    return twin


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_zero_start_is_the_base(variant, make):
    model, ids = make(), tokens()
    before = logits(model, ids)
    assert torch.equal(logits(settings(variant).adapt(model), ids), before)


def test_shard_by_hand_where_r_does_not_divide():
    model, base, block = layer(10, 8, Bone(r=4))
    weight = base.weight.detach().clone()
    for j in range(10):
        weight[:, j] += block[j % 4]
    x = torch.randn(5, 10)
    expected = nn.functional.linear(x, weight, base.bias)
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert torch.allclose(merge_adapters(model)(x), expected, atol=1e-6)
    assert x.shape == (5, 10)


def test_bat_by_hand_and_back():
    model, base, block = layer(12, 8, Bone(r=4, variant="bat"))
    assert block.shape == (2, 4, 4)
    weight, expected = base.weight.detach(), torch.empty(8, 12)
    for a in range(2):
        for c in range(3):
            part = weight[4 * a : 4 * a + 4, 4 * c : 4 * c + 4]
            expected[4 * a : 4 * a + 4, 4 * c : 4 * c + 4] = (
                part @ (torch.eye(4) + block[a]) + block[a]
            )
    x = torch.randn(5, 12)
    assert torch.allclose(model(x), nn.functional.linear(x, expected, base.bias), atol=1e-6)
    merge_adapters(model)
    assert torch.allclose(model[0].base_layer.weight, expected, atol=1e-6)
    back = unguided(model[0].base_layer.weight.detach(), block.detach())
    assert torch.allclose(back, weight, atol=6e-7)
    unmerge_adapters(model)
    assert torch.equal(model[0].base_layer.weight, weight)


def test_bat_columns_by_hand():
    model, base, block = layer(12, 8, Bone(r=4, variant="bat", bat_axis="col"))
    assert block.shape == (3, 4, 4)
    weight, expected = base.weight.detach(), torch.empty(8, 12)
    for a in range(2):
        for c in range(3):
            part = weight[4 * a : 4 * a + 4, 4 * c : 4 * c + 4]
            expected[4 * a : 4 * a + 4, 4 * c : 4 * c + 4] = (
                part @ (torch.eye(4) + block[c]) + block[c]
            )
    x = torch.randn(5, 12)
    assert torch.allclose(model(x), nn.functional.linear(x, expected, base.bias), atol=1e-6)
    back = unguided(guided(weight, block.detach(), "col"), block.detach(), "col")
    assert torch.allclose(back, weight, atol=6e-7)


def test_singular_block_cannot_be_undone():
    block = -torch.eye(4)[None].repeat(2, 1, 1)
    with pytest.raises(ConfigError, match="cond"):
        unguided(torch.randn(8, 12), block)


def test_mini_is_shard_at_full_width_and_repeats_rows():
    full, _, block = layer(12, 8, settings("mini", q=8))
    shard, base, other = layer(12, 8, Bone(r=4))
    with torch.no_grad():
        other.copy_(block)
    x = torch.randn(3, 12)
    assert torch.equal(full(x), shard(x))
    narrow, base, _ = layer(12, 8, settings("mini", q=1))
    delta = narrow[0].deltas["default"].weight(base.weight)
    assert torch.equal(delta, delta[:1].expand_as(delta))


def test_shard_of_full_width_is_a_dense_delta():
    model, base, block = layer(12, 8, Bone(r=12))
    assert torch.equal(model[0].deltas["default"].weight(base.weight), block.T)


@pytest.mark.parametrize("width", [12, 10])
def test_gradient_of_shard_at_zero(width):
    model, base, block = layer(width, 8, Bone(r=4), scale=0.0, dtype=torch.float64)
    x = torch.randn(5, width, dtype=torch.float64)
    base(x).pow(2).sum().backward()
    model(x).pow(2).sum().backward()
    assert base.weight.grad is not None
    for k in range(4):
        expected = base.weight.grad[:, k::4].sum(1)
        assert torch.allclose(block.grad[k], expected, rtol=1e-12)


def test_gradient_of_bat_at_zero():
    model, base, block = layer(12, 8, Bone(r=4, variant="bat"), scale=0.0, dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    base(x).pow(2).sum().backward()
    model(x).pow(2).sum().backward()
    assert base.weight.grad is not None
    parts = base.weight.grad.unflatten(0, (2, 4)).unflatten(2, (3, 4))
    weights = base.weight.detach().unflatten(0, (2, 4)).unflatten(2, (3, 4))
    for a in range(2):
        expected = sum(
            (weights[a, :, c] + torch.eye(4, dtype=torch.float64)).T @ parts[a, :, c]
            for c in range(3)
        )
        assert torch.allclose(block.grad[a], expected, rtol=1e-12)


@pytest.mark.parametrize("width", [12, 10])
@pytest.mark.parametrize("method", [
    Bone(r=4), Bone(r=4, variant="mini", mini_r=2), Bone(r=2, variant="bat"),
    Bone(r=2, variant="bat", bat_axis="col"),
])  # fmt: skip
def test_finite_differences(method, width):
    model, _, block = layer(width, 8, method, dtype=torch.float64)
    x = torch.randn(2, 3, width, dtype=torch.float64, requires_grad=True)

    def out(x, block):
        return functional_call(model, {"0.deltas.default.block": block}, (x,))

    assert torch.autograd.gradcheck(out, (x, block))
    assert torch.autograd.gradgradcheck(lambda x, block: out(x, block).sin(), (x, block))


@pytest.mark.parametrize("method", [
    Bone(r=4), Bone(r=4, variant="mini", mini_r=2), Bone(r=2, variant="bat"),
    Bone(r=2, variant="bat", bat_axis="col"),
])  # fmt: skip
def test_fused_equals_plain(method):
    """A hook on the base layer turns the fused path off: both must agree, gradients too."""
    results = []
    for hooked in (False, True):
        model, _, block = layer(10, 8, method, dtype=torch.float64)
        if hooked:
            model[0].base_layer.register_forward_hook(lambda *args: None)
        x = torch.randn(2, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        x.requires_grad_()
        out = model(x)
        out.sin().sum().backward()
        results.append((out.detach(), x.grad, block.grad))
    for fused, plain in zip(*results, strict=True):
        assert torch.allclose(fused, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("piece", [1, 30, 48, 2**18])
@pytest.mark.parametrize("frozen", ["x", "block", "neither"])
def test_bat_in_pieces(piece, frozen, monkeypatch):
    """Whatever the size of a piece, and whichever gradient is asked for."""
    monkeypatch.setattr("outlay.methods.adapters._bone_math.PIECE", piece)
    model, base, block = layer(12, 8, Bone(r=2, variant="bat"), dtype=torch.float64)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=frozen != "x")
    block.requires_grad_(frozen != "block")
    asked = [t for t in (x, block) if t.requires_grad]
    plain = nn.functional.linear(x, guided(base.weight, block, "row"), base.bias)
    assert torch.allclose(model(x), plain, rtol=1e-12)
    ours = torch.autograd.grad(model(x).sin().sum(), asked)
    for one, other in zip(ours, torch.autograd.grad(plain.sin().sum(), asked), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)


def test_rank_and_lora():
    model, base, _ = layer(32, 24, Bone(r=4))
    delta = model[0].deltas["default"]
    weight = delta.weight(base.weight)
    assert torch.linalg.matrix_rank(weight) <= 4
    for width, method in ((32, Bone(r=4)), (30, Bone(r=4)), (32, settings("mini", q=3))):
        model, base, _ = layer(width, 24, method)
        a, b = model[0].deltas["default"].to_lora()
        assert torch.allclose(b @ a, model[0].deltas["default"].weight(base.weight), atol=1e-7)
    model, _, _ = layer(12, 8, Bone(r=4, variant="bat"))
    assert model[0].deltas["default"].to_lora() is None


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (Bone(r=4), 4 * 8),
        (Bone(r=4, variant="mini", mini_r=2), 4 * 2),
        (Bone(r=4, variant="bat"), 4 * 8),
        (Bone(r=4, variant="bat", bat_axis="col"), 4 * 12),
    ],
)
def test_parameter_counts(method, count):
    model, _, _ = layer(12, 8, method)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("width", [12, 10])
def test_equal_to_peft(variant, width):
    r = 2 if variant == "bat" else 4
    method = settings(variant, r=r)
    model, base, block = layer(width, 8, method)
    twin = peft_twin(base, method, block)
    x = torch.randn(5, 7, width, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, theirs = model(x), twin(y)
    assert torch.allclose(ours, theirs, atol=5e-7)
    ours.sin().sum().backward()
    theirs.sin().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=5e-6)
    assert torch.allclose(block.grad, twin[0].miss_block["default"].grad, atol=2e-5)
    merged = peft_merged(twin)
    assert torch.allclose(merge_adapters(model)[0].base_layer.weight, merged, atol=5e-7)


def peft_merged(twin: nn.Module) -> torch.Tensor:
    twin[0].merge()
    return twin[0].base_layer.weight.detach()


def twenty_steps(model: nn.Module, twin: nn.Module, method: Bone, vocabulary: int) -> None:
    targets = list(method.targets(model))
    entries = method.to_peft({}, {"": nn.Linear(1, 1)})
    assert entries is not None
    entries.pop("peft_type")
    twin = peft.inject_adapter_in_model(peft.MissConfig(target_modules=targets, **entries), twin)
    model = method.adapt(model)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_("miss_block" in name or name.startswith("classifier"))
    ours = train(model, 20, lr=1e-3, vocabulary=vocabulary)
    theirs = train(twin, 20, lr=1e-3, vocabulary=vocabulary)
    assert ours[-1] != ours[0]
    assert ours == pytest.approx(theirs, rel=2e-4)
    for name, delta in method.deltas(model).items():
        other = twin.get_submodule(name).miss_block["default"]
        assert torch.allclose(delta.block, other, atol=2e-4), name


@pytest.mark.assets
@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps_on_minilm(variant):
    method = Bone(
        r=16, variant=variant, mini_r=8 if variant == "mini" else 1, layers_to_transform=(-1,)
    )
    twenty_steps(minilm(), minilm(), method, 30_000)


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps_on_llama(variant):
    twenty_steps(llama(), llama(), settings(variant), 50)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gpt2_and_convolutions(variant):
    model = settings(variant).adapt(gpt2())
    ids = tokens()
    with torch.no_grad():
        for wrapped in adapted_layers(model).values():
            wrapped.deltas["default"].block.normal_(0, 0.05)
    before = logits(model, ids)
    merge_adapters(model)
    assert torch.allclose(logits(model, ids), before, atol=1e-5)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 2, stride=2, padding=1), nn.Flatten())
    adapted = settings(variant).adapt(net)
    with torch.no_grad():
        adapted[0].deltas["default"].block.normal_(0, 0.1)
    x = torch.randn(2, 4, 6, 6)
    out = adapted(x)
    merged = merge_adapters(adapted)(x)
    assert torch.allclose(out, merged, atol=1e-5)


def test_dropout_acts_on_the_adapter_alone():
    model, base, block = layer(12, 8, Bone(r=4, dropout=0.5))
    x = torch.ones(1, 12)
    assert torch.equal(model.eval()(x), model(x))
    drawn = {tuple(model.train()(x)[0].tolist()) for _ in range(8)}
    assert len(drawn) > 1
    with torch.no_grad():
        block.zero_()
    assert torch.allclose(model(x), base(x))


def test_bfloat16_base_keeps_a_float32_block():
    for variant in VARIANTS:
        method = settings(variant)
        model, base, block = layer(12, 8, method, dtype=torch.bfloat16)
        assert block.dtype == torch.float32
        x = torch.randn(5, 12, dtype=torch.bfloat16, requires_grad=True)
        out = model(x)
        out.float().sum().backward()
        assert out.dtype == x.grad.dtype == torch.bfloat16 and block.grad.dtype == torch.float32
        wide = base.weight.float() + model[0].deltas["default"].weight(base.weight.float())
        reference = nn.functional.linear(x.float(), wide, base.bias.float())
        rounded = nn.functional.linear(x, wide.bfloat16(), base.bias)
        allowed = 2 * (rounded.float() - reference).abs().max() + 1e-3
        assert (out.float() - reference).abs().max() <= allowed + 0.02
        merge_adapters(model)
        assert torch.equal(model[0].base_layer.weight, wide.bfloat16())


def test_shards_add_up_with_other_r():
    model = nn.Sequential(nn.Linear(10, 8))
    base = copy.deepcopy(model[0])
    Bone(r=4, adapter_name="one").adapt(model)
    Bone(r=3, adapter_name="two").adapt(model)
    with torch.no_grad():
        for delta in model[0].deltas.values():
            delta.block.normal_(0, 0.1)
    weight = base.weight + sum(d.weight(base.weight) for d in model[0].deltas.values())
    x = torch.randn(3, 10)
    assert torch.allclose(model(x), nn.functional.linear(x, weight, base.bias), atol=1e-6)
    assert torch.allclose(merge_adapters(model)(x), model(x), atol=1e-6)


def test_bat_speaks_about_the_frozen_base():
    """Stacked by hand, bat multiplies the frozen weight whatever was added before it."""
    outs = []
    for order in (0, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8))
        methods = [Bone(r=4, adapter_name="a"), Bone(r=4, variant="bat", adapter_name="b")]
        for method in methods[:: -1 if order else 1]:
            method.adapt(model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in "ab":
                block = model[0].deltas[name].block
                block.copy_(torch.randn(block.shape, generator=generator) * 0.1)
        x = torch.randn(3, 12, generator=generator)
        outs += [model(x), merge_adapters(model)(x)]
    for other in outs[1:]:
        assert torch.allclose(outs[0], other, atol=1e-6)


def test_claims():
    model = bert()
    shard, bat = Bone(r=4), Bone(r=4, variant="bat", adapter_name="b")
    assert {c.word for c in shard.claims(model)} == {"delta.additive"}
    assert {c.word for c in bat.claims(model)} == {"delta.multiplicative"}
    check([shard, Bone(r=8, adapter_name="b")], model)
    with pytest.raises(Conflict):
        check([shard, bat], model)
    check([
        Bone(r=4, target_modules=("query",)), Bone(r=4, variant="bat", target_modules=("value",))
    ], model)  # fmt: skip


def test_rank_pattern():
    model = Bone(r=4, rank_pattern={"query": 2, "layer.1.*value": 8}).adapt(bert())  # type: ignore[arg-type]
    sizes = {n: len(d.block) for n, d in Bone().deltas(model).items()}
    assert sizes["bert.encoder.layer.0.attention.self.query"] == 2
    assert sizes["bert.encoder.layer.1.attention.self.value"] == 8
    assert sizes["bert.encoder.layer.0.attention.self.value"] == 4


@pytest.mark.parametrize("text", [
    "bone(r=0)", "bone(r=-3)", "bone(r=2.5)", "bone(r='4')", "bone(variant='bats')",
    "bone(mini_r=4)", "bone(variant='mini', mini_r=0)", "bone(dropout=1.0)", "bone(dropout=-0.1)",
    "bone(variant='bat', dropout=0.1)", "bone(bat_axis='diagonal')", "bone(rank=4)",
    "bone(target_modules=())", "bone(rank_pattern={'query': 0})",
])  # fmt: skip
def test_bad_settings(text):
    with pytest.raises(ConfigError) as error:
        build(text)
    assert "bone" in error.value.problem and error.value.remedy


def test_bad_for_the_model():
    with pytest.raises(ConfigError, match="1, 2, 4"):
        Bone(r=3, variant="bat").adapt(nn.Sequential(nn.Linear(12, 8)))
    with pytest.raises(ConfigError, match="mini_r = 3"):
        Bone(r=4, variant="mini", mini_r=3).adapt(nn.Sequential(nn.Linear(12, 8)))
    with pytest.warns(UserWarning, match="above the 12 inputs"):
        Bone(r=13).adapt(nn.Sequential(nn.Linear(12, 8)))
    with pytest.raises(NoEffect, match="qeury"):
        Bone(r=4, target_modules=("qeury",)).adapt(bert())
    untouched = bert()
    names = [n for n, _ in untouched.named_modules()]
    with pytest.raises(ConfigError):
        Bone(r=5, variant="bat").adapt(untouched)
    assert [n for n, _ in untouched.named_modules()] == names
    assert all(p.requires_grad for p in untouched.parameters())


def test_call_string_round_trip():
    for text in ("bone", "bone(r=8)", "bone(r=8, variant='bat', bat_axis='col')",
                 "bone(rank_pattern={'query': 2})"):  # fmt: skip
        method = build(text)
        assert build(method.spec()) == method


def test_nothing_touches_the_global_generator():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        Bone(r=4).adapt(nn.Sequential(nn.Linear(12, 8)))
        kept = torch.get_rng_state()
    assert not torch.equal(state, kept)  # nn.Linear itself draws
    model = nn.Sequential(nn.Linear(12, 8))
    state = torch.get_rng_state()
    Bone(r=4).adapt(model)
    assert torch.equal(state, torch.get_rng_state())
