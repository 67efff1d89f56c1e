"""The label space of a task: names in id order, weights, and the unit of real targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Labels:
    """What a model predicts, in the order of its logits.

    Attributes:
        names: Class names (sorted), or the names of real-valued targets; empty for language
            modeling.
        weights: Loss weight of each class; of the positive side of each label in
            multi-label classification. Empty means 1 everywhere.
        scale: Standard deviation of each real target over the training rows, in the target's
            own unit. A model predicts target / scale; export and predictions multiply it back.
        mean: Mean of each real target over the training rows; only the head's bias starts there.
        image: Channels, height and width of an image; empty for text.
    """

    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    image: tuple[int, ...] = ()

    @classmethod
    def read(cls, plain: Mapping[str, Sequence[Any]]) -> Labels:
        """From the plain values that `dataclasses.asdict` and JSON make of it."""
        return cls(**{key: tuple(values) for key, values in plain.items()})

    def __len__(self) -> int:
        return len(self.names)

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each logit, as transformers writes it into a config."""
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        """Logit of each name."""
        return {name: index for index, name in enumerate(self.names)}


def sorted_names(names: set[str]) -> tuple[str, ...]:
    """Whole numbers by value, anything else by spelling."""
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))
