"""Token stores: every token is predicted once, rows are lazy, stores are whole or not there."""

import json

import pytest

from outlay.core.errors import ConfigError, DataError
from outlay.training.data.blocks import Blocks, blocks
from outlay.training.data.pool import Pool
from outlay.training.models.tokens import byte_tokenizer, tokenizer_of, train_tokenizer

ROWS = [
    {"id": str(i), "domain": "odd" if i % 2 else "even", "text": f"document number {i} " * (i + 1)}
    for i in range(9)
]


@pytest.fixture
def made(tmp_path):
    return blocks(ROWS, byte_tokenizer(), 16, folder=tmp_path)


def stream(domain):
    tokenizer = byte_tokenizer()
    ids = []
    for row in ROWS:
        if row["domain"] == domain:
            ids += [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], 2]
    return ids


@pytest.mark.parametrize("domain", ["even", "odd"])
def test_every_token_but_the_first_is_predicted_once(made, domain):
    mine = [example for example in made if example["domain"] == domain]
    told = [t for example in mine for t in example["labels"][1:]]
    assert told == stream(domain)[1:]
    assert all(len(e["input_ids"]) == 16 for e in mine[:-1])
    assert [e["input_ids"][-1] for e in mine[:-1]] == [e["input_ids"][0] for e in mine[1:]]


def test_facts_are_known_without_making_examples(made, monkeypatch):
    examples = list(made)
    assert made.ids == tuple(e["id"] for e in examples)
    assert made.domains == tuple(e["domain"] for e in examples)
    assert made.lengths == tuple(len(e["input_ids"]) for e in examples)
    made_now, make = [], Blocks.__getitem__
    monkeypatch.setattr(Blocks, "__getitem__", lambda b, i: made_now.append(i) or make(b, i))
    pool = Pool(made, seed=1)
    kept = pool.keep([0, 2, 5])
    assert kept.ids == tuple(made.ids[i] for i in (0, 2, 5)) and len(kept) == 3
    pool.set_weights({"even": 1.0, "odd": 3.0})
    # The type checker of the tests looks at one item of what it is given.
    assert len(made_now) <= 8 < len(made)


def test_a_pool_over_blocks_draws_what_one_over_a_list_draws(made):
    lazy, plain = Pool(made, seed=3), Pool(list(made), seed=3)
    assert lazy.draw(40) == plain.draw(40)
    some = range(0, len(made), 3)
    assert lazy.keep(some).draw(5) == plain.keep(some).draw(5)
    assert made[1:3] == [made[1], made[2]] and made[-1] == made[len(made) - 1]


def test_pairs_are_a_text_and_its_continuation(tmp_path, made):
    pairs = blocks(ROWS, byte_tokenizer(), 16, "sequence-to-sequence", tmp_path)
    assert [p["input_ids"] + p["labels"] for p in pairs][:-1] == [
        e["input_ids"] for e in made
    ][:-1]  # fmt: skip
    assert all(p["labels"] for p in pairs)


def test_a_store_is_written_once_and_depends_on_text_and_tokenizer(tmp_path):
    first = blocks(ROWS, byte_tokenizer(), 16, folder=tmp_path)
    store = next(tmp_path.iterdir())
    before = (store / "tokens.npy").stat().st_mtime_ns
    again = blocks(ROWS, byte_tokenizer(), 8, folder=tmp_path)
    assert (store / "tokens.npy").stat().st_mtime_ns == before and len(again) > len(first)
    blocks(ROWS[1:], byte_tokenizer(), 16, folder=tmp_path)
    blocks(ROWS, tokenizer_of(train_tokenizer(ROWS, 280, tmp_path / "t")), 16, folder=tmp_path)
    assert len([p for p in tmp_path.iterdir() if p.name != "t"]) == 3


def test_a_damaged_store_is_refused(tmp_path):
    blocks(ROWS, byte_tokenizer(), 16, folder=tmp_path)
    store = next(tmp_path.iterdir())
    facts = json.loads((store / "store.json").read_text())
    facts["domains"][0][1] += 1
    (store / "store.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="damaged"):
        blocks(ROWS, byte_tokenizer(), 16, folder=tmp_path)


def test_refusals(tmp_path):
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match="does not go with regression"):
        blocks(ROWS, tokenizer, 16, "regression", tmp_path)
    with pytest.raises(ConfigError, match="leaves no room"):
        blocks(ROWS, tokenizer, 1, folder=tmp_path)
    with pytest.raises(ConfigError, match="plain text"):
        blocks([{"id": 1, "domain": "", "prompt": "a"}], tokenizer, 16, folder=tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-text"):
        blocks(ROWS, tokenizer, 16, folder=tmp_path)
    assert blocks([], byte_tokenizer(), 16, folder=tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_one_token_alone_still_makes_a_row(tmp_path):
    row = [{"id": "0", "domain": "", "text": ""}]
    assert [e["input_ids"] for e in blocks(row, byte_tokenizer(), 4, folder=tmp_path)] == [[2]]


def test_a_trained_tokenizer_reads_any_text_and_is_kept(tmp_path):
    text = train_tokenizer(ROWS, 300, tmp_path)
    tokenizer = tokenizer_of(text)
    assert len(tokenizer) <= 300 and tokenizer.eos_token_id == 2
    for sample in ("document number 3", "Grüße, 世界\n\t x"):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    pieces = tokenizer("document number 3 document")["input_ids"]
    assert len(pieces) < len("document number 3 document") / 2
    assert (
        train_tokenizer(ROWS, 300, tmp_path) == text == train_tokenizer(ROWS, 300, tmp_path / "n")
    )
    with pytest.raises(ConfigError, match="256 bytes"):
        train_tokenizer(ROWS, 200, tmp_path)
