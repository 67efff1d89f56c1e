"""Arms that belong to a recipe: what `outlay compare RECIPE` runs when no arm is given.

Learning rates stand here as numbers. They come from the validation grid that
`outlay compare RECIPE --tune recipe` runs, equal for every arm (that of `minilm-questions` lies in
benchmarks/results/demo_grid.json); a comparison that only uses them says that nothing was tuned
in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_TOP = "layers_to_transform=(-2, -1)"
_LORA = (
    "peft(type='LORA', r=8, lora_alpha=16, layers_to_transform=[4, 5], "
    "target_modules=['query', 'key', 'value', 'dense'])"
)


@dataclass(frozen=True)
class Suggestion:
    """Arms, and the grid that their learning rates come from.

    Attributes:
        arms: As `--arm` takes them.
        grid: Values of each setting that `--tune` tries.
        note: A sentence for the report when the grid is not run.
    """

    arms: tuple[str, ...]
    grid: dict[str, tuple[float, ...]] = field(default_factory=dict)
    note: str = ""


_NOTE = (
    "Learning rates were not tuned here; they are fixed from a validation grid that was equal "
    "for every arm."
)
_GRID = {"optimizer.lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)}

SUGGESTIONS: dict[str, Suggestion] = {
    "minilm-questions": Suggestion(
        (
            "probe=feature_probe",
            "tfidf=tfidf_logistic_regression",
            f"lora={_LORA} @ optimizer.lr=3e-3",
            f"adalora=adalora(init_r=12, target_r=8, {_TOP}) @ optimizer.lr=3e-2",
            f"bone=bone(r=8, {_TOP}) @ optimizer.lr=3e-3",
            f"svfit=svfit(rank=64, {_TOP}) @ optimizer.lr=3e-1",
        ),
        _GRID,
        _NOTE,
    ),
    "minilm-questions-full": Suggestion(
        (
            "probe=feature_probe",
            "head=probe",
            "tfidf=tfidf_logistic_regression",
            "full=full",
            "lora=peft(type='LORA', r=8, lora_alpha=16)",
            "dora=peft(type='LORA', r=8, lora_alpha=16, use_dora=True)",
            "vera=peft(type='VERA', r=256)",
            "adalora=adalora(init_r=12, target_r=8)",
            "adalora magnitude=adalora(init_r=12, target_r=8, importance='magnitude')",
            "bone shard=bone(r=8)",
            "bone mini=bone(r=8, variant='mini', mini_r=64)",
            "bone bat=bone(r=8, variant='bat')",
            "lamda=lamda(r=32)",
            "lamda++=lamda(r=32, allocate='energy_threshold')",
            "svfit=svfit(rank=64)",
            "svfit all values=svfit(rank='full')",
        ),
        {"optimizer.lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)},
        "",
    ),
    "pretrain-lm": Suggestion(
        (
            "dense=full @ optimizer.lr=3e-3",
            "low rank=low_rank(rank=64) @ optimizer.lr=3e-3",
            "sltrain=sltrain(rank=64, density=0.03) @ optimizer.lr=3e-3",
            "galore=galore(rank=64) @ optimizer.lr=1e-2",
            "apollo=apollo(rank=64) @ optimizer.lr=1e-2",
            "spdf=spdf(sparsity=0.75) @ optimizer.lr=3e-3",
            "gradual pruning=gradual_pruning(final_sparsity=0.6, every=10) @ optimizer.lr=3e-3",
            "loss weights=loss_weights @ optimizer.lr=3e-3",
            "ul2=ul2 @ optimizer.lr=3e-3",
        ),
        {"optimizer.lr": (1e-3, 3e-3, 1e-2, 3e-2)},
        "Learning rates were not tuned here; they are the papers' own, or the dense model's.",
    ),
    "digits-vit": Suggestion(
        ("all weights=full", "last block=full(layers_to_transform=(-1,))", "head=probe")
    ),
    "glass-lm": Suggestion(
        ("all weights=full", "bone=bone(r=8)", "adalora=adalora(init_r=6, target_r=4)")
    ),
}


def suggestion(recipe: str) -> Suggestion:
    """Arms of a recipe by name; none for a recipe of the user's own."""
    return SUGGESTIONS.get(recipe.strip().lower().replace("_", "-"), Suggestion(()))
