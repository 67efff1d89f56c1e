"""SPDF: fixed masks in a run, dense fine-tuning after it, and FLOPs. arXiv 2303.10464."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import kit

import outlay
from outlay.core.errors import ConfigError, Conflict
from outlay.core.meter import FlopTable
from outlay.core.method import Watcher
from outlay.methods.sparse.spdf import SPDF, flop_ratio
from outlay.nn.prunable import prunable_weights
from outlay.training import checkpoint
from outlay.training.recipe import Recipe


@pytest.mark.parametrize(
    ("sparsity", "layers", "width", "expected"),
    [
        (0.5, 24, 2048, 1.665),
        (0.75, 24, 2048, 2.494),
        (0.5, 12, 768, 1.357),
        (0.75, 12, 768, 1.653),
        (0.9, 32, 4096, 5.18),
        (0.0, 12, 768, 1.0),
    ],
)
def test_flop_ratios(sparsity, layers, width, expected):
    found = flop_ratio(
        sparsity, layers=layers, width=width, inner=4 * width, length=2048, vocabulary=50_257
    )
    assert found == pytest.approx(expected, abs=5.1e-3 if expected == 5.18 else 5.1e-4)


class Look(Watcher):
    """What is zero after every step, and what trains."""

    def __init__(self, live: Any) -> None:
        self.live, self.steps = live, 0
        self.masks: dict[str, torch.Tensor] = {}

    def after_update(self, step: Any) -> None:
        self.steps += 1
        if not self.masks:
            self.masks = {n: m.keep.clone() for n, m in self.live.masks.items()}
        for name, keep in self.masks.items():
            assert torch.equal(self.live.masks[name].keep, keep), "masks do not move"
            parameter = self.live.parameter(name)
            assert bool((parameter[~keep] == 0).all()) and bool((parameter.grad[~keep] == 0).all())
            optimizer, *_ = self.live.slot(parameter)
            for value in optimizer.state[parameter].values():
                if value.shape == keep.shape:
                    assert bool((value[~keep] == 0).all())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_masked_entries_are_zero_after_every_step(optimizer):
    """Weight decay, momentum, clipping and accumulation included."""
    recipe = kit.recipe(
        "llama", ["spdf"], budget="4steps", batch={"size": 8, "micro": 2, "length": 48},
        optimizer={"name": optimizer, "lr": 0.05, "weight_decay": 0.5, "clip": 0.01},
    )  # fmt: skip
    stage = kit.stage(recipe)
    look = Look(stage.live)
    stage.loop.watchers = [*stage.loop.watchers, look]
    kit.trained(stage)
    assert look.steps == 4 and set(look.masks) == set(prunable_weights(stage.model))
    for name, keep in look.masks.items():
        assert int(keep.sum()) == round(0.25 * keep.numel()), name


def test_the_clip_norm_leaves_masked_entries_out():
    stage = kit.stage(kit.recipe("llama", ["spdf"], budget="1step"))
    seen: dict[str, float] = {}

    class Norm(Watcher):
        def after_backward(self, step: Any, found: Any) -> None:
            live = stage.live
            parts = [
                (p.grad * live.masks[n].keep if n in live.masks else p.grad).flatten()
                for n, p in live.named_parameters()
            ]
            norm, clipped = float(torch.cat(parts).norm()), found.gradient_norm
            seen["ratio"], seen["whole"] = norm / min(clipped, 1.0), clipped

    stage.loop.watchers = [*stage.loop.watchers, Norm()]
    kit.trained(stage)
    assert seen["ratio"] == pytest.approx(1, rel=1e-5)


def test_no_sparsity_is_the_dense_run_bit_by_bit():
    def weights(*specs: str) -> dict[str, torch.Tensor]:
        return kit.weights(kit.trained(kit.stage(kit.recipe("llama", specs, budget="5steps"))))

    dense, sparse = weights(), weights("spdf(sparsity=0.0)")
    assert all(torch.equal(dense[name], sparse[name]) for name in dense)


def test_variable_spdf_trains_everything_after_its_share():
    spec = "spdf(sparsity=0.9, until=0.5)"
    stage = kit.stage(kit.recipe("llama", [spec], budget="8steps"))
    allowed, masked = [], []

    class Count(Watcher):
        def after_update(self, step: Any) -> None:
            masked.append(len(stage.live.masks))
            allowed.append(stage.loop.watchers[0].may_stop(step))

    stage.loop.watchers = [*stage.loop.watchers, Count()]
    kit.trained(stage)
    assert masked == [14] * 4 + [0] * 4 and allowed == [False] * 4 + [True] * 4
    assert stage.context.meter.facts["average_density"] == pytest.approx(0.55, abs=1e-3)
    assert stage.context.meter.facts["final_density"] == 1
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((stage.live.parameter(name) == 0).float().mean()) < 0.01


def staged(tmp_path: Any, second: str = "[]") -> tuple[Any, Any]:
    text = f"""
name: spdf-way
model: {{config: llama, layers: 2, width: 64}}
task: causal-language-modeling
data: {{path: {kit.folder() / "rows.jsonl"}, text: text}}
batch: {{size: 8, micro: 4, length: 32}}
optimizer: {{lr: 0.01, weight_decay: 0.1}}
budget: 6steps
stages:
  - {{name: sparse, methods: ["spdf(sparsity=0.75)"], budget: 5steps}}
  - {{name: dense, methods: {second}}}
