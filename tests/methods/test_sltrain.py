"""SLTrain and its low-rank control in models: what is replaced, counted, exported and refused."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers
from adapter_kit import bert, gpt2, llama, logits, tokens, train
from conformance import kit
from torch import nn

from outlay import LowRank, SLTrain, build
from outlay.core.card import Card
from outlay.core.claims import Claim, check
from outlay.core.context import Context
from outlay.core.errors import ConfigError, Conflict, NoEffect
from outlay.core.method import OnStep
from outlay.core.watcher import Watcher
from outlay.nn.sparse_low_rank import LowRankLinear, SparseLowRankLinear
from outlay.training import checkpoint

SMALL = SLTrain(rank=4, density=0.1)


@dataclass(frozen=True, kw_only=True)
class Masking(OnStep):
    """Claims masks on what it names."""

    card: ClassVar[Card] = Card(name="masking", title="toy", claims=("mask",))
    names: tuple[str, ...] = ()

    def watch(self, live):
        return Watcher()

    def claims(self, model):
        return [Claim("mask", frozenset(self.names))]


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


# ---- known answers -------------------------------------------------------------------------------

# width, feed-forward width, blocks, rank, density; totals in millions: dense, low-rank, SLTrain.
SHAPES = {
    "60M": (512, 1376, 8, 128, 0.03, (58.074, 42.771, 43.530)),
    "130M": (768, 2048, 12, 256, 0.03, (134.106, 93.998, 96.546)),
    "350M": (1024, 2736, 24, 256, 0.03, (367.969, 185.222, 194.294)),
    "1B": (2048, 5461, 24, 512, 0.03, (1339.083, 609.311, 645.548)),
    "7B": (4096, 11008, 32, 1024, 0.05, (6738.416, 2820.936, 3144.736)),
}


def millions(model):
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 3)


@pytest.mark.parametrize("size", list(SHAPES))
def test_parameter_totals_of_the_published_shapes(size):
    width, inner, blocks, rank, density, expected = SHAPES[size]
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=width // 64, tie_word_embeddings=False,
    )  # fmt: skip

    def model():
        with torch.device("meta"):
            return transformers.LlamaForCausalLM(config)

    low, sparse = LowRank(rank=rank), SLTrain(rank=rank, density=density)
    found = (millions(model()), millions(low.adapt(model())), millions(sparse.adapt(model())))
    assert found == expected
    head = model().lm_head.weight
    assert head.shape == (32000, width)


# ---- what is replaced ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_attention_and_mlp_are_replaced_and_nothing_else(make):
    plain = make()
    model = SMALL.adapt(copy.deepcopy(plain))
    shapes = {
        n: tuple(m.weight.shape)
        for n, m in plain.named_modules()
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    }
    found = layers(model)
    assert set(found) == {
        n for n in shapes if any(w in n.lower() for w in ("attn", "attention", "mlp"))
    }
    assert found and set(found) < set(shapes)
    for name, layer in found.items():
        shape = shapes[name][::-1] if make is gpt2 else shapes[name]
        assert (layer.out_features, layer.in_features) == shape
    untouched = {n: p for n, p in plain.named_parameters() if n.rpartition(".")[0] not in found}
    after = dict(model.named_parameters())
    assert untouched and all(torch.equal(after[n], p) for n, p in untouched.items())
    assert all(p.requires_grad for p in model.parameters())


def test_supports_come_from_the_seed_and_the_path():
    first, again = SMALL.adapt(llama()), SMALL.adapt(llama())
    other = SMALL.adapt(llama(), Context(seed=1))
    one, two = layers(first), layers(again)
    for name, layer in one.items():
        assert torch.equal(layer.positions, two[name].positions)
        assert not torch.equal(layer.positions, layers(other)[name].positions)
    q = one["model.layers.0.self_attn.q_proj"].positions
    assert not torch.equal(q, one["model.layers.0.self_attn.o_proj"].positions)
    # The order of the layers, or which others are replaced, has no part in it.
    alone = SLTrain(rank=4, density=0.1, target_modules=("q_proj",)).adapt(llama())
    assert torch.equal(layers(alone)["model.layers.0.self_attn.q_proj"].positions, q)


def test_settings_reach_the_layers():
    model = SLTrain(rank=4, density=0.2, alpha=2.0, mode="factored", train_values=False).adapt(
        llama()
    )
    for layer in layers(model).values():
        assert isinstance(layer, SparseLowRankLinear)
        assert (layer.rank, layer.density, layer.scaling, layer.mode) == (4, 0.2, 0.5, "factored")
        assert not layer.values.requires_grad and layer.a.requires_grad and not layer.b.any()
    low = layers(LowRank(rank=4, init="zero_b").adapt(llama()))
    assert all(not layer.b.any() and layer.scaling == 1.0 for layer in low.values())
    assert all(bool(layer.b.any()) for layer in layers(LowRank(rank=4).adapt(llama())).values())


# ---- training and export -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("method", [SMALL, LowRank(rank=4)])
def test_exported_it_loads_without_outlay(tmp_path, make, method):
    model = method.adapt(make())
    train(model, 3)
    expected = logits(model.eval(), tokens())
    plain = method.export(model)
    assert {n: type(m) for n, m in plain.named_modules()} == {
        n: type(m) for n, m in make().named_modules()
    }
    plain.save_pretrained(tmp_path)
    assert "outlay" not in (tmp_path / "config.json").read_text()
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(fresh.eval(), tokens()), expected, rtol=1e-4, atol=1e-5)


def test_both_ways_train_alike():
    curves = []
    for mode in ("materialize", "factored"):
        stage = kit.stage(
            kit.recipe("llama", [f"sltrain(rank=8, mode={mode!r})"], precision="float64")
        )
        curves.append(kit.weights(kit.trained(stage)))
    for name, value in curves[0].items():
        torch.testing.assert_close(value, curves[1][name], rtol=1e-7, atol=1e-9)


def test_a_checkpoint_holds_the_support():
    """It is put back from there, whatever the seed would give."""
    stage = kit.stage(kit.recipe("llama", ["sltrain(rank=8)"]))
    marks = checkpoint.buffer_marks(stage.model, stage.objective)
    state = checkpoint.capture(stage.live, marks)
    kept = [key for key in state["buffers"] if key.endswith("positions")]
    assert len(kept) == len(layers(stage.model))
    other = kit.stage(kit.recipe("llama", ["sltrain(rank=8)"], seed=1))
    checkpoint.restore_weights(other.live, state)
    for name, layer in layers(stage.model).items():
        assert torch.equal(layer.positions, layers(other.model)[name].positions)
        assert torch.equal(layer.weight_dense(), layers(other.model)[name].weight_dense())


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SMALL, LowRank(rank=4)])
@pytest.mark.parametrize(
    "spec", ["bone(r=4)", "bone(r=8, variant='bat')", "svfit", "sltrain(rank=2)"]
)
def test_what_acts_on_the_same_layers_is_refused(method, spec):
    for pair in ([method, build(spec)], [build(spec), method]):
        with pytest.raises(Conflict) as refusal:
            check(pair, llama())
        assert repr(method.card.name) in refusal.value.problem
        assert repr(build(spec).card.name) in refusal.value.problem


def test_a_mask_on_the_same_layer_is_refused():
    with pytest.raises(Conflict, match=r"'sltrain' .*q_proj.weight.* 'masking'"):
        check([SMALL, Masking(names=("model.layers.0.self_attn.q_proj.weight",))], llama())
    check([SMALL, Masking(names=("lm_head.weight",))], llama())


def test_an_adapter_on_other_layers_stacks():
    apart = build("bone(r=4, target_modules=['lm_head'])")
    check([SMALL, apart], llama())


def test_a_trained_model_is_warned_about(tmp_path):
    llama().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'sltrain' trains from scratch: the weights"):
        SMALL.adapt(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SMALL.adapt(llama())


@pytest.mark.parametrize("method", [SLTrain(rank=40), LowRank(rank=40)])
def test_a_rank_that_saves_nothing_is_warned_about(method):
    with pytest.warns(UserWarning, match=r"holds [\d,]+ parameters in the place of [\d,]+"):
        method.adapt(llama())


def test_tied_weights_are_refused():
    method = SLTrain(rank=4, target_modules=("lm_head",))
    with pytest.raises(Conflict, match="'lm_head', which is tied"):
        method.adapt(llama(tied=True))
    method.adapt(llama(tied=False))


def test_no_layer_is_no_effect():
    with pytest.raises(NoEffect):
        SLTrain(target_modules=("no_such",)).adapt(llama())
    with pytest.raises(NoEffect):
        SMALL.adapt(SMALL.adapt(llama()))


def test_a_density_without_an_entry_names_the_layer():
    with pytest.raises(ConfigError) as refusal:
        SLTrain(rank=4, density=1e-4).adapt(llama())
    assert "'model.layers.0.self_attn.q_proj'" in refusal.value.problem


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("density", 0.0), ("density", 1.0), ("alpha", 0.0)],
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(ConfigError, match=rf"sltrain\.{field} = "):
        SLTrain(**{field: value})
