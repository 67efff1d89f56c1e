"""Layers without a weight: their gradients, both ways of computing, what is kept and counted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from outlay.core.errors import ConfigError
from outlay.core.meter import FlopCounter
from outlay.nn.sparse_low_rank import LowRankLinear, SparseLowRankLinear

MODES = ("materialize", "factored")
M, N, R, K = 9, 12, 3, 21  # int(0.2 * 9 * 12) entries
DOUBLE = torch.float64


def layer(mode="materialize", dtype=DOUBLE, seed=3, **more):
    given = {"density": 0.2, "alpha": 8.0, "init": "both"} | more
    return SparseLowRankLinear(N, M, R, seed=seed, mode=mode, dtype=dtype, **given)


def inputs(*shape, dtype=DOUBLE, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, N, generator=generator, dtype=dtype)


# ---- support -------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.01, 0.03, 0.5, 1.0])
def test_the_support_has_the_right_size_and_is_sorted(density):
    made = SparseLowRankLinear(64, 48, 4, density, seed=1)
    assert len(made.positions) == len(made.values) == int(density * 64 * 48)
    assert made.positions.dtype == torch.int32
    assert bool((made.positions.diff() > 0).all())
    assert int(made.positions[0]) >= 0 and int(made.positions[-1]) < 64 * 48


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    first, again, other = layer(seed=1), layer(seed=1), layer(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.positions, other.positions)
    assert not torch.equal(first.a, other.a)


def test_a_weight_of_two_to_the_31_entries_takes_int64():
    made = SparseLowRankLinear(2**16, 2**15, 4, 1e-6, device="meta")
    assert made.positions.dtype == torch.int64
    assert SparseLowRankLinear(2**16, 2**14, 4, 1e-6, device="meta").positions.dtype == torch.int32


def test_draws_have_the_published_ranges():
    made = SparseLowRankLinear(400, 100, 16, 0.2, seed=1)
    for value, bound in ((made.a, 1 / 20), (made.values, 1 / 20), (made.bias, 1 / 10)):
        assert 0.9 * bound < float(value.detach().abs().max()) <= bound
    assert not made.b.any()
    both = LowRankLinear(400, 100, 16, seed=1)
    assert 0.9 / 4 < float(both.b.detach().abs().max()) <= 1 / 4
    # Entries of B A are then about as large as those of a plain layer, 1 / sqrt(3 n).
    assert 0.8 < float(both.weight_dense().detach().std()) * math.sqrt(9 * 400) < 1.2


# ---- gradients -----------------------------------------------------------------------------------


def called(made):
    names = [name for name, _ in made.named_parameters()]

    def call(x, *values):
        return functional_call(made, dict(zip(names, values, strict=True)), (x,))

    return call, tuple(made.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_against_differences(mode, bias):
    made = layer(mode, bias=bias)
    call, parameters = called(made)
    assert torch.autograd.gradcheck(call, (inputs(2, 5).requires_grad_(), *parameters))


def test_gradients_of_the_low_rank_layer_against_differences():
    made = LowRankLinear(N, M, R, 2.0, seed=3, dtype=DOUBLE)
    call, parameters = called(made)
    assert torch.autograd.gradcheck(call, (inputs(2, 5).requires_grad_(), *parameters))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_weight_pulled_back(mode):
    made, x = layer(mode), inputs(4)
    pull = torch.randn(4, M, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(made(x), list(made.parameters()), pull)
    weight = made.weight_dense()
    dense = pull.T @ x
    names = [n for n, _ in made.named_parameters()]
    wanted = dict(
        zip(("a", "b", "values"),
            torch.autograd.grad(weight, (made.a, made.b, made.values), dense), strict=True)
    ) | {"bias": pull.sum(0)}  # fmt: skip
    for name, value in zip(names, found, strict=True):
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12)
    at = found[names.index("values")]
    torch.testing.assert_close(at, dense.flatten()[made.positions], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (DOUBLE, 1e-10)])
@pytest.mark.parametrize("density", [0.03, 0.2])
def test_both_ways_give_one_result(dtype, tolerance, density):
    found = []
    for mode in MODES:
        made = SparseLowRankLinear(
            96, 160, 16, density, 32.0, init="both", seed=2, mode=mode, dtype=dtype
        )
        x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
        x.requires_grad_()
        out = made(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in made.parameters())])
    for first, second in zip(*found, strict=True):
        assert float((first - second).detach().abs().max()) <= tolerance * float(
            first.detach().abs().max()
        )


@pytest.mark.parametrize("mode", MODES)
def test_frozen_values_get_no_gradient(mode):
    made = layer(mode)
    made.values.requires_grad_(False)
    x = inputs(4).requires_grad_()
    made(x).sum().backward()
    assert made.values.grad is None and made.a.grad is not None and x.grad is not None


def test_at_the_start_the_output_does_not_depend_on_a():
    made = layer(init="zero_b")
    x = inputs(4)
    first = made(x)
    first.square().sum().backward()
    assert not made.a.grad.any() and bool(made.b.grad.any())
    with torch.no_grad():
        made.a.add_(1)
    assert torch.equal(made(x), first)


def test_all_positions_and_no_product_train_as_a_dense_layer_does():
    made = layer(density=1.0, init="zero_b")
    made.b.requires_grad_(False)
    plain = made.merge()
    target = torch.randn(32, M, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    losses = []
    for model in (made, plain):
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0
        )
        curve = []
        for _ in range(30):
            loss = (model(inputs(32)) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        losses.append(curve)
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


# ---- merging, ranks ------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (DOUBLE, 1e-14)])
@pytest.mark.parametrize("bias", [True, False])
def test_merged_it_answers_the_same(dtype, tolerance, bias):
    made = layer(dtype=dtype, bias=bias)
    plain = made.merge()
    assert type(plain) is nn.Linear and plain.weight.dtype == dtype
    x = inputs(7, dtype=dtype)
    assert float((plain(x) - made(x)).detach().abs().max()) <= tolerance
    assert torch.equal(made.weight, made.weight_dense())
    assert plain.weight.requires_grad and plain.weight.is_leaf


def test_a_sparse_random_matrix_lifts_the_rank():
    """Full rank from a density of about ln(n) / n on; the product alone stays at r."""
    n = 128
    made = SparseLowRankLinear(
        n, n, 8, 1.5 * math.log(n) / n, init="both", seed=1, bias=False, dtype=DOUBLE
    )
    assert int(torch.linalg.matrix_rank(made.weight_dense())) == n
    low = LowRankLinear(n, n, 8, seed=1, dtype=DOUBLE)
    assert int(torch.linalg.matrix_rank(low.weight_dense())) == 8


# ---- memory and FLOPs ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_autograd_keeps_the_input_and_the_parameters_alone(mode):
    made, x = layer(mode), inputs(4).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(x)
    own = {x.data_ptr(), *(t.data_ptr() for t in made.state_dict().values())}
    assert {t.data_ptr() for t in kept} <= own and len(kept) == 5


def test_bytes_an_entry_with_adam_in_bfloat16():
    """2 for the value, 2 for its gradient, 4 for two moments, 4 for the place."""
    made = SparseLowRankLinear(64, 64, 4, 0.1, seed=1, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(made.parameters())
    made(torch.randn(2, 64, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    state = optimizer.state[made.values]
    held = [made.values, made.values.grad, state["exp_avg"], state["exp_avg_sq"], made.positions]
    each = [t.numel() * t.element_size() / len(made.values) for t in held]
    assert each == [2, 2, 2, 2, 4]


def flops(made, x):
    with FlopCounter() as counter:
        made(x).sum().backward()
    return counter.counted.flops()


@pytest.mark.parametrize("to_input", [True, False])
@pytest.mark.parametrize("tokens", [1, 10])
def test_flops_of_forming_the_weight(tokens, to_input):
    found = flops(layer("materialize"), inputs(tokens).requires_grad_(to_input))
    products, formings = (3, 4) if to_input else (2, 3)
    assert found.executed == products * 2 * tokens * M * N + formings * 2 * R * M * N
    assert found.effective == products * 2 * tokens * (R * (M + N) + K)
    assert found.dense == products * 2 * tokens * M * N


@pytest.mark.parametrize("to_input", [True, False])
@pytest.mark.parametrize("tokens", [1, 10])
def test_flops_of_the_factors(tokens, to_input):
    found = flops(layer("factored"), inputs(tokens).requires_grad_(to_input))
    products = 3 if to_input else 2
    once = 2 * tokens * (R * (M + N) + K)
    # x A^T is made again; without a gradient for x, g B is still there for A's.
    again = 2 * tokens * R * (N if to_input else N + M)
    assert found.executed == products * once + again
    assert found.effective == products * once
    assert found.dense == products * 2 * tokens * M * N


def test_flops_of_the_low_rank_layer():
    made = LowRankLinear(N, M, R, seed=1)
    found = flops(made, inputs(10, dtype=torch.float32).requires_grad_())
    once = 2 * 10 * R * (M + N)
    assert found == (3 * once + 2 * 10 * R * N, 3 * once, 3 * 2 * 10 * M * N)


# ---- where it must work --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_without_storage(mode):
    made = SparseLowRankLinear(N, M, R, 0.2, mode=mode, device="meta")
    out = made(torch.empty(2, 5, N, device="meta"))
    assert out.shape == (2, 5, M)
    out.sum().backward()
    assert made.values.grad.shape == (K,)
    with FakeTensorMode():
        fake = SparseLowRankLinear(N, M, R, 0.2, mode=mode, seed=1)
        x = torch.randn(4, N, requires_grad=True)
        with FlopCounter() as counter:
            fake(x).sum().backward()
    real = flops(
        SparseLowRankLinear(N, M, R, 0.2, mode=mode, seed=1), torch.randn(4, N, requires_grad=True)
    )
    assert counter.counted.flops() == real and fake.a.grad.shape == (R, N)


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_under_autocast(mode):
    made = layer(mode, torch.float32)
    x = inputs(16, dtype=torch.float32).requires_grad_()
    wide = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wide, rtol=0.03, atol=0.03)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in made.parameters())
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(mode, reentrant):
    made, x = layer(mode), inputs(4).requires_grad_()
    plain = torch.autograd.grad(made(x).square().sum(), [x, *made.parameters()])
    out = checkpoint(made, x, use_reentrant=reentrant)
    out.square().sum().backward()
    for first, second in zip(plain, [x, *made.parameters()], strict=True):
        assert torch.equal(first, second.grad)


def test_auto_takes_factors_where_they_are_cheaper():
    sparse = SparseLowRankLinear(512, 1376, 128, 0.03, device="meta")
    dense = SparseLowRankLinear(512, 1376, 128, 0.2, device="meta")
    few, many = torch.empty(1, 512), torch.empty(4096, 512)
    assert sparse._factored(few) == torch.backends.mkl.is_available()
    assert not dense._factored(many)
    assert not sparse._factored(few.bfloat16())


def test_settings_make_the_layer_again():
    made = layer("factored", torch.float32)
    again = SparseLowRankLinear(**made.settings())
    assert again.settings() == made.settings()
    for name, value in made.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"density": 0.0}, "density = 0.0"),
        ({"density": 1.5}, "density = 1.5"),
        ({"density": 0.001}, "leaves no entry of a 9 x 12 weight"),
    ],
)
def test_bad_densities_are_refused(more, problem):
    with pytest.raises(ConfigError, match=problem):
        layer(**more)


def test_a_rank_below_one_is_refused():
    with pytest.raises(ConfigError, match="rank = 0"):
        LowRankLinear(4, 4, 0)
