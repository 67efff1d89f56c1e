"""Gradual pruning: placement, events, averages and the meter. arXiv 2501.12486."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conformance import kit

import outlay
from outlay.core.errors import ConfigError, Conflict
from outlay.core.method import Watcher
from outlay.methods.sparse.gradual_pruning import GradualPruning
from outlay.nn.prunable import prunable_weights

TABLE = {
    0.2: (0.2231, 0.7211, 0.8926),
    0.4: (0.1915, 0.6808, 0.7662),
    0.5: (0.1732, 0.6535, 0.6929),
    0.6: (0.1526, 0.6186, 0.6103),
    0.8: (0.0998, 0.5012, 0.3991),
}


@pytest.mark.parametrize("sparsity", list(TABLE))
def test_placement_in_compute(sparsity):
    method = GradualPruning(final_sparsity=sparsity)
    assert (*method.window(), method.average_density()) == pytest.approx(
        TABLE[sparsity], abs=5.1e-5
    )
    # Discretely, too: each quarter mark of the steps' summed density is where it should be.
    total, density = 200_000, 1.0
    events, spent = dict(GradualPruning(final_sparsity=sparsity, every=1).plan(total)), []
    for step in range(total):
        density = events.get(step, density)
        spent.append(density)
    whole = sum(spent)
    first, last = min(events), max(events)
    assert sum(spent[:first]) / whole == pytest.approx(0.25, abs=1e-4)
    assert sum(spent[:last]) / whole == pytest.approx(0.75, abs=1e-4)
    assert whole / total == pytest.approx(TABLE[sparsity][2], abs=1e-4)


def test_the_released_run():
    method = GradualPruning(final_sparsity=0.5)
    first, last = (round(72_200 * share) for share in method.window())
    assert (first, last) == (12_507, 47_185)
    released = GradualPruning(
        final_sparsity=0.5, unit="steps", start=12_500 / 72_200, end=47_200 / 72_200
    )
    events = released.plan(72_200)
    assert len(events) == 348 and events[0][0] == 12_500 and events[-1][0] == 47_200
    assert events[-1][1] == pytest.approx(0.5, abs=1e-12)
    assert [step for step, _ in events] == list(range(12_500, 47_201, 100))
    ratio = 0.5 ** (1 / 348)
    assert [d for _, d in events] == pytest.approx([ratio ** (j + 1) for j in range(348)])
    assert released.average_density(72_200) == pytest.approx(0.69291, abs=5e-6)


@pytest.mark.parametrize("shape", ["geometric", "cubic", "linear"])
@pytest.mark.parametrize("unit", ["compute", "steps"])
def test_every_shape_falls_to_its_end_and_averages_as_it_says(shape, unit):
    method = GradualPruning(final_sparsity=0.7, every=1, shape=shape, unit=unit)
    events = method.plan(100_000)
    values = [1.0, *(density for _, density in events)]
    assert all(a > b for a, b in itertools.pairwise(values)) and values[-1] == pytest.approx(0.3)
    assert method.average_density(100_000) == pytest.approx(method.average_density(), abs=1e-4)
    if unit == "steps":
        assert method.window() == pytest.approx((0.25, 0.75))


def test_windows_that_do_not_divide():
    method = GradualPruning(unit="steps", start=0.0, end=0.25, every=100)
    assert [step for step, _ in method.plan(1000)] == [0, 100, 250], "the last event moves"
    assert [step for step, _ in method.plan(200)] == [50], "shorter than `every`: at once"
    assert GradualPruning(unit="steps", start=0.5, end=1.0).plan(1000)[-1] == (1000, 0.5)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"start": 0.5, "end": 0.5}, "end = 0.5 is not after start"),
        ({"start": 0.5, "end": 0.4}, "end = 0.4 is not after start"),
        ({"final_sparsity": 1.0}, "final_sparsity"),
        ({"end": 1.2}, "end"),
        ({"final_sparsity": 0.6, "structure": "2:4"}, "final_sparsity = 0.6 is above the half"),
    ],
)
def test_bad_settings(settings, names):
    with pytest.raises(ConfigError, match=names):
        GradualPruning(**settings)


# ---- in a run ------------------------------------------------------------------------------------


class Look(Watcher):
    """Density, masks and zeros after every step."""

    def __init__(self, live: Any) -> None:
        self.live, self.densities = live, []
        self.before: dict[str, torch.Tensor] = {}

    def after_update(self, step: Any) -> None:
        masks = {n: m.keep.clone() for n, m in self.live.masks.items()}
        for name, keep in self.before.items():
            assert not bool((masks[name] & ~keep).any()), "nothing comes back"
        for name, keep in masks.items():
            assert bool((self.live.parameter(name)[~keep] == 0).all())
        self.before = masks
        self.densities.append(dict(self.live.context.figures).get("density"))


def pruned(spec: str, steps: int = 20, **more: Any) -> tuple[Any, Look]:
    fields: dict[str, Any] = {"budget": f"{steps}steps", "optimizer": {"lr": 1e-3}} | more
    stage = kit.stage(kit.recipe("llama", [spec], **fields))
    look = Look(stage.live)
    stage.loop.watchers = [*stage.loop.watchers, look]
    return kit.trained(stage), look


def test_the_run_follows_its_plan():
    method = GradualPruning(final_sparsity=0.6, every=2)
    stage, look = pruned(method.spec())
    total = sum(stage.live.parameter(n).numel() for n in prunable_weights(stage.model))
    events, density, expected = dict(method.plan(20)), 1.0, []
    for step in range(20):
        density = events.get(step, density)
        expected.append(density)
    assert look.densities == pytest.approx(expected, abs=1 / total)
    facts = stage.context.meter.facts
    assert facts["prunable_parameters"] == total
    assert facts["final_density"] == pytest.approx(0.4, abs=1 / total)
    alive = [round(d * total) for d in expected]
    assert facts["average_prunable_parameters"] == sum(alive) / 20
    assert facts["average_density"] == pytest.approx(method.average_density(20), abs=1 / total)
    assert method.dense_equivalent(stage.model, 20) == pytest.approx(
        facts["average_prunable_parameters"], abs=1
    )


def test_no_sparsity_is_the_dense_run():
    def digest(*specs: str) -> dict[str, torch.Tensor]:
        return kit.weights(kit.trained(kit.stage(kit.recipe("llama", specs, budget="6steps"))))

    dense, sparse = digest(), digest("gradual_pruning(final_sparsity=0.0, every=1)")
    assert all(torch.equal(dense[name], sparse[name]) for name in dense)


def test_one_event_warns_and_an_event_at_the_end_is_not_lost():
    with pytest.warns(UserWarning, match="pruned at once, after step 10"):
        stage, look = pruned("gradual_pruning(unit='steps', start=0.9, end=1.0)", 10)
    assert set(look.densities) == {1.0}
    assert stage.context.meter.facts["final_density"] == pytest.approx(0.5, abs=1e-3)
    assert stage.context.meter.facts["average_density"] == 1


def test_a_run_that_ends_early_is_pruned_at_its_end():
    stage = kit.stage(kit.recipe("llama", ["gradual_pruning(every=1, end=1.0)"], budget="8steps"))
    stage.loop.after_step = lambda step: step.index == 3
    with pytest.warns(UserWarning, match="before the last pruning event"):
        kit.trained(stage)
    assert stage.context.meter.facts["final_density"] == pytest.approx(0.5, abs=1e-3)


def test_a_dead_layer_is_refused():
    stage = kit.stage(kit.recipe("llama", ["gradual_pruning(every=1, start=0.0)"], budget="4steps"))
    with torch.no_grad():
        stage.live.parameter("model.layers.1.self_attn.v_proj.weight").mul_(1e-6)
    with pytest.raises(Conflict, match=r"layers\.1\.self_attn\.v_proj"):
        kit.trained(stage)


@pytest.mark.parametrize(
    ("spec", "budget"),
    [
        ("gradual_pruning", "5seconds"),
        ("dynamic_sparsity", "1e9flops"),
        ("dynamic_sparsity", "5seconds"),
    ],
)
def test_budgets_that_name_no_steps_are_refused(spec, budget):
    with pytest.raises(ConfigError, match=f"{spec} places its events"):
        kit.stage(kit.recipe("llama", [spec], budget=budget))


def test_the_best_weights_are_sparse_ones(tmp_path):
    """Rates that spoil the model: the best evaluation is the first, and dense."""
    recipe = kit.recipe(
        "llama", ["gradual_pruning(every=1, end=0.7)"], budget="8steps", optimizer={"lr": 1.0},
        every={"evaluate": 1}, evaluate={"keep_best": True, "patience": 1}, schedule={"warmup": 0},
    )  # fmt: skip
    result = outlay.run(recipe, out=tmp_path)
    from outlay.training.checkpoint import read_folder

    found = read_folder(next(tmp_path.iterdir()) / "trained" / "main")
    for name, mask in found["masks"].items():
        assert bool((found["parameters"][name][~mask["keep"]] == 0).all())
    assert result.meter["final_density"] == pytest.approx(0.5, abs=1e-3)
    assert result.meter["steps"] >= len(GradualPruning(every=1, end=0.7).plan(8))


@pytest.mark.parametrize("shape", ["geometric", "cubic", "linear"])
def test_progress_under_a_budget_in_flops(shape):
    method = GradualPruning(final_sparsity=0.8, shape=shape, start=0.25, end=0.75)
    # What the fall has cost after each thousandth of its steps, by plain summing.
    costs = [method.density((i + 0.5) / 1000) for i in range(1000)]
    for steps in (1, 130, 500, 999):
        spent = 0.25 + 0.5 * sum(costs[:steps]) / sum(costs)
        assert method.progress(spent, True) == pytest.approx(steps / 1000, abs=2e-6)
    assert [method.progress(x, True) for x in (0.0, 0.25, 0.75, 1.0)] == [0, 0, 1, 1]
    first, last = method.window()
    assert method.progress((first + last) / 2, False) == pytest.approx(0.5)


def test_a_run_with_a_budget_in_effective_flops(tmp_path):
    recipe = kit.recipe("llama", ["gradual_pruning(final_sparsity=0.8, every=1)"])
    dense = outlay.run(recipe.changed({"methods": [], "budget": "4steps"}), out=tmp_path, threads=1)
    budget = 8 * dense.meter["effective_flops"]
    recipe = recipe.changed({"budget": f"{budget}effective_flops"})
    result = outlay.run(recipe, out=tmp_path, threads=1)
    assert result.meter["final_density"] == pytest.approx(0.2, abs=1e-3)
    assert budget <= result.meter["effective_flops"] < 1.1 * budget
    assert result.meter["flops"] > result.meter["effective_flops"]
    assert result.meter["steps"] > 8 * 4, "sparse steps cost less, so there are more of them"
    with pytest.raises(ConfigError, match="unit='compute'"):
        outlay.run(
            recipe.changed({"methods": ["gradual_pruning(unit='steps')"]}), out=tmp_path, threads=1
        )
