"""The collator alone: any DataLoader, any number of workers, the same batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from outlay import MixtureOfDenoisers, prepare_tokenizer
from outlay.core.errors import ConfigError, DataError
from outlay.nn.denoising import UL2_UNIFORM, SpanCorruption, restore
from outlay.nn.prefix_attention import prefix_attention
from outlay.training.models.tokens import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    made = byte_tokenizer()
    assert prepare_tokenizer(made) == 260 + 103 == len(made)
    return made


def texts(count=24, longest=40):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(4, 260, (size,), generator=generator) for size in sizes]


def indexed(count=24, longest=40):
    return [{"input_ids": t, "index": i} for i, t in enumerate(texts(count, longest))]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_preparing_twice_adds_nothing(tokenizer):
    before = dict(tokenizer.get_vocab())
    assert prepare_tokenizer(tokenizer) == len(before)
    assert tokenizer.get_vocab() == before
    plain = byte_tokenizer()
    assert prepare_tokenizer(plain, sentinels=5, mode_tokens=False) == 265
    assert "[NLU]" not in plain.get_vocab()


def test_an_encoder_decoder_batch(tokenizer):
    collate = MixtureOfDenoisers(tokenizer, 64, format="encoder_decoder", pad_to=4)
    some = texts()
    batch = collate(some)
    assert set(batch) == {
        "input_ids", "attention_mask", "labels", "decoder_input_ids", "denoiser_id"
    }  # fmt: skip
    assert batch["input_ids"].shape[1] % 4 == 0 and batch["denoiser_id"].shape == (24,)
    assert len(set(batch["denoiser_id"].tolist())) > 3
    modes = {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}
    for row, text in enumerate(some):
        denoiser = UL2_UNIFORM.denoisers[int(batch["denoiser_id"][row])]
        kept = batch["attention_mask"][row].bool()
        inputs = batch["input_ids"][row][kept].tolist()
        labels = batch["labels"][row]
        targets = labels[labels != -100].tolist()
        assert (batch["input_ids"][row][~kept] == tokenizer.pad_token_id).all()
        assert inputs[0] == tokenizer.convert_tokens_to_ids(modes[denoiser.mode])
        assert inputs[-1] == targets[-1] == tokenizer.eos_token_id
        sentinels = collate.sentinels if isinstance(denoiser, SpanCorruption) else None
        assert restore(inputs[1:-1], targets[:-1], sentinels) == text.tolist()
        told = batch["decoder_input_ids"][row]
        assert int(told[0]) == tokenizer.pad_token_id
        assert told[1 : len(targets)].tolist() == targets[:-1]


def test_a_prefix_batch_trains_a_model(tokenizer):
    import transformers

    collate = MixtureOfDenoisers(tokenizer, 80)
    batch = collate([t.tolist() for t in texts()])
    context = batch["bidirectional_mask"]
    assert torch.equal(context.sum(1), batch["prefix_length"])
    assert ((batch["labels"] == -100) | (context == 0)).all()
    scored = (batch["labels"] != -100).sum(1)
    assert torch.equal(scored + batch["prefix_length"], batch["attention_mask"].sum(1))
    same = (batch["labels"] == batch["input_ids"]) | (batch["labels"] == -100)
    assert same.all() and batch["input_ids"].shape[1] <= 80
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    with prefix_attention(model, {**batch, "bidirectional": context}):
        keys = ("input_ids", "attention_mask", "labels")
        loss = model(**{key: batch[key] for key in keys}).loss
    loss.backward()
    assert float(loss.detach()) > 0 and model.lm_head.weight.grad is not None
    causal = MixtureOfDenoisers(tokenizer, 80, format="causal")([t.tolist() for t in texts()])
    assert "bidirectional_mask" not in causal
    assert all(torch.equal(causal[key], batch[key]) for key in causal)


def test_one_denoiser_among_seven_is_that_denoiser_alone(tokenizer):
    one_hot = MixtureOfDenoisers(tokenizer, 64, rates=(1, 0, 0, 0, 0, 0, 0), mode_tokens=False)
    plain = MixtureOfDenoisers(tokenizer, 64, mixture="t5", mode_tokens=False)
    alone = MixtureOfDenoisers(
        tokenizer, 64, denoisers=[SpanCorruption(3, 0.15)], mode_tokens=False
    )
    assert one_hot.raw_length == plain.raw_length == alone.raw_length
    for _ in range(3):
        some = texts()
        first = one_hot(some)
        assert equal(first, plain(some)) and equal(first, alone(some))


# On one core torch advises against two workers.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing_and_epochs_do(tokenizer):
    collate = MixtureOfDenoisers(tokenizer, 64)
    data = indexed()

    def batches(workers, keep=False):
        return DataLoader(
            data, batch_size=5, collate_fn=collate, num_workers=workers, persistent_workers=keep
        )

    alone = list(batches(0))
    loader = batches(2, keep=True)
    assert all(equal(a, b) for a, b in zip(alone, loader, strict=True))
    collate.set_epoch(1)
    second, there = list(batches(0)), list(loader)
    assert all(equal(a, b) for a, b in zip(second, there, strict=True))
    assert not any(equal(a, b) for a, b in zip(alone, second))
    # Any order and any batch: an example's own draw.
    collate.set_epoch(0)
    whole = collate(data)["denoiser_id"].tolist()
    assert whole == [int(collate([row])["denoiser_id"]) for row in data]


def test_no_draw_touches_the_callers_generator(tokenizer):
    before = torch.get_rng_state()
    MixtureOfDenoisers(tokenizer, 64)([*texts(), *indexed(3)])
    assert torch.equal(torch.get_rng_state(), before)


def test_its_own_stream_goes_on_where_it_was_saved(tokenizer):
    collate, some = MixtureOfDenoisers(tokenizer, 64), texts()
    first = collate(some)
    saved = collate.state_dict()
    second = collate(some)
    assert not equal(first, second)
    other = MixtureOfDenoisers(tokenizer, 64)
    other.load_state_dict(saved)
    assert equal(other(some), second)
    assert equal(MixtureOfDenoisers(tokenizer, 64)(some), first)
    assert not equal(MixtureOfDenoisers(tokenizer, 64, seed=1)(some), first)


def test_texts_of_the_raw_length_fit(tokenizer):
    for form in ("encoder_decoder", "prefix_lm"):
        collate = MixtureOfDenoisers(tokenizer, 40, format=form, pad_to=1)
        text = list(range(4, 4 + collate.raw_length))
        batch = collate([text] * 200)
        assert 36 < batch["input_ids"].shape[1] <= 40
        assert batch["labels"].shape[1] <= 40


def test_what_does_not_fit_is_refused_by_the_denoisers_name(tokenizer):
    collate = MixtureOfDenoisers(
        tokenizer, 64, target_length=16, denoisers=[SpanCorruption(3, 0.5, "X")],
        format="encoder_decoder",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"SpanCorruption\(mean_span=3.* labels of 60 tokens"):
        collate([list(range(4, 64))])
    with pytest.raises(ConfigError, match="input_ids of 90 tokens, and there is room for 64"):
        MixtureOfDenoisers(tokenizer, 64)([list(range(4, 94))])
    with pytest.raises(ConfigError, match="a text of 1 tokens"):
        collate([[7]])
    with pytest.raises(DataError, match="no example"):
        collate([])


def test_workers_without_an_index_are_refused(tokenizer):
    loader = DataLoader(
        texts(4), batch_size=2, num_workers=1, collate_fn=MixtureOfDenoisers(tokenizer, 64)
    )
    with pytest.raises(ConfigError, match="would all draw the same"):
        list(loader)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "prefix"}, "did you mean 'prefix_lm'"),
        ({"mixture": "unifrom"}, "did you mean 'uniform'"),
        ({"rates": (1.0,)}, "1 numbers for 7"),
        ({"denoisers": ()}, "names none"),
        ({"sentinels": 120}, "lacks 20 tokens, first '<extra_id_100>'"),
        ({"length": 1024, "format": "encoder_decoder"}, "171 spans of 1023"),
        ({"length": 3}, "no room"),
    ],
)
def test_bad_settings_are_refused(tokenizer, settings, said):
    with pytest.raises(ConfigError, match=said):
        MixtureOfDenoisers(tokenizer, **settings)


def test_a_tokenizer_without_the_tokens_is_refused():
    with pytest.raises(ConfigError, match="call prepare_tokenizer"):
        MixtureOfDenoisers(byte_tokenizer())
    nameless = byte_tokenizer()
    nameless.eos_token = None
    with pytest.raises(ConfigError, match="end-of-text token"):
        MixtureOfDenoisers(nameless)
