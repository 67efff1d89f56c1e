"""bench prefill: the promised figures, and prompts that cannot be read."""

from __future__ import annotations

import json

import pytest

ARMS = ["padded", "sorted", "packed", "packed list", "one by one"]


@pytest.fixture
def prompts(work):
    texts = ["a", "one two three " * 4, "short", "a middling prompt of some words", "x y"]
    (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    return "prompts.jsonl"


def test_every_way_is_measured_and_gives_the_same_logits(outlay, prompts):
    found = outlay(
        "bench", "prefill", "llama", "--data", prompts, "--repeats", "1", "--batch-size", "3",
        "--json", "--device", "cpu",
    ).json  # fmt: skip
    assert list(found["arms"]) == ARMS
    assert found["prompts"] + found["left_out"] == 5
    for arm in found["arms"].values():
        assert arm["logits_gap"] <= 1e-5
        assert arm["seconds_per_prompt"] > 0 and arm["peak_bytes"] > 0 and arm["cache_bytes"] > 0
    tokens = {name: arm["computed_tokens"] for name, arm in found["arms"].items()}
    assert tokens["packed"] < tokens["sorted"] <= tokens["padded"]
    assert tokens["one by one"] == found["tokens"]


def test_the_table_says_what_packing_gives(outlay, prompts):
    out = outlay("bench", "prefill", "gpt2", "--data", prompts, "--repeats", "1").out
    assert "packed, a cache a prompt" in out and "times as fast as padded" in " ".join(out.split())


def test_a_column_that_is_not_there_is_refused(outlay, prompts):
    answer = outlay("bench", "prefill", "llama", "--data", prompts, "--text", "question")
    assert answer.code == 2 and "no column 'question'" in answer.err and "prompt" in answer.err


def test_prompts_of_one_token_alone_are_refused(outlay, work):
    (work / "short.jsonl").write_text('{"prompt": ""}\n')
    answer = outlay("bench", "prefill", "llama", "--data", "short.jsonl")
    assert answer.code == 2 and "two tokens" in answer.err
