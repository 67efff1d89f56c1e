"""Models of every shape: built, read, refused, grown, written; nothing random is shared."""

from __future__ import annotations

import hashlib
import json
import socket
import struct

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from outlay.core.errors import ConfigError
from outlay.nn.targets import head_modules
from outlay.training.data.encode import encode
from outlay.training.data.labels import Labels
from outlay.training.models.load import (
    byte_tokenizer,
    fingerprint,
    grow_tokens,
    load_model,
    save_model,
    token_bytes,
)
from outlay.training.specs import ModelSpec

CLASSES = Labels(("a", "b", "c"), image=(1, 8, 8))
LM = "causal-language-modeling"
SHAPES = [
    ("bert", "sequence-classification"), ("gpt2", "sequence-classification"),
    ("llama", "multi-label-classification"), ("t5", "sequence-classification"), ("gpt2", LM),
    ("llama", LM), ("t5", "sequence-to-sequence"), ("vit", "image-classification"),
    ("cnn", "image-classification"),
]  # fmt: skip


def small(kind, task, labels=CLASSES, **more):
    spec = {k: more.pop(k) for k in ("dropout", "gradient_checkpointing") if k in more}
    return load_model(ModelSpec(config=kind, layers=2, width=32, **spec), task, labels, **more)


def inputs_of(model, task):
    if task == "image-classification":
        return {"pixel_values": torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    ids = torch.tensor([[70, 71, 72, 2], [80, 81, 82, 2]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids} if task == "sequence-to-sequence" else {})


def refused(spec, task="sequence-classification", labels=CLASSES, **more):
    with pytest.raises(ConfigError) as caught:
        load_model(spec, task, labels, **more)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2, lines
    return lines


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small BERT with three classes in a folder."""
    model, tokenizer = small("bert", "sequence-classification")
    return save_model(model, tokenizer, tmp_path_factory.mktemp("m") / "bert", CLASSES)


@pytest.mark.parametrize(("kind", "task"), SHAPES)
def test_every_shape_builds_runs_and_comes_back_from_its_folder(tmp_path, kind, task):
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    model, tokenizer = small(kind, task)
    assert model.training
    assert (tokenizer is None) == (task == "image-classification")
    twin, _ = small(kind, task)
    assert fingerprint(model) == fingerprint(twin)
    assert fingerprint(small(kind, task, seed=1)[0]) != fingerprint(model)
    folder = save_model(model, tokenizer, tmp_path / "out", CLASSES)
    again, _ = load_model(ModelSpec(path=str(folder)), task, CLASSES)
    assert fingerprint(again) == fingerprint(model)
    inputs = inputs_of(model, task)
    with torch.no_grad():
        one, two = model.eval()(**inputs).logits, again.eval()(**inputs).logits
    assert torch.equal(one, two)
    if task.endswith("classification"):
        assert one.shape == (2, 3)
        assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    meta, _ = load_model(ModelSpec(path=str(folder)), task, CLASSES, meta=True)
    described = [(n, p.shape, p.device.type) for n, p in meta.named_parameters()]
    assert described == [(n, p.shape, "meta") for n, p in model.named_parameters()]


@pytest.mark.parametrize(("kind", "task"), [s for s in SHAPES if s[1] != "image-classification"])
def test_padding_changes_no_prediction(kind, task):
    model, tokenizer = small(kind, task, dropout=0.0, precision="float64")
    texts = ["short", "a good deal longer than that"]
    rows = [{"id": t, "domain": "", "text": t, "prompt": t, "completion": "x"} for t in texts]
    rows = [
        {k: v for k, v in r.items() if task != LM or k in ("id", "domain", "text")} for r in rows
    ]
    examples = encode(rows, task, tokenizer, 32, CLASSES)

    def logits(*examples):
        width = max(len(e["input_ids"]) for e in examples)
        ids = [
            e["input_ids"] + [tokenizer.pad_token_id] * (width - len(e["input_ids"]))
            for e in examples
        ]
        mask = [[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if task == "sequence-to-sequence":
            inputs["decoder_input_ids"] = torch.tensor([[0, *e["labels"][:-1]] for e in examples])
        with torch.no_grad():
            found = model.eval()(**inputs).logits[0]
        return found[: len(examples[0]["input_ids"])] if task == LM else found

    assert torch.allclose(logits(examples[0]), logits(*examples), atol=1e-6)


def test_heads_that_read_the_end_of_a_row_need_it_there():
    model, tokenizer = small("t5", "sequence-classification")
    ids = encode([{"id": "0", "domain": "", "text": "long text"}], "sequence-classification",
                 tokenizer, 5)[0]["input_ids"]  # fmt: skip
    assert len(ids) == 5
    assert ids[-1] == model.config.eos_token_id
    spec = ModelSpec(config="t5")
    assert "end-of-text token" in refused(spec, tokenizer=byte_tokenizer())[0]


def test_heads_are_where_methods_look_for_them():
    expected = {"bert": "classifier", "gpt2": "score", "t5": "classification_head"}
    for kind, head in expected.items():
        assert head_modules(small(kind, "sequence-classification")[0]) == (head,)
    for kind in ("vit", "cnn"):
        assert head_modules(small(kind, "image-classification")[0]) == ("classifier",)


def test_rows_of_the_convolutional_network_never_touch():
    model, _ = small("cnn", "image-classification", dropout=0.0)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, alone = model(images).logits, model(images[:1]).logits
    assert torch.allclose(whole[:1], alone, atol=1e-6)


def test_precision_and_dropout():
    model, _ = small("bert", "sequence-classification", precision="float64", dropout=0.25)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}
    for kind, task in SHAPES:
        plain, _ = small(kind, task, dropout=0.0)
        assert not any(m.p for m in plain.modules() if isinstance(m, torch.nn.Dropout))
    assert {p.dtype for p in small("gpt2", LM, precision="bfloat16")[0].parameters()} == {
        torch.float32
    }


def test_half_precision_folders_are_read_in_float32(tmp_path):
    model, tokenizer = small("llama", LM)
    folder = save_model(model.to(torch.bfloat16), tokenizer, tmp_path / "half")
    again, _ = load_model(ModelSpec(path=str(folder)), LM)
    assert {p.dtype for p in again.parameters()} == {torch.float32}


@pytest.mark.parametrize(("kind", "task"), [s for s in SHAPES if s[0] != "cnn"])
def test_gradient_checkpointing_changes_no_gradient(kind, task):
    gradients = []
    for on in (False, True):
        model, _ = small(kind, task, dropout=0.0, gradient_checkpointing=on, precision="float64")
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == on
        inputs = inputs_of(model, task)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        model(**inputs).logits.square().sum().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert torch.allclose(*gradients, atol=1e-12)
    assert gradients[0].abs().sum() > 0


def test_gradient_checkpointing_is_refused_where_there_is_none():
    spec = ModelSpec(config="cnn", gradient_checkpointing=True)
    assert "gradient checkpointing" in refused(spec, "image-classification")[0]


# Folders.


def test_a_fresh_head_depends_on_the_seed_alone(tmp_path, saved):
    body = transformers.AutoModel.from_pretrained(saved)
    body.save_pretrained(tmp_path / "body")
    byte_tokenizer().save_pretrained(tmp_path / "body")
    spec = ModelSpec(path=str(tmp_path / "body"))
    torch.manual_seed(1)
    one, _ = load_model(spec, "sequence-classification", CLASSES, seed=3)
    torch.manual_seed(2)
    two, _ = load_model(spec, "sequence-classification", CLASSES, seed=3)
    three, _ = load_model(spec, "sequence-classification", CLASSES, seed=4)
    assert torch.equal(one.classifier.weight, two.classifier.weight)
    assert not torch.equal(one.classifier.weight, three.classifier.weight)
    assert one.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert not one.classifier.bias.any()
    assert fingerprint(one, lambda n: n.startswith("bert")) == fingerprint(
        three, lambda n: n.startswith("bert")
    )


def test_a_head_is_kept_reordered_or_begun_afresh(saved):
    spec = ModelSpec(path=str(saved))
    kept, _ = load_model(spec, "sequence-classification", CLASSES)
    moved, _ = load_model(spec, "sequence-classification", Labels(("c", "a", "b")))
    assert torch.equal(moved.classifier.weight, kept.classifier.weight[[2, 0, 1]])
    assert moved.config.id2label == {0: "c", 1: "a", 2: "b"}
    other, _ = load_model(spec, "sequence-classification", Labels(("a", "b", "d")))
    assert not torch.equal(other.classifier.weight, kept.classifier.weight)
    wider, _ = load_model(spec, "sequence-classification", Labels(("a", "b", "c", "d")))
    assert wider.classifier.weight.shape[0] == 4
    assert torch.equal(wider.bert.pooler.dense.weight, kept.bert.pooler.dense.weight)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_a_regression_model_is_written_in_the_targets_unit(tmp_path, kind):
    labels = Labels(("price",), (), (250.0,), (1000.0,))
    model, tokenizer = small(kind, "regression", labels)
    folder = save_model(model, tokenizer, tmp_path / "out", labels)
    inputs = inputs_of(model, "regression")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    again, _ = load_model(ModelSpec(path=str(folder)), "regression", labels)
    with torch.no_grad():
        ours = model.eval()(**inputs).logits
        assert torch.allclose(plain.eval()(**inputs).logits, 250 * ours, rtol=1e-5)
        assert torch.allclose(again.eval()(**inputs).logits, ours, rtol=1e-5)
    assert plain.config.problem_type == "regression"
    if kind == "bert":
        # A fresh head predicts the mean.
        assert float(250 * ours.mean()) == pytest.approx(1000, rel=0.2)


def test_the_model_in_hand_is_left_as_it_was(tmp_path):
    labels = Labels(("y",), (), (5.0,), (0.0,))
    model, tokenizer = small("gpt2", "regression", labels)
    before = fingerprint(model)
    save_model(model, tokenizer, tmp_path / "out", labels)
    assert fingerprint(model) == before
    assert model.config.use_cache is False
    assert json.loads((tmp_path / "out/config.json").read_text())["use_cache"] is True


def test_an_exported_folder_just_works_in_a_pipeline(saved):
    pipe = transformers.pipeline("text-classification", model=str(saved), device="cpu")
    (found,) = pipe("hello")
    assert found["label"] in CLASSES.names


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_an_exported_image_model_says_what_it_takes(tmp_path, kind):
    labels = Labels(("a", "b", "c"), image=(3, 16, 16))
    model, _ = small(kind, "image-classification", labels)
    folder = save_model(model, None, tmp_path / "out", labels)
    contract = json.loads((folder / "preprocessor_config.json").read_text())
    assert contract["size"] == {"height": 16, "width": 16}
    image = pytest.importorskip("PIL.Image", reason="pip install pillow")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    pipe = transformers.pipeline("image-classification", model=str(folder), device="cpu")
    found = {entry["label"]: entry["score"] for entry in pipe(image.fromarray(pixels))}
    inputs = torch.tensor(pixels / 255, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        chances = model.eval()(pixel_values=inputs).logits.softmax(-1)[0]
    assert [found[name] for name in labels.names] == pytest.approx(chances.tolist(), abs=1e-4)


def test_nothing_is_looked_for_on_a_network(saved, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    load_model(ModelSpec(path=str(saved)), "sequence-classification", CLASSES)
    assert "does not exist" in refused(ModelSpec(path="org/name"))[0]
    assert "is a file" in refused(ModelSpec(path=str(saved / "config.json")))[0]


def folder_like(saved, tmp_path, leave_out=(), config=None):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved.iterdir():
        if file.name not in leave_out:
            (folder / file.name).write_bytes(file.read_bytes())
    if config is not None:
        plain = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(plain | config))
    return folder


def test_folders_that_are_not_whole_are_refused(saved, tmp_path):
    folder = folder_like(saved, tmp_path, ["config.json"])
    assert "has no config.json" in refused(ModelSpec(path=str(folder)))[0]
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refused(ModelSpec(path=str(folder)))[0]
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(ModelSpec(path=str(folder)))[0]
    (folder / "config.json").write_text('{"model_type": "nobody-knows"}')
    assert "cannot be used" in refused(ModelSpec(path=str(folder)))[0]
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in refused(ModelSpec(path=str(folder)))[0]
    weights.unlink()
    assert "has no weights" in refused(ModelSpec(path=str(folder)))[0]
    (folder / "pytorch_model.bin").write_bytes(b"x")
    lines = refused(ModelSpec(path=str(folder)))
    assert "only pickled weights (pytorch_model.bin)" in lines[0]
    assert "save_pretrained" in lines[1]


def test_weights_of_another_shape_are_refused(saved, tmp_path):
    folder = folder_like(saved, tmp_path, config={"num_hidden_layers": 3})
    assert "first 'bert.encoder.layer.2" in refused(ModelSpec(path=str(folder)))[0]
    folder = folder_like(saved, tmp_path / "copy", config={"intermediate_size": 64})
    assert "another shape" in refused(ModelSpec(path=str(folder)))[0]


def test_a_missing_pooler_is_drawn_from_the_seed(saved, tmp_path):
    folder = folder_like(saved, tmp_path, ["model.safetensors"])
    state = load_file(saved / "model.safetensors")
    save_file({k: v for k, v in state.items() if "pooler" not in k}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    one, _ = load_model(ModelSpec(path=str(folder)), "sequence-classification", CLASSES)
    two, _ = load_model(ModelSpec(path=str(folder)), "sequence-classification", CLASSES)
    assert torch.equal(one.bert.pooler.dense.weight, two.bert.pooler.dense.weight)


def test_other_refusals(saved, tmp_path):
    quantized = folder_like(
        saved, tmp_path, config={"quantization_config": {"quant_method": "gptq"}}
    )
    assert "quantized" in refused(ModelSpec(path=str(quantized)))[0]
    bare = folder_like(saved, quantized, ["tokenizer.json", "tokenizer_config.json"])
    assert "holds no tokenizer" in refused(ModelSpec(path=str(bare)))[0]
    assert "both sides" in refused(ModelSpec(path=str(saved)), LM)[0]
    lines = refused(ModelSpec(path=str(saved)), length=600)
    assert "exceeds the model's 512 positions" in lines[0]
    assert (
        "no head for sequence-to-sequence"
        in refused(ModelSpec(path=str(saved)), "sequence-to-sequence")[0]
    )
    assert "needs named labels" in refused(ModelSpec(path=str(saved)), labels=None)[0]
    tiny = ModelSpec(config="gpt2", vocabulary=100)
    assert "the tokenizer has 260 tokens" in refused(tiny, LM)[0]
    assert "does not divide" in refused(ModelSpec(config="bert", width=30, heads=4))[0]
    assert "even parts" in refused(ModelSpec(config="llama", width=9, heads=3), LM)[0]
    assert "no head for" in refused(ModelSpec(config="bert"), LM)[0]
    assert (
        "no images"
        in refused(ModelSpec(config="vit"), "image-classification", Labels(("a", "b")))[0]
    )
    lines = refused(ModelSpec(config="bert", tokenizer="nowhere"))
    assert "model.tokenizer = 'nowhere'" in lines[0]
    vit, _ = small("vit", "image-classification")
    save_model(vit, None, tmp_path / "vit", CLASSES)
    other = Labels(("a", "b"), image=(1, 9, 9))
    assert (
        "the model takes 1x8x8"
        in refused(ModelSpec(path=str(tmp_path / "vit")), "image-classification", other)[0]
    )


def test_longer_rows_get_more_positions():
    model, _ = small("gpt2", LM, length=700)
    assert model.config.n_positions == 700


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model, tokenizer = small("bert", "sequence-classification")
    folder = tmp_path / "out"
    save_model(model, tokenizer, folder, CLASSES)
    assert (folder.stat().st_mode & 0o777) == (
        (tmp_path / "x").mkdir() or (tmp_path / "x").stat().st_mode & 0o777
    )
    with pytest.raises(ConfigError, match="is there already"):
        save_model(model, tokenizer, folder, CLASSES)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", no_space)
    with pytest.raises(OSError, match="No space"):
        save_model(model, tokenizer, folder, CLASSES, overwrite=True)
    with pytest.raises(OSError, match="No space"):
        save_model(model, tokenizer, tmp_path / "new", CLASSES)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "x"]
    monkeypatch.undo()
    save_model(model, tokenizer, folder, Labels(("x", "y", "z")), overwrite=True)
    assert json.loads((folder / "config.json").read_text())["id2label"]["0"] == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "x"]
    with pytest.raises(ConfigError, match="no transformers model"):
        save_model(torch.nn.Linear(1, 1), None, tmp_path / "other")


# Tokens and hashes.


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_new_tokens_start_from_seed_and_name_near_the_mean(kind):
    task = {"bert": "sequence-classification", "t5": "sequence-to-sequence"}.get(kind, LM)
    rows = []
    before = torch.random.get_rng_state()
    for names in (["<x>", "<y>"], ["<y>", "<new>", "<x>"]):
        model, tokenizer = small(kind, task)
        old = model.get_input_embeddings().weight.detach().clone()
        ids = grow_tokens(model, tokenizer, names, seed=5)
        assert ids == tuple(range(260, 260 + len(names)))
        assert tokenizer.convert_ids_to_tokens(list(ids)) == names
        weight = model.get_input_embeddings().weight
        assert weight.shape[0] == model.config.vocab_size == 260 + len(names)
        assert torch.equal(weight[:260], old)
        away = (weight[260:] - old.mean(0)) / old.std(0)
        assert 0.05 < away.std().item() < 0.2
        rows.append(weight[ids[names.index("<x>")]])
        output = model.get_output_embeddings()
        if output is not None:
            assert output.weight is weight
        assert tokenizer("a<x>b")["input_ids"][1] == ids[names.index("<x>")]
        assert grow_tokens(model, tokenizer, names, seed=5) == ()
    assert torch.equal(*rows)
    assert torch.equal(before, torch.random.get_rng_state())


def test_tokens_that_the_tokenizer_has_already_get_rows_when_the_model_is_loaded(tmp_path):
    model, tokenizer = small("llama", LM)
    folder = save_model(model, tokenizer, tmp_path / "out")
    spec = ModelSpec(path=str(folder))
    assert grow_tokens(None, tokenizer, ["<x>", "<y>"]) == (260, 261)
    assert "262 tokens, the model 260" in refused(spec, LM, tokenizer=tokenizer)[0]
    grow_tokens(model, byte_tokenizer(), ["<x>", "<y>"], seed=3)
    loaded, _ = load_model(spec, LM, tokenizer=tokenizer, added=("<x>", "<y>"), seed=3)
    assert fingerprint(loaded) == fingerprint(model)
    meta, _ = load_model(spec, LM, tokenizer=tokenizer, added=("<x>", "<y>"), meta=True)
    assert meta.get_input_embeddings().weight.shape == (262, 32)


def test_untied_output_rows_are_drawn_apart_and_spare_rows_are_used():
    config = transformers.LlamaConfig(
        vocab_size=270, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model, tokenizer = transformers.LlamaForCausalLM(config), byte_tokenizer()
    (new,) = grow_tokens(model, tokenizer, ["<x>"])
    assert new == 260
    assert model.get_input_embeddings().weight.shape[0] == 270
    inner, outer = model.get_input_embeddings().weight[new], model.lm_head.weight[new]
    assert not torch.equal(inner, outer)
    assert outer.abs().mean().item() < model.lm_head.weight[:260].abs().mean().item()


def test_bytes_of_tokens():
    tokenizer = byte_tokenizer()
    sizes = token_bytes(tokenizer)
    text = "héllo 😀\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert int(sizes[ids].sum()) == len(text.encode()) == len(ids)
    assert not sizes[:4].any()


def test_the_fingerprint_is_what_it_says():
    tensors = {"b": torch.tensor([[1.5, -2.0]]), "a": torch.tensor([3], dtype=torch.int64)}
    expected = hashlib.sha256(
        b"a\0int64\0(1,)\0"
        + struct.pack("<q", 3)
        + b"b\0float32\0(1, 2)\0"
        + struct.pack("<2f", 1.5, -2)
    ).hexdigest()
    assert fingerprint(tensors) == expected
    assert fingerprint(tensors, lambda name: name == "a") != expected
    half = {"h": torch.tensor([1.0], dtype=torch.bfloat16)}
    assert fingerprint(half) == hashlib.sha256(b"h\0bfloat16\0(1,)\0\x80\x3f").hexdigest()
