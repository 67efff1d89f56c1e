"""The stratified choice: its promises hold for any groups."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from outlay.training.data.encode import encode
from outlay.training.data.splits import rows_fingerprint, strata, stratified
from outlay.training.models.tokens import byte_tokenizer

TOKENIZER = byte_tokenizer()


@settings(deadline=None, max_examples=60)
@given(
    groups=st.lists(st.sampled_from("abcde"), min_size=2, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_exact_count_fair_shares_and_nobody_is_emptied(groups, share, seed):
    count = round(share * (len(groups) - 1))
    chosen = stratified(groups, count, seed, "s")
    assert len(chosen) == count
    assert chosen == stratified(groups, count, seed, "s")
    assert chosen <= set(range(len(groups)))
    sizes, taken = Counter(groups), Counter(groups[i] for i in chosen)
    if count <= len(groups) - len(sizes):
        assert all(taken[g] < size for g, size in sizes.items())
    if min(sizes.values()) >= 4 and count <= len(groups) / 2:
        # Large groups: rounding alone moves a share, and by less than one row.
        for group, size in sizes.items():
            assert abs(taken[group] - count * size / len(groups)) < 1


def test_the_stream_and_the_seed_decide():
    groups = ["a"] * 50
    first = stratified(groups, 10, 0, "test")
    assert first != stratified(groups, 10, 0, "validation")
    assert first != stratified(groups, 10, 1, "test")
    # What is chosen does not depend on how many rows of other groups there are before.
    assert stratified(groups, 0, 0, "test") == set()
    assert stratified(groups, 50, 0, "test") == set(range(50))


def test_strata_of_each_kind():
    rows = [{"label": float(i), "domain": "d"} for i in range(20)]
    assert strata(rows, "regression") == [i // 2 for i in range(20)]
    rows = [{"label": ["a", "b"], "domain": ""}, {"label": [], "domain": ""}]
    assert strata(rows, "multi-label-classification") == [("a", "b"), ()]
    assert strata([{"domain": "x"}], "causal-language-modeling") == ["x"]


def test_the_fingerprint_sees_order_split_and_columns():
    rows = [{"id": "1", "text": "a"}, {"id": "2", "text": "b"}]
    prints = {
        rows_fingerprint([("train", rows)], 1),
        rows_fingerprint([("train", rows[::-1])], 1),
        rows_fingerprint([("test", rows)], 1),
        rows_fingerprint([("train", rows[:1]), ("test", rows[1:])], 1),
        rows_fingerprint([("train", rows)], 2),
    }
    assert len(prints) == 5


@settings(deadline=None, max_examples=40)
@given(text=st.text(max_size=40), length=st.integers(2, 20))
def test_windows_predict_every_token_once(text, length):
    row = {"id": "r", "domain": "", "text": text}
    examples = encode([row], "causal-language-modeling", TOKENIZER, length)
    ids = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
    assert [t for e in examples for t in e["labels"][1:]] == ids[1:]
    assert all(len(e["input_ids"]) <= length for e in examples)


@settings(deadline=None, max_examples=40)
@given(
    prompt=st.text(max_size=30), answer=st.text(min_size=1, max_size=30), length=st.integers(2, 24)
)
def test_completions_fit_and_score_the_answer_from_its_start(prompt, answer, length):
    row = {"id": "r", "domain": "", "prompt": prompt, "completion": answer}
    (example,) = encode([row], "causal-language-modeling", TOKENIZER, length)
    assert len(example["input_ids"]) == len(example["labels"]) <= length
    scored = [t for t in example["labels"] if t != -100]
    assert scored
    assert scored == [*TOKENIZER(answer)["input_ids"], TOKENIZER.eos_token_id][: len(scored)]
    assert example["labels"][0] == -100
