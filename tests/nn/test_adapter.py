from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from adapter_kit import MODELS, bert, fill, gpt2, llama, logits, tokens, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from outlay import AdaLora, Bone
from outlay.core.card import Card
from outlay.core.errors import ConfigError, Conflict
from outlay.core.method import Context, OnModel
from outlay.nn.adapter import (
    AdaptedLayer,
    AdapterMethod,
    Delta,
    adapter_names,
    bare,
    delta_dtype,
    disable_adapters,
    fusable,
    linear_shape,
    merge_adapters,
    set_adapter,
    unmerge_adapters,
    unwrap_adapters,
)
from outlay.nn.lowrank import LowRankDelta


class Dense(Delta):
    """The simplest delta: a weight of its own; everything else is the base class's default."""

    def __init__(self, shape, dtype):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape, dtype=dtype))

    def weight(self, base):
        return self.w.to(base.dtype)


@dataclass(frozen=True, kw_only=True)
class DenseAdapter(AdapterMethod, OnModel):
    card: ClassVar[Card] = Card(name="dense", title="dense", claims=("delta.additive",))

    def kinds(self):
        return (nn.Conv2d,)

    def make(self, name, layer, context):
        return Dense(linear_shape(layer), delta_dtype(layer))


@dataclass(frozen=True, kw_only=True)
class Lora(AdapterMethod, OnModel):
    card: ClassVar[Card] = Card(name="lora", title="lora", claims=("delta.additive",))
    r: int = 2

    def make(self, name, layer, context):
        out, width = linear_shape(layer)
        draw = torch.Generator().manual_seed(0)
        a = torch.randn(self.r, width, generator=draw, dtype=delta_dtype(layer)) * 0.1
        return LowRankDelta(a, torch.zeros(out, self.r, dtype=a.dtype), scaling=2.0)


@pytest.mark.parametrize("method", [DenseAdapter(), Lora()])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_adapt_train_merge_export(method, make):
    model, ids = make(), tokens()
    before = logits(model, ids)
    kinds = {n: type(m) for n, m in model.named_modules()}
    weights = {n: p.clone() for n, p in model.named_parameters()}
    model = method.adapt(model)
    assert torch.equal(logits(model, ids), before)
    train(model, 3, lr=1e-2)
    after = logits(model, ids)
    assert not torch.allclose(after, before, atol=1e-3)
    merge_adapters(model)
    assert torch.allclose(logits(model, ids), after, atol=1e-5)
    unmerge_adapters(model)
    assert torch.equal(logits(model, ids), after)
    plain = method.export(model)
    assert {n: type(m) for n, m in plain.named_modules()} == kinds
    assert torch.allclose(logits(plain, ids), after, atol=1e-5)
    moved = {n for n, p in plain.named_parameters() if not torch.equal(p, weights[n])}
    assert {n.removesuffix(".weight") for n in moved if "classifier" not in n} == set(
        method.targets(make())
    )


def test_exports_in_float64_are_exact():
    model, ids = llama().double(), tokens()
    model = fill(Lora().adapt(model))
    after = logits(model, ids)
    assert torch.allclose(logits(Lora().export(model), ids), after, atol=1e-6)  # RMSNorm is float32
    net = fill(DenseAdapter().adapt(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()))
    x = torch.randn(3, 6, dtype=torch.float64)
    after = net(x)
    assert torch.allclose(DenseAdapter().export(net)(x), after, atol=1e-12)


def test_frozen_by_hand_and_left_alone_in_a_run():
    model = Lora(modules_to_save=("pooler",), target_modules=("query",)).adapt(bert())
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trains if "deltas" not in n} == {"classifier", "bert"}
    assert {n for n in trains if n.startswith("bert") and "deltas" not in n} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias"
    }  # fmt: skip
    model = Lora().adapt(bert(), Context(freezes=True))
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="did you mean 'classifier'"):
        Lora(modules_to_save=("classifer",)).adapt(bert())


def test_two_adapters_switch_and_add_up():
    model, ids = llama(), tokens()
    base = logits(model, ids)
    fill(Lora(adapter_name="one").adapt(model), seed=1)
    one = logits(model, ids)
    fill(Lora(r=3, adapter_name="two").adapt(model), seed=2)
    assert adapter_names(model) == ("one", "two")
    both = logits(model, ids)
    set_adapter(model, "two")
    two = logits(model, ids)
    assert not torch.allclose(one, two) and not torch.allclose(both, two)
    with disable_adapters(model):
        assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model, ids), two)
    merge_adapters(model)
    with disable_adapters(model):
        assert torch.equal(logits(model, ids), base)
    assert torch.allclose(logits(model, ids), two, atol=1e-5)
    set_adapter(model, "two", "one")
    assert torch.allclose(logits(model, ids), both, atol=1e-5)
    with pytest.raises(ConfigError, match="did you mean 'two'"):
        set_adapter(model, "tow")
    with pytest.raises(Conflict, match="adapter_name"):
        Lora(adapter_name="two").adapt(model)


def test_merging_twice_rounds_once():
    model = nn.Sequential(nn.Linear(64, 64, bias=False).bfloat16())
    base = model[0].weight.float()
    fill(Lora(adapter_name="one").adapt(model), scale=0.02, seed=1)
    wide = base + model[0].deltas["one"].weight(base)
    merge_adapters(model)
    fill(Lora(adapter_name="two").adapt(model), scale=0.02, seed=2)
    with torch.no_grad():
        wide = base + sum(d.weight(base) for d in model[0].deltas.values())
    merge_adapters(model)
    assert torch.equal(model[0].base_layer.weight, wide.bfloat16())
    unmerge_adapters(model)
    assert torch.equal(model[0].base_layer.weight.float(), base)


