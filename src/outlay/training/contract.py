"""The audit of a backbone's input contract: does it see what it was trained to see?

Heads on features hide such mismatches: they lose accuracy and say nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .backbone import IMAGE, Backbone

_SAMPLE = 256
_ALONE = 4  # rows whose features are computed again by themselves


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What.
        status: "ok" or "warning".
        text: What was found, with figures.
    """

    check: str
    status: str
    text: str


def audit(backbone: Backbone, rows: Sequence[Any]) -> list[Finding]:
    """Look at inputs as the model sees them, and at what it makes of them.

    Args:
        backbone: The model.
        rows: Training rows; the first 256 are used.
    """
    sample = list(rows[:_SAMPLE])
    looked = _images(backbone, sample) if backbone.task == IMAGE else _texts(backbone, sample)
    together = np.concatenate(list(backbone.features(sample)))
    alone = np.concatenate(list(backbone.features(sample[:_ALONE], batch_size=1)))
    largest = max(1e-12, float(np.abs(alone).max()))
    apart = float(np.abs(alone - together[: len(alone)]).max()) / largest
    looked.append(
        _finding("a row's features do not depend on its batch", apart < 1e-3,
                 f"alone and in a batch they differ by {apart:.1e} of the largest")
    )  # fmt: skip
    still = int((together.std(axis=0) < 1e-7 * max(1e-12, np.abs(together).max())).sum())
    looked.append(
        _finding("features vary", still < together.shape[1] / 2,
                 f"{still} of {together.shape[1]} features are the same for all rows looked at")
    )  # fmt: skip
    zero = int((np.linalg.norm(together, axis=1) == 0).sum())
    looked.append(
        _finding("no feature vector is zero", zero == 0, f"{zero} of {len(together)} rows")
    )
    centered = together - together.mean(axis=0)
    spectrum = np.linalg.svd(centered, compute_uv=False) ** 2
    share = spectrum / max(spectrum.sum(), 1e-30)
    rank = float(np.exp(-(share * np.log(share + 1e-30)).sum()))
    looked.append(
        _finding("features are not one direction", rank >= 2,
                 f"effective rank {rank:.1f} of at most {min(together.shape)}")
    )  # fmt: skip
    return looked


def _finding(check: str, fine: bool, text: str) -> Finding:
    return Finding(check, "ok" if fine else "warning", text)


def _images(backbone: Backbone, sample: list[Any]) -> list[Finding]:
    wanted = backbone.preprocessing
    pixels = np.stack([row["pixel_values"] for row in sample])
    low, high = float(pixels.min()), float(pixels.max())
    found = [
        _finding("the model says how it wants images", wanted.declared,
                 f"preprocessor_config.json is {'there' if wanted.declared else 'missing'}: "
                 f"mean {wanted.mean or 'none'}, deviation {wanted.deviation or 'none'}"),
        _finding("values lie between 0 and 1 before standardizing", low >= 0 and 0.1 < high <= 1,
                 f"from {low:.3g} to {high:.3g}"),
    ]  # fmt: skip
    given, channels = pixels.shape[2:], pixels.shape[1]
    size = wanted.size or given
    factor = max(size[0] / given[0], given[0] / size[0])
    found.append(
        _finding("images have the model's size", factor <= 2,
                 f"{given[0]} x {given[1]}, seen as {size[0]} x {size[1]}")
    )  # fmt: skip
    found.append(
        _finding("images have the model's channels", wanted.channels in (0, channels),
                 f"{channels}, the model takes {wanted.channels or channels}")
    )  # fmt: skip
    if wanted.mean:
        seen = wanted.images(torch.from_numpy(pixels))
        mean, deviation = float(seen.mean()), float(seen.std())
        found.append(
            _finding("standardized values are near mean 0 and deviation 1",
                     abs(mean) < 1 and 0.3 < deviation < 3,
                     f"mean {mean:.2f}, deviation {deviation:.2f}")
        )  # fmt: skip
    return found


def _texts(backbone: Backbone, sample: list[Any]) -> list[Finding]:
    _, tokenizer = backbone.load()
    length = backbone.preprocessing.length
    texts = [row["text"] for row in sample]
    encoded = tokenizer(texts)["input_ids"]
    cut = sum(len(ids) > length for ids in encoded)
    every = list(itertools.chain.from_iterable(encoded))
    unknown = getattr(tokenizer, "unk_token_id", None)
    share = sum(i == unknown for i in every) / max(1, len(every)) if unknown is not None else 0.0
    pieces = len(every) / max(1, sum(len(text.split()) for text in texts))
    return [
        _finding("the tokenizer knows the text", share < 0.02, f"{share:.1%} unknown tokens"),
        _finding("words are not torn to pieces", pieces < 3, f"{pieces:.2f} tokens a word"),
        _finding("texts fit", cut <= 0.05 * len(sample),
                 f"{cut} of {len(sample)} are longer than {length} tokens and are cut"),
    ]  # fmt: skip
