"""APOLLO beside its authors' code, its projections and the size of its state."""

from __future__ import annotations

import pytest
import torch
from optimizer_kit import SETTINGS, groups, network, peer, tensor_bytes, walked

from outlay import Apollo
from outlay.core.context import Context
from outlay.core.errors import ConfigError

PROJECTED = ("mlp.tall.weight", "attn.wide.weight")


def ours(parameters, seed=0, **more):
    return Apollo(**more).build(groups(parameters), SETTINGS, Context(seed=seed))


@pytest.mark.parametrize(
    ("variant", "rank", "scale", "kind"),
    [("apollo", 4, 1.0, "channel"), ("apollo", 4, 3.0, "channel"), ("mini", 1, 128.0, "tensor")],
)
def test_twenty_steps_of_the_authors_code(monkeypatch, variant, rank, scale, kind):
    """Given our random matrices: the authors' follow from the order of the parameters."""
    projector = peer("apollo_torch", "random_projector").GradientProjector
    adam = peer("apollo_torch", "apollo")
    mine, other = network(torch.float32), network(torch.float32)
    optimizer = ours(mine, variant=variant, rank=rank, scale=scale, update_every=6)
    turns = dict.fromkeys(PROJECTED, 0)

    def drawn(self, weights, rank, type, seed):
        name = next(n for n in PROJECTED if other[n].grad is weights)
        turns[name] += 1
        return optimizer.basis(weights, name, turns[name] - 1)

    monkeypatch.setattr(projector, "get_orthogonal_matrix", drawn)
    apart = {
        "rank": rank, "proj": "random", "scale_type": kind, "scale": scale,
        "update_proj_gap": 6, "proj_type": "std",
    }  # fmt: skip
    twin = adam.AdamW(
        [
            {"params": [other[n] for n in PROJECTED], **apart},
            {"params": [p for n, p in other.items() if n not in PROJECTED]},
        ],
        lr=0.01, betas=SETTINGS.betas, eps=SETTINGS.eps, weight_decay=0.1,
    )  # fmt: skip
    found, expected = walked(optimizer, mine), walked(twin, other)
    assert turns == dict.fromkeys(PROJECTED, 4)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_projections_keep_lengths_on_average():
    optimizer = ours(network(), rank=64)
    gradient = torch.randn(200, 100, generator=torch.Generator().manual_seed(1))
    basis = optimizer.basis(gradient, "mlp.x.weight", 0)
    ratios = (gradient @ basis.T).norm(dim=1) / gradient.norm(dim=1)
    assert abs(float(ratios.mean()) - 1) < 0.05


def test_projections_follow_seed_name_and_turn():
    gradient, optimizer = torch.zeros(24, 10), ours(network(), rank=4)
    first = optimizer.basis(gradient, "a", 0)
    state = torch.get_rng_state()
    assert torch.equal(first, optimizer.basis(gradient, "a", 0))
    assert torch.equal(torch.get_rng_state(), state)
    others = [
        optimizer.basis(gradient, "b", 0),
        optimizer.basis(gradient, "a", 1),
        ours(network(), seed=1, rank=4).basis(gradient, "a", 0),
    ]
    assert not any(torch.equal(first, other) for other in others)


def test_the_update_grows_by_one_percent_at_most():
    parameters = network()
    optimizer = ours(parameters, rank=4)
    state: dict[str, torch.Tensor] = {}
    gradient = torch.randn(24, 10, dtype=torch.float64)
    small = project = torch.ones(24, 4, dtype=torch.float64)
    norms = [
        float(optimizer.full_update(small, project, gradient * factor, state).norm())
        for factor in (1.0, 10.0, 10.0, 0.1)
    ]
    assert norms[1] == pytest.approx(1.01 * norms[0], rel=1e-6)
    assert norms[2] == pytest.approx(1.01 * norms[1], rel=1e-6)
    assert norms[3] == pytest.approx(0.1 * norms[0], rel=1e-6)


@pytest.mark.parametrize(("variant", "rank"), [("apollo", 4), ("mini", 1), ("apollo", None)])
def test_state_is_as_large_as_it_says(variant, rank):
    parameters = network()
    optimizer = ours(parameters, variant=variant, rank=rank)
    walked(optimizer, parameters, 2)
    small = 2 * 8 * rank * (2 * 24 + 10) if rank else 2 * 8 * 2 * 240
    assert tensor_bytes(optimizer) == optimizer.state_bytes() == small + 2 * 8 * (12 + 192)


def test_published_defaults():
    full, mini = ours(network()), ours(network(), variant="mini")
    assert (full.rank, full.factor, full.by_channel) == (256, 1.0, True)
    assert (mini.rank, mini.factor**2, mini.by_channel) == (1, pytest.approx(128), False)


def test_a_broken_expression_is_refused():
    with pytest.raises(ConfigError, match="not a regular expression"):
        Apollo(target_modules="(")
