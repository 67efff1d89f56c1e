"""SVFit (arXiv 2409.05926): is LoRA matched by training sixteen times fewer numbers?

Claim (abstract): better than LoRA with 16 times fewer trainable parameters. The factor fits all
singular values of query and value against LoRA of rank 8 there; these are the layers adapted.

Arms: SVFit on all values, on the 16 largest and the 16 smallest, and on random orthonormal
directions; LoRA of rank 8; and what competes at its size: LoRA of rank 1 on the value matrices
alone, biases (BitFit) or, where a model has none, its norms' scales, and the head alone.

The margins are the specification's half point of accuracy, and 0.01 nats on the language model,
one percent of perplexity. Text-to-image generation cannot be done with packaged data.
"""

from __future__ import annotations

from ..comparison.replicate import Replication
from ..comparison.verdicts import Claim
from ._tasks import (
    GLASS,
    NO_DOWNLOAD,
    NO_VISION,
    QUESTIONS,
    glass,
    layers,
    questions,
)

MARGIN = {QUESTIONS: 0.005, GLASS: 0.01}
_BIASES = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
_NORMS = "('input_layernorm', 'post_attention_layernorm', 'norm')"


def _arms(where: str, query: str, value: str) -> tuple[str, ...]:
    both, one = f"target_modules=('{query}', '{value}')", f"target_modules=('{value}',)"
    return (
        f"LoRA=peft(type='LORA', r=8, lora_alpha=16, {both}{where}) @ optimizer.lr=3e-3",
        f"SVFit=svfit(rank='full', {both}{where}) @ optimizer.lr=1e-1",
        f"random directions=svfit(rank='full', basis='random', {both}{where}) @ optimizer.lr=1e-1",
        f"SVFit 16=svfit(rank=16, {both}{where}) @ optimizer.lr=1e-1",
        f"minor 16=svfit(rank=16, selection='minor', {both}{where}) @ optimizer.lr=1e-1",
        f"LoRA r1=peft(type='LORA', r=1, lora_alpha=2, {one}{where}) @ optimizer.lr=1e-2",
    )


def _questions(size: str) -> tuple[str, ...]:
    biases = "('bias',)"
    if size != "gpu":
        paths = [f"encoder.layer.{layer}.{part}.bias" for layer in (4, 5) for part in _BIASES]
        biases = repr(tuple(paths))
    return (
        *_arms(layers(size), "query", "value"),
        f"biases=probe(modules_to_save={biases}) @ optimizer.lr=1e-2",
        "head=probe @ optimizer.lr=3e-2",
    )


def _glass(size: str) -> tuple[str, ...]:
    return (
        *_arms("", "q_proj", "v_proj"),
        f"norms=probe(modules_to_save={_NORMS}) @ optimizer.lr=1e-2",
    )


def _rival(name: str, task: str) -> Claim:
    return Claim(
        name=f"beyond {name}",
        text=f"SVFit is not worse than training the {name} alone",
        arm="SVFit", than=name, kind="not_worse", size={task: MARGIN[task]}, role="secondary",
        source="the specification: at this size these are the real competitors",
    )  # fmt: skip


REPLICATION = Replication(
    paper=35,
    slug="svfit",
    title="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular "
    "Values",
    arxiv="2409.05926",
    claim="SVFit is not worse than LoRA of rank 8 with a sixteenth of its trainable parameters.",
    baseline="LoRA",
    method="SVFit",
    tasks=(
        questions(_questions),
        glass(_glass, "The model has no biases: the scales of its norms stand for BitFit."),
    ),
    claims=(
        Claim(
            name="equal at a sixteenth",
            text="SVFit is not worse than LoRA with at most a sixteenth of its parameters",
            arm="SVFit", than="LoRA", kind="not_worse", size=MARGIN,
            quantity="adapter_parameters", at_most=1 / 16,
            source="abstract: ahead of LoRA with 16 times fewer; the margin is the specification's",
        ),
        Claim(
            name="singular directions",
            text="singular directions are better than random ones",
            arm="SVFit", than="random directions", kind="better", size=MARGIN, role="secondary",
            source="the specification's control",
        ),
        Claim(
            name="largest values",
            text="the largest singular values are better to train than the smallest",
            arm="SVFit 16", than="minor 16", kind="better", size=MARGIN, role="secondary",
            source="abstract: the top values hold more than 99 % of the information",
        ),
        Claim(
            name="beyond small LoRA",
            text="SVFit is not worse than a LoRA of its own size",
            arm="SVFit", than="LoRA r1", kind="not_worse", size=MARGIN, role="secondary",
            source="the specification's control",
        ),
        _rival("biases", QUESTIONS),
        _rival("head", QUESTIONS),
        _rival("norms", GLASS),
    ),
    grid={"optimizer.lr": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)},
    limits=(
        NO_DOWNLOAD,
        NO_VISION,
        "text-to-image generation (DreamBooth) cannot be done with packaged data",
        "all linear layers are not adapted, only query and value, which fit the factor of 16",
    ),
)  # fmt: skip
