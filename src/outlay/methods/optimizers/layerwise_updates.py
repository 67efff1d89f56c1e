"""Update every parameter as soon as its gradient is there, and let the gradient go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.card import Card
from ...core.method import Method


@dataclass(frozen=True, kw_only=True)
class LayerwiseUpdates(Method):
    """Updates inside the backward pass, one optimizer a parameter. As in LOMO, arXiv 2306.09782.

    No two gradients need to be in memory at once. It acts at no place: its claim,
    `update.inside`, tells the loop when to update, so it stacks with any optimizer, whose `build`
    is then called once a parameter. With several micro-batches gradients accumulate as always and
    the update comes in the last one's backward pass: the result is that of the plain order, and
    so is then the memory. What needs all gradients at once (`optimizer.clip`, watchers of
    gradients) is refused by name.
    """

    card: ClassVar[Card] = Card(
        name="layerwise_updates",
        title="Full Parameter Fine-tuning for Large Language Models with Limited Resources",
        arxiv="2306.09782",
        group="optimizers",
        summary="Update each parameter inside the backward pass; stacks with any optimizer.",
        authors="Kai Lv, Yuqing Yang, Tengxiao Liu, Qinghui Gao, Qipeng Guo, Xipeng Qiu",
        year=2023,
        claims=("update.inside",),
        saves=("memory",),
    )
