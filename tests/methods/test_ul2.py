"""The mixture of denoisers in a run: what is made, what it costs, and bit-exact resume."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from outlay import Recipe, plan, run
from outlay.core.claims import check
from outlay.core.errors import ConfigError, Conflict, DataError
from outlay.core.method import Context, Step, generator_of
from outlay.methods.baselines.full import Full
from outlay.methods.objectives.mode_token import ModeToken
from outlay.methods.objectives.ul2 import UL2
from outlay.nn.denoising import MODE_TOKENS, SpanCorruption, restore, sentinel_names
from outlay.training import checkpoint
from outlay.training.data.batch import token_count
from outlay.training.data.pool import Pool
from outlay.training.finished import open_run
from outlay.training.keeper import Silent
from outlay.training.materials import load_materials, raw_length
from outlay.training.models.tokens import byte_tokenizer
from outlay.training.planning.shapes import drawn_shapes

SMALL = {"layers": 2, "width": 32, "heads": 2, "dropout": 0.0}
TASKS = {
    "llama": "causal-language-modeling",
    "gpt2": "causal-language-modeling",
    "t5": "sequence-to-sequence",
}
STEP = Step(0, 0.0, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTLAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    draw = random.Random(0)
    words = ["salt", "wave", "fish", "tide", "saw", "file", "drill", "plum"]
    rows = [" ".join(draw.choices(words, k=draw.randint(3, 20))) for _ in range(40)]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


def recipe(text, kind="llama", methods=("ul2",), **changes):
    fields = {
        "model": {"config": kind, **SMALL},
        "task": TASKS[kind],
        "data": {"path": str(text), "text": "text", "blocks": True},
        "methods": list(methods),
        "batch": {"size": 8, "length": 48},
        "optimizer": {"lr": 0.01},
        "budget": "4steps",
    }
    return Recipe(**{**fields, **changes})


def tokenizer(method=None):
    made = byte_tokenizer()
    made.add_tokens(list((method or UL2()).tokens(made)), special_tokens=True)
    return made


def context(task="causal-language-modeling", length=None, method=None):
    return Context(tokenizer=tokenizer(method), task=task, length=length)


def draw(example, stream):
    return generator_of(0, stream, example["id"], example.get("visit", 0))


def causal(index, ids):
    return {"id": f"row {index}", "domain": "", "input_ids": list(ids), "labels": list(ids)}


# ---- one example ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["prefix_lm", "causal", "encoder_decoder"])
def test_what_is_made_gives_the_text_back(form):
    task = "sequence-to-sequence" if form == "encoder_decoder" else "causal-language-modeling"
    method, ids = UL2(format=form), list(range(10, 70))
    here = context(task)
    sentinels = here.tokenizer.convert_tokens_to_ids(list(sentinel_names(100)))
    end, seen = here.tokenizer.eos_token_id, set()
    for index in range(40):
        row = causal(index, ids)
        if form == "encoder_decoder":
            row |= {"input_ids": ids[:30], "labels": ids[30:]}
        made = method.transform(row, draw, STEP, here)
        denoiser = method.mixture.denoisers[made["denoiser_id"]]
        seen.add(made["denoiser_id"])
        if form == "encoder_decoder":
            inputs, targets = made["input_ids"][1:-1], made["labels"][:-1]
            assert made["input_ids"][-1] == made["labels"][-1] == end
        else:
            size = made["labels"].index(next(x for x in made["labels"] if x != -100))
            inputs, targets = made["input_ids"][1:size], made["input_ids"][size:-1]
            assert made["labels"][size:] == made["input_ids"][size:]
            assert made["labels"][-1] == end
            if form == "prefix_lm":
                assert made["bidirectional"] == [1] * size + [0] * len(made["labels"][size:])
            else:
                assert "bidirectional" not in made
        mode = here.tokenizer.convert_tokens_to_ids(MODE_TOKENS[denoiser.mode])
        assert made["input_ids"][0] == mode
        used = sentinels if isinstance(denoiser, SpanCorruption) else None
        assert restore(inputs, targets, used) == ids
    assert seen == set(range(7))


def test_rates_of_one_denoiser_are_plain_t5_bit_for_bit():
    one_hot = UL2(rates=(1, 0, 0, 0, 0, 0, 0), mode_tokens=False)
    plain = UL2(preset="t5", mode_tokens=False)
    written = UL2(denoisers=(("R", 3, 0.15),), mode_tokens=False)
    here = context()
    for index in range(10):
        made = [
            method.transform(causal(index, range(10, 90)), draw, STEP, here)
            for method in (one_hot, plain, written)
        ]
        assert made[0] == made[1] == made[2]
    assert one_hot.raw_length(512, "sequence-to-sequence") == 568


def test_the_draw_is_the_examples_own():
    method, here = UL2(), context()
    row = causal(1, range(10, 60))
    first = method.transform(row, draw, STEP, here)
    assert method.transform(row, draw, Step(9, 0.5, 0), here) == first
    visits = [method.transform({**row, "visit": v}, draw, STEP, here) for v in range(8)]
    assert len({tuple(made["input_ids"]) for made in visits}) > 4


def test_denoisers_come_as_often_as_they_should():
    method, here = UL2(preset="s20"), context()
    found = [
        method.transform(causal(i, range(10, 30)), draw, STEP, here)["denoiser_id"]
        for i in range(1000)
    ]
    for index, rate in enumerate((0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1)):
        assert abs(found.count(index) / 1000 - rate) < 4 * (rate * (1 - rate) / 1000) ** 0.5


def test_the_end_of_text_is_not_put_twice():
    method, here = UL2(preset="t5"), context()
    end = here.tokenizer.eos_token_id
    made = method.transform(causal(0, [*range(10, 40), end]), draw, STEP, here)
    assert made["input_ids"].count(end) == 1
    shortest = method.transform(causal(0, [10, end]), draw, STEP, here)
    assert shortest["input_ids"][-1] == end and shortest["input_ids"].count(end) == 2


def test_what_is_not_scored_stays_so():
    method, here = UL2(denoisers=(("X", 3, 0.5),)), context()
    row = causal(0, range(10, 50))
    row["labels"] = [-100] * 20 + row["labels"][20:]
    made = method.transform(row, draw, STEP, here)
    targets = made["labels"][made["bidirectional"].count(1) :]
    assert not set(targets) & set(range(10, 30)) and set(targets) & set(range(30, 50))
    row["labels"] = [-100] * 40
    assert set(method.transform(row, draw, STEP, here)["labels"]) == {-100}


@pytest.mark.parametrize("roll", [False, True])
def test_rolling_moves_a_single_span(roll):
    method, here = UL2(denoisers=(("X", 64, 0.15),), roll=roll), context()
    sentinel = here.tokenizer.convert_tokens_to_ids("<extra_id_0>")
    places = {
        method.transform(causal(i, range(10, 70)), draw, STEP, here)["input_ids"].index(sentinel)
        for i in range(20)
    }
    assert (len(places) > 5) if roll else places == {1 + 51}


def test_rows_of_any_length_fit():
    """Pairs of a sequence-to-sequence file may hold twice as much as a block."""
    for task, form in (("sequence-to-sequence", ""), ("causal-language-modeling", "causal")):
        method = UL2(format=form or "auto")
        here = context(task, length=40)
        for index in range(100):
            row = causal(index, range(10, 80))
            if not form:
                row["labels"] = list(range(80, 150))
            made = method.transform(row, draw, STEP, here)
            assert len(made["input_ids"]) <= 40 and len(made["labels"]) <= 40


def test_bad_rows_are_refused_by_name():
    here = context()
    with pytest.raises(DataError, match=r"row 'row 0'.* 1 tokens"):
        UL2(preset="t5").transform(causal(0, [9]), draw, STEP, here)
    pairs = context("sequence-to-sequence")
    row = {"id": "a", "input_ids": [9, 8], "labels": [-100, 7]}
    with pytest.raises(DataError, match="row 'a': a target is left out"):
        UL2().transform(row, draw, STEP, pairs)
    here.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-text"):
        UL2().transform(causal(0, range(9, 30)), draw, STEP, here)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rates": (1.0,)}, "ul2.rates"),
        ({"rates": (0.0,) * 7}, "ul2.rates"),
        ({"denoisers": ()}, "ul2.denoisers"),
        ({"denoisers": (("R", 0.5, 0.15),)}, "ul2.denoisers"),
        ({"denoisers": (("R", 3, 1.5),)}, "ul2.denoisers: SpanCorruption(mean_span=3.0, rate=1.5"),
        ({"denoisers": (("S", 0.7),)}, "ul2.denoisers: PrefixDenoising(rate=0.7"),
        ({"sentinels": 0}, "ul2.sentinels"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ConfigError) as refusal:
        UL2(**settings)
    assert said in refusal.value.problem and refusal.value.remedy


def test_the_task_decides_the_format():
    assert UL2().format_for("causal-language-modeling") == "prefix_lm"
    assert UL2().format_for("sequence-to-sequence") == "encoder_decoder"
    with pytest.raises(ConfigError, match="sequence-classification"):
        UL2().format_for("sequence-classification")
    with pytest.raises(ConfigError, match="'encoder_decoder' does not go with causal"):
        UL2(format="encoder_decoder").format_for("causal-language-modeling")


def test_lengths_are_those_that_always_fit():
    assert UL2().raw_length(512, "sequence-to-sequence") == 511
    assert UL2(mode_tokens=False).raw_length(512, "sequence-to-sequence") == 512
    assert UL2(preset="t5").raw_length(512, "sequence-to-sequence") == 567
    # 3/4 of the row: (3, 0.5) adds two sentinels for six tokens.
    assert UL2().raw_length(512, "causal-language-modeling") == 382
    with pytest.raises(ConfigError, match="171 spans of 1023 tokens and there are 100 sentinels"):
        UL2().raw_length(1024, "sequence-to-sequence")
    assert UL2(sentinels=171).raw_length(1024, "sequence-to-sequence") == 1023
    with pytest.raises(ConfigError, match=r"batch.length = 3"):
        UL2().raw_length(3, "causal-language-modeling")


def test_only_modes_that_are_drawn_need_a_token():
    assert UL2(preset="t5", sentinels=2).tokens(None) == ("<extra_id_0>", "<extra_id_1>", "[NLU]")
    assert UL2(mode_tokens=False, sentinels=1).tokens(None) == ("<extra_id_0>",)


def test_two_corruptions_are_refused():
    check([UL2(), Full()])
    with pytest.raises(Conflict, match=r"'ul2' holds 'example.corruption'"):
        check([UL2(), UL2(preset="t5")])


# ---- a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(TASKS))
def test_rows_fit_and_every_token_is_counted(text, kind):
    made = recipe(text, kind, batch={"size": 8, "length": 48, "pad_to": 1})
    materials = load_materials(made)
    lengths = {len(e["input_ids"]) + len(e["labels"]) * (kind == "t5") for e in materials.train}
    assert max(lengths) == raw_length(made) == UL2().raw_length(48, TASKS[kind])
    assert max(len(e["input_ids"]) for e in materials.splits["validation"]) <= 48
    method, here = UL2(), Context(tokenizer=materials.tokenizer, task=TASKS[kind], length=48)
    expected = sum(
        len(m["input_ids"]) + len(m["labels"]) * (kind == "t5")
        for m in _first(made, materials, method, here, 8)
    )
    batch = drawn_shapes(made.changed({"budget": "1steps"}), materials)[0].batch
    assert token_count(batch, TASKS[kind]) == expected
    assert batch["input_ids"].shape[1] <= 48 and batch["labels"].shape[1] <= 48


def _first(made, materials, method, here, count):
    def stream(example, name):
        return generator_of(made.seed, "example", name, example["id"], example["visit"])

    pool = Pool(materials.train, made.seed)
    return [method.transform(e, stream, STEP, here) for e in pool.draw(count)]


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        ("llama", ("ul2(preset='s20')",)),
        ("gpt2", ("ul2(format='causal')", "full")),
        ("gpt2", ("ul2", "bone(r=4)")),
        ("t5", ("ul2(split='uniform')", "loss_weights")),
    ],
)
def test_it_runs_and_shows_each_mode(text, tmp_path, kind, methods):
    result = run(
        recipe(text, kind, methods, batch={"size": 16, "micro": 8, "length": 48}),
        out=tmp_path / "runs", device="cpu",
    )  # fmt: skip
    lines = [line for line in result.curves if "loss" in line]
    assert len(lines) == 4 and all("loss.X" in line for line in lines)
    for line in lines:
        shown = [line[key] for key in ("loss.R", "loss.S", "loss.X") if key in line]
        assert min(shown) - 1e-4 <= line["loss"] <= max(shown) + 1e-4
    assert result.metrics["test/loss"] > 0
    last = lines[-1]["tokens"]
    assert last == result.meter["tokens"] > 0


def test_the_mean_of_the_modes_is_the_loss_whatever_the_split(text, tmp_path):
    results = [
        run(
            recipe(text, batch={"size": 8, "micro": micro, "length": 48}, precision="float64"),
            out=tmp_path / str(micro), device="cpu",
        ).curves
        for micro in (8, 2)
    ]  # fmt: skip
    for whole, split in zip(*results):
        assert set(whole) == set(split)
        for key in ("loss", "loss.R", "loss.S", "loss.X", "tokens"):
            if key in whole:
                assert split[key] == pytest.approx(whole[key], rel=1e-5)


def test_packed_rows_give_the_same_weights(text, tmp_path):
    plain, dense = (
        run(
            recipe(text, methods=("ul2",), precision="float64",
                   batch={"size": 8, "length": 48, "packing": packing}),
            out=tmp_path / str(packing), device="cpu",
        )
        for packing in (False, True)
    )  # fmt: skip
    first, second = (
        dict(open_run(result.folder, rows=False, device="cpu").model.named_parameters())
        for result in (plain, dense)
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-9, rtol=0)
    assert plain.meter["tokens"] == dense.meter["tokens"]


class Killed(BaseException):
    pass


class KilledAt(Silent):
    def __init__(self, step):
        self.left = step

    def step(self, step, values, meter):
        if self.left == 0:
            raise Killed
        self.left -= 1


@pytest.mark.parametrize("kind", list(TASKS))
def test_killed_and_started_again_gives_the_same_bits(text, tmp_path, kind):
    made = recipe(
        text, kind, budget="5steps", every={"save": 2}, model={"config": kind, **SMALL,
        "dropout": 0.1}, batch={"size": 4, "length": 48, "prefetch": 2},
    )  # fmt: skip
    whole = run(made, out=tmp_path / "whole", device="cpu")
    for step in (1, 3):
        with pytest.raises(Killed):
            run(made, out=tmp_path / "killed", device="cpu", progress=KilledAt(step))
    again = run(made, out=tmp_path / "killed", device="cpu")
    assert again.weights_sha256 == whole.weights_sha256 and again.metrics == whole.metrics
    assert again.meter["tokens"] == whole.meter["tokens"]
    both = (whole.curves, again.curves)
    strip = [[{k: v for k, v in row.items() if "seconds" not in k} for row in c] for c in both]
    assert strip[0] == strip[1]


def test_evaluation_reads_plain_text_causally(text, tmp_path):
    """The metric is the exported model's own next-token loss on rows that nobody corrupted."""
    made = recipe(text, precision="float64")
    result = run(made, out=tmp_path / "runs", device="cpu")
    done = open_run(result.folder, device="cpu")
    rows = done.materials.splits["test"]
    assert done.evaluate(["test"])["test/loss"] == pytest.approx(result.metrics["test/loss"])
    model = done.exported().eval()
    nats = tokens = 0.0
    for row in rows:
        assert row["labels"] == row["input_ids"]
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            out = model(input_ids=ids).logits.log_softmax(-1)
        nats -= float(out[0, :-1].gather(1, ids[0, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    assert result.metrics["test/loss"] == pytest.approx(nats / tokens, rel=1e-9)


def test_attention_is_what_differs_between_the_formats(text, tmp_path):
    """The same rows, and other weights: with two blocks the context's own states matter."""
    digests = {
        form: run(recipe(text, methods=(f"ul2(format='{form}')",)), out=tmp_path / form)
        for form in ("prefix_lm", "causal")
    }
    assert digests["prefix_lm"].weights_sha256 != digests["causal"].weights_sha256
    assert digests["prefix_lm"].meter["tokens"] == digests["causal"].meter["tokens"]


def test_a_plan_knows_it(text):
    planned = plan(recipe(text), device="cpu")
    assert planned.flops > 0 and planned.chain[0]["claims"] == ["example.corruption"]
    assert not [note for note in planned.notes if "not counted" in note]


@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_modes_weigh_by_their_tokens_or_alike(text, tmp_path, average):
    made = recipe(text, objective={"average": average}, budget="1steps")
    (line, *_) = run(made, out=tmp_path / "runs", device="cpu").curves
    materials = load_materials(made)
    here = Context(tokenizer=materials.tokenizer, task=made.task, length=48)
    method = UL2()
    weights: dict[str, float] = {}
    for row in _first(made, materials, method, here, 8):
        mode = method.mixture.denoisers[row["denoiser_id"]].mode
        scored = sum(label != -100 for label in row["labels"])
        weights[mode] = weights.get(mode, 0.0) + (scored if average == "tokens" else 1)
    mean = sum(line[f"loss.{mode}"] * weight for mode, weight in weights.items())
    assert line["loss"] == pytest.approx(mean / sum(weights.values()), rel=1e-4)


# ---- refusals in a run ---------------------------------------------------------------------------


def test_overflowing_sentinels_end_before_anything_is_encoded(text, tmp_path):
    made = recipe(text, methods=("ul2(sentinels=3)",))
    with pytest.raises(ConfigError, match=r"spans of .* tokens and there are 3 sentinels"):
        run(made, out=tmp_path / "runs", device="cpu")
    assert not (tmp_path / "runs").exists()


def test_it_is_refused_where_nothing_is_predicted(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "salt and fish", "label": "ab"[i % 2]} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Recipe(
        model={"config": "llama", **SMALL}, task="sequence-classification",
        data={"path": str(file)}, methods=["ul2"], budget="1steps",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="the task is sequence-classification"):
        run(made, out=tmp_path / "runs", device="cpu")


def test_it_and_a_mode_token_are_for_different_stages(text, tmp_path):
    assert ModeToken().mode == "[NLU]"
    with pytest.raises(Conflict, match=r"'mode_token' .* 'ul2'"):
        run(recipe(text, methods=("ul2", "mode_token")), out=tmp_path / "runs", device="cpu")


# ---- and then ------------------------------------------------------------------------------------


def stages(text, rows, mode="mode_token", second=None):
    return Recipe(
        model={"config": "gpt2", **SMALL},
        task="causal-language-modeling",
        data={"path": str(text), "text": "text", "blocks": True},
        batch={"size": 8, "length": 48},
        optimizer={"lr": 0.01},
        budget="3steps",
        stages=[
            {"name": "pretrain", "methods": ["ul2"]},
            {
                "name": "tune", "task": "sequence-classification", "data": {"path": str(rows)},
                "methods": [mode] if mode else [], "budget": "4steps",
            },
        ],
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["mode_token", "mode_token(mode='[NLG]')", ""])
def test_pretrain_then_classify_with_a_mode_token(text, tmp_path, mode, recwarn):
    draw_ = random.Random(1)
    words = {"a": ["salt", "wave"], "b": ["saw", "drill"]}
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"text": " ".join(draw_.choices(words["ab"[i % 2]], k=3)), "label": "ab"[i % 2]}
        for i in range(60)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run(stages(text, rows, mode), out=tmp_path / "runs", device="cpu")
    assert result.status == "done" and 0 <= result.metrics["test/accuracy"] <= 1
    # The first stage made the token: nothing to warn of.
    assert not [w for w in recwarn if "mode_token" in str(w.message)]
    done = open_run(result.folder, device="cpu")
    token = done.tokenizer.convert_tokens_to_ids(mode[-7:-2] if "=" in mode else "[NLU]")
    (first, *_) = done.assembly.batches("test")
    assert (int(first["input_ids"][0, 0]) == token) is bool(mode)
    left = checkpoint.read_folder(Path(result.folder) / "stages" / "pretrain")["model"]
    assert len(left["transformer.wte.weight"]) == len(done.tokenizer) == 260 + 103
    # In prediction too: the rows of the file read again give the run's own answers.
    told = list(done.predict(lines[:5]))
    assert len(told) == 5 and all(row["prediction"] in ("a", "b") for row in told)
