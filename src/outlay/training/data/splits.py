"""Which row goes to which split: stratified, decided by (seed, row number) alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from ...core.method import seed_of


def content(row: dict[str, Any]) -> str:
    """A row's inputs without label, id and domain: equal for rows that are duplicates."""
    kept = {
        k: row[k] for k in ("text", "text_pair", "prompt", "completion", "messages") if k in row
    }
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False)
    if "pixel_values" in row:
        pixels = row["pixel_values"]
        text += f"{pixels.shape}{hashlib.sha256(pixels.tobytes()).hexdigest()}"
    return text


def strata(rows: Sequence[dict[str, Any]], task: str) -> list[Hashable]:
    """What a split keeps in proportion: the class, the set of labels, a tenth of the targets'
    range of ranks, or the domain.
    """
    if task == "regression":
        first = [r["label"][0] if isinstance(r["label"], list) else r["label"] for r in rows]
        order = sorted(range(len(rows)), key=lambda i: (first[i], i))
        tenth = dict.fromkeys(order, 0)
        for rank, index in enumerate(order):
            tenth[index] = rank * 10 // len(rows)
        return [tenth[index] for index in range(len(rows))]
    if rows and "label" in rows[0]:
        labels = [r.get("label") for r in rows]
        return [tuple(label) if isinstance(label, list) else label for label in labels]
    return [row["domain"] for row in rows]


def stratified(groups: Sequence[Hashable], count: int, seed: int, stream: str) -> set[int]:
    """Choose `count` indices so that every group gives its share, to within one row.

    Shares are rounded by the largest remainder. A group never gives its last row as long as
    others can give one instead, so no class disappears from what is left.

    Args:
        groups: Group of each row.
        count: How many rows to choose; at most as many as there are.
        seed: With `stream`, decides which rows of a group are chosen.
        stream: Name of the choice.
    """
    total = len(groups)
    keys = [seed_of(seed, stream, index) for index in range(total)]
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    exact = {group: count * len(rows) / total for group, rows in members.items()}
    quota = {g: min(int(exact[g]), len(rows) - 1) for g, rows in members.items()}
    by_remainder = sorted(members, key=lambda g: (-(exact[g] - quota[g]), str(g)))
    left = count - sum(quota.values())
    while left > 0:
        open_groups = [g for g in by_remainder if quota[g] < len(members[g]) - 1]
        for group in (open_groups or [g for g in by_remainder if quota[g] < len(members[g])])[
            :left
        ]:
            quota[group] += 1
            left -= 1
    return {
        index
        for group, rows in members.items()
        for index in sorted(rows, key=lambda i: keys[i])[: quota[group]]
    }


def rows_fingerprint(splits: Iterable[tuple[str, Sequence[dict[str, Any]]]], extra: Any) -> str:
    """SHA-256 over every row of every split in order, and over what `extra` says of them."""
    digest = hashlib.sha256(json.dumps(extra, sort_keys=True, default=str).encode())
    for name, rows in splits:
        digest.update(f"\0{name}\0{len(rows)}\0".encode())
        for row in rows:
            plain = {key: value for key, value in row.items() if key != "pixel_values"}
            digest.update(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode())
            if "pixel_values" in row:
                pixels = row["pixel_values"]
                digest.update(f"{pixels.shape}".encode() + pixels.astype("<f4").tobytes())
    return digest.hexdigest()
