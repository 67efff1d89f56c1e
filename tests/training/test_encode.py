"""Token ids, labels and what is scored."""

from __future__ import annotations

import pytest
import torch

from outlay.core.errors import ConfigError, DataError
from outlay.training.data.dataset import encode
from outlay.training.data.labels import Labels
from outlay.training.models.tokens import byte_tokenizer

LM = "causal-language-modeling"
TOKENIZER = byte_tokenizer()
END, START = TOKENIZER.eos_token_id, TOKENIZER.bos_token_id


def ids_of(text):
    return TOKENIZER(text)["input_ids"]


def row(**columns):
    return {"id": "r", "domain": "d", **columns}


def scored(example):
    return TOKENIZER.decode([t for t in example["labels"] if t not in (-100, END)])


def test_classes_pairs_and_truncation():
    labels = Labels(("no", "yes"))
    rows = [row(text="abc", label="yes"), row(text="abcdefgh", label="no"), row(text="")]
    first, second, empty = encode(rows, "sequence-classification", TOKENIZER, 6, labels)
    assert first == {"id": "r", "domain": "d", "input_ids": ids_of("abc"), "labels": 1}
    assert second["input_ids"] == ids_of("abcdef")
    assert empty == {"id": "r", "domain": "d", "input_ids": [TOKENIZER.pad_token_id]}
    (pair,) = encode([row(text="ab", text_pair="cd")], "sequence-classification", TOKENIZER, 9)
    assert pair["input_ids"] == ids_of("abcd")
    assert encode([], "sequence-classification", TOKENIZER) == []


def test_other_targets():
    names = Labels(("x", "y", "z"))
    (several,) = encode([row(text="a", label=["z", "x"])], "multi-label-classification", TOKENIZER,
                        labels=names)  # fmt: skip
    assert several["labels"] == [1.0, 0.0, 1.0]
    (one,) = encode([row(text="a", label=2.5)], "regression", TOKENIZER)
    assert one["labels"] == 2.5
    (two,) = encode([row(text="a", label=[1, 2.5])], "regression", TOKENIZER)
    assert two["labels"] == [1.0, 2.5]


def test_images_are_tensors_of_their_own():
    import numpy as np

    image = np.ones((1, 2, 2), np.float32)
    (example,) = encode([row(pixel_values=image, label="b")], "image-classification",
                        labels=Labels(("a", "b")))  # fmt: skip
    image[:] = 0
    assert torch.equal(example["pixel_values"], torch.ones(1, 2, 2))
    assert example["labels"] == 1


@pytest.mark.parametrize("length", [2, 3, 5, 64])
def test_every_token_of_a_text_is_predicted_exactly_once(length):
    text = "twelve chars"
    examples = encode([row(text=text)], LM, TOKENIZER, length)
    ids = [*ids_of(text), END]
    assert all(2 <= len(e["input_ids"]) <= length for e in examples)
    assert examples[0]["input_ids"][0] == ids[0]
    assert [t for e in examples for t in e["labels"][1:]] == ids[1:]
    assert [e["id"] for e in examples] == ["r", *(f"r#{k}" for k in range(1, len(examples)))]


def test_only_the_completion_is_scored():
    (example,) = encode([row(prompt="ask", completion="tell")], LM, TOKENIZER, 64)
    assert example["input_ids"] == [*ids_of("asktell"), END]
    assert example["labels"] == [-100] * 3 + [*ids_of("tell"), END]
    (unknown,) = encode([row(prompt="ask")], LM, TOKENIZER, 64)
    assert unknown["labels"] == [-100] * 3
    (bare,) = encode([row(prompt="", completion="tell")], LM, TOKENIZER, 64)
    assert bare["input_ids"][0] == START
    assert scored(bare) == "tell"


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_its_end():
    (example,) = encode([row(prompt="0123456789", completion="ab")], LM, TOKENIZER, 8)
    assert TOKENIZER.decode(example["input_ids"][:5]) == "56789"
    assert scored(example) == "ab"
    (example,) = encode([row(prompt="01", completion="abcdefghij")], LM, TOKENIZER, 8)
    assert TOKENIZER.decode(example["input_ids"]) == "01abcdef"
    (example,) = encode([row(prompt="0123456789", completion="abcdefghij")], LM, TOKENIZER, 8)
    assert TOKENIZER.decode(example["input_ids"]) == "6789abcd"


TALK = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so"},
]


def test_a_conversation_without_a_template():
    (example,) = encode([row(messages=TALK)], LM, TOKENIZER, 128)
    text = TOKENIZER.decode(example["input_ids"], skip_special_tokens=True)
    assert text == "system: be\nuser: hi\nassistant: ho\nuser: why\nassistant: so\n"
    assert scored(example) == " ho so"
    assert example["labels"].count(END) == 2
    (cut,) = encode([row(messages=TALK)], LM, TOKENIZER, 40)
    assert len(cut["input_ids"]) == len(cut["labels"]) == 40


def test_a_conversation_with_the_tokenizers_own_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (example,) = encode([row(messages=TALK)], LM, tokenizer, 128)
    assert tokenizer.decode(example["input_ids"]) == (
        "[system]be[user]hi[assistant]ho</s>[user]why[assistant]so</s>"
    )
    assert scored(example) == "hoso"
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode([row(messages=TALK)], LM, tokenizer, 128)


def test_sequence_to_sequence():
    (example,) = encode(
        [row(prompt="abcdef", completion="xyz")], "sequence-to-sequence", TOKENIZER, 4
    )
    assert example["input_ids"] == ids_of("abcd")
    assert example["labels"] == [*ids_of("xyz"), END]
    (unknown,) = encode([row(prompt="ab")], "sequence-to-sequence", TOKENIZER, 4)
    assert "labels" not in unknown


@pytest.mark.parametrize(("task", "length"), [(LM, 1), ("sequence-classification", 0)])
def test_a_length_without_room_is_refused(task, length):
    with pytest.raises(ConfigError, match="no room"):
        encode([row(text="a", label="x")], task, TOKENIZER, length, Labels(("x",)))
