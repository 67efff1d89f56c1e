"""AdaLoRA (arXiv 2303.10512): does a rank budget that moves between layers beat equal ranks?

Claim (Table 1): at an equal number of final parameters AdaLoRA is better than LoRA, 88.86 against
88.15 on average over GLUE at the smallest budget, and the lead grows as the budget shrinks.

Arms at a final average rank of 1 and 4, over every linear layer that is adapted: LoRA, AdaLoRA
from 2 to 1 and from 6 to 4 (the paper's own starts), and at rank 1 four that take one idea away
each: SVD-shaped adapters without pruning, pruning by magnitude, pruning at random, and LoRA of
rank 2, which trains as many numbers as AdaLoRA does before it prunes. Rank 2 is left out.

The size on the language model is this script's choice: 0.01 nats is one percent of perplexity.
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

SIZE = {QUESTIONS: 0.007, GLASS: 0.01}


def _arms(where: str) -> tuple[str, ...]:
    def lora(rank: int) -> str:
        return f"peft(type='LORA', r={rank}, lora_alpha={2 * rank}{where}) @ optimizer.lr=1e-2"

    def adalora(start: int, end: int, more: str = "") -> str:
        return f"adalora(init_r={start}, target_r={end}{more}{where}) @ optimizer.lr=3e-2"

    return (
        f"LoRA r1={lora(1)}",
        f"AdaLoRA r1={adalora(2, 1)}",
        f"random r1={adalora(2, 1, ', importance=' + repr('random'))}",
        f"magnitude r1={adalora(2, 1, ', importance=' + repr('magnitude'))}",
        f"unpruned r1={adalora(1, 1)}",
        f"LoRA r2={lora(2)}",
        f"LoRA r4={lora(4)}",
        f"AdaLoRA r4={adalora(6, 4)}",
    )


REPLICATION = Replication(
    paper=2,
    slug="adalora",
    title="Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
    arxiv="2303.10512",
    claim="at an equal number of final parameters AdaLoRA is better than LoRA, most at the "
    "smallest budget.",
    baseline="LoRA r1",
    method="AdaLoRA r1",
    tasks=(
        questions(lambda size: _arms(layers(size))),
        glass(lambda size: _arms("")),
    ),
    claims=(
        Claim(
            name="better at rank 1",
            text="AdaLoRA is better than LoRA at a final average rank of 1",
            arm="AdaLoRA r1", than="LoRA r1", kind="better", size=SIZE,
            source="Table 1: 88.86 against 88.15 on average at 0.3 M parameters",
        ),
        Claim(
            name="importance",
            text="the importance score chooses better than chance",
            arm="AdaLoRA r1", than="random r1", kind="better", size=SIZE, role="secondary",
            source="the specification's control",
        ),
        Claim(
            name="uncertainty",
            text="sensitivity and uncertainty choose better than magnitude",
            arm="AdaLoRA r1", than="magnitude r1", kind="better", size=SIZE, role="secondary",
            source="Table 4: up to 0.9 points",
        ),
        Claim(
            name="allocation",
            text="moving ranks between layers is better than equal ranks of the same shape",
            arm="AdaLoRA r1", than="unpruned r1", kind="better", size=SIZE, role="secondary",
            source="the specification's ablation",
        ),
        Claim(
            name="start counts",
            text="AdaLoRA is not worse than LoRA with the rank that it starts from",
            arm="AdaLoRA r1", than="LoRA r2", kind="not_worse", size=SIZE, role="secondary",
            source="the specification's pitfall: training memory is that of the start",
        ),
        Claim(
            name="smaller is wider",
            text="the lead over LoRA is wider at rank 1 than at rank 4",
            arm="AdaLoRA r1", than="LoRA r1", kind="better", size=SIZE, role="secondary",
            beyond=("AdaLoRA r4", "LoRA r4"),
            source="the specification's claim under test",
        ),
        Claim(
            name="time",
            text="AdaLoRA takes at most 16 % more time than LoRA",
            arm="AdaLoRA r1", than="LoRA r1", kind="at_most", quantity="seconds",
            size={QUESTIONS: 1.16, GLASS: 1.16}, role="secondary",
            source="appendix H: 11 to 16 % an epoch",
        ),
    ),
    grid={"optimizer.lr": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)},
    limits=(
        NO_DOWNLOAD,
        NO_VISION,
        "rank 2 is not run; a full fine-tuning reference is left to `outlay compare`",
    ),
)  # fmt: skip
