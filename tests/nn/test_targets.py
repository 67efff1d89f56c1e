from __future__ import annotations

import pytest
import transformers
from adapter_kit import bert, gpt2, llama
from torch import nn

from outlay.core.errors import ConfigError, NoEffect
from outlay.nn.targets import (
    blocks,
    head_modules,
    is_conv1d,
    linear_shape,
    match_modules,
    pattern_value,
)


def test_all_linear_leaves_out_head_and_output_embedding():
    found = match_modules(bert())
    assert "classifier" not in found and "bert.pooler.dense" in found
    assert len(found) == 2 * 6 + 1
    assert "lm_head" not in match_modules(llama())
    assert len(match_modules(llama())) == 2 * 7
    assert len(match_modules(gpt2())) == 2 * 4


def test_heads():
    assert head_modules(bert()) == ("classifier",)
    for language_model in (llama(), llama(tied=True), gpt2()):
        assert head_modules(language_model) == ()
    config = transformers.DistilBertConfig(
        vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=8
    )
    model = transformers.DistilBertForSequenceClassification(config)
    assert head_modules(model) == ("pre_classifier", "classifier")
    assert head_modules(nn.Sequential(nn.Linear(2, 2))) == ()


def test_names_expressions_and_layers():
    model = bert()
    names = match_modules(model, ("query", "output.dense"))
    assert {n.rpartition(".")[2] for n in names} == {"query", "dense"}
    assert "bert.encoder.layer.0.output.dense" in names
    assert not any(n.endswith("intermediate.dense") for n in names)
    assert list(match_modules(model, r".*layer\.1.*value")) == [
        "bert.encoder.layer.1.attention.self.value"
    ]
    last = match_modules(model, "all-linear", (-1,))
    assert last and all(".layer.1." in n for n in last)
    assert list(match_modules(model, "classifier")) == ["classifier"]
    assert list(match_modules(llama(), ("lm_head",))) == ["lm_head"]


def test_convolutions_only_where_the_method_takes_them():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    with pytest.raises(NoEffect):
        match_modules(net)
    assert len(match_modules(net, kinds=(nn.Conv2d,))) == 2
    mixed = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))
    assert list(match_modules(mixed, kinds=(nn.Conv2d,))) == ["1"]
    assert list(match_modules(mixed, ("0",), kinds=(nn.Conv2d,))) == ["0"]


def test_torch_attention_is_never_matched():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert set(match_modules(layer)) == {"linear1", "linear2"}
    with pytest.raises(NoEffect):
        match_modules(layer, ("out_proj",))


def test_nearest_names_are_offered():
    with pytest.raises(NoEffect, match="did you mean 'query'"):
        match_modules(bert(), "qury")
    with pytest.raises(ConfigError, match="not a regular expression"):
        match_modules(bert(), "(query")
    with pytest.raises(ConfigError, match="from -2 to 1"):
        match_modules(bert(), "all-linear", (2,))
    with pytest.raises(ConfigError, match="no list of layers"):
        match_modules(nn.Sequential(nn.Linear(2, 2)), "all-linear", (0,))


def test_shapes():
    assert linear_shape(nn.Linear(3, 5)) == (5, 3)
    assert linear_shape(nn.Conv2d(4, 6, 3)) == (6, 36)
    layer = gpt2().transformer.h[0].attn.c_attn
    assert is_conv1d(layer) and linear_shape(layer) == (96, 32)
    found = blocks(bert())
    assert found is not None and found[0] == "bert.encoder.layer"


def test_patterns():
    assert pattern_value({"query": 2, ".*value": 3}, "a.b.query", 1) == 2
    assert pattern_value((("query", 2),), "a.b.myquery", 1) == 1
    assert pattern_value((("a.*", 4), ("query", 2)), "a.b.query", 1) == 4
