"""A mode token stands in front of every input, wherever a model meets one."""

from __future__ import annotations

import json
import random

import pytest
import torch

from outlay import Recipe, run
from outlay.core.method import Context, Step
from outlay.methods.objectives.mode_token import ModeToken
from outlay.training.finished import open_run
from outlay.training.materials import load_materials
from outlay.training.models.tokens import byte_tokenizer

SMALL = {"layers": 1, "width": 32, "heads": 2, "dropout": 0.0}


def told(task="sequence-classification", **tokens):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[NLU]", "[S2S]"], special_tokens=True)
    tokenizer.add_special_tokens(tokens)
    return Context(tokenizer=tokenizer, task=task)


def test_the_token_comes_first_and_labels_keep_their_places():
    here = told("causal-language-modeling")
    token = here.tokenizer.convert_tokens_to_ids("[S2S]")
    method = ModeToken(mode="[S2S]")
    row = {"id": "a", "input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    shown = method.present(row, here)
    assert shown["input_ids"] == [token, 5, 6, 7]
    # Scored as before: 6 and 7, each from the token before it.
    assert shown["labels"] == [-100, -100, 6, 7]
    assert row["input_ids"] == [5, 6, 7]


def test_a_pairs_targets_and_a_class_stay():
    pair = {"id": "a", "input_ids": [5], "labels": [7, 8, 9]}
    shown = ModeToken().present(pair, told("sequence-to-sequence"))
    assert len(shown["input_ids"]) == 2 and shown["labels"] == [7, 8, 9]
    assert ModeToken().present({"id": "a", "input_ids": [5], "labels": 3}, told())["labels"] == 3


def test_a_classification_token_stays_first():
    here = told(cls_token="[CLS]")
    token, first = here.tokenizer.convert_tokens_to_ids(["[NLU]", "[CLS]"])
    row = {"id": "a", "input_ids": [first, 5, 6], "token_type_ids": [0, 0, 1], "labels": 0}
    shown = ModeToken().present(row, here)
    assert shown["input_ids"] == [first, token, 5, 6]
    assert shown["token_type_ids"] == [0, 0, 0, 1]


def test_a_token_that_no_model_knows_is_warned_of():
    plain = byte_tokenizer()
    with pytest.warns(UserWarning, match=r"no \[NLG\]"):
        assert ModeToken(mode="[NLG]").tokens(plain) == ("[NLG]",)
    plain.add_tokens(["[NLG]"])
    assert ModeToken(mode="[NLG]").tokens(plain) == ("[NLG]",)


SHAPES = {
    "gpt2": "sequence-classification",
    "bert": "sequence-classification",
    "t5": "sequence-to-sequence",
    "llama": "causal-language-modeling",
}


@pytest.fixture
def rows(tmp_path):
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdef ", k=draw.choice((3, 9, 60)))) for _ in range(40)]
    classes = [{"text": t, "label": "xy"[i % 2]} for i, t in enumerate(texts)]
    pairs = [{"prompt": t, "completion": t[:4]} for t in texts]
    for name, table in (("classes", classes), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in table))
    return tmp_path


@pytest.mark.parametrize("kind", list(SHAPES))
@pytest.mark.filterwarnings("ignore:mode_token")
def test_everywhere_in_a_run_and_never_too_long(rows, kind):
    task = SHAPES[kind]
    file = rows / ("classes.jsonl" if "classification" in task else "pairs.jsonl")
    made = Recipe(
        model={"config": kind, **SMALL}, task=task, data={"path": str(file)},
        methods=["mode_token(mode='[S2S]')"], batch={"size": 8, "length": 24, "pad_to": 1},
        budget="2steps",
    )  # fmt: skip
    result = run(made, out=rows / "runs", device="cpu")
    done = open_run(result.folder, device="cpu")
    token = done.tokenizer.convert_tokens_to_ids("[S2S]")
    loop = done.assembly.loop
    source = [json.loads(line) for line in file.read_text().splitlines()]
    met = {
        "training": loop.drawer.draw(Step(0, 0.0, 0))[0],
        "evaluation": next(iter(done.assembly.batches("test"))),
        "prediction": next(done._batches(source, labeled=False)),
    }
    place = int(done.tokenizer.cls_token_id is not None)
    for moment, batch in met.items():
        assert (batch["input_ids"][:, place] == token).all(), moment
        assert batch["input_ids"].shape[1] <= 24, moment
    assert met["prediction"]["input_ids"].shape[1] == 24
    assert next(iter(done.predict(source[:3])))["id"] is not None


def test_text_is_scored_as_often_as_without(rows):
    """Windows are a token shorter; each token of the text still counts exactly once."""
    file = rows / "text.jsonl"
    file.write_text("".join(json.dumps({"text": "abcdefgh" * n}) + "\n" for n in range(1, 21)))
    counts = []
    for spec in ([], ["mode_token"]):
        made = Recipe(
            model={"config": "gpt2", **SMALL}, task="causal-language-modeling",
            data={"path": str(file), "text": "text"}, methods=spec, batch={"length": 20},
        )  # fmt: skip
        if spec:
            with pytest.warns(UserWarning):
                materials = load_materials(made)
        else:
            materials = load_materials(made)
        here = Context(tokenizer=materials.tokenizer, task=made.task)
        shown = materials.splits["test"]
        for method in made.methods:
            shown = [method.present(example, here) for example in shown]
        assert max(len(e["input_ids"]) for e in shown) == 20
        counts.append(sum(int((torch.tensor(e["labels"][1:]) != -100).sum()) for e in shown))
    assert counts[0] == counts[1]
