"""The two tasks that the adapter replications share: what they are, at each size.

`minilm-questions`: a pre-trained sentence encoder on questions in six classes; adapters in its
top two layers, whose frozen inputs are kept. Accuracy: a classification task near pre-training.
`glass-lm`: a causal language model of 0.85 M parameters moved from one author to product
reviews; adapters in every layer. Loss in nats a token: continuous, and far from pre-training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..comparison.replicate import Task

QUESTIONS, GLASS = "minilm-questions", "glass-lm"

CONSTANT_CLASS = "a constant class"
UNTRAINED = "the language model before it is adapted"
NO_DOWNLOAD = (
    "the paper's models and data sets (DeBERTa-v3, RoBERTa, LLaMA-2; GLUE, SQuAD, GSM8K) are not "
    "packaged for offline use: a 22.7 M encoder and a 0.85 M language model stand in, so the "
    "paper's own scores are not reproduced, only its comparisons"
)
NO_VISION = (
    "the specification's image experiment (a vision transformer pre-trained in the run, then "
    "rotated images) is not run: `glass-lm` takes its place as the task far from pre-training"
)

Arms = Callable[[str], tuple[str, ...]]

_QUESTIONS: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        "budget": "4steps", "every.evaluate": None, "data.limit": 80,
        "data.validation_share": 40, "data.test_share": 40,
    },
    "cpu": {"budget": "150steps", "every.evaluate": None},
    "gpu": {
        "budget": "600steps", "every.evaluate": None, "model.cache_frozen": False,
        "batch.size": 32,
    },
}  # fmt: skip
_GLASS: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"budget": "4steps", "every.evaluate": None, "data.limit": 40},
    "cpu": {"budget": "100steps", "every.evaluate": None},
    "gpu": {"budget": "600steps", "every.evaluate": None},
}


def layers(size: str) -> str:
    """Which layers of the encoder are adapted, as the end of a call string.

    The top two on a CPU, so that the frozen ones below are computed once; all on a GPU.
    """
    return "" if size == "gpu" else ", layers_to_transform=(-2, -1)"


def questions(arms: Arms, note: str = "") -> Task:
    """`minilm-questions`."""
    return Task(
        name=QUESTIONS,
        recipe=QUESTIONS,
        arms=arms,
        changes=_QUESTIONS,
        floor=0.25,  # the largest class holds 23 % of the rows
        floor_source=CONSTANT_CLASS,
        note=note,
    )


def glass(arms: Arms, note: str = "") -> Task:
    """`glass-lm`."""
    return Task(
        name=GLASS,
        recipe=GLASS,
        arms=arms,
        changes=_GLASS,
        floor=5.8,  # nats a token; measured 5.84 on the test split
        floor_source=UNTRAINED,
        note=note,
    )
