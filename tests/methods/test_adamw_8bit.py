"""8-bit AdamW beside torchao's own class, its state and what happens without torchao."""

from __future__ import annotations

import sys

import pytest
import torch
from optimizer_kit import SETTINGS, gradients, groups, tensor_bytes, walked
from torch import nn

from outlay import AdamW8bit
from outlay.core.context import Context
from outlay.core.errors import MissingExtra

INSTALL = "torchao is missing: pip install torchao==0.18.0"


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (64, 128), "small": (8, 8), "odd": (4099,), "vector": (4096,)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }


def ours(some, **more):
    pytest.importorskip("torchao.optim", reason=INSTALL)
    return AdamW8bit(**more).build(groups(some), SETTINGS, Context())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_steps_of_torchaos_own_class(monkeypatch, dtype):
    """Compiled or not the arithmetic is one; here theirs is not compiled, to the bit ours."""
    optim = pytest.importorskip("torchao.optim", reason=INSTALL)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    mine, other = parameters(dtype), parameters(dtype)
    twin = optim.AdamW8bit(
        list(other.values()), lr=0.01, betas=SETTINGS.betas, eps=SETTINGS.eps, weight_decay=0.1
    )
    found, expected = walked(ours(mine), mine), walked(twin, other)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_it_stays_near_adamw():
    mine, other = parameters(), parameters()
    plain = torch.optim.AdamW(groups(other), betas=SETTINGS.betas, eps=SETTINGS.eps)
    start = parameters()
    found, expected = walked(ours(mine), mine), walked(plain, other)
    for name, value in found.items():
        moved = float((expected[name] - start[name]).detach().norm())
        assert float((value - expected[name]).norm()) < 0.05 * moved


def test_state_is_plain_tensors_of_the_size_it_says():
    some = parameters()
    optimizer = ours(some)
    walked(optimizer, some, 1)
    for state in optimizer.state.values():
        assert all(type(value) is torch.Tensor for value in state.values())
    coded = 64 * 128 + 4096
    expected = 2 * (coded + 4 * coded // 256 + 4 * (64 + 4099))
    assert tensor_bytes(optimizer) == optimizer.state_bytes() == expected
    assert optimizer.state[some["large"]]["exp_avg_codes"].dtype == torch.uint8
    assert optimizer.state[some["odd"]]["exp_avg"].shape == (4099,)


def test_stochastic_rounding_moves_weights_below_their_resolution():
    def moved(stochastic):
        some = {"large": nn.Parameter(torch.full((64, 64), 100.0, dtype=torch.bfloat16))}
        optimizer = ours(some, stochastic_rounding=stochastic)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            for step in range(5):
                gradients(some, step)
                optimizer.param_groups[0]["weight_decay"] = 0.0
                optimizer.step()
        return int((some["large"] != 100).sum())

    assert moved(False) == 0
    assert moved(True) > 0


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(MissingExtra, match=r"outlay\[torchao\]"):
        AdamW8bit().build(groups(parameters()), SETTINGS, Context())