"""
    result = outlay.run(Recipe.from_yaml(text), out=tmp_path)
    return result, tmp_path / result.run


def test_the_whole_way(tmp_path):
    """Exact zeros in the sparse stage; they are handed on as zeros and grow in the dense one."""
    result, folder = staged(tmp_path)
    sparse = checkpoint.read_folder(folder / "trained" / "sparse")
    handed = checkpoint.read_folder(folder / "stages" / "sparse")["model"]
    dense = checkpoint.read_folder(folder / "trained" / "dense")
    assert len(sparse["masks"]) == 14 and not dense["masks"]
    for name, mask in sparse["masks"].items():
        dead = ~mask["keep"]
        assert int(dead.sum()) == dead.numel() - round(0.25 * dead.numel())
        assert bool((sparse["parameters"][name][dead] == 0).all())
        assert torch.equal(handed[name], sparse["parameters"][name]), "no output changes"
        grown = dense["parameters"][name][dead] != 0
        assert float(grown.float().mean()) > 0.99, name
    assert result.meter["average_density"] == pytest.approx(0.25, abs=1e-3)
    assert result.meter["steps"] == 11


def test_fine_tuning_may_stay_sparse(tmp_path):
    """The control: magnitudes find the same masks again; random ones are refused."""
    _, folder = staged(tmp_path, "[spdf(init='magnitude')]")
    stages = [checkpoint.read_folder(folder / "trained" / name) for name in ("sparse", "dense")]
    for name, mask in stages[0]["masks"].items():
        assert torch.equal(mask["keep"], stages[1]["masks"][name]["keep"])
    with pytest.raises(Conflict, match="exactly 0, as sparse training leaves them"):
        staged(tmp_path / "again", "[spdf]")


def test_bad_settings():
    for settings in ({"sparsity": 1.0}, {"sparsity": -0.1}, {"until": 0.0}, {"until": 1.5}):
        with pytest.raises(ConfigError):
            SPDF(**settings)
    with pytest.raises(ConfigError, match="without a live one"):
        kit.trained(kit.stage(kit.recipe("llama", ["spdf(sparsity=0.9999)"])))


# ---- FLOPs by hand -------------------------------------------------------------------------------


ROWS = {"size": 4, "micro": 2, "length": 16, "pad_to": 0}


def by_hand(
    stage: Any, densities: list[dict[str, float]], again: tuple[str, ...] = ()
) -> tuple[float, float]:
    """(executed, effective) of training steps at full rows: every product of every layer.

    Layers whose names end in one of `again`, and attention with them, run forward twice.
    """
    rows, length, layers, width = 4, 16, 2, 32
    positions = rows * length
    sizes = {n: stage.live.parameter(n).numel() for n in prunable_weights(stage.model)}
    passes = {n: 3 + n.removesuffix(".weight").endswith(again or ("-",)) for n in sizes}
    vocabulary = stage.model.get_output_embeddings().weight.shape[0]
    rest = 3 * 2 * positions * vocabulary * width
    rest += layers * (8 if again else 6) * 2 * rows * length * length * width
    executed = effective = 0.0
    for density in densities:
        products = {n: passes[n] * 2 * positions * size for n, size in sizes.items()}
        executed += sum(products.values()) + rest
        effective += sum(p * density.get(n, 1.0) for n, p in products.items()) + rest
    return executed, effective


def counted(shape: str, spec: str, **more: Any) -> tuple[Any, list[dict[str, float]]]:
    """A trained stage with its FLOPs counted, and the density of each weight in each step."""
    stage = kit.stage(kit.recipe(shape, [spec], budget="5steps", batch=ROWS, **more))
    densities: list[dict[str, float]] = []

    class Densities(Watcher):
        def before_forward(self, step: Any, batches: Any) -> None:
            masks = stage.live.masks.items()
            densities.append({n: float(m.keep.double().mean()) for n, m in masks})

    stage.loop.gradients.flops = FlopTable()
    stage.loop.watchers = [*stage.loop.watchers, Densities()]
    return kit.trained(stage), densities


@pytest.mark.parametrize(
    "spec",
    [
        "spdf(sparsity=0.75)",
        "spdf(sparsity=0.6, distribution='erk', until=0.5)",
        "gradual_pruning(every=1, final_sparsity=0.6)",
        "dynamic_sparsity(every=2, sparsity=0.5)",
    ],
)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_executed_and_effective_flops_are_those_counted_by_hand(shape, spec):
    stage, densities = counted(shape, spec)
    totals, (executed, effective) = stage.context.meter.totals, by_hand(stage, densities)
    assert totals["flops"] == totals["dense_flops"] == pytest.approx(executed, rel=1e-9)
    assert totals["effective_flops"] == pytest.approx(effective, rel=1e-9)
    assert totals["effective_flops"] < totals["flops"]


# Torch stops computing a block again once it has what the backward pass needs: not the last layer.
AGAIN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")


@pytest.mark.parametrize(
    ("fields", "again"),
    [({"precision": "bfloat16"}, ()), ({"model": {"gradient_checkpointing": True}}, AGAIN)],
)
def test_copies_and_recomputed_products_are_counted_too(fields, again):
    stage, densities = counted("llama", "gradual_pruning(every=1, final_sparsity=0.6)", **fields)
    totals = stage.context.meter.totals
    executed, effective = by_hand(stage, densities, again)
    assert totals["flops"] == pytest.approx(executed, rel=1e-9)
    assert totals["effective_flops"] == pytest.approx(effective, rel=1e-9)


def test_six_times_average_parameters_times_positions():
    """6 N D with the average number of parameters is what the masked linear layers cost."""
    stage, _ = counted("llama", "gradual_pruning(every=1, final_sparsity=0.6)")
    totals, facts = stage.context.meter.totals, stage.context.meter.facts
    positions = 5 * 4 * 16
    saved = totals["flops"] - totals["effective_flops"]
    linear = 6 * facts["prunable_parameters"] * positions
    assert linear - saved == pytest.approx(
        6 * facts["average_prunable_parameters"] * positions, rel=1e-9
    )
