"""Documents as one memory-mapped stream of tokens, read in full rows of one length."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from ...core.drafts import drafted
from ...core.errors import ConfigError, DataError
from ...core.method import Example
from .columns import Row

_AT_ONCE = 1000  # documents that the tokenizer gets in one call
_VERSION = 1


class Blocks(Sequence[Example]):
    """Rows of `length` tokens of a token store; made when they are asked for.

    A row begins with the last token of the row before, so that every token but a domain's first is
    predicted exactly once. Rows do not cross domains; a domain's last one may be shorter.

    Args:
        tokens: The stream, domain after domain. Shape (tokens,), unsigned integers.
        domains: Name and number of tokens of each domain, in the stream's order.
        length: Tokens of a row, >= 2.
        pairs: Cut each row in two halves, `input_ids` and `labels`: text and its continuation.

    Attributes:
        ids: `DOMAIN#NUMBER` of each row.
        domains: Domain of each row.
        lengths: Tokens of each row.
    """

    def __init__(
        self, tokens: Any, domains: Sequence[tuple[str, int]], length: int, pairs: bool = False
    ) -> None:
        self.tokens, self.length, self.pairs = tokens, length, pairs
        self.names = [name for name, _ in domains]
        self._begins, self._ends, self._first = [], [], []
        start = rows = 0
        for _, count in domains:
            self._begins.append(start)
            self._ends.append(start + count)
            self._first.append(rows)
            start += count
            rows += max(1, -(-(count - 1) // (length - 1))) if count else 0
        self._rows = rows
        spans = [self._span(index) for index in range(rows)]
        self.domains = tuple(self.names[d] for d, _, _ in spans)
        self.lengths = tuple(end - begin for _, begin, end in spans)
        self.ids = tuple(
            f"{self.names[d]}#{i - self._first[d]}" for i, (d, _, _) in enumerate(spans)
        )

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        domain, begin, end = self._span(index)
        ids = self.tokens[begin:end].tolist()
        half = -(-len(ids) // 2)
        first, second = (ids[:half], ids[half:] or ids[-1:]) if self.pairs else (ids, list(ids))
        return {
            "id": self.ids[index],
            "domain": self.names[domain],
            "input_ids": first,
            "labels": second,
        }

    def _span(self, index: int) -> tuple[int, int, int]:
        """Domain and first and last place in the stream of one row."""
        domain = bisect.bisect_right(self._first, index) - 1
        begin = self._begins[domain] + (index - self._first[domain]) * (self.length - 1)
        return domain, begin, min(begin + self.length, self._ends[domain])


def blocks(
    rows: Sequence[Row],
    tokenizer: Any,
    length: int,
    task: str = "causal-language-modeling",
    folder: Path | None = None,
) -> Sequence[Example]:
    """Rows of text as full blocks of tokens, from a store that is written once.

    Every document is ended by the end-of-text token; documents of a domain stay in their order.

    Args:
        rows: Rows with `text` and `domain`.
        tokenizer: The run's tokenizer.
        length: Tokens of a block, the shared first one included.
        task: For sequence to sequence each block is a text and its continuation.
        folder: Where stores are kept; the cache folder by default.

    Raises:
        ConfigError: If the task, the columns or the length do not go with blocks.
    """
    if task not in ("causal-language-modeling", "sequence-to-sequence"):
        raise ConfigError(f"data.blocks does not go with {task}", "leave it out")
    if length < 2:
        raise ConfigError(f"batch.length = {length} leaves no room for text", "raise batch.length")
    if not rows:
        return []
    if "text" not in rows[0]:
        raise ConfigError("data.blocks joins plain text", "name a column with data.text")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "data.blocks parts documents by an end-of-text token, and the tokenizer has none",
            "use another model.tokenizer, or leave data.blocks out",
        )
    import numpy as np

    if folder is None:
        from ...assets.sources import cache_folder

        folder = cache_folder() / "tokens"
    place = folder / _key(rows, tokenizer)
    if not (place / "store.json").is_file():
        _write(place, rows, tokenizer)
    try:
        facts = json.loads((place / "store.json").read_text(encoding="utf-8"))
        tokens = np.load(place / "tokens.npy", mmap_mode="r", allow_pickle=False)
        if len(tokens) != sum(count for _, count in facts["domains"]):
            raise ValueError("it is cut short")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the token store {str(place)!r} is damaged ({error})", "delete that folder"
        ) from None
    pairs = task == "sequence-to-sequence"
    return Blocks(tokens, [tuple(d) for d in facts["domains"]], length, pairs)


def _key(rows: Sequence[Row], tokenizer: Any) -> str:
    """Names a store: its documents, their order and domains, and the tokenizer."""
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    shown = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    digest.update(f"{_VERSION}\x1f{tokenizer.eos_token_id}\x1f{shown}".encode())
    for row in rows:
        text = row["text"].encode()
        digest.update(f"\x1f{row['domain']}\x1f{len(text)}\x1f".encode())
        digest.update(text)
    return digest.hexdigest()


def _write(place: Path, rows: Sequence[Row], tokenizer: Any) -> None:
    import numpy as np

    by_domain: dict[str, list[str]] = {}
    for row in rows:
        by_domain.setdefault(row["domain"], []).append(row["text"])
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    domains, parts = [], []
    for domain, texts in by_domain.items():
        stream = np.concatenate([np.asarray(d, kind) for d in _encoded(texts, tokenizer)])
        domains.append((domain, len(stream)))
        parts.append(stream)
    try:
        with drafted(place) as draft:
            np.save(draft / "tokens.npy", np.concatenate(parts), allow_pickle=False)
            facts = {"domains": domains, "documents": len(rows)}
            (draft / "store.json").write_text(json.dumps(facts), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the token store {str(place)!r} cannot be written ({error.strerror})",
            "free some space, or set OUTLAY_CACHE to another folder",
        ) from None


def _encoded(texts: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of documents, each with the end-of-text token behind it."""
    from ..models.quiet import quiet_transformers

    end = tokenizer.eos_token_id
    with quiet_transformers():
        for start in range(0, len(texts), _AT_ONCE):
            some = list(texts[start : start + _AT_ONCE])
            for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
                yield [*ids, end]
