"""Packed prefill against one prompt at a time: the paper's claim is exact equality."""

from __future__ import annotations

import packing_kit as kit
import pytest
import torch

from outlay.core.errors import ConfigError, Conflict
from outlay.inference import check_isolation, isolated, prefill_packed, prepack, unpack_cache
from outlay.inference import isolation as module
from outlay.inference.prefill import packed_cache

WAYS = ("segments", "mask")
every = pytest.mark.parametrize("family", kit.FAMILIES)
both = pytest.mark.parametrize("way", WAYS)


@torch.no_grad()
def alone(model, prompt, tokens=0):
    """Logits after the prompt, its cache, and its greedy continuation."""
    out = model(torch.tensor([prompt]), use_cache=True)
    logits, cache, words = out.logits[0, -1], out.past_key_values, []
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for _ in range(tokens):
        words.append(int(out.logits[0, -1].argmax()))
        out = model(torch.tensor([words[-1:]]), past_key_values=cache, use_cache=True)
    return logits, kept, words


@torch.no_grad()
def continued(model, ready, tokens):
    """Greedy continuation from a prefilled cache, and the first logits."""
    token, mask, positions = ready.last_tokens, ready.attention_mask, ready.position_ids
    words, first = [], None
    for _ in range(tokens):
        out = model(
            token, past_key_values=ready.cache, attention_mask=mask, position_ids=positions,
            use_cache=True,
        )  # fmt: skip
        first = out.logits[:, -1] if first is None else first
        token = out.logits[:, -1:].argmax(-1)
        words.append(token)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        positions = positions + 1
    return first, torch.cat(words, 1).tolist()


@every
@both
def test_cache_logits_and_20_greedy_tokens_are_those_of_each_prompt_alone(family, way):
    model, prompts = kit.tiny(family), kit.ragged()
    ready = prefill_packed(model, prompts, attention=way)
    caches = prefill_packed(model, prompts, attention=way, layout="list").cache
    kept = [
        [(layer.keys.clone(), layer.values.clone()) for layer in single.layers] for single in caches
    ]
    longest = ready.attention_mask.shape[1]
    whole = [(layer.keys.clone(), layer.values.clone()) for layer in ready.cache.layers]
    first, words = continued(model, ready, 20)
    for number, prompt in enumerate(prompts):
        logits, own, following = alone(model, prompt, 20)
        torch.testing.assert_close(first[number], logits, atol=1e-5, rtol=0)
        assert words[number] == following
        size = len(prompt) - 1
        for layer, pair in enumerate(own):
            for side, tensor in enumerate(pair):
                expected = tensor[:, :, :size]
                torch.testing.assert_close(kept[number][layer][side], expected, atol=1e-5, rtol=0)
                left = whole[layer][side][number : number + 1]
                torch.testing.assert_close(
                    left[:, :, longest - 1 - size :], expected, atol=1e-5, rtol=0
                )
                assert not left[:, :, : longest - 1 - size].any()


@every
@both
@torch.no_grad()
def test_the_last_hidden_state_is_that_of_each_prompt_alone(family, way):
    model, prompts = kit.tiny(family), kit.ragged()
    batch = prepack(prompts, 14)
    with isolated(model, batch, way) as told:
        hidden = model.base_model(**told).last_hidden_state
    for own, prompt in zip(batch.unpack(hidden), prompts):
        expected = model.base_model(torch.tensor([prompt])).last_hidden_state[0]
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)


@every
@both
def test_bfloat16_agrees_as_far_as_its_rounding(family, way):
    model, prompts = kit.tiny(family, initializer_range=0.05).to(torch.bfloat16), kit.ragged()
    first, _ = continued(model, prefill_packed(model, prompts, attention=way), 1)
    expected = torch.stack([alone(model, prompt)[0] for prompt in prompts])
    assert (first - expected).abs().max() <= 2e-2 * expected.abs().max()


