"""Bone (arXiv 2409.15371, now MiSS): does a shared block beat LoRA at equal parameters?

Claims (v12, Tables 4 and 8): better than LoRA at equal parameters, chiefly early in training,
faster and lighter; the Bat form better than the shard form. The paper gives all arms one learning
rate, which favors the method with the larger first gradients; here each arm has its own.

Arms: LoRA r = 8; shard with the ranks that give each layer the same number of parameters; bat and
mini; PiSSA; full fine-tuning of the adapted layers; and the specification's control, an adapter
whose A is fixed to random orthonormal rows, of the same rank: if it does as well, sharing is not
what matters. The control trains B S for a fixed A, where S adds r^2 numbers a matrix.

Sizes: two points of accuracy are the paper's own (Table 4); 0.02 nats on the language model, two
percent of perplexity, and half of both for the control, are this script's choice.

The specification's toy (a sine wave fitted by a 64-wide network) is no packaged task and is not
run. On the language model bat is left out: 341, its feed-forward width, shares no divisor with 128.
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

BETTER = {QUESTIONS: 0.02, GLASS: 0.02}
CONTROL = {QUESTIONS: 0.01, GLASS: 0.01}
# r of a shard layer for LoRA's r = 8: 8 (in + out) / out, rounded down, by layer.
_ENCODER = "(('intermediate.dense', 10), ('attention.output.dense', 16), ('output.dense', 40))"
_GLASS = "(('k_proj', 24), ('v_proj', 24), ('gate_proj', 11), ('up_proj', 11), ('down_proj', 29))"
# In bat r divides both sides.
_ENCODER_BAT = "(('intermediate.dense', 8), ('attention.output.dense', 16), ('output.dense', 32))"
_LORA = "type='LORA', r=8, lora_alpha=16"


def _arms(where: str, ranks: str) -> tuple[str, ...]:
    shard = f"r=16, rank_pattern={ranks}"
    fixed = f"{shard}, init='svd_zero', basis='random', freeze_fraction=None"
    full = "full(" + where.removeprefix(", ") + ")"
    return (
        f"LoRA=peft({_LORA}{where}) @ optimizer.lr=3e-3",
        f"Bone=bone({shard}{where}) @ optimizer.lr=3e-3",
        f"fixed random A=lamda({fixed}{where}) @ optimizer.lr=3e-2",
        f"PiSSA=peft({_LORA}, init_lora_weights='pissa'{where}) @ optimizer.lr=1e-3",
        f"full={full} @ optimizer.lr=3e-4",
    )


def _questions(size: str) -> tuple[str, ...]:
    where = layers(size)
    return (
        *_arms(where, _ENCODER),
        f"bat=bone(r=16, variant='bat', rank_pattern={_ENCODER_BAT}{where}) @ optimizer.lr=3e-3",
        f"mini=bone(r=16, variant='mini', mini_r=64{where}) @ optimizer.lr=1e-2",
    )


REPLICATION = Replication(
    paper=34,
    slug="bone",
    title="Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large "
    "Language Models",
    arxiv="2409.15371",
    claim="at equal trainable parameters, each at its own best learning rate, Bone is better than "
    "LoRA.",
    baseline="LoRA",
    method="Bone",
    tasks=(
        questions(_questions),
        glass(lambda size: _arms("", _GLASS), "bat and mini are left out: 341 has no divisor."),
    ),
    claims=(
        Claim(
            name="better at equal parameters",
            text="Bone is better than LoRA at equal trainable parameters",
            arm="Bone", than="LoRA", kind="better", size=BETTER,
            source="v12 Table 4: 86.35 against 84.28 on average; nats are this script's",
        ),
        Claim(
            name="sharing",
            text="sharing a block is better than a fixed random projection of the same rank",
            arm="Bone", than="fixed random A", kind="better", size=CONTROL, role="control",
            source="the specification's control",
        ),
        Claim(
            name="early",
            text="Bone's training loss is lower than LoRA's over the first tenth of the steps",
            arm="Bone", than="LoRA", kind="better", quantity="loss@0.1",
            size={QUESTIONS: 0.01, GLASS: 0.02}, role="secondary",
            source="v12 Fig. 1; the size, in nats, is this script's",
        ),
        Claim(
            name="PiSSA",
            text="Bone is better than PiSSA at equal trainable parameters",
            arm="Bone", than="PiSSA", kind="better", size=BETTER, role="secondary",
            source="v12 Table 5: 29.30 on average against 24.72 and less",
        ),
        Claim(
            name="bat",
            text="the bat form is better than the shard form",
            arm="bat", than="Bone", kind="better", size={QUESTIONS: 0.005}, role="secondary",
            source="the specification's claim (c); the size is this script's",
        ),
        Claim(
            name="time",
            text="Bone takes at most 0.94 of LoRA's time",
            arm="Bone", than="LoRA", kind="at_most", quantity="seconds",
            size={QUESTIONS: 0.94, GLASS: 0.94}, role="secondary",
            source="v12 Table 8: 1867 s against 1993 s",
        ),
        Claim(
            name="memory",
            text="Bone needs at most 0.91 of LoRA's peak memory",
            arm="Bone", than="LoRA", kind="at_most", quantity="peak_memory_bytes",
            size={QUESTIONS: 0.91, GLASS: 0.91}, role="secondary",
            source="v12 Table 8: 20.2 GB against 22.3 GB",
        ),
    ),
    grid={"optimizer.lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)},
    limits=(
        NO_DOWNLOAD,
        NO_VISION,
        "the sine toy of the paper's appendix C is no packaged task and is not run",
        "the first gradient's norm is not compared",
    ),
)  # fmt: skip
