"""Canonical small settings of every method: what conformance, resume and pairs run over.

A method of the registry without a row here fails a test; a row brings every check at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from outlay.core import registry

_TARGET = str(Path(__file__).with_name("target.jsonl"))

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
    "sltrain": (
        "sltrain(rank=8, density=0.1)",
        "sltrain(rank=8, density=0.2, mode='materialize', target_modules='all-linear')",
        "sltrain(rank=8, density=0.1, mode='factored', train_values=False)",
    ),
    "low_rank": ("low_rank(rank=8)", "low_rank(rank=8, init='zero_b')"),
    "layerwise_updates": ("layerwise_updates",),
    "adamw_8bit": ("adamw_8bit(block_size=64)",),
    "galore": ("galore(rank=4, update_every=2)",),
    "apollo": ("apollo(rank=4, update_every=2)", "apollo(variant='mini', update_every=2)"),
    "spdf": (
        "spdf(sparsity=0.6)",
        "spdf(sparsity=0.4, distribution='erk', until=0.5, exclude=('k_proj',))",
        "spdf(sparsity=0.5, init='magnitude')",
    ),
    "dynamic_sparsity": (
        "dynamic_sparsity(sparsity=0.5, every=1, stop=1.0)",
        "dynamic_sparsity(rule='set', sparsity=0.5, every=2, distribution='erk')",
    ),
    "gradual_pruning": (
        "gradual_pruning(every=1, start=0.0, end=0.8)",
        "gradual_pruning(final_sparsity=0.6, every=1, shape='cubic', scope='layer', unit='steps')",
        "gradual_pruning(every=1, structure='2:4', score='random', shape='linear', end=1.0)",
    ),
    "classp": (
        "classp(threshold=1e-5)",
        "classp(p=2, threshold='quantile:0.5')",
        "classp(p=2, threshold=0.5, mode='tensor_any')",
    ),
    "ewc": (
        "ewc(samples=3)",
        "ewc(samples=3, fisher='empirical', online=True, decay=0.5)",
    ),
    "l2_anchor": ("l2_anchor(strength=5.0)", "l2_anchor(anchor='initial', strength=5.0)"),
    "replay": ("replay(size=5, share=0.5)",),
    "random_selection": (
        "random_selection(keep=0.5)",
        "random_selection(keep=0.4, unit='documents', inverse=True, seed=3)",
    ),
    "quality_filters": (
        "quality_filters(words=('salt', 'fig'), twin='random')",
        "quality_filters(words=('salt', 'fig'), inverse=True)",
    ),
    "linear_selection": (
        f"linear_selection(target={_TARGET!r}, keep=0.5, bits=10)",
        f"linear_selection(target={_TARGET!r}, keep=0.5, bits=10, twin='length')",
    ),
    "decontamination": (f"decontamination(against={_TARGET!r}, n=8)",),
    "probe": ("probe",),
    "full": ("full", "full(layers_to_transform=(1,))"),
}

# Packages without which a method is refused. `make setup` installs them; elsewhere the rows are
# left out.
EXTRAS: dict[str, str] = {"adamw_8bit": "torchao"}

# Rows whose first forward pass is not the base model's: they train from scratch.
MOVES_AT_START: frozenset[str] = frozenset((*ROWS["sltrain"], *ROWS["low_rank"]))

# Rows whose gradients are gone once backward is over.
INSIDE: frozenset[str] = frozenset({"layerwise_updates"})

# Rows that have nothing to train on some shapes: there is no head of the task's own.
HEADS_ONLY: frozenset[str] = frozenset({"probe"})

# Methods that make text to predict, and so do nothing for classes: where they are tried instead.
HOMES: dict[str, str] = {"ul2": "llama"}

# Methods that follow tasks in sequence: their recipes have two.
OF_TASKS = frozenset({"ewc", "l2_anchor", "replay"})


def needs_tasks(methods: Sequence[Any]) -> bool:
    """True if one of the methods does nothing without a change of task."""
    return any(registry.build(method).card.name in OF_TASKS for method in methods)


# Rows that choose examples: of fewer they make another choice.
CHOOSE: frozenset[str] = frozenset(
    spec
    for name in ("random_selection", "quality_filters", "linear_selection", "decontamination")
    for spec in ROWS[name]
)

# Rows that find nothing on texts as short as these.
IDLE: frozenset[str] = frozenset(ROWS["decontamination"])

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


def runnable() -> dict[str, tuple[str, ...]]:
    """Rows of the methods whose packages are there."""
    return {n: rows for n, rows in ROWS.items() if n not in EXTRAS or find_spec(EXTRAS[n])}


def specs() -> list[str]:
    return [spec for rows in runnable().values() for spec in rows]


def representatives() -> list[str]:
    """One row a method, and one more where variants claim different things."""
    return [spec for name, rows in runnable().items() for spec in PAIRED.get(name, rows[:1])]


def on_shapes(shapes: Sequence[str]) -> list[tuple[str, str, bool]]:
    """(shape, row, slow): every row on every shape that it can train.

    Quick are all rows on the first shape, every method on every shape, and each further row on
    one more shape in turn.
    """
    found, turn = [], 0
    for name, rows in runnable().items():
        for index, spec in enumerate(rows):
            turn += index > 0
            for place, shape in enumerate(shapes):
                quick = index == 0 or place == 0 or place == 1 + turn % (len(shapes) - 1)
                if name in HOMES and shape == "bert":
                    continue
                if place == 0 or spec not in HEADS_ONLY:
                    found.append((shape, spec, not quick))
    return found
