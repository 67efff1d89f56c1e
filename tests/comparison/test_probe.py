"""The probe: backbones, audit, cache, heads and page, on models made here."""

from __future__ import annotations

import json

import numpy as np
import pytest

from outlay.cli.app import run_app
from outlay.comparison import probe as probing
from outlay.comparison.page.probe_page import probe_markdown, probe_page
from outlay.comparison.probe import ProbeSettings, backbone_features, probe, wilson
from outlay.core.errors import ConfigError, DataError, MissingExtra
from outlay.training.backbone import Preprocessing, open_backbone
from outlay.training.contract import audit
from outlay.training.data.dataset import load
from outlay.training.data.labels import Labels
from outlay.training.models.load import load_model, save_model
from outlay.training.specs import DataSpec, ModelSpec

WORDS = {"fruit": "apple pear plum fig", "sea": "wave salt fish tide", "tool": "saw file drill axe",
         "sky": "cloud sun star moon"}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "encoder"
    spec = ModelSpec(config="bert", layers=2, width=32)
    model, tokenizer = load_model(spec, "sequence-classification", Labels(("a", "b")))
    return save_model(model, tokenizer, folder)


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("vit", "cnn"):
        spec = ModelSpec(config=kind, layers=2, width=32)
        labels = Labels(("a", "b"), image=(1, 8, 8))
        model, _ = load_model(spec, "image-classification", labels)
        save_model(model, None, folder / kind)
    return folder


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTLAY_CACHE", str(tmp_path / "cache"))
    lines = [
        json.dumps({"text": f"{words.split()[i % 4]} {words.split()[(i * 3 + 1) % 4]} {i}",
                    "label": kind, "domain": f"d{i % 2}"})
        for i in range(40) for kind, words in WORDS.items()
    ]  # fmt: skip
    place = tmp_path / "rows.jsonl"
    place.write_text("\n".join(lines) + "\n")
    return place


def spec(rows, **more):
    return DataSpec(path=str(rows), domain="domain", test_share=0.25, **more)


def test_a_probe_of_a_text_model(encoder, rows):
    asked = ProbeSettings(tasks=2, orders=2, domains=True)
    found = probe(str(encoder), spec(rows), asked)
    assert not found["features"]["cached"] and found["features"]["width"] == 32
    heads = {(h["head"], h["inputs"]): h for h in found["heads"]}
    assert len(heads) == 8
    assert heads["linear_probe", "raw"]["accuracy"] > 0.9
    assert all(h["interval"][0] <= h["accuracy"] <= h["interval"][1] for h in found["heads"])
    assert len(found["streams"]) == 4
    for stream in found["streams"]:
        for name in ("nearest_class_mean", "streaming_lda"):
            final = stream["learners"][name]["metrics"]["final"]
            # Rows in any order give one head: the end of a stream is the head fitted at once.
            assert final == pytest.approx(heads[name, "model"]["accuracy"])
    domains = next(s for s in found["streams"] if s["protocol"] == "domain-incremental")
    matrix = domains["learners"]["nearest_class_mean"]["matrix"]
    assert all(value is not None for row in matrix for value in row)
    json.dumps(found, allow_nan=False)
    page, text = probe_page(found), probe_markdown(found)
    assert "<svg" in page and "http" not in page.replace("http-equiv", "")
    assert "class-incremental" in page and "| nearest_class_mean | model |" in text
    again = probe(str(encoder), spec(rows), asked)
    assert again["features"]["cached"]
    assert [h["accuracy"] for h in again["heads"]] == [h["accuracy"] for h in found["heads"]]


def test_the_cache_goes_by_model_layer_preprocessing_and_data(encoder, rows, monkeypatch):
    splits = load(spec(rows), "sequence-classification")
    first = backbone_features(open_backbone(str(encoder)), splits)
    monkeypatch.setattr(probing, "audit", lambda *_: pytest.fail("the model was read again"))
    second = backbone_features(open_backbone(str(encoder)), splits)
    assert first.fresh and not second.fresh
    np.testing.assert_array_equal(first.splits["train"], second.splits["train"])
    assert isinstance(second.splits["train"], np.memmap)
    monkeypatch.undo()
    monkeypatch.setenv("OUTLAY_CACHE", str(first.folder.parents[1]))
    other = load(spec(rows, limit=20), "sequence-classification")
    places = {first.folder}
    for model, data in (
        (open_backbone(str(encoder), layer=1), splits),
        (open_backbone(str(encoder), pooling="cls"), splits),
        (open_backbone(str(encoder), length=4), splits),
        (open_backbone(str(encoder)), other),
    ):
        found = backbone_features(model, data)
        assert found.fresh
        places.add(found.folder)
    assert len(places) == 5
    # A damaged set is made anew, and nothing half-written stays.
    (first.folder / "train.npy").write_bytes(b"broken")
    assert backbone_features(open_backbone(str(encoder)), splits).fresh
    assert not [p for p in first.folder.parent.iterdir() if p.name.startswith(".")]