@every
@both
@torch.no_grad()
def test_a_changed_token_leaves_other_prompts_bit_identical(family, way):
    model, prompts = kit.tiny(family), kit.ragged((6, 4, 5))
    for token in range(6):
        changed = [list(prompt) for prompt in prompts]
        changed[0][token] = (changed[0][token] + 1) % kit.VOCABULARY
        found = []
        for some in (prompts, changed):
            batch = prepack(some, 16)
            with isolated(model, batch, way) as told:
                found.append(batch.unpack(model(**told).logits))
        assert not torch.equal(found[0][0], found[1][0])
        assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:]))


def test_a_leaking_attention_is_refused_by_name(monkeypatch):
    model = kit.tiny()
    leaky = torch.ones(1, 1, 11, 11, dtype=torch.bool).tril()
    monkeypatch.setattr(
        module,
        "_mask",
        lambda model, batch: leaky[..., : batch.input_ids.shape[1], : batch.input_ids.shape[1]],
    )
    with pytest.raises(Conflict, match="'sdpa' lets one prompt"):
        prefill_packed(model, kit.ragged(), attention="mask")


def test_an_attention_that_is_isolated_but_wrong_is_refused(monkeypatch):
    model = kit.tiny()
    monkeypatch.setattr(
        module, "_mask", lambda model, batch: torch.eye(batch.input_ids.shape[1]).bool()[None, None]
    )
    with pytest.raises(Conflict, match="differ by"):
        check_isolation(model, "mask")


def test_eager_models_take_the_additive_mask():
    model, prompts = kit.tiny(implementation="eager"), kit.ragged()
    first, _ = continued(model, prefill_packed(model, prompts, attention="mask"), 1)
    expected = torch.stack([alone(model, prompt)[0] for prompt in prompts])
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)


def test_the_models_own_attention_is_back_afterwards():
    model = kit.tiny()
    prefill_packed(model, kit.ragged())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sliding_windows_hold_inside_each_prompt(family):
    changes = {"sliding_window": 4}
    if family == "qwen2":
        changes |= {"use_sliding_window": True, "max_window_layers": 1}
    model, prompts = kit.tiny(family, **changes), kit.ragged()
    first, words = continued(model, prefill_packed(model, prompts), 6)
    for number, prompt in enumerate(prompts):
        logits, _, following = alone(model, prompt, 6)
        torch.testing.assert_close(first[number], logits, atol=1e-5, rtol=0)
        assert words[number] == following
    with pytest.raises(Conflict, match="sliding window"):
        prefill_packed(model, prompts, attention="mask")


def test_prompts_of_one_token_need_no_pass():
    model, prompts = kit.tiny(), [[5], [9]]
    ready = prefill_packed(model, prompts)
    assert ready.attention_mask.tolist() == [[1], [1]]
    _, words = continued(model, ready, 3)
    assert words == [alone(model, prompt, 3)[2] for prompt in prompts]


def test_what_cannot_be_prefilled_is_refused():
    model = kit.tiny()
    with pytest.raises(ConfigError, match="sequence 1 is empty"):
        prefill_packed(model, [[1, 2], []])
    with pytest.raises(ConfigError, match="a row holds 4"):
        prefill_packed(model, [[1] * 6], capacity=4)
    with pytest.raises(ConfigError, match="layout"):
        prefill_packed(model, [[1]], layout="right")
    with pytest.raises(ConfigError, match="attention"):
        prefill_packed(model, [[1]], attention="none")
    with pytest.raises(Conflict, match="training mode"):
        prefill_packed(model.train(), [[1, 2]])


@torch.no_grad()
def test_unpack_cache_takes_a_cache_made_by_hand():
    model, prompts = kit.tiny(), kit.ragged((3, 5))
    batch = prepack(prompts, 8)
    cache = packed_cache(model, batch)
    assert cache.layers[0].keys.shape[2] == 8
    left = unpack_cache(cache, batch)
    assert left.layers[0].keys.shape[:3] == (2, 2, 5)
    singles = unpack_cache(cache, batch, "list")
    assert [single.get_seq_length() for single in singles] == [3, 5]
