from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from adapter_kit import MODELS, bert, fill, gpt2, llama, logits, minilm, tokens, train
from safetensors.torch import load_file, save_file
from torch import nn

from outlay import Bone, load_adapter, save_adapter, set_adapter
from outlay.core.errors import ConfigError
from outlay.nn.adapter import adapted_layers

# PEFT asks transformers for an attribute that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LINEAR = "query|q_proj|c_attn"
BONES = {
    "shard": Bone(r=4),
    "mini": Bone(r=4, variant="mini", mini_r=2),
    "bat": Bone(r=4, variant="bat"),
}


def peft_config(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def plain_peft(model: nn.Module, folder) -> nn.Module:
    """What a user without outlay does."""
    return peft.PeftModel.from_pretrained(model, folder).eval()


# ---- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", BONES)
@pytest.mark.parametrize("make", [bert, llama])
def test_bone_is_miss_in_plain_peft(variant, make, tmp_path):
    model = fill(BONES[variant].adapt(make()))
    ids = tokens()
    assert save_adapter(model, tmp_path) == "MISS"
    theirs = plain_peft(make(), tmp_path)
    assert torch.allclose(logits(theirs, ids), logits(model, ids), atol=2e-6)
    ours = load_adapter(make(), tmp_path)
    assert torch.equal(logits(ours, ids), logits(model, ids))
    assert not any(p.requires_grad for p in ours.parameters())
    assert adapted_layers(ours).popitem()[1].methods["default"] == BONES[variant]


@pytest.mark.assets
@pytest.mark.parametrize("variant", ["shard", "bat"])
def test_minilm_with_its_head_in_plain_peft(variant, tmp_path):
    model = Bone(r=16, variant=variant, layers_to_transform=(-1,)).adapt(minilm())
    train(model, 2, vocabulary=30_000)
    ids = tokens(vocabulary=30_000)
    assert save_adapter(model, tmp_path, base="the/base") == "MISS"
    assert peft_config(tmp_path)["modules_to_save"] == ["classifier"]
    assert peft_config(tmp_path)["base_model_name_or_path"] == "the/base"
    theirs = plain_peft(minilm(), tmp_path)
    assert torch.allclose(logits(theirs, ids), logits(model, ids), atol=2e-6)
    assert not torch.allclose(logits(minilm(), ids), logits(model, ids), atol=1e-3)


@pytest.mark.parametrize("method", [
    Bone(r=4), Bone(r=4, variant="mini", mini_r=2), Bone(r=4, rank_pattern={"c_attn": 2}),
])  # fmt: skip
def test_conv1d_goes_out_as_lora(method, tmp_path):
    model = fill(method.adapt(gpt2()))
    ids = tokens()
    assert save_adapter(model, tmp_path) == "LORA"
    config = peft_config(tmp_path)
    assert config["fan_in_fan_out"]
    assert bool(config["rank_pattern"]) == bool(method.rank_pattern)
    theirs = plain_peft(gpt2(), tmp_path)
    assert torch.allclose(logits(theirs, ids), logits(model, ids), atol=5e-6)
    ours = load_adapter(gpt2(), tmp_path)
    assert torch.equal(logits(ours, ids), logits(model, ids))
    assert all(m.methods["default"] == method for m in adapted_layers(ours).values())


def test_convolutions_go_out_as_lora(tmp_path):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 2, stride=2))

    model = fill(Bone(r=4).adapt(net()))
    assert save_adapter(model, tmp_path) == "LORA"
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    x = torch.randn(2, 4, 6, 6)
    assert torch.allclose(theirs(x), model(x), atol=5e-6)


@pytest.mark.parametrize(
    ("method", "make"),
    [(Bone(r=4, variant="bat"), gpt2), (Bone(r=4, variant="bat", bat_axis="col"), llama)],
)
def test_what_peft_cannot_load_says_so(method, make, tmp_path):
    model = fill(method.adapt(make()))
    with pytest.warns(UserWarning, match="PEFT cannot load"):
        assert save_adapter(model, tmp_path) == "OUTLAY"
    assert "outlay.load_adapter" in peft_config(tmp_path)["note"]
    with pytest.raises((KeyError, ValueError), match="OUTLAY"):
        plain_peft(make(), tmp_path)
    assert torch.equal(logits(load_adapter(make(), tmp_path), tokens()), logits(model, tokens()))
    with pytest.raises(ConfigError, match="LORA"):
        save_adapter(model, tmp_path, peft_type="LORA")