def test_a_failed_pass_leaves_nothing(encoder, rows, monkeypatch):
    splits = load(spec(rows), "sequence-classification")
    backbone = open_backbone(str(encoder))
    whole = type(backbone).features

    def broken(self, rows, batch_size=64):
        for batch in whole(self, rows, batch_size):
            batch = batch.copy()
            if len(rows) == len(splits.validation):
                batch[1] = np.nan
            yield batch

    monkeypatch.setattr(type(backbone), "features", broken)
    with pytest.raises(DataError, match="NaN or inf for validation rows 1"):
        backbone_features(backbone, splits)
    monkeypatch.undo()


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_images(vision, kind):
    generator = np.random.default_rng(0)
    rows = [{"pixel_values": generator.random((1, 8, 8), dtype=np.float32)} for _ in range(12)]
    backbone = open_backbone(str(vision / kind))
    assert backbone.task == "image-classification"
    found = np.concatenate(list(backbone.features(rows, batch_size=5)))
    assert found.shape == (12, 32)
    looked = {f.check: f for f in audit(backbone, rows)}
    assert looked["values lie between 0 and 1 before standardizing"].status == "ok"
    assert looked["images have the model's size"].status == "ok"
    wrong = [{"pixel_values": row["pixel_values"] * 255} for row in rows]
    looked = {f.check: f for f in audit(backbone, wrong)}
    assert looked["values lie between 0 and 1 before standardizing"].status == "warning"
    large = [{"pixel_values": np.ones((1, 20, 20), np.float32) * i / 9} for i in range(9)]
    looked = {f.check: f for f in audit(backbone, large)}
    assert looked["images have the model's size"].status == "warning"
    if kind == "cnn":
        with pytest.raises(ConfigError, match="hidden states"):
            list(open_backbone(str(vision / kind), layer=9).features(rows))


def test_pooling_is_over_real_tokens_alone(encoder):
    backbone = open_backbone(str(encoder))
    rows = [{"id": "0", "domain": "", "text": "salt"}, {"id": "1", "domain": "", "text": "x" * 60}]
    alone = np.concatenate([next(iter(backbone.features([row]))) for row in rows])
    together = next(iter(backbone.features(rows)))
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_preprocessing_of_images():
    import torch

    grey = torch.full((2, 1, 4, 4), 0.5)
    wanted = Preprocessing(size=(8, 8), channels=3, mean=(0.5,) * 3, deviation=(0.25,) * 3)
    assert wanted.images(grey).shape == (2, 3, 8, 8)
    assert wanted.images(grey).abs().max() < 1e-6
    with pytest.raises(DataError, match="4 channels, the model takes 3"):
        wanted.images(torch.ones(1, 4, 8, 8))


def test_what_is_refused(encoder, vision, rows, tmp_path):
    with pytest.raises(ConfigError, match="neither a folder"):
        open_backbone("no-such-model")
    with pytest.raises(ConfigError, match="pooling = 'max'"):
        open_backbone(str(encoder), pooling="max")
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(b"")
    try:
        import onnxruntime  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(MissingExtra, match="onnxruntime"):
            open_backbone(str(onnx)).load()
    with pytest.raises(ConfigError, match="cannot be parted"):
        probe(str(encoder), spec(rows), ProbeSettings(tasks=9))
    with pytest.raises(ConfigError, match="length"):
        probe(str(encoder), spec(rows), ProbeSettings(length=100_000))


def test_the_random_twin_is_another_network_and_leaves_the_generator_alone(vision):
    import torch

    generator = np.random.default_rng(0)
    rows = [{"pixel_values": generator.random((1, 8, 8), dtype=np.float32)} for _ in range(3)]
    state = torch.get_rng_state()
    found = []
    for seed in (None, 0, 0, 1):
        backbone = open_backbone(str(vision / "vit"))
        backbone.random_seed = seed
        found.append(next(iter(backbone.features(rows))))
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(found[1], found[2])
    assert np.abs(found[0] - found[1]).max() > 1e-3 < np.abs(found[1] - found[3]).max()


def test_wilsons_interval():
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-3) and high == pytest.approx(0.9433, abs=1e-3)
    assert wilson(0, 5)[0] == pytest.approx(0, abs=1e-12)


def test_the_command(encoder, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        "probe",
        str(encoder),
        "--data",
        str(rows),
        "--tasks",
        "2",
        "--orders",
        "1",
        "--random-twin",
    )
    assert run_app(words) == 0, capsys.readouterr().err
    out, _ = capsys.readouterr()
    assert "nearest_class_mean" in out and "report.html" in out
    assert {p.name for p in (tmp_path / "probe").iterdir()} == {
        "report.html", "report.md", "probe.json",
    }  # fmt: skip
    assert run_app(words) == 3
    capsys.readouterr()
    assert run_app([*words, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["features"]["cached"]
    assert run_app(["probe", str(encoder), "--data", "nothing", "--out", "new"]) == 2
    assert "packaged" in capsys.readouterr().err
