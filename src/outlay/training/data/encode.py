"""Rows into examples: token ids, labels, and which tokens count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...core.errors import ConfigError, DataError
from ...core.method import Example
from ..models.quiet import quiet_transformers
from ..objectives import IGNORED
from ..specs import IMAGES, MASKED
from .columns import Row
from .labels import Labels


def encode(
    rows: Sequence[Row],
    task: str,
    tokenizer: Any = None,
    length: int = 512,
    labels: Labels | None = None,
) -> list[Example]:
    """Examples of a task.

    Text for classification and regression is cut at `length` tokens. Text for language modeling
    is cut into windows of `length` tokens that overlap by one, so that every token is predicted
    exactly once; the windows after the first have ids that end in "#1", "#2" and so on. A
    completion is scored together with the end-of-text token, its prompt is not; if both do not
    fit, the prompt loses its beginning first, down to half of the length. Of a conversation only
    the assistant's turns are scored.

    Args:
        rows: Rows as `load` gives them.
        task: One of `recipe.TASKS`.
        tokenizer: The run's tokenizer; None for images.
        length: Longest example in tokens.
        labels: Label space.

    Returns:
        Dicts with id, domain, the model's inputs and, where the row has one, `labels`: a class
        index, a list of 0.0 and 1.0, a float or a list of floats, or token ids with -100 for
        what is not scored.

    Raises:
        ConfigError: If `length` leaves no room for a token.
        DataError: If the tokenizer's chat template cannot be cut into turns.
    """
    labels = labels or Labels()
    if task in IMAGES:
        import torch

        return [
            {
                **_identity(row),
                "pixel_values": torch.from_numpy(row["pixel_values"].copy()),
                **_target(row, task, labels),
            }
            for row in rows
        ]
    with quiet_transformers():
        room = length - tokenizer.num_special_tokens_to_add(pair=False)
        if room < 1 or (task == "causal-language-modeling" and length < 2):
            raise ConfigError(
                f"batch.length = {length} leaves no room for text", "raise batch.length"
            )
        if task == "causal-language-modeling":
            return [example for row in rows for example in _causal(row, tokenizer, length)]
        if task == "sequence-to-sequence":
            return [_pair(row, tokenizer, length) for row in rows]
        return _texts(rows, task, tokenizer, length, labels)


def _identity(row: Row) -> Example:
    return {key: row[key] for key in ("id", "domain", "task") if key in row}


def _target(row: Row, task: str, labels: Labels) -> Example:
    if "label" not in row or task in MASKED:
        return {}
    label, index = row["label"], labels.label2id
    if task == "regression":
        return {"labels": [float(x) for x in label] if isinstance(label, list) else float(label)}
    if task == "multi-label-classification":
        return {"labels": [float(name in label) for name in labels.names]}
    return {"labels": index[label]}


def _texts(
    rows: Sequence[Row], task: str, tokenizer: Any, length: int, labels: Labels
) -> list[Example]:
    if not rows:
        return []
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    tokens = tokenizer(
        [row["text"] for row in rows],
        pairs,
        truncation=True,
        max_length=length,
        padding=False,
        return_attention_mask=False,
    )
    # A text without a single token still needs a row: the pad token stands for it.
    empty = [tokenizer.pad_token_id or 0]
    kinds = tokens.get("token_type_ids")
    examples = []
    for index, row in enumerate(rows):
        example = {**_identity(row), "input_ids": list(tokens["input_ids"][index]) or empty}
        if kinds is not None:
            example["token_type_ids"] = list(kinds[index]) or [0]
        examples.append(example | _target(row, task, labels))
    return examples


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _causal(row: Row, tokenizer: Any, length: int) -> Iterator[Example]:
    if "messages" in row:
        ids, scored = _conversation(row, tokenizer)
        labels = [token if score else IGNORED for token, score in zip(ids, scored)]
        yield {**_identity(row), "input_ids": ids[:length], "labels": labels[:length]}
    elif "prompt" in row:
        yield _completion(row, tokenizer, length)
    else:
        ids = _ended(_ids(tokenizer, row["text"], True), tokenizer)
        # The last token of a window is the first of the next: there it is context only.
        for number, start in enumerate(range(0, max(1, len(ids) - 1), length - 1)):
            piece = ids[start : start + length]
            name = row["id"] if number == 0 else f"{row['id']}#{number}"
            yield {**_identity(row), "id": name, "input_ids": piece, "labels": list(piece)}


def _completion(row: Row, tokenizer: Any, length: int) -> Example:
    prompt = _ids(tokenizer, row["prompt"], True)
    if len(prompt) > 1 and prompt[-1] == tokenizer.eos_token_id:
        prompt.pop()
    if not prompt:
        # Something must stand before the first scored token.
        start = tokenizer.bos_token_id
        prompt = [tokenizer.eos_token_id if start is None else start]
    answer = _ended(_ids(tokenizer, row.get("completion", ""), False), tokenizer)
    if "completion" not in row:
        answer = []
    kept = min(len(answer), max(length - len(prompt), length // 2))
    room = length - kept
    if len(prompt) > room:
        first = prompt[:1] if prompt[0] == tokenizer.bos_token_id and room > 1 else []
        prompt = first + prompt[len(prompt) - (room - len(first)) :]
    answer = answer[:kept]
    return {
        **_identity(row),
        "input_ids": prompt + answer,
        "labels": [IGNORED] * len(prompt) + answer,
    }


def _conversation(row: Row, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant wrote."""
    messages = row["messages"]
    if not getattr(tokenizer, "chat_template", None):
        return _plain_conversation(messages, tokenizer)
    ids: list[int] = []
    scored: list[bool] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _template(tokenizer, messages[:index], True)
        after = _template(tokenizer, messages[: index + 1], False)
        if after[: len(before)] != before or before[: len(ids)] != ids:
            raise DataError(
                f"row {row['id']!r}: the tokenizer's chat template rewrites earlier turns, so "
                "the assistant's words cannot be told apart",
                "give prompt and completion columns, or a tokenizer with a plainer template",
            )
        scored += [False] * (len(before) - len(ids)) + [True] * (len(after) - len(before))
        ids = after
    return ids, scored


def _template(tokenizer: Any, messages: Sequence[dict[str, str]], prompt: bool) -> list[int]:
    if not messages:
        return []
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=prompt
    )
    return _ids(tokenizer, text, False)


def _plain_conversation(
    messages: Sequence[dict[str, str]], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Without a template: "role: content" a line, the end-of-text token behind the assistant."""
    start = tokenizer.bos_token_id
    ids = [] if start is None else [int(start)]
    scored = [False] * len(ids)
    for message in messages:
        name = _ids(tokenizer, f"{message['role']}:", False)
        spoken = message["role"] == "assistant"
        words = _ids(tokenizer, f" {message['content']}", False)
        if spoken and tokenizer.eos_token_id is not None:
            words.append(tokenizer.eos_token_id)
        line = _ids(tokenizer, "\n", False)
        ids += [*name, *words, *line]
        scored += [False] * len(name) + [spoken] * len(words) + [False] * len(line)
    return ids, scored


def _pair(row: Row, tokenizer: Any, length: int) -> Example:
    tokens = tokenizer(row["prompt"], truncation=True, max_length=length)
    example = {**_identity(row), "input_ids": list(tokens["input_ids"]) or [tokenizer.pad_token_id]}
    if "completion" in row:
        answer = _ended(
            list(
                tokenizer(text_target=row["completion"], truncation=True, max_length=length)[
                    "input_ids"
                ]
            ),
            tokenizer,
        )
        example["labels"] = answer[:length]
    return example
