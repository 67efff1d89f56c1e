"""CLASSP: the rule by hand, its limits, and how it behaves as a torch optimizer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conformance import kit
from torch import nn

from outlay import CLASSP, CLASSPOptimizer
from outlay.core import registry
from outlay.core.errors import ConfigError, Conflict, NonFinite
from outlay.training.planning.plan import plan


def weights(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def give(parameters, seed, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * scale


def one(value, dtype=torch.float64):
    return nn.Parameter(torch.tensor([value], dtype=dtype))


def walk(parameter, optimizer, gradients):
    path = []
    for gradient in gradients:
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        path.append(parameter.item())
    return path


# ---- known answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_with_p_2_and_no_threshold_it_is_adagrad_with_eps_inside(dtype, tolerance):
    ours, theirs = weights((4, 3), (5,), dtype=dtype), weights((4, 3), (5,), dtype=dtype)
    optimizer = CLASSPOptimizer(ours, lr=0.1, p=2, eps=1e-3)
    peer = torch.optim.Adagrad(theirs, lr=0.1, initial_accumulator_value=1e-3, eps=0.0)
    for step in range(20):
        give(ours, step)
        give(theirs, step)
        optimizer.step()
        peer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_three_steps_by_hand():
    w = one(1.0)
    optimizer = CLASSPOptimizer([w], lr=0.1, p=1, eps=1e-300, threshold=0.04)
    assert walk(w, optimizer, [0.5, 0.1, -0.3]) == pytest.approx([0.9, 0.9, 0.9375], rel=1e-14)
    assert optimizer.state[w]["accumulator"].item() == pytest.approx(0.8, rel=1e-15)


def test_a_gradient_at_the_threshold_does_not_move():
    w = one(1.0)
    optimizer = CLASSPOptimizer([w], lr=0.1, threshold=0.25)
    assert walk(w, optimizer, [0.5]) == [1.0]
    assert walk(w, optimizer, [math.nextafter(0.5, 1)])[0] < 1.0


@pytest.mark.parametrize("p", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("apply_decay", [True, False])
@pytest.mark.parametrize("foreach", [True, False])
def test_rejected_elements_stay_to_the_bit(p, apply_decay, foreach):
    some = weights((30, 7), (11,), dtype=torch.float32)
    optimizer = CLASSPOptimizer(
        some, lr=0.1, p=p, threshold=4e-3, apply_decay=apply_decay, foreach=foreach
    )
    give(some, 0)
    optimizer.step()
    before = [w.detach().clone() for w in some]
    sums = [optimizer.state[w]["accumulator"].clone() for w in some]
    give(some, 1)
    optimizer.step()
    gates = [w.grad.square() > 4e-3 for w in some]
    for w, old, total, gate in zip(some, before, sums, gates):
        assert torch.equal(w[~gate], old[~gate]) and not (w[gate] == old[gate]).any()
        now = optimizer.state[w]["accumulator"]
        assert torch.equal(now[~gate], total[~gate]) and (now[gate] > total[gate]).all()
    expected = torch.cat([gate.flatten() for gate in gates]).double().mean().item()
    assert optimizer.update_density() == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected < 0.9


def test_without_decay_it_is_plain_descent_and_the_accumulator_grows():
    ours, theirs = weights((4, 3)), weights((4, 3))
    optimizer = CLASSPOptimizer(ours, lr=0.1, p=3, apply_decay=False)
    peer = torch.optim.SGD(theirs, lr=0.1)
    total = torch.zeros(4, 3, dtype=torch.float64)
    for step in range(5):
        give(ours, step)
        give(theirs, step)
        optimizer.step()
        peer.step()
        total += ours[0].grad.abs() ** 3
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-15, atol=1e-15)
    found = optimizer.state[ours[0]]["accumulator"]
    torch.testing.assert_close(found, total + 1e-5, rtol=1e-13, atol=0)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_scaling_the_loss_and_the_threshold_changes_nothing(p):
    def path(scale, threshold):
        some = weights((20,))
        optimizer = CLASSPOptimizer(some, lr=0.1, p=p, eps=1e-30, threshold=threshold)
        for step in range(10):
            give(some, step, scale=0.1 * scale)
            optimizer.step()
        return some[0].detach()

    plain = path(1, 5e-3)
    torch.testing.assert_close(path(8, 5e-3 * 64), plain, rtol=1e-12, atol=1e-12)
    assert (path(8, 5e-3) - plain).abs().max() > 1e-2


def test_steps_under_a_constant_gradient():
    w = one(0.0)
    path = walk(w, CLASSPOptimizer([w], lr=0.1, p=1, eps=1e-300), [-0.7] * 50)
    harmonic = [sum(1 / k for k in range(1, t + 1)) for t in range(1, 51)]
    assert path == pytest.approx([0.1 * h for h in harmonic], rel=1e-12)
    w = one(0.0)
    path = walk(w, CLASSPOptimizer([w], lr=0.1, p=2, eps=1e-300), [0.7] * 50)
    steps = [-(b - a) for a, b in zip([0.0, *path], path)]
    assert steps == pytest.approx([0.1 / math.sqrt(t) for t in range(1, 51)], rel=1e-10)


def test_a_large_power_divides_by_the_largest_gradient_so_far():
    w = one(0.0)
    path = walk(w, CLASSPOptimizer([w], lr=1.0, p=400, eps=1e-300), [0.5, 0.9, 0.3])
    assert path == pytest.approx([-1.0, -2.0, -2.0 - 0.3 / 0.9], rel=1e-2)


def test_each_group_follows_its_own_settings():
    groups = weights((6,), (6,), (6,))
    optimizer = CLASSPOptimizer(
        [
            {"params": [groups[0]]},
            {"params": [groups[1]], "lr": 0.01, "threshold": 5e-3, "p": 2.0},
            {"params": [groups[2]], "apply_decay": False},
        ],
        lr=0.1,
    )
    alone = weights((6,), (6,), (6,))
    single = [
        CLASSPOptimizer([alone[0]], lr=0.1),
        CLASSPOptimizer([alone[1]], lr=0.01, threshold=5e-3, p=2),
        CLASSPOptimizer([alone[2]], lr=0.1, apply_decay=False),
    ]
    for step in range(4):
        give(groups, step)
        give(alone, step)
        optimizer.step()
        for each in single:
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(groups, alone))
    densities = [optimizer.update_density(k) for k in range(3)]
    assert densities[0] == densities[2] == 1.0 and densities[1] == single[1].update_density() < 1


def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened():
    some = weights((5, 2), (3,))
    optimizer = CLASSPOptimizer(some, p=1.5, threshold=1e-3)
    for step in range(3):
        give(some, step)
        optimizer.step()
    twins = [nn.Parameter(w.detach().clone()) for w in some]
    again = CLASSPOptimizer(twins, p=1.5, threshold=1e-3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh = [nn.Parameter(w.detach().clone()) for w in some]
    forgetful = CLASSPOptimizer(fresh, p=1.5, threshold=1e-3)
    for step in range(3, 6):
        for parameters, each in ((some, optimizer), (twins, again), (fresh, forgetful)):
            give(parameters, step)
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(some, twins))
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(some, fresh)), "history is what protects"


def test_an_infinite_threshold_freezes_and_no_gradient_is_skipped():
    w, idle = weights((4,), (4,))
    optimizer = CLASSPOptimizer([w, idle], threshold=math.inf)
    before = w.detach().clone()
    give([w], 0, scale=1e30)
    optimizer.step()
    assert torch.equal(w, before) and optimizer.update_density() == 0
    assert not optimizer.state.get(idle)


# ---- the published class -------------------------------------------------------------------------


def published(parameters, sums, lr, threshold, p, eps):
    """The released rule, tensor by tensor: a test on the whole, and |g| accumulated."""
    for w, total in zip(parameters, sums):
        if (w.grad**2).any() > threshold:
            total += w.grad.abs()
            w.data -= lr * w.grad / (total + eps) ** (1 / p)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.99, 1.0, 2.0])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_the_compatibility_mode_computes_what_the_published_class_does(threshold, p):
    ours, theirs = weights((4, 3), (5,)), weights((4, 3), (5,))
    sums = [torch.zeros_like(w) for w in theirs]
    optimizer = CLASSPOptimizer(
        [{"params": [ours[0]]}, {"params": [ours[1]], "lr": 9.0}],
        lr=0.05, threshold=threshold, p=p, mode="tensor_any",
    )  # fmt: skip
    before = ours[0].detach().clone()
    for step in range(6):
        give(ours, step)
        give(theirs, step)
        optimizer.step()
        published(theirs, sums, 0.05, threshold, p, 1e-5)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours[0], before) == (threshold >= 1), "the threshold matters from 1 on alone"


def test_the_published_class_with_p_1_is_the_rule_without_a_threshold():
    ours, theirs = weights((9,)), weights((9,))
    compatible = CLASSPOptimizer(ours, p=1, threshold=0.99, mode="tensor_any")
    plain = CLASSPOptimizer(theirs, p=1)
    for step in range(5):
        give(ours, step)
        give(theirs, step)
        compatible.step()
        plain.step()
    assert torch.equal(ours[0], theirs[0])


# ---- as a torch optimizer ------------------------------------------------------------------------


def test_one_by_one_and_together_give_the_same_bits():
    together, alone = weights((4, 3), (5,)), weights((4, 3), (5,))
    first = CLASSPOptimizer(together, threshold=2e-3, p=1.5)
    second = CLASSPOptimizer(alone, threshold=2e-3, p=1.5, foreach=False)
    for step in range(4):
        give(together, step)
        give(alone, step)
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone))
    assert first.update_density() == second.update_density()


def test_maximize_weight_decay_closure_and_schedulers():
    up, down = weights((5,)), weights((5,))
    climbing = CLASSPOptimizer(up, maximize=True)
    falling = CLASSPOptimizer(down)
    start = up[0].detach().clone()
    give(up, 0)
    give(down, 0)
    climbing.step()
    falling.step()
    torch.testing.assert_close(up[0] - start, start - down[0])
    decayed = CLASSPOptimizer(up, lr=0.1, weight_decay=0.5, threshold=math.inf)
    before = up[0].detach().clone()
    decayed.step()
    torch.testing.assert_close(up[0].detach(), before * 0.95)

    def closure():
        falling.zero_grad()
        loss = (down[0] ** 2).sum()
        loss.backward()
        return loss

    scheduler = torch.optim.lr_scheduler.StepLR(falling, 1, gamma=0.5)
    losses = []
    for _ in range(5):
        losses.append(falling.step(closure).item())
        scheduler.step()
    assert losses == sorted(losses, reverse=True)
    assert falling.param_groups[0]["lr"] == 0.1 / 2**5


def test_a_quantile_threshold_moves_the_largest_of_every_tensor():
    some = weights((10, 10), (1,))
    optimizer = CLASSPOptimizer(some, threshold="quantile:0.9")
    before = some[0].detach().clone()
    give(some, 0, scale=1e-6)
    optimizer.step()
    moved = some[0] != before
    assert int(moved.sum()) == 10 and optimizer.update_density() == pytest.approx(11 / 101)
    sizes = some[0].grad.abs()
    assert sizes[moved].min() > sizes[~moved].max()


def test_saturation_and_consolidation():
    some = weights((101,))
    optimizer = CLASSPOptimizer(some, p=2, eps=1e-4)
    assert optimizer.saturation() == {} and math.isnan(optimizer.update_density())
    give(some, 0)
    optimizer.step()
    roots = (some[0].grad.square() + 1e-4).sqrt().sort().values.tolist()
    found = optimizer.saturation((0.0, 0.5, 1.0))
    assert found == pytest.approx({0.0: roots[0], 0.5: roots[50], 1.0: roots[100]}, rel=1e-6)
    before = optimizer.state[some[0]]["accumulator"].clone()
    optimizer.consolidate(0.25)
    torch.testing.assert_close(
        optimizer.state[some[0]]["accumulator"], 1e-4 + 0.25 * (before - 1e-4), rtol=1e-12, atol=0
    )
    with pytest.raises(ConfigError, match=r"decay = 1\.5"):
        optimizer.consolidate(1.5)


def test_gradients_that_are_not_finite():
    some = weights((4,), (4,))
    optimizer = CLASSPOptimizer(some)
    give(some, 0)
    some[1].grad[2] = math.nan
    before = [w.detach().clone() for w in some]
    optimizer.step()
    assert optimizer.skipped_steps == 1 and all(torch.equal(a, b) for a, b in zip(some, before))
    with pytest.raises(NonFinite):
        CLASSPOptimizer(some, nonfinite="raise").step()
    large = weights((4,), dtype=torch.float32)
    large[0].grad = torch.full((4,), 1e25)
    start = large[0].detach().clone()
    CLASSPOptimizer(large).step()
    assert not torch.equal(large[0], start), "a norm that overflows is no reason to skip"


def test_what_it_refuses():
    some = weights((3,))
    for settings, said in (
        ({"p": 0.0}, "p = 0.0"),
        ({"threshold": -1.0}, "threshold = -1.0"),
        ({"threshold": math.nan}, "threshold = nan"),
        ({"threshold": "quantile:2"}, "threshold = 'quantile:2'"),
        ({"threshold": "much"}, "threshold = 'much'"),
        ({"eps": 0.0}, "eps = 0.0"),
        ({"lr": -0.1}, "lr = -0.1"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0"),
        ({"mode": "other"}, "mode = 'other'"),
        ({"nonfinite": "hide"}, "nonfinite = 'hide'"),
        ({"threshold": "quantile:0.5", "mode": "tensor_any"}, "quantile:0.5"),
    ):
        with pytest.raises(ValueError, match=said):
            CLASSPOptimizer(some, **settings)
    with pytest.raises(ConfigError, match="p = -1"):
        CLASSPOptimizer([{"params": some, "p": -1.0}])
    with pytest.raises(ConfigError, match="complex"):
        CLASSPOptimizer([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse"):
        CLASSPOptimizer(table.parameters()).step()


# ---- in a run ------------------------------------------------------------------------------------


def test_the_run_uses_it_and_shows_how_much_moved():
    stage = kit.stage(kit.recipe(methods=["classp(threshold=1e-4, p=2)"]))
    (optimizer,) = stage.live.optimizers
    assert type(optimizer) is CLASSPOptimizer
    group = optimizer.param_groups[0]
    assert (group["threshold"], group["p"], group["weight_decay"]) == (1e-4, 2.0, 0.01)
    logged = []
    stage.loop.on_step = lambda step, values: logged.append(values)
    kit.trained(stage)
    assert all(0 < values["update_density"] < 1 for values in logged) and len(logged) == 3


def test_a_plan_counts_one_tensor_a_weight():
    planned = plan(kit.recipe(methods=["classp(threshold=1e-5)"]), device="cpu")
    assert planned.memory_bytes["optimizer"] == 4 * planned.params["trainable"]
    assert not any("not counted" in note for note in planned.notes)


def test_a_threshold_that_blocks_everything_is_said(recwarn):
    spec = "classp(threshold=1e6)"
    stage = kit.stage(kit.recipe(methods=[spec], budget="100steps", model={"layers": 1}))
    with pytest.warns(UserWarning, match="no weight move for 100 steps; the 99th percentile"):
        kit.trained(stage)


def test_settings():
    assert registry.build("classp(threshold='quantile:0.9')") == CLASSP(threshold="quantile:0.9")
    for spec, said in (
        ("classp(threshold='half')", "classp.threshold = 'half'"),
        ("classp(threshold=-1e-5)", "classp.threshold"),
        ("classp(p=0)", "classp.p"),
        ("classp(mode='tensor_any', threshold='quantile:0.5')", "single elements"),
    ):
        with pytest.raises(ConfigError, match=said):
            registry.build(spec)
    with pytest.raises(Conflict, match="'classp' follows the tasks"):
        kit.stage(kit.recipe(methods=["classp(decay_from_task=1)"]))