@pytest.mark.parametrize("variant", BONES)
def test_miss_from_peft(variant, tmp_path):
    method = BONES[variant]
    entries = method.to_peft({}, {}) or {}
    entries.pop("peft_type")
    config = peft.MissConfig(
        target_modules=["query", "value"], modules_to_save=["classifier"], **entries
    )
    theirs = fill(peft.get_peft_model(bert(), config))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(bert(), tmp_path)
    assert torch.allclose(logits(ours, tokens()), logits(theirs, tokens()), atol=2e-6)
    made = adapted_layers(ours).popitem()[1].methods["default"]
    assert (made.variant, made.r) == (method.variant, method.r)


def test_old_bone_folder(tmp_path):
    """Folders of PEFT's removed Bone tuner: other names, the same block."""
    model = fill(Bone(r=4).adapt(bert()))
    save_adapter(model, tmp_path)
    (tmp_path / "outlay.json").unlink()
    config = peft_config(tmp_path) | {"peft_type": "BONE"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {n.replace("miss_block", "bone_block"): t for n, t in weights.items()},
        tmp_path / "adapter_model.safetensors",
    )
    assert torch.equal(logits(load_adapter(bert(), tmp_path), tokens()), logits(model, tokens()))


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"rank_pattern": {LINEAR: 2}}])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_lora_from_peft(make, extra, tmp_path):
    linear = ["query", "dense", "q_proj", "down_proj", "c_attn", "c_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=linear, fan_in_fan_out=make is gpt2, **extra
    )
    theirs = fill(peft.get_peft_model(make(), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(make(), tmp_path)
    assert torch.allclose(logits(ours, tokens()), logits(theirs, tokens()), atol=2e-6)
    again = tmp_path / "again"
    assert save_adapter(ours, again) == "LORA"
    assert torch.allclose(
        logits(plain_peft(make(), again), tokens()), logits(theirs, tokens()), atol=2e-6
    )


def test_dora_folder_is_refused_by_name(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["query"], use_dora=True)
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="use_dora"):
        load_adapter(bert(), tmp_path)


def test_unknown_method_is_refused_by_name(tmp_path):
    config = peft.VeraConfig(r=4, target_modules=["query"])
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="VERA"):
        load_adapter(bert(), tmp_path)


def test_trained_on_by_peft(tmp_path):
    """PEFT's newer weights win over outlay's notes in the same folder."""
    model = fill(Bone(r=4).adapt(bert()))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
    train(theirs, 2, lr=1e-2)
    theirs.eval().save_pretrained(tmp_path)
    ours = load_adapter(bert(), tmp_path)
    assert torch.allclose(logits(ours, tokens()), logits(theirs, tokens()), atol=2e-6)


def test_switching_between_loaded_adapters(tmp_path):
    outs = {}
    for seed, name in enumerate(("first", "second")):
        model = fill(Bone(r=4).adapt(llama()), seed=seed)
        outs[name] = logits(model, tokens())
        save_adapter(model, tmp_path / name)
    model = llama()
    for name in outs:
        model = load_adapter(model, tmp_path / name, adapter_name=name)
        assert torch.equal(logits(model, tokens()), outs[name])
    set_adapter(model, "first")
    assert torch.equal(logits(model, tokens()), outs["first"])
    assert save_adapter(model, tmp_path / "again", adapter_name="second") == "MISS"


def test_training_goes_on_after_loading(tmp_path):
    model = fill(Bone(r=4).adapt(bert()))
    save_adapter(model, tmp_path)
    again = load_adapter(bert(), tmp_path, trainable=True)
    names = {n for n, p in again.named_parameters() if p.requires_grad}
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    assert train(again, 3) == train(model, 3)


def test_modules_to_save(tmp_path):
    method = Bone(r=4, target_modules=("query",), modules_to_save=("pooler",))
    model = fill(method.adapt(bert()))
    save_adapter(model, tmp_path)
    assert sorted(peft_config(tmp_path)["modules_to_save"]) == ["bert.pooler", "classifier"]
    theirs = plain_peft(bert(), tmp_path)
    assert torch.allclose(logits(theirs, tokens()), logits(model, tokens()), atol=2e-6)
    assert torch.equal(logits(load_adapter(bert(), tmp_path), tokens()), logits(model, tokens()))


def test_broken_folders(tmp_path):
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        load_adapter(bert(), tmp_path)
    model = fill(Bone(r=4).adapt(bert()))
    save_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match="model has none"):
        load_adapter(llama(), tmp_path)
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        save_adapter(model, tmp_path, adapter_name="other")
    with pytest.raises(ConfigError, match=r"classifier.*model has \(5"):
        load_adapter(bert(labels=5), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_adapter(bert(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="pickled"):
        load_adapter(bert(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_adapter(bert(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fill(bert())
