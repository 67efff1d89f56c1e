"""GaLore beside its authors' code, its sign convention, and the size of its state."""

from __future__ import annotations

import pytest
import torch
from conformance import kit
from optimizer_kit import SETTINGS, groups, network, peer, tensor_bytes, walked

from outlay import GaLore
from outlay.core.context import Context
from outlay.core.errors import ConfigError
from outlay.nn.projected_adam import project, project_back
from outlay.training.planning.plan import plan

PROJECTED = ("mlp.tall.weight", "attn.wide.weight")


def ours(parameters, **more):
    method = GaLore(**{"rank": 4, "update_every": 200, "scale": 0.25} | more)
    return method.build(groups(parameters), SETTINGS, Context())


def theirs(parameters, update_every):
    adam = peer("galore_torch", "adamw")
    apart = {"rank": 4, "update_proj_gap": update_every, "scale": 0.25, "proj_type": "std"}
    return adam.AdamW(
        [
            {"params": [parameters[n] for n in PROJECTED], **apart},
            {"params": [p for n, p in parameters.items() if n not in PROJECTED]},
        ],
        lr=0.01, betas=SETTINGS.betas, eps=SETTINGS.eps, weight_decay=0.1,
        no_deprecation_warning=True,
    )  # fmt: skip


def same(first, second):
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-7)


def test_twenty_steps_of_the_authors_code():
    mine, other = network(torch.float32), network(torch.float32)
    same(walked(ours(mine), mine), walked(theirs(other, 200), other))


def test_twenty_steps_with_new_subspaces(monkeypatch):
    """The authors leave signs to the decomposition: given ours, they walk alike."""
    projector = peer("galore_torch", "galore_projector").GaLoreProjector
    decompose = projector.get_orthogonal_matrix

    def signed(self, weights, rank, type):
        found = decompose(self, weights, rank, type)
        rows = found if type == "right" else found.T
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        rows = rows * largest.sign()
        return rows if type == "right" else rows.T

    monkeypatch.setattr(projector, "get_orthogonal_matrix", signed)
    mine, other = network(torch.float32), network(torch.float32)
    same(walked(ours(mine, update_every=6), mine), walked(theirs(other, 6), other))


def test_the_subspace_holds_what_the_singular_vectors_hold():
    parameters = network()
    optimizer = ours(parameters)
    for name in PROJECTED:
        gradient = torch.randn(parameters[name].shape, dtype=torch.float64)
        basis = optimizer.basis(gradient, name, 0)
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        best = left[:, :4] * values[:4] @ right[:4]
        back = project_back(project(gradient, basis), basis, gradient.shape)
        torch.testing.assert_close(back, best)
        rows = basis if gradient.shape[0] >= gradient.shape[1] else basis.T
        torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64))
        assert bool((rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all())


def test_a_negated_gradient_has_the_same_subspace():
    optimizer, gradient = ours(network()), torch.randn(24, 10, dtype=torch.float64)
    torch.testing.assert_close(optimizer.basis(gradient, "", 0), optimizer.basis(-gradient, "", 0))


@pytest.mark.parametrize("rank", [1, 4, 9, 10, 50])
def test_state_is_as_large_as_it_says(rank):
    parameters = network()
    optimizer = ours(parameters, rank=rank)
    walked(optimizer, parameters, 1)
    small = 2 * 8 * rank * (2 * 24 + 10) if rank < 10 else 2 * 8 * 2 * 240
    assert tensor_bytes(optimizer) == optimizer.state_bytes() == small + 2 * 8 * (12 + 192)


def test_bfloat16_weights_have_float32_state():
    parameters = network(torch.bfloat16)
    optimizer = ours(parameters)
    walked(optimizer, parameters, 2)
    state = optimizer.state[parameters["mlp.tall.weight"]]
    assert {state[k].dtype for k in ("basis", "exp_avg", "exp_avg_sq")} == {torch.float32}
    assert tensor_bytes(optimizer) == optimizer.state_bytes()


@pytest.mark.parametrize("spec", ["galore(rank=4)", "apollo(rank=4)"])
def test_a_plan_knows_the_state(spec):
    recipe = kit.recipe("llama", [spec])
    trained = kit.trained(kit.stage(recipe))
    held = sum(tensor_bytes(optimizer) for optimizer in trained.live.optimizers)
    assert plan(recipe, device="cpu").memory_bytes["optimizer"] == held


def test_what_is_not_matched_is_plain_adamw():
    """Epsilon apart, which the authors add before the bias correction."""
    mine, other = network(), network()
    optimizer = GaLore(target_modules="nothing").build(
        groups(mine, weight_decay=0.0),
        type(SETTINGS)(betas=(0.9, 0.99), eps=1e-30),
        Context(),
    )
    plain = torch.optim.AdamW(
        groups(other, weight_decay=0.0), lr=0.01, betas=(0.9, 0.99), eps=1e-30
    )
    same(walked(optimizer, mine), walked(plain, other))


def test_a_broken_expression_is_refused():
    with pytest.raises(ConfigError, match="not a regular expression"):
        GaLore(target_modules="(")
