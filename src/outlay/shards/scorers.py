"""What gives a text a number: linear models on hashed words, word lists, overlaps, fastText.

A scorer's `column` names the property that a high value means; values are float32 in [0, 1].
"""

from __future__ import annotations

import hashlib
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.drafts import drafted
from ..core.errors import ConfigError, DataError, MissingExtra, require
from .sets import digest
from .words import content_of, words_of

Scores = NDArray[np.float32]


class Scorer(ABC):
    """Gives texts numbers and lives in a folder.

    Attributes:
        column: The property that a high value means.
    """

    kind: ClassVar[str]
    column: str

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when any score would."""

    @abstractmethod
    def score(self, texts: Sequence[str]) -> Scores:
        """One value in [0, 1] a text. Shape (texts,)."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write JSON, and safetensors where there are arrays."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, facts: dict[str, Any]) -> Scorer:
        """What `save` wrote; `facts` are its JSON."""


def _write(folder: Path, facts: dict[str, Any], arrays: dict[str, Any] | None = None) -> None:
    with drafted(folder) as draft:
        (draft / "scorer.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        if arrays:
            from safetensors.numpy import save_file

            save_file(arrays, draft / "arrays.safetensors")


def load_scorer(folder: Path, column: str | None = None) -> Scorer:
    """Read a scorer that `save` wrote.

    Args:
        folder: The folder.
        column: Another name for its property.

    Raises:
        ConfigError: If it holds no scorer.
    """
    try:
        facts = json.loads((folder / "scorer.json").read_text(encoding="utf-8"))
        kind = _KINDS[facts.pop("kind")]
        if column is not None:
            facts["column"] = column
        return kind.read(folder, facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{str(folder)!r} holds no scorer ({error})", "give a folder that a scorer's save wrote"
        ) from None


# ---- linear --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HashedLinear(Scorer):
    """Logistic regression on hashed runs of words.

    A text's features are its words and runs of up to `ngrams` words, hashed into `2^bits` places;
    the sum of their weights is divided by the square root of their number, so that long texts are
    no surer than short ones by length alone.

    Attributes:
        column: See `Scorer`.
        weights: Shape (2^bits,).
        bias: Added to every text.
        ngrams: Longest run of words.
    """

    kind: ClassVar[str] = "hashed-linear"
    column: str
    weights: NDArray[np.float32]
    bias: float = 0.0
    ngrams: int = 2

    @classmethod
    def fit(
        cls,
        positive: Sequence[str],
        negative: Sequence[str],
        column: str,
        *,
        ngrams: int = 2,
        bits: int = 18,
        penalty: float = 1.0,
    ) -> HashedLinear:
        """Learn from texts with and without the property; the classes weigh the same in total.

        The objective (mean log loss and `penalty / (2 n)` times the squared norm, bias left out)
        is convex and minimized by L-BFGS: the same texts give the same weights.

        Raises:
            DataError: If a class is empty.
        """
        for name, texts in (("with", positive), ("without", negative)):
            if not texts:
                raise DataError(
                    f"no text {name} the property {column!r} to learn from",
                    "give at least one of each",
                )
        from scipy.optimize import minimize

        size = 1 << bits
        matrix = _matrix([*positive, *negative], ngrams, bits)
        sign = np.repeat([1.0, -1.0], [len(positive), len(negative)])
        share = np.repeat([0.5 / len(positive), 0.5 / len(negative)],
                          [len(positive), len(negative)])  # fmt: skip
        strength = penalty / len(sign)

        def loss(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            margin = sign * (matrix @ x[:-1] + x[-1])
            value = share @ np.logaddexp(0.0, -margin) + 0.5 * strength * (x[:-1] @ x[:-1])
            slope = -share * sign / (1.0 + np.exp(np.minimum(margin, 700.0)))
            return value, np.append(matrix.T @ slope + strength * x[:-1], slope.sum())

        found = minimize(loss, np.zeros(size + 1), jac=True, method="L-BFGS-B",
                         options={"maxiter": 100})  # fmt: skip
        return cls(column, found.x[:-1].astype(np.float32), float(found.x[-1]), ngrams)

    @property
    def bits(self) -> int:
        """Logarithm of the number of places."""
        return len(self.weights).bit_length() - 1

    @property
    def fingerprint(self) -> str:
        """Changes when any score would."""
        content = hashlib.blake2b(self.weights.tobytes(), digest_size=16).hexdigest()
        return digest(self.kind, self.column, content, self.bias, self.ngrams)

    def score(self, texts: Sequence[str]) -> Scores:
        """Probability of the property. Shape (texts,)."""
        sums = np.empty(len(texts))
        for index, text in enumerate(texts):
            places = _places(text, self.ngrams, self.bits)
            sums[index] = self.weights[places].sum(dtype=np.float64) / max(1, len(places)) ** 0.5
        return _logistic(sums + self.bias)

    def save(self, folder: Path) -> None:
        """Write the scorer's folder."""
        facts = {
            "kind": self.kind, "column": self.column, "bias": self.bias, "ngrams": self.ngrams
        }  # fmt: skip
        _write(folder, facts, {"weights": self.weights})

    @classmethod
    def read(cls, folder: Path, facts: dict[str, Any]) -> HashedLinear:
        """Read the scorer's folder."""
        from safetensors.numpy import load_file

        return cls(weights=load_file(folder / "arrays.safetensors")["weights"], **facts)


def _logistic(values: NDArray[np.float64]) -> Scores:
    return (1.0 / (1.0 + np.exp(-np.clip(values, -80.0, 80.0)))).astype(np.float32)


def _places(text: str, ngrams: int, bits: int) -> NDArray[np.int64]:
    """Where the features of a text fall, repeats included."""
    words = [zlib.crc32(word.encode()) for word in words_of(text)]
    single = np.asarray(words, np.uint64)
    runs, parts = single, [single]
    for length in range(1, min(ngrams, len(words))):
        runs = (runs[:-1] * np.uint64(0x9E3779B97F4A7C15)) ^ single[length:]
        parts.append(runs)
    joined = np.concatenate(parts) * np.uint64(0xD6E8FEB86659FD93)
    return (joined >> np.uint64(64 - bits)).astype(np.int64)


def _matrix(texts: Sequence[str], ngrams: int, bits: int) -> Any:
    from scipy.sparse import csr_matrix

    found = [_places(text, ngrams, bits) for text in texts]
    starts = np.concatenate([[0], np.cumsum([len(places) for places in found])])
    values = np.concatenate([np.full(len(p), max(1, len(p)) ** -0.5) for p in found])
    shape = (len(texts), 1 << bits)
    return csr_matrix((values, np.concatenate(found), starts), shape=shape)


# ---- lists and overlaps --------------------------------------------------------------------------


@dataclass(frozen=True)
class WordList(Scorer):
    """Share of a text's words that stand on a list: whole words, normalized and case-folded.

    Attributes:
        column: See `Scorer`.
        words: Single words or runs of words.
    """

    kind: ClassVar[str] = "word-list"
    column: str
    words: tuple[str, ...]

    @cached_property
    def _listed(self) -> dict[int, frozenset[tuple[str, ...]]]:
        runs = [tuple(words_of(entry)) for entry in self.words]
        lengths = {len(run) for run in runs if run}
        return {n: frozenset(run for run in runs if len(run) == n) for n in lengths}

    @property
    def fingerprint(self) -> str:
        """Changes when any score would."""
        return digest(self.kind, self.column, sorted(self.words))

    def score(self, texts: Sequence[str]) -> Scores:
        """Hits over words, at most 1. Shape (texts,)."""
        shares = []
        for text in texts:
            words = words_of(text)
            hits = sum(
                run in listed
                for length, listed in self._listed.items()
                for run in zip(*(words[start:] for start in range(length)))
            )
            shares.append(min(1.0, hits / max(1, len(words))))
        return np.asarray(shares, np.float32)

    def save(self, folder: Path) -> None:
        """Write the scorer's folder."""
        _write(folder, {"kind": self.kind, "column": self.column, "words": self.words})

    @classmethod
    def read(cls, folder: Path, facts: dict[str, Any]) -> WordList:
        """Read the scorer's folder."""
        return cls(facts["column"], tuple(facts["words"]))


@dataclass(frozen=True)
class Overlap(Scorer):
    """1 for a text that shares a run of `n` words with reference texts, else 0.

    With `n = 0` whole texts are compared. Exact on words: runs are compared as 128-bit hashes of
    their normalized words. References of fewer than `n` words cannot be found.

    Attributes:
        column: See `Scorer`.
        n: Words of a run.
        runs: Hashes of the references' runs.
    """

    kind: ClassVar[str] = "overlap"
    column: str
    n: int
    runs: frozenset[bytes]

    @classmethod
    def of(cls, references: Iterable[str], column: str, n: int) -> Overlap:
        """With the runs of reference texts."""
        return cls(column, n, frozenset(run for text in references for run in _runs(text, n)))

    @property
    def fingerprint(self) -> str:
        """Changes when any score would."""
        content = hashlib.blake2b(b"".join(sorted(self.runs)), digest_size=16).hexdigest()
        return digest(self.kind, self.column, self.n, content)

    def score(self, texts: Sequence[str]) -> Scores:
        """1 or 0. Shape (texts,)."""
        hit = [any(run in self.runs for run in _runs(text, self.n)) for text in texts]
        return np.asarray(hit, np.float32)

    def save(self, folder: Path) -> None:
        """Write the scorer's folder."""
        runs = np.frombuffer(b"".join(sorted(self.runs)), np.uint8)
        _write(folder, {"kind": self.kind, "column": self.column, "n": self.n}, {"runs": runs})

    @classmethod
    def read(cls, folder: Path, facts: dict[str, Any]) -> Overlap:
        """Read the scorer's folder."""
        from safetensors.numpy import load_file

        joined = load_file(folder / "arrays.safetensors")["runs"].tobytes()
        runs = frozenset(joined[at : at + 16] for at in range(0, len(joined), 16))
        return cls(facts["column"], facts["n"], runs)


def _runs(text: str, n: int) -> Iterable[bytes]:
    if n == 0:
        return [content_of(text)]
    words = words_of(text)
    return (
        hashlib.blake2b(" ".join(words[at : at + n]).encode(), digest_size=16).digest()
        for at in range(len(words) - n + 1)
    )


# ---- other packages ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profanity(Scorer):
    """Probability of offensive language by alt-profanity-check's bundled linear model (English)."""

    kind: ClassVar[str] = "profanity"
    column: str = "toxicity"

    def __post_init__(self) -> None:
        _predict_profanity()

    @property
    def fingerprint(self) -> str:
        """Changes when any score would."""
        from importlib.metadata import version

        return digest(self.kind, self.column, version("alt-profanity-check"))

    def score(self, texts: Sequence[str]) -> Scores:
        """Shape (texts,)."""
        predict = _predict_profanity()
        return np.asarray(predict(list(texts)), np.float32)  # type: ignore[operator]

    def save(self, folder: Path) -> None:
        """Write the scorer's folder."""
        _write(folder, {"kind": self.kind, "column": self.column})

    @classmethod
    def read(cls, folder: Path, facts: dict[str, Any]) -> Profanity:
        """Read the scorer's folder."""
        return cls(**facts)


def _predict_profanity() -> Callable[[list[str]], Any]:
    return require("profanity_check", "toxicity").predict_prob  # type: ignore[attr-defined]


_LABEL = "__label__"
_FASTTEXT_BITS = 18
# Packages that install a module of this name and overwrite each other's files.
_FASTTEXTS = ("fasttext-numpy2-wheel", "fasttext-numpy2", "fasttext-wheel", "fasttext",
              "fasttext-predict")  # fmt: skip


def fasttext_module(training: bool = False) -> Any:
    """The module `fasttext`, if it is whole.

    Args:
        training: True if a model is to be trained.

    Raises:
        MissingExtra: If it is not installed, or the installed one cannot train.
        ConfigError: If several packages wrote over each other.
    """
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in _FASTTEXTS:
        try:
            version(name)
            found.append(name)
        except PackageNotFoundError:
            continue
    if len(found) > 1:
        raise ConfigError(
            f"{' and '.join(found)} install the same module 'fasttext' over each other",
            f"pip uninstall {' '.join(found)}, then pip install {_FASTTEXTS[0]}",
        )
    module: Any = require("fasttext", "fasttext")
    if training and not hasattr(module, "train_supervised"):
        raise MissingExtra(
            f"{found[0] if found else 'the installed fasttext'} cannot train",
            f"pip uninstall {' '.join(found)}, then pip install {_FASTTEXTS[0]}",
        )
    return module


@dataclass(frozen=True)
class FastText(Scorer):
    """A supervised fastText model; ours has the labels 1 (with the property) and 0.

    Attributes:
        column: See `Scorer`.
        path: The model's `.bin` file.
        label: Label that stands for the property, without its prefix.
    """

    kind: ClassVar[str] = "fasttext"
    column: str
    path: Path
    label: str = "1"

    @classmethod
    def fit(
        cls,
        positive: Sequence[str],
        negative: Sequence[str],
        column: str,
        path: Path,
        *,
        ngrams: int = 2,
        bits: int = 18,
    ) -> FastText:
        """Train on one thread, so that the same texts give the same model, and write it.

        Raises:
            ConfigError: If there are too few features for fastText to start from.
            DataError: If a class is empty, or the training broke down.
        """
        # On one thread fastText 0.9.2 sets a tenth of its matrix and leaves the rest as the memory
        # was. A matrix of 64 MB comes from fresh pages, which are zero; a small one does not.
        if bits < _FASTTEXT_BITS:
            raise ConfigError(
                f"bits = {bits} is too few for fastText", f"give {_FASTTEXT_BITS} or more"
            )
        module = fasttext_module(training=True)
        if not positive or not negative:
            raise DataError(
                f"no texts to learn {column!r} from", "give at least one with and one without"
            )
        import os
        import tempfile

        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            train, model = Path(folder) / "train.txt", Path(folder) / "model.bin"
            with train.open("w", encoding="utf-8") as file:
                for label, texts in (("1", positive), ("0", negative)):
                    file.writelines(f"{_LABEL}{label} {_one_line(text)}\n" for text in texts)
            try:
                trained = module.train_supervised(
                    str(train), dim=64, wordNgrams=ngrams, bucket=1 << bits, epoch=5, minCount=5,
                    thread=1, verbose=0,
                )  # fmt: skip
            except (RuntimeError, ValueError) as error:
                raise DataError(
                    f"fastText cannot learn {column!r} from these texts ({error})",
                    "give more texts, or use the hashed backend",
                ) from None
            trained.save_model(str(model))
            os.replace(model, path)
        return cls(column, path)

    @property
    def fingerprint(self) -> str:
        """Changes when any score would."""
        with self.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return digest(self.kind, self.column, content, self.label)

    @cached_property
    def _model(self) -> Any:
        return fasttext_module().load_model(str(self.path))

    def __getstate__(self) -> dict[str, Any]:
        return {"column": self.column, "path": self.path, "label": self.label}

    def score(self, texts: Sequence[str]) -> Scores:
        """Probability of the label. Shape (texts,)."""
        labels, values = self._model.predict([_one_line(text) for text in texts], k=-1)
        wanted = f"{_LABEL}{self.label}"
        found = [
            next((float(p) for name, p in zip(names, shares) if name == wanted), 0.0)
            for names, shares in zip(labels, values)
        ]
        return np.clip(np.asarray(found, np.float32), 0.0, 1.0)

    def save(self, folder: Path) -> None:
        """Write the scorer's folder, the model in it."""
        import shutil

        with drafted(folder) as draft:
            shutil.copyfile(self.path, draft / "model.bin")
            facts = {"kind": self.kind, "column": self.column, "label": self.label}
            (draft / "scorer.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, facts: dict[str, Any]) -> FastText:
        """Read the scorer's folder."""
        return cls(path=folder / "model.bin", **facts)


def _one_line(text: str) -> str:
    """Line breaks would end the text, and words that look like labels would be labels."""
    return text.replace("\n", " ").replace(_LABEL, "label")


_KINDS: dict[str, Any] = {
    kind.kind: kind for kind in (HashedLinear, WordList, Overlap, Profanity, FastText)
}
