"""Canonical small settings of every method: what conformance, resume and pairs run over.

A method of the registry without a row here fails a test; a row brings every check at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outlay.core import registry

ROWS: dict[str, tuple[str, ...]] = {
    "adalora": (
        "adalora(init_r=4, target_r=2, dropout=0.1)",
        "adalora(init_r=4, target_r=2, cost='params', compact_final=True, orth_norm='squared_sum')",
        "adalora(init_r=3, target_r=1, units='doublets', gamma=0.0, importance='sensitivity')",
        "adalora(init_r=3, target_r=2, importance='magnitude', every=2)",
    ),
    "bone": (
        "bone(r=4, dropout=0.1)",
        "bone(r=4, variant='mini', mini_r=8)",
        "bone(r=8, variant='bat')",
        "bone(r=8, variant='bat', bat_axis='col')",
    ),
    "lamda": (
        "lamda(r=4)",
        "lamda(r=4, init='svd_zero', freeze_fraction=0.0)",
        "lamda(r=4, init='code', freeze_fraction=0.6)",
        "lamda(r=4, allocate='energy_threshold', freeze_fraction=0.5)",
    ),
    "svfit": (
        "svfit",
        "svfit(rank=6, parameterisation='relative')",
        "svfit(rank=6, parameterisation='softplus', hold='both')",
        "svfit(rank=('energy', 0.5))",
        "svfit(rank=4, basis='random')",
    ),
    "peft": (
        "peft(type='LORA', r=4, lora_dropout=0.1)",
        "peft(type='LORA', r=4, use_dora=True)",
        "peft(type='VERA', r=8)",
        "peft(type='ADALORA', init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1)",
    ),
    "loss_weights": (
        "loss_weights(temperature=0.4)",
        "loss_weights(curve='quadratic', scope='micro', warmup_steps=1)",
        "loss_weights(curve='extremes', loss_range='quantile', warmup_temperature=9.0)",
    ),
    "ul2": (
        "ul2(sentinels=20)",
        "ul2(preset='s20', split='uniform', roll=True, sentinels=20)",
        "ul2(denoisers=(('R', 3, 0.15), ('S', 1.0)), mode_tokens=False, sentinels=20)",
    ),
    "feature_distillation": (
        "feature_distillation(teacher='original', pool='mean')",
        "feature_distillation(teacher='original', pool='tokens', distance='cosine', layer=1)",
        "feature_distillation(teacher='original', pool='mean', view='corrupted', weight=0.5)",
    ),
    "distance_to_initial": ("distance_to_initial(every=2)",),
    "mode_token": ("mode_token", "mode_token(mode='[S2S]')"),
    "probe": ("probe",),
    "full": ("full", "full(layers_to_transform=(1,))"),
}

# Rows whose first forward pass is not the base model's. None so far.
MOVES_AT_START: frozenset[str] = frozenset()

# Rows that have nothing to train on some shapes: there is no head of the task's own.
HEADS_ONLY: frozenset[str] = frozenset({"probe"})

# Methods that make text to predict, and so do nothing for classes: where they are tried instead.
HOMES: dict[str, str] = {"ul2": "llama"}

# Rows whose size depends on the weights' values: a plan loads none. It gives a bound for the
# first, and the size at equal ranks, which pay the same price, for the second.
BY_WEIGHTS: frozenset[str] = frozenset(
    {
        "svfit(rank=('energy', 0.5))",
        "lamda(r=4, allocate='energy_threshold', freeze_fraction=0.5)",
    }
)

# Methods that only look: a run ends at the same weights with and without them.
OBSERVERS: frozenset[str] = frozenset({"distance_to_initial"})

# A stand-in of every way of changing a layer: pairs are formed of these.
PAIRED: dict[str, tuple[str, ...]] = {
    "bone": ("bone(r=4)", "bone(r=8, variant='bat')"),
    "peft": ("peft(type='LORA', r=4)", "peft(type='LORA', r=4, use_dora=True)"),
}


def home(specs: Sequence[Any]) -> str:
    """The shape that methods are tried on where one is enough."""
    names = [registry.build(spec).card.name for spec in specs]
    return next((HOMES[name] for name in names if name in HOMES), "bert")


def specs() -> list[str]:
    return [spec for rows in ROWS.values() for spec in rows]


def representatives() -> list[str]:
    """One row a method, and one more where variants claim different things."""
    return [spec for name, rows in ROWS.items() for spec in PAIRED.get(name, rows[:1])]


def on_shapes(shapes: Sequence[str]) -> list[tuple[str, str, bool]]:
    """(shape, row, slow): every row on every shape that it can train.

    Quick are all rows on the first shape, every method on every shape, and each further row on
    one more shape in turn.
    """
    found, turn = [], 0
    for name, rows in ROWS.items():
        for index, spec in enumerate(rows):
            turn += index > 0
            for place, shape in enumerate(shapes):
                quick = index == 0 or place == 0 or place == 1 + turn % (len(shapes) - 1)
                if name in HOMES and shape == "bert":
                    continue
                if place == 0 or spec not in HEADS_ONLY:
                    found.append((shape, spec, not quick))
    return found
