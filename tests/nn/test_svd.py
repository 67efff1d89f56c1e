"""Decompositions, their cache, energies."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from adapter_kit import gpt2
from spectral_kit import Quantized, random
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from outlay.core.errors import ConfigError, Conflict, NonFinite
from outlay.nn.decomposition import DISTINCT
from outlay.nn.svd import (
    SvdCache,
    decompose,
    energies,
    energy_rank,
    fingerprint,
    float_matrix,
    is_quantized,
    shared_cache,
    spectral_energy,
)


def hilbert(n: int) -> torch.Tensor:
    index = torch.arange(n, dtype=torch.float64)
    return 1 / (index[:, None] + index[None, :] + 1)


SHAPES = [(12, 12), (30, 8), (8, 30), (1, 5), (5, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_product_is_the_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random(*shape, dtype=dtype)
    found = decompose(weight)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.u.dtype == found.s.dtype == found.vh.dtype == kept
    tight = 1e-12 if dtype == torch.float64 else 1e-6
    error = (found.u * found.s) @ found.vh - weight.to(kept)
    assert error.abs().max() <= tight * weight.double().norm()
    eye = torch.eye(min(shape), dtype=kept)
    assert (found.u.T @ found.u - eye).abs().max() < tight
    assert (found.vh @ found.vh.T - eye).abs().max() < tight
    assert (found.s[:-1] >= found.s[1:]).all()
    assert math.isclose(found.energy, float(weight.double().square().sum()), rel_tol=1e-12)


def test_values_equal_torch_to_float32_or_better() -> None:
    weight = random(40, 24)
    wide = torch.linalg.svd(weight.double(), full_matrices=False)[1]
    assert (decompose(weight).s.double() - wide).abs().max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_entry_of_every_left_vector_is_positive(shape: tuple[int, int]) -> None:
    for weight in (random(*shape), -random(*shape)):
        found = decompose(weight)
        peaks = found.u.gather(0, found.u.abs().argmax(0, keepdim=True))
        assert (peaks > 0).all()


def test_signs_flip_in_pairs_only() -> None:
    """-W has the vectors of W with one side turned: u stays, v turns."""
    weight = random(20, 12)
    first, second = decompose(weight), decompose(-weight)
    assert torch.allclose(first.u, second.u, atol=1e-6)
    assert torch.allclose(first.vh, -second.vh, atol=1e-6)


def test_singular_weights_fall_back_to_the_svd() -> None:
    for weight in (hilbert(12).float(), torch.zeros(4, 6), torch.ones(5, 3), torch.diag(
        torch.tensor([2.0, 1.0, 0.0])
    )):  # fmt: skip
        found = decompose(weight)
        small = min(weight.shape)
        assert torch.allclose((found.u * found.s) @ found.vh, weight, atol=1e-6)
        assert torch.allclose(found.u.T @ found.u, torch.eye(small), atol=1e-6)
        assert torch.allclose(found.vh @ found.vh.T, torch.eye(small), atol=1e-6)


def test_the_threads_do_not_change_the_bits() -> None:
    weight, before = random(64, 48), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(decompose(weight))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].u, results[1].u)
    assert torch.equal(results[0].vh, results[1].vh)


def test_iterated_triplets_agree_with_exact_ones() -> None:
    u, _ = torch.linalg.qr(random(320, 300, dtype=torch.float64))
    v, _ = torch.linalg.qr(random(300, 300, seed=1, dtype=torch.float64))
    weight = ((u * (10 / torch.arange(1.0, 301.0))) @ v.T).float()
    found, exact = decompose(weight, 6, exact_below=64), decompose(weight)
    assert not found.exact and len(found.s) == 7
    assert torch.allclose(found.s, exact.s[:7], rtol=1e-5)
    assert torch.allclose(found.u, exact.u[:, :7], atol=2e-3)
    eye = torch.eye(7)
    assert (found.u.T @ found.u - eye).abs().max() < 1e-5
    residual = (weight @ found.vh.T - found.u * found.s).norm(dim=0)
    assert residual.max() <= 1e-4 * found.s[0] * 1.01
    assert energy_rank(found.s, 0.9, found.energy) == energy_rank(exact.s, 0.9)
    again = decompose(weight, 6, exact_below=64)
    assert torch.equal(found.u, again.u)


def test_iteration_that_does_not_settle_becomes_exact() -> None:
    flat, _ = torch.linalg.qr(random(160, 160))
    found = decompose(flat, 4, exact_below=64)
    assert found.exact or (flat @ found.vh.T - found.u * found.s).norm(dim=0).max() < 1.1e-4
    noise = decompose(random(160, 160), 15, exact_below=64)
    assert noise.exact and len(noise.s) == 160


def test_gaps() -> None:
    found = decompose(torch.diag(torch.tensor([4.0, 3.0, 2.0, 2.0])))
    assert found.gap([0]) == 0.25
    assert not found.degenerate([0, 1])
    assert found.gap([2]) < DISTINCT and found.degenerate([2]) and found.degenerate([1, 2])
    assert decompose(torch.eye(3)).degenerate([0])
    assert decompose(torch.zeros(3, 3)).degenerate([0])
    assert decompose(torch.tensor([[2.0]])).gap([0]) == math.inf


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_name_the_layer(bad: float) -> None:
    weight = random(4, 4)
    weight[1, 2] = bad
    with pytest.raises(NonFinite, match="attention"):
        decompose(weight, name="attention")


def test_fingerprint_is_about_values() -> None:
    weight = random(6, 4)
    assert fingerprint(weight) == fingerprint(weight.clone().double()) == fingerprint(weight.T.T)
    assert fingerprint(weight.bfloat16()) == fingerprint(weight.bfloat16().float())
    assert fingerprint(weight) != fingerprint(weight.T)
    assert fingerprint(weight) != fingerprint(weight.reshape(4, 6))
    nudged = weight.double()
    nudged[0, 0] += 1e-12
    assert fingerprint(nudged) != fingerprint(weight)
    assert len(fingerprint(weight)) == 32


# ---- cache ---------------------------------------------------------------------------------------


def test_memory_answers_the_second_time_and_content_is_the_key() -> None:
    cache, weight = SvdCache(), random(10, 6)
    first = cache.get(weight)
    assert cache.get(weight.clone(), 2) is first
    assert (cache.made, cache.hits) == (1, 1)
    weight[0, 0] += 1
    assert cache.get(weight) is not first and cache.made == 2
    assert cache.get(weight.double()).u.dtype == torch.float64 and cache.made == 3


def test_memory_has_a_limit() -> None:
    cache = SvdCache(limit_bytes=2 * decompose(random(10, 10)).nbytes())
    for seed in range(4):
        cache.get(random(10, 10, seed=seed))
    cache.get(random(10, 10, seed=3))
    cache.get(random(10, 10, seed=0))
    assert (cache.hits, cache.made) == (1, 5)
    cache.clear()
    cache.get(random(10, 10, seed=0))
    assert cache.made == 6


def test_disk_gives_the_same_bits(tmp_path: Path) -> None:
    weight = random(9, 7)
    made = SvdCache(tmp_path / "svd").get(weight)
    again = SvdCache(tmp_path / "svd")
    read = again.get(weight)
    assert again.loaded == 1 and again.made == 0
    for part in ("u", "s", "vh"):
        assert torch.equal(getattr(made, part), getattr(read, part))
    assert (made.energy, made.exact, made.fingerprint) == (
        read.energy, read.exact, read.fingerprint,
    )  # fmt: skip


def test_broken_files_are_made_again(tmp_path: Path) -> None:
    weight = random(5, 5)
    SvdCache(tmp_path).get(weight)
    (file,) = tmp_path.iterdir()
    for content in (b"", b"nonsense", file.read_bytes()[:-7]):
        file.write_bytes(content)
        cache = SvdCache(tmp_path)
        cache.get(weight)
        assert cache.made == 1
        assert [p.name for p in tmp_path.iterdir()] == [file.name]
    assert SvdCache(tmp_path).get(weight).exact


def test_the_folder_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTLAY_SVD_CACHE", str(tmp_path))
    assert shared_cache() is shared_cache()
    shared_cache().get(random(4, 3))
    assert len(list(tmp_path.iterdir())) == 1


# ---- energies ------------------------------------------------------------------------------------


def test_energy_rule() -> None:
    s = torch.tensor([3.0, 1.0, 1.0])
    assert torch.allclose(energies(s), torch.tensor([9.0, 10.0, 11.0]).double() / 11)
    ranks = {share: energy_rank(s, share) for share in (0.8, 0.9, 0.95, 1.0, 1e-9)}
    assert ranks == {0.8: 1, 0.9: 2, 0.95: 3, 1.0: 3, 1e-9: 1}
    assert energy_rank(torch.tensor([3.0]), 0.9, total=11.0) == 1
    assert energy_rank(torch.zeros(4), 0.5) == 1
    for share in (0.0, 1.1, -1.0):
        with pytest.raises(ConfigError, match="share"):
            energy_rank(s, share)


def test_spectral_energy_of_a_weight() -> None:
    energy = spectral_energy(torch.diag(torch.tensor([1.0, 3.0, 1.0])))
    assert torch.allclose(energy, torch.tensor([9.0, 10.0, 11.0]).double() / 11)
    assert (spectral_energy(random(20, 6)).diff() >= 0).all()


# ---- weights as matrices -------------------------------------------------------------------------


def test_every_kind_of_layer_is_a_matrix() -> None:
    assert float_matrix(nn.Linear(3, 5)).shape == (5, 3)
    assert float_matrix(nn.Conv2d(3, 5, (2, 4))).shape == (5, 24)
    block = gpt2().transformer.h[0]
    assert float_matrix(block.attn.c_attn).shape == (96, 32)
    with pytest.raises(Conflict, match="groups"):
        float_matrix(nn.Conv2d(4, 4, 3, groups=2), "stem")
    layer = Quantized(nn.Linear(6, 4))
    assert is_quantized(layer) and not is_quantized(nn.Linear(2, 2).bfloat16())
    assert (float_matrix(layer) - layer.exact).abs().max() < 0.01
    layer.weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(Conflict, match="int8"):
        float_matrix(layer, "head")


def test_plans_need_no_values() -> None:
    with FakeTensorMode():
        fake = torch.randn(8, 6)
        found = SvdCache().get(fake)
        assert found.u.shape == (8, 6) and found.vh.shape == (6, 6)
        assert decompose(fake, 2).u.shape == (8, 3)
        assert energy_rank(found.s, 0.5) == 6 and not found.degenerate([0, 1])
    assert decompose(torch.empty(5, 7, device="meta")).s.shape == (5,)