def test_a_merge_leaves_tied_weights_alone():
    model, ids = llama(tied=True), tokens()
    table = model.get_input_embeddings().weight
    model = fill(Lora(target_modules=("lm_head",)).adapt(model))
    after = logits(model, ids)
    merge_adapters(model)
    assert model.get_input_embeddings().weight is table
    assert torch.allclose(logits(model, ids), after, atol=1e-5)
    unmerge_adapters(model)
    assert model.lm_head.weight is table
    plain = unwrap_adapters(model)
    assert not plain.config.tie_word_embeddings


def test_tied_models_keep_their_tie_when_only_layers_are_adapted():
    for make in (gpt2, lambda: llama(tied=True)):
        model = fill(Lora().adapt(make()))
        plain = Lora().export(model)
        assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
        assert plain.config.tie_word_embeddings


def test_one_module_in_two_places():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    model = Lora().adapt(model)
    assert model[0] is model[2] and isinstance(model[0], AdaptedLayer)
    assert Lora().export(model)[0] is shared


def test_the_model_itself_may_be_the_layer():
    model = Lora().adapt(nn.Linear(4, 4))
    assert isinstance(model, AdaptedLayer)
    x = torch.randn(2, 4)
    after = fill(model)(x)
    plain = Lora().export(model)
    assert isinstance(plain, nn.Linear) and torch.allclose(plain(x), after, atol=1e-6)


def test_torch_encoder_layers_see_the_adapter_in_evaluation():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = fill(Lora().adapt(nn.TransformerEncoder(layer, 2)), scale=0.5).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for mask in (None, padding):
        with torch.no_grad():
            quick = model(x, src_key_padding_mask=mask)
        with torch.enable_grad():
            slow = model(x, src_key_padding_mask=mask)
        assert torch.allclose(quick[:, :3], slow[:, :3], atol=1e-5)
    with torch.no_grad(), disable_adapters(model):
        assert not torch.allclose(model(x), quick, atol=1e-3)


def test_convolutions_through_the_default():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, padding_mode="circular"), nn.Flatten()
    )
    model = fill(DenseAdapter().adapt(net))
    x = torch.randn(2, 4, 6, 6)
    after = model(x)
    assert torch.allclose(merge_adapters(model)(x), after, atol=1e-5)
    with pytest.raises(Conflict, match="cannot take an adapter"):
        DenseAdapter(target_modules=("0",)).make("0", nn.Conv1d(2, 2, 1), None)(
            torch.randn(1, 2, 3), nn.Conv1d(2, 2, 1)
        )


def test_views_see_through_wrappers():
    model = bert()
    names = [n for n, _ in model.named_modules()]
    Lora(adapter_name="a").adapt(model)
    Lora(adapter_name="b", target_modules=("query",)).adapt(model)
    assert [n for n, _ in bare(model).named_modules()] == names
    assert len(Lora(adapter_name="a").deltas(model)) == 13


def test_deepcopy_and_state_dict():
    model, ids = fill(Lora().adapt(llama())), tokens()
    merged = merge_adapters(copy.deepcopy(model))
    twin = copy.deepcopy(merged)
    assert torch.equal(logits(unmerge_adapters(twin), ids), logits(model, ids))
    other = Lora().adapt(llama())
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert not [n for n in merged.state_dict() if "kept" in n]


def test_where_fusing_is_allowed():
    layer = nn.Linear(4, 4).requires_grad_(False)
    x = torch.randn(2, 4)
    assert fusable(x, layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fusable(x, layer)
    assert not fusable(x, nn.Linear(4, 4))
    assert not fusable(x, nn.Conv2d(1, 1, 1).requires_grad_(False))
    layer.register_forward_hook(lambda *args: None)
    assert not fusable(x, layer)


@pytest.mark.parametrize("method", [DenseAdapter(), Lora()])
def test_autocast(method):
    model = fill(method.adapt(nn.Sequential(nn.Linear(8, 8))))
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None and torch.allclose(out.float(), model(x), atol=0.1)


def test_function_transforms_take_the_plain_path():
    model = fill(Lora().adapt(nn.Sequential(nn.Linear(4, 4))))
    x = torch.randn(3, 4)
    jacobians = torch.func.vmap(torch.func.jacrev(model))(x)
    weight = model[0].base_layer.weight + model[0].deltas["default"].weight(model[0].weight)
    assert torch.allclose(jacobians, weight.expand(3, 4, 4), atol=1e-6)


def test_gradient_checkpointing():
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
        model = fill(Lora().adapt(net))
        x = torch.randn(4, 6, requires_grad=True)
        out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        out.sin().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(grads[0]) == len(grads[1]) == 5
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", [DenseAdapter(), Lora(), Bone(r=4), Bone(r=4, variant="bat")])
def test_no_rows_at_all(method):
    model = fill(method.adapt(nn.Sequential(nn.Linear(8, 4))))
    x = torch.zeros(0, 3, 8, requires_grad=True)
    out = model(x)
    out.sum().backward()
    assert out.shape == (0, 3, 4) and x.grad is not None
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in grads)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = llama()
    for method in (Bone(r=4), AdaLora(adapter_name="b")):
        model = method.adapt(model)
    held = [p for p in model.parameters() if p.requires_grad]
    assert all(p.is_meta for p in held)
    assert sum(p.numel() for p in held) > 0


def test_a_quantized_layer_is_refused():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(Conflict, match="quantized"):
        Lora().adapt(nn.Sequential(layer))
