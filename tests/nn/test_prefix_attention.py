"""What a prefix language model sees, on LLaMA- and GPT-2-shaped models."""

from __future__ import annotations

import pytest
import torch
import transformers

from outlay.core.errors import Conflict
from outlay.inference.attention import segment_mask
from outlay.nn.prefix_attention import check_prefix_attention, prefix_attention, prefix_mask

SIZES = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def model(kind, attention="sdpa", **more):
    torch.manual_seed(0)
    config = (
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            **SIZES, **more,
        )
        if kind == "llama"
        else transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, **SIZES, **more)
    )  # fmt: skip
    config._attn_implementation = attention
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def batch(rows, contexts):
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    tokens = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    context = torch.tensor([[1] * n + [0] * (width - n) for n in contexts])
    return {"input_ids": ids, "attention_mask": tokens, "bidirectional": context}


@torch.no_grad()
def logits(lm, given):
    with prefix_attention(lm, given):
        return lm(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits


def test_the_mask_of_one_row():
    given = batch([[1, 2, 3, 4]], [2])
    padding = torch.cat([given["attention_mask"], torch.zeros(1, 1, dtype=torch.long)], 1)
    context = torch.cat([given["bidirectional"], torch.zeros(1, 1, dtype=torch.long)], 1)
    found = prefix_mask(context, padding)[0, 0].int().tolist()
    assert found == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_who_changes_what(kind, attention):
    lm = model(kind, attention)
    check_prefix_attention(lm)
    row, context = [5, 6, 7, 8, 9, 10, 11], 4
    plain = logits(lm, batch([row], [context]))[0]
    for place in range(context, len(row)):
        changed = [*row[:place], 50, *row[place + 1 :]]
        other = logits(lm, batch([changed], [context]))[0]
        assert torch.equal(other[:place], plain[:place])
        assert not torch.equal(other[place], plain[place])
    last = [*row[: context - 1], 50, *row[context:]]
    other = logits(lm, batch([last], [context]))[0]
    assert all(not torch.equal(a, b) for a, b in zip(other, plain))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_and_neighbours_change_nothing(kind, attention):
    lm = model(kind, attention)
    rows, contexts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]], [4, 2]
    together = logits(lm, batch(rows, contexts))
    for row, context, found in zip(rows, contexts, together):
        alone = logits(lm, batch([row], [context]))[0]
        torch.testing.assert_close(found[: len(row)], alone, rtol=1e-5, atol=1e-6)


def test_without_a_context_it_is_causal_attention():
    lm, given = model("llama"), batch([[5, 6, 7, 8], [9, 10]], [0, 0])
    told = logits(lm, given)
    with torch.no_grad():
        plain = lm(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    kept = given["attention_mask"].bool()
    torch.testing.assert_close(told[kept], plain[kept], rtol=1e-5, atol=1e-6)


def test_packed_rows_keep_their_contexts_apart():
    lm = model("llama")
    rows, contexts = [[5, 6, 7, 8, 9], [12, 13, 14]], [3, 2]
    segments = torch.tensor([[0] * 5 + [1] * 3])
    given = {
        "input_ids": torch.tensor([rows[0] + rows[1]]),
        "bidirectional": torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0]]),
        "segment_ids": segments,
        "attention_mask": segment_mask(segments),
    }
    places = torch.tensor([[*range(5), *range(3)]])
    with torch.no_grad(), prefix_attention(lm, given):
        found = lm(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"],
            position_ids=places,
        ).logits[0]  # fmt: skip
    for row, context, part in zip(rows, contexts, (found[:5], found[5:])):
        alone = logits(lm, batch([row], [context]))[0]
        torch.testing.assert_close(part, alone, rtol=1e-5, atol=1e-6)


def test_a_model_that_is_not_told_is_unchanged():
    lm, given = model("gpt2"), batch([[5, 6, 7]], [2])
    del given["bidirectional"]
    with prefix_attention(lm, given):
        assert not lm._forward_pre_hooks
    logits(lm, batch([[5, 6, 7]], [2]))
    assert not lm._forward_pre_hooks


def test_what_cannot_be_told_is_refused(monkeypatch):
    with pytest.raises(Conflict, match="'flex_attention' takes no mask"):
        lm = model("llama")
        lm.config._attn_implementation = "flex_attention"
        check_prefix_attention(lm)
    with pytest.raises(Conflict, match="no transformers model"):
        check_prefix_attention(torch.nn.Linear(2, 2))
    lm = model("llama")
    lm.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(Conflict, match="a part of the text alone"):
        check_prefix_attention(lm)


@pytest.mark.parametrize(
    ("given", "said"),
    [("causal", "does not read a context both ways"), ("full", "lets a target change")],
)
def test_a_model_that_disobeys_is_found_out(given, said):
    lm = model("llama").train()
    forward = lm.forward

    def deaf(input_ids, attention_mask):
        width = input_ids.shape[1]
        seen = torch.ones(width, width, dtype=torch.bool)
        seen = seen.tril() if given == "causal" else seen
        return forward(
            input_ids=input_ids, attention_mask=seen.expand(len(input_ids), 1, width, width)
        )

    lm.forward = deaf
    with pytest.raises(Conflict, match=said):
        check_prefix_attention(lm)
    assert lm.training and all(module.training for module in lm.modules())
