from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from adapter_kit import MODELS, bert, fill, gpt2, llama, logits, minilm, tokens, train
from safetensors.torch import load_file, save_file
from torch import nn

from outlay import Bone, Peft, build, disable_adapters, load_adapter, save_adapter, set_adapter
from outlay.core.budget import Budget
from outlay.core.claims import check
from outlay.core.errors import ConfigError, Conflict, NoEffect
from outlay.core.live import Live
from outlay.core.losses import Objective
from outlay.core.method import Context, Step
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


def test_heads_switch_with_their_adapters(tmp_path):
    """As in PEFT: each adapter brings the task head that it was trained with."""
    base, ids, outs = bert(), tokens(), {}
    before = logits(base, ids)
    for seed, name in enumerate(("first", "second")):
        model = fill(Bone(r=4).adapt(bert()), seed=seed)
        outs[name] = logits(model, ids)
        save_adapter(model, tmp_path / name)
    model = base
    for name in outs:
        model = load_adapter(model, tmp_path / name, adapter_name=name)
        assert torch.equal(logits(model, ids), outs[name])
    for name in ("first", "second", "first"):
        set_adapter(model, name)
        assert torch.equal(logits(model, ids), outs[name])
        with disable_adapters(model):
            assert torch.equal(logits(model, ids), before)
        assert torch.equal(logits(model, ids), outs[name])
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    changed = logits(model, ids)
    set_adapter(model, "second")
    set_adapter(model, "first")
    assert torch.equal(logits(model, ids), changed)
    assert torch.equal(logits(Bone(adapter_name="first").export(model), ids), changed) or (
        torch.allclose(logits(model, ids), changed, atol=1e-5)
    )


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


# ---- the method --------------------------------------------------------------------------------

TYPES = {
    "LORA": {"r": 4, "lora_alpha": 8},
    "DORA": {"r": 4},
    "VERA": {"r": 4},
    "MISS": {"r": 4},
    "ADALORA": {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 10},
    "IA3": {
        "target_modules": ("query", "q_proj", "c_attn", "dense", "down_proj"),
        "feedforward_modules": ("down_proj",),
    },
    "LN_TUNING": {"target_modules": ("LayerNorm", "ln_1", "input_layernorm")},
}


def a_peft(kind: str) -> Peft:
    return Peft(type=kind, **TYPES[kind])


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_any_adapter_trains_exports_and_is_saved(kind, make, tmp_path):
    if kind in ("MISS", "VERA") and make is gpt2:
        pytest.skip("PEFT's own method takes nn.Linear alone")
    method, model, ids = a_peft(kind), make(), tokens()
    kinds = {n: type(m) for n, m in model.named_modules()}
    before = logits(model, ids)
    model = method.adapt(model)
    assert type(model) is type(make())
    if kind != "LORA" or make is not bert:
        assert torch.allclose(logits(model, ids), before, atol=1e-5)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    heads = {n for n in trained if n.split(".")[0] == "classifier"}
    assert bool(heads) == (make is bert) and not any("ranknum" in n for n in trained)
    train(model, 3, lr=1e-2)
    after = logits(model, ids)
    assert not torch.allclose(after, before, atol=1e-4)
    assert save_adapter(model, tmp_path) == ("LORA" if kind == "DORA" else kind)
    assert torch.allclose(logits(plain_peft(make(), tmp_path), ids), after, atol=2e-5)
    with disable_adapters(model):
        if make is not bert:
            assert torch.allclose(logits(model, ids), before, atol=1e-5)
    assert torch.equal(logits(model, ids), after)
    plain = method.export(model)
    assert {n: type(m) for n, m in plain.named_modules()} == kinds
    assert torch.allclose(logits(plain, ids), after, atol=3e-5)
    assert not hasattr(plain, "peft_config")


def test_equal_to_peft_itself():
    method = Peft(type="LORA", r=4, lora_alpha=8, target_modules=["query", "value"])
    ours = method.adapt(bert())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
    theirs = peft.get_peft_model(bert(), config)
    state = {f"base_model.model.{n}": t for n, t in ours.state_dict().items()}
    theirs.load_state_dict(state)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name or "classifier" in name)
    assert train(ours, 5) == train(theirs.eval(), 5)


def test_frozen_by_the_loop_or_by_hand():
    context = Context(freezes=True)
    model = bert()
    model.bert.pooler.requires_grad_(False)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    a_peft("LORA").adapt(model, context)
    left = {n.replace(".base_layer", "") for n, p in model.named_parameters() if p.requires_grad}
    assert names <= left
    by_hand = Peft(type="LORA", r=2, target_modules=("query",), modules_to_save=("pooler",))
    model = by_hand.adapt(bert())
    left = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {n.rpartition(".")[0] for n in left} == {"classifier", "bert.pooler.dense"}


