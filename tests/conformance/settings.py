"""Canonical small settings of every method: what conformance, resume and pairs run over.

A method of the registry without a row here fails a test; a row brings every check at once.
"""

from __future__ import annotations

from collections.abc import Iterable

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
    "probe": ("probe",),
    "full": ("full", "full(layers_to_transform=(1,))"),
}

# Rows whose first forward pass is not the base model's. None so far.
MOVES_AT_START: frozenset[str] = frozenset()

# Rows that have nothing to train on some shapes: there is no head of the task's own.
HEADS_ONLY: frozenset[str] = frozenset({"probe"})

# A stand-in of every way of changing a layer: pairs are formed of these.
PAIRED: dict[str, tuple[str, ...]] = {
    "bone": ("bone(r=4)", "bone(r=8, variant='bat')"),
    "peft": ("peft(type='LORA', r=4)", "peft(type='LORA', r=4, use_dora=True)"),
}


def specs() -> list[str]:
    return [spec for rows in ROWS.values() for spec in rows]


def representatives() -> list[str]:
    """One row a method, and one more where variants claim different things."""
    return [spec for name, rows in ROWS.items() for spec in PAIRED.get(name, rows[:1])]


def on_shapes(shapes: Iterable[str]) -> list[tuple[str, str]]:
    """Every row on every shape that it can train."""
    return [
        (shape, spec)
        for shape in shapes
        for spec in specs()
        if shape == "bert" or spec not in HEADS_ONLY
    ]
