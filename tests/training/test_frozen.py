"""Lower layers that nothing trains are computed once, and give what the plain forward gives."""

from __future__ import annotations

import copy

import pytest
import torch
from contracts import toys
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from outlay.core.errors import Conflict
from outlay.training.frozen import FrozenPrefix, frozen_prefix

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def bert(dropout=0.0):
    config = BertConfig(
        **SMALL, intermediate_size=48, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, num_labels=3,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


def gpt2():
    config = GPT2Config(
        vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=32, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def llama(**more):
    config = LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, **more)
    return AutoModelForCausalLM.from_config(config)


def top_trains(model, last="2"):
    """Only the last block (and the head) trains."""
    for name, parameter in model.named_parameters():
        inside = f".{last}." in name
        parameter.requires_grad_(inside or name.startswith("classifier"))
    return model.train()


def batch(seed=0, start=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 9, 3, 7])
    mask = (torch.arange(9)[None] < lengths[:, None]).long()
    tokens = torch.randint(1, 50, (4, 9), generator=generator) * mask
    return {
        "input_ids": tokens, "attention_mask": mask, "labels": torch.zeros(4, dtype=torch.long),
        "ids": tuple(range(start, start + 4)),
    }  # fmt: skip


def call(model, rows):
    return model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits


@pytest.mark.parametrize("build", [bert, gpt2, llama])
def test_the_prefix_gives_what_the_plain_forward_gives(build):
    torch.manual_seed(0)
    model = top_trains(build())
    plain = copy.deepcopy(model)
    prefix = FrozenPrefix(model, [])
    assert prefix.depth == 2
    rows = batch()
    assert prefix.fill(rows) > 0 and prefix.fill(rows) == 0
    kept = rows["attention_mask"].bool()
    for at in range(2):
        with prefix.bind(rows):
            mine = call(model, rows)
        theirs = call(plain, rows)
        if mine.dim() == 3:
            mine, theirs = mine[kept], theirs[kept]
        assert float((mine - theirs).detach().abs().max()) < 1e-6, at
    mine.square().sum().backward()
    theirs.square().sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters()):
        if a.requires_grad and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    # Outside, everything is as before.
    torch.testing.assert_close(call(model, rows), call(plain, rows))


def test_equal_ids_of_two_splits_are_two_rows():
    torch.manual_seed(0)
    model = top_trains(bert())
    prefix = FrozenPrefix(model, [])
    for seed in (0, 1):
        rows = batch(seed)
        with prefix.bind(rows):
            mine = call(model, rows)
        assert float((mine - call(model, rows)).detach().abs().max()) < 1e-6


def test_a_lower_layer_that_was_written_is_computed_again():
    torch.manual_seed(0)
    model = top_trains(bert())
    prefix = FrozenPrefix(model, [])
    rows = batch()
    prefix.fill(rows)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(1.1)
    assert prefix.fill(rows) > 0
    with prefix.bind(rows):
        mine = call(model, rows)
    assert float((mine - call(model, rows)).detach().abs().max()) < 1e-6
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(True)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(1.0)
    with pytest.raises(Conflict, match="trains now"):
        prefix.fill(rows)


def test_what_cannot_hold_is_refused_by_name():
    with pytest.raises(Conflict, match="dropout"):
        FrozenPrefix(top_trains(bert(dropout=0.1)), [])
    model = top_trains(bert())
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.raises(Conflict, match=r"'bert\.embeddings\.word_embeddings\.weight' trains"):
        FrozenPrefix(model, [])
    with pytest.raises(Conflict, match="'corrupt' rewrites inputs"):
        FrozenPrefix(top_trains(bert()), [toys.Corrupt()])
    with pytest.raises(Conflict, match="dropout"):
        FrozenPrefix(top_trains(llama(attention_dropout=0.1)), [])
    assert frozen_prefix(top_trains(bert(), last="0"), []) is None, "there is nothing to cache"
    with pytest.raises(Conflict, match="no list of blocks"):
        FrozenPrefix(nn.Linear(2, 2), [])