def test_draws_follow_the_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    states = []
    for seed in (1, 1, 2):
        model = llama()
        torch.set_rng_state(state)
        a_peft("LORA").adapt(model, Context(seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        drawn = [p.flatten() for n, p in model.named_parameters() if "lora_A" in n]
        states.append(torch.cat(drawn))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_adalora_of_peft_brings_its_call():
    method, model = a_peft("ADALORA"), llama()
    context = Context(budget=Budget(10, "steps"), total_steps=10)
    model = method.adapt(model, context)
    objective = method.shape(Objective(), model, context)
    assert next(iter(objective.penalties(model, Step(0, 0.0, 0)))).startswith("orthogonality")
    live = Live(model, objective, [], None, context)
    watcher = method.watch(live)
    with pytest.raises(NoEffect):
        watcher.close()
    train(
        model, 10, lr=1e-2,
        after=lambda i: watcher.after_update(Step(i, i / 10, 0, total=10)),
        penalty=lambda: sum(objective.penalties(model, Step(0, 0.0, 0)).values()),
    )  # fmt: skip
    watcher.close()
    alive = [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]
    assert sum(alive) == 2 * len(alive) and len(set(alive)) > 1
    again = method.watch(live)
    again.load_state_dict(watcher.state_dict())
    assert again.calls == 10
    with pytest.raises(ConfigError, match="total_step"):
        Peft(type="ADALORA").adapt(llama())


@pytest.mark.parametrize("peft_first", [True, False])
def test_beside_an_adapter_of_outlay(peft_first):
    methods = [a_peft("LORA"), Bone(r=4)]
    if not peft_first:
        methods.reverse()
    check(methods, llama())
    model, ids = llama(), tokens()
    for method in methods:
        model = method.adapt(model, Context(freezes=True))
    fill(model, scale=0.05)
    before = logits(model, ids)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, 1)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert any("lora_B" in n for n in moved) and any("block" in n for n in moved)
    after = logits(model, ids)
    assert not torch.allclose(before, after)
    for order in (methods, methods[::-1]):
        plain = copy.deepcopy(model)
        for method in order:
            plain = method.export(plain)
        assert {type(m) for m in plain.modules()} == {type(m) for m in llama().modules()}
        assert torch.allclose(logits(plain, ids), after, atol=3e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_tied_embeddings_are_untied_by_a_merge():
    for method in (Peft(type="LORA", r=2, target_modules=("lm_head",)),
                   Bone(r=4, target_modules=("lm_head",))):  # fmt: skip
        model, ids = llama(tied=True), tokens()
        embedded = model.get_input_embeddings().weight.detach().clone()
        model = fill(method.adapt(model))
        after = logits(model, ids)
        plain = method.export(model)
        assert torch.allclose(logits(plain, ids), after, atol=1e-5)
        assert torch.equal(plain.get_input_embeddings().weight, embedded)
        assert not plain.config.tie_word_embeddings


def test_claims_of_types():
    assert a_peft("LORA").claims(None)[0].word == "delta.additive"
    assert a_peft("DORA").claims(None)[0].word == "delta.multiplicative"
    assert a_peft("IA3").claims(None)[0].word == "delta.multiplicative"
    with pytest.raises(Conflict):
        check([a_peft("DORA"), Bone(r=4)], bert())


@pytest.mark.parametrize("text", [
    "peft(type='LORA', r=8, lora_alpha=16)", "peft(type='vera', r=4)", "peft(type='dora')",
    "peft(type='LORA', rank_pattern={'query': 2}, target_modules=['query'])",
    "peft(type='LORA', layers_to_transform=[-1], adapter_name='other')",
])  # fmt: skip
def test_call_strings(text):
    method = build(text)
    assert build(method.spec()) == method and hash(method) == hash(build(text))
    assert len(method.adapt(bert()).peft_config) == 1


@pytest.mark.parametrize("text", [
    "peft", "peft(type='LORRA')", "peft(type=8)", "peft(type='LORA', rr=8)", "peft(r=8)",
    "peft(type='LORA', r='8')", "peft(type='LORA', r=0)", "peft(type='LORA', use_dora=1)",
    "peft(type='PROMPT_TUNING')", "peft(type='XLORA')", "peft(type='POLY')",
    "peft(type='LORA', bias='all')", "peft(type='LORA', init_lora_weights='eva')",
    "peft(type='ADALORA', total_step=10, tinit=10)", "peft(type='LORA', target_modules=[])",
])  # fmt: skip
def test_bad_settings(text):
    with pytest.raises(ConfigError) as error:
        build(text)
    assert error.value.problem and error.value.remedy


def test_bad_for_the_model():
    with pytest.raises(NoEffect, match="qeury"):
        Peft(type="LORA", target_modules=("qeury",)).adapt(bert())
    with pytest.raises(ConfigError, match="PEFT refuses"):
        Peft(type="MISS", r=4).adapt(gpt2())
    model = a_peft("LORA").adapt(bert())
    with pytest.raises(Conflict, match="already"):
        a_peft("VERA").adapt(model)
