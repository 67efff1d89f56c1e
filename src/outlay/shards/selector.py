"""What a method of selection says once, for shards on disk and for the examples of a run alike."""

from __future__ import annotations

import hashlib
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..core.errors import ConfigError, DataError
from .deciding import Columns, Rule, decide
from .reading import date_of, key_of, read
from .scorers import Scorer
from .sets import Fields, digest, open_shards

if TYPE_CHECKING:
    from ..core.context import Context

SAMPLE = 20_000  # documents of the pool that a scorer may learn from
SAMPLE_CHARACTERS = 10_000  # of each of them
_HELD_OUT = {"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
Texts = Callable[[], list[str]]


class Selecting:
    """Scores, then a rule on scores: `select` follows from these two.

    A method inherits this beside `OnData`.
    """

    card: ClassVar[Any]

    @abstractmethod
    def scorers(self, pool: Texts, folder: Path) -> tuple[Scorer, ...]:
        """The scorers that the rule reads, fitted.

        Args:
            pool: Gives a random sample of the pool's texts; called only if it is needed.
            folder: Where large models may be written.
        """

    @abstractmethod
    def rule(self, seed: int) -> Rule:
        """What is kept.

        Args:
            seed: Of random orders, where the method has no seed of its own.
        """

    def files(self) -> tuple[str, ...]:
        """Files and folders whose content the scores depend on."""
        return ()

    def identity(self, seed: int) -> str:
        """Changes when the selection from one pool would."""
        contents = [_content(Path(name).expanduser()) for name in self.files()]
        return digest(self.spec(), contents, seed)  # type: ignore[attr-defined]

    def select(self, pool: Any, context: Context | None = None) -> Any:
        """From a pool to the pool of the examples whose rows are kept.

        Raises:
            DataError: If the pool's examples have no texts behind them, or none is kept.
        """
        seed = 0 if context is None else context.seed
        documents = pool.documents()
        rows, texts = columns_of(documents, pool)
        with tempfile.TemporaryDirectory() as folder:
            for scorer in self.scorers(lambda: sampled(rows, texts), Path(folder)):
                rows[scorer.column] = scorer.score(texts)
        reasons = decide(self.rule(seed), lambda: [rows]).apply(rows)
        kept = [i for (_, indices), why in zip(documents, reasons) if why == "" for i in indices]
        if not kept:
            raise DataError(
                f"{self.card.name} keeps none of {len(documents):,} documents",
                "loosen its settings",
            )
        return pool.keep(kept)


def columns_of(documents: Sequence[Any], pool: Any) -> tuple[dict[str, Any], list[str]]:
    """The columns of a side table, and the texts, of a pool's rows."""
    texts: list[str] = [_text(row) for row, _ in documents]
    lengths = getattr(pool.examples, "lengths", None)

    def tokens(index: int) -> int:
        if lengths is not None:
            return lengths[index]
        return len(pool.examples[index].get("input_ids", ()))

    rows = {
        "key": np.asarray([key_of(row["id"]) for row, _ in documents], np.uint64),
        "characters": np.asarray([len(text) for text in texts], np.int64),
        "bytes": np.asarray([len(text.encode()) for text in texts], np.int64),
        "tokens": np.asarray([sum(map(tokens, indices)) for _, indices in documents], np.int64),
        "date": np.asarray([date_of(row.get("date")) for row, _ in documents], object),
        "domain": np.asarray([row["domain"] for row, _ in documents], object),
    }
    return rows, texts


def _text(row: Any) -> str:
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    parts = [row[key] for key in ("text", "text_pair", "prompt", "completion") if key in row]
    if not parts:
        raise DataError("the examples have no text to choose by", "leave the selection out")
    return "\n".join(parts)


def sampled(rows: Columns, texts: Sequence[str], count: int = SAMPLE) -> list[str]:
    """The texts whose ids hash lowest: a random sample that no order changes."""
    chosen = np.argsort(rows["key"], kind="stable")[:count]
    return [str(texts[index])[:SAMPLE_CHARACTERS] for index in chosen.tolist()]


def texts_of(name: str, column: str = "text", what: str = "texts") -> list[str]:
    """All texts of a small file or folder of shards.

    Args:
        name: Its path.
        column: Column of the text.
        what: What the texts are, for messages.

    Raises:
        DataError: If a row is unusable, naming it, or there is none.
    """
    found = []
    fields = Fields(text=column)
    for shard in open_shards(name, fields).shards:
        for batch in read(shard, fields):
            if batch.quarantined:
                bad = batch.quarantined[0]
                raise DataError(
                    f"{what}: {bad.file} line {bad.line}: {bad.reason}",
                    "repair that row or take it out",
                )
            found += [document.text for document in batch.documents]
    if not found:
        raise DataError(f"{name!r} holds no {what}", "give a file with at least one row")
    return found


def refuse_held_out(name: str, allowed: bool, setting: str) -> None:
    """A target must not be what the result is judged on.

    Raises:
        ConfigError: If the file or its folder is named after a test or validation split.
    """
    path = Path(name)
    words = {*path.name.lower().replace("-", ".").replace("_", ".").split("."),
             path.parent.name.lower()}  # fmt: skip
    held = sorted(words & _HELD_OUT)
    if held and not allowed:
        raise ConfigError(
            f"{setting} = {name!r} is named after a {held[0]} split",
            "choose by training examples, or set allow_held_out=True",
        )


def _content(path: Path) -> str:
    """A hash of a file, or of all files of a folder."""
    if not path.exists():
        raise ConfigError(f"{str(path)!r} does not exist", "give a file or a folder")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = hashlib.blake2b(digest_size=16)
    for file in files:
        found.update(f"{file.relative_to(path).as_posix()}\x1f{file.stat().st_size}\x1f".encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                found.update(piece)
    return found.hexdigest()
