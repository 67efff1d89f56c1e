"""Ranks from spectra under a budget, and columns that freeze."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from outlay.core.allocate import allocate
from outlay.core.errors import CheckpointError, ConfigError, NoEffect
from outlay.core.live import Live
from outlay.core.losses import Objective
from outlay.core.method import Context, Step
from outlay.nn.freezing import ColumnFreezer, ColumnFreezeSchedule
from outlay.nn.ranks import allocate_ranks, factor_cost, linear_cost, square_cost
from outlay.nn.svd import energies

POLICIES = ("uniform", "energy_threshold", "greedy_energy")


def spectrum(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("policy", ["energy_threshold", "greedy_energy"])
def test_a_concentrated_and_a_flat_matrix(policy: str) -> None:
    spectra = {"peak": spectrum(1, 0, 0, 0), "flat": spectrum(1, 1, 1, 1)}
    assert allocate_ranks(spectra, 5, policy=policy) == {"peak": 1, "flat": 4}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cost", [linear_cost, square_cost])
def test_identical_spectra_get_equal_ranks(policy: str, cost: object) -> None:
    s = torch.rand(8, generator=torch.Generator().manual_seed(0)).sort(descending=True)[0]
    spectra = dict.fromkeys("abc", s)
    for rank in (1, 3, 5, 8):
        budget = 3 * cost("a", rank)  # type: ignore[operator]
        assert set(allocate_ranks(spectra, budget, policy=policy, cost=cost).values()) == {rank}


def test_greedy_takes_the_largest_next_share() -> None:
    spectra = {"a": spectrum(2, 1.5, 0.1), "b": spectrum(30, 3, 2.9)}
    ranks = allocate_ranks(spectra, 4)
    shares = {n: (s**2 / (s**2).sum()).tolist() for n, s in spectra.items()}
    assert shares["a"][1] > shares["b"][1] > shares["a"][2]
    assert ranks == {"a": 2, "b": 2}


def test_threshold_is_the_largest_that_the_budget_pays_for() -> None:
    generator = torch.Generator().manual_seed(3)
    spectra = {
        f"m{i}": torch.rand(12, generator=generator).pow(i + 1).sort(descending=True)[0]
        for i in range(5)
    }
    held = {n: energies(s) for n, s in spectra.items()}

    def ranks_at(tau: float) -> dict[str, int]:
        return {n: int((e < tau).sum()) + 1 for n, e in held.items()}

    for budget in (60.0, 150.0, 333.0):
        best = max(
            (tau for e in held.values() for tau in e.tolist()
             if sum(square_cost(n, r) for n, r in ranks_at(tau).items()) <= budget),
        )  # fmt: skip
        ranks = allocate_ranks(spectra, budget, policy="energy_threshold", cost=square_cost)
        least = ranks_at(best)
        assert all(ranks[n] >= least[n] for n in ranks)
        assert sum(ranks.values()) - sum(least.values()) <= len(ranks)


lists = st.lists(
    st.lists(st.floats(0, 100), min_size=4, max_size=9).map(lambda v: sorted(v, reverse=True)),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(lists, st.sampled_from(POLICIES), st.integers(1, 2), st.sampled_from(["r", "rr", "f"]))
def test_budgets_hold_and_more_never_takes_away(
    values: list[list[float]], policy: str, step: int, price: str
) -> None:
    spectra = {f"m{i}": torch.tensor(v, dtype=torch.float64) for i, v in enumerate(values)}
    shapes = {name: (3 + i, 9) for i, name in enumerate(spectra)}
    cost = {"r": linear_cost, "rr": square_cost, "f": factor_cost(shapes)}[price]
    least = sum(cost(n, 2) for n in spectra)
    before = dict.fromkeys(spectra, 2)
    for budget in sorted((least, least + 3.5, least * 1.5, least * 3, least * 20)):
        ranks = allocate_ranks(spectra, budget, 2, 6, step, policy, cost)
        assert sum(cost(n, r) for n, r in ranks.items()) <= budget * (1 + 1e-9)
        assert all(before[n] <= r <= 6 and r % step == 0 for n, r in ranks.items())
        before = ranks
    assert all(r == min(6, len(spectra[n])) // step * step for n, r in before.items())


def test_equal_prices_are_the_shared_allocator() -> None:
    generator = torch.Generator().manual_seed(1)
    spectra = {
        f"m{i}": torch.rand(7, generator=generator).sort(descending=True)[0] for i in range(4)
    }
    scores = torch.cat([(s.double() ** 2 / (s.double() ** 2).sum())[1:] for s in spectra.values()])
    for budget in (4, 9, 17, 28):
        kept = allocate(scores, budget=budget - 4).view(4, 6).sum(1) + 1
        assert list(allocate_ranks(spectra, budget).values()) == kept.tolist()


def test_hollow_spectra_are_shared_evenly() -> None:
    spectra = {"a": torch.empty(6, device="meta"), "b": torch.empty(6, device="meta")}
    assert allocate_ranks(spectra, 18, cost=square_cost) == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"budget": 1}, "at least 2"),
        ({"budget": float("nan")}, "budget"),
        ({"policy": "best"}, "policy"),
        ({"r_min": 0}, "r_min"),
        ({"r_min": 5}, "r_min"),
        ({"r_max": 1, "r_min": 2}, "r_max"),
        ({"multiple_of": 2, "r_min": 1}, "multiple"),
        ({"spectra": {}}, "at least one"),
        ({"spectra": {"x": spectrum(float("nan"))}}, "'x'"),
    ],
)
def test_bad_allocations(change: dict, match: str) -> None:
    wanted = {"spectra": {"a": spectrum(1, 1), "b": spectrum(2, 1)}, "budget": 4} | change
    with pytest.raises(ConfigError, match=match):
        allocate_ranks(**wanted)


# ---- freezing ------------------------------------------------------------------------------------


def test_columns_frozen_over_time() -> None:
    schedule = ColumnFreezeSchedule(0.3)
    assert [schedule.frozen(8, t / 100) for t in (0, 15, 30, 99)] == [0, 4, 8, 8]
    assert [ColumnFreezeSchedule(0).frozen(8, t) for t in (0.0, 1.0)] == [8, 8]
    assert ColumnFreezeSchedule(None).frozen(8, 1.0) == 0
    assert [ColumnFreezeSchedule(1).frozen(4, t) for t in (0.0, 0.5, 0.99, 1.0)] == [0, 2, 3, 4]
    # Every column falls exactly where the formula in whole numbers puts it.
    for r in (3, 8, 64):
        for total in (100, 150, 999):
            for t in range(total):
                exact = min(r, (r * t * 10) // (3 * total))
                assert schedule.frozen(r, t / total) == exact
    for bad in (-0.1, 1.5):
        with pytest.raises(ConfigError, match="fraction"):
            ColumnFreezeSchedule(bad)


class Nothing(Objective):
    """An objective that nobody calls."""


def live_of(model: nn.Module) -> Live:
    names, parameters = zip(*model.named_parameters())
    group = {"params": list(parameters), "names": list(names)}
    optimizer = torch.optim.AdamW([group], lr=0.1, weight_decay=0.1)
    return Live(model, Nothing(), [optimizer], None, Context(total_steps=20))


@pytest.mark.parametrize("order", ["largest_first", "smallest_first"])
def test_plain_columns_of_any_method_freeze_for_good(order: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    live = live_of(model)
    freezer = ColumnFreezer(live, ("weight",), ColumnFreezeSchedule(0.5), order)
    seen = []
    for t in range(14):
        freezer.before_step(Step(t, t / 20, 0))
        before = model.weight.detach().clone()
        model(torch.randn(5, 4)).square().sum().backward()
        named = dict(live.named_parameters())
        for name in live.masks:
            live.before_update(name, named[name])
        live.optimizers[0].step()
        for name in live.masks:
            live.after_update(name, named[name])
        live.optimizers[0].zero_grad()
        still = (model.weight == before).all(0)
        k = min(4, int(4 * t / 10 + 1e-9))
        expected = [i < k if order == "largest_first" else i >= 4 - k for i in range(4)]
        assert still.tolist() == expected
        seen.append(int(still.sum()))
    assert seen[0] == 0 and seen[-1] == 4
    group = live.optimizers[0].param_groups[0]
    assert group["names"] == ["bias"] and not model.weight.requires_grad
    assert list(live.optimizers[0].state) == [model.bias] and not live.masks
    assert freezer.state_dict() == {"frozen": {"weight": 4}, "asked": True}
    freezer.close()


def test_a_freezer_that_was_never_told_of_a_step_says_so() -> None:
    live = live_of(nn.Linear(4, 3))
    freezer = ColumnFreezer(live, ("weight",), ColumnFreezeSchedule(0.5), owner="lamda")
    with pytest.raises(NoEffect, match="lamda"):
        freezer.close()
    with pytest.raises(CheckpointError, match="is about"):
        freezer.load_state_dict({"frozen": {"else": 1}})
