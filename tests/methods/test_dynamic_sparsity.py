"""SET and RigL in a run: the count stays, the right entries come and go. arXiv 1911.11134."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance import kit

from outlay.core.method import Watcher
from outlay.methods.sparse.dynamic_sparsity import DynamicSparsity


class Around(Watcher):
    """Masks, values and dense gradients before a move, and what it made of them."""

    def __init__(self, live: Any) -> None:
        self.live, self.moves = live, {}

    def before(self, step: Any, seen: Any) -> None:
        self.moves[step.index] = {
            name: (mask.keep.clone(), self.live.parameter(name).detach().abs().clone(),
                   self.live.parameter(name).grad.abs().clone())
            for name, mask in self.live.masks.items()
        }  # fmt: skip


@pytest.mark.parametrize("rule", ["rigl", "set"])
def test_moves(rule):
    method = DynamicSparsity(rule=rule, sparsity=0.6, every=3, stop=0.75, drop_fraction=0.4)
    stage = kit.stage(kit.recipe("llama", [method], budget="16steps", optimizer={"lr": 3e-3}))
    live, moved, allowed = stage.live, [], []
    around = Around(live)

    class First(Watcher):
        def after_backward(self, step: Any, seen: Any) -> None:
            around.before(step, seen)

    class Last(Watcher):
        def after_backward(self, step: Any, seen: Any) -> None:
            changed = 0
            for name, (keep, sizes, gradient) in around.moves[step.index].items():
                now = live.masks[name].keep
                changed += int((now != keep).sum())
                assert int(now.sum()) == int(keep.sum()), "density is constant"
                came, went = now & ~keep, keep & ~now
                assert bool((live.parameter(name)[came] == 0).all())
                if not bool(came.any()):
                    continue
                dropped = int(method.dropped(step.index, 12) * int(keep.sum()))
                gone = sizes[keep].sort()[0][dropped - 1]
                assert float(sizes[went].max()) <= float(gone)
                if rule == "rigl":
                    assert float(gradient[came].min()) >= float(gradient[~now & ~keep].max())
            moved.append(changed > 0)

        def after_update(self, step: Any) -> None:
            allowed.append(stage.loop.watchers[1].may_stop(step))
            for name, mask in live.masks.items():
                assert bool((live.parameter(name)[~mask.keep] == 0).all())

    stage.loop.watchers = [First(), *stage.loop.watchers, Last()]
    kit.trained(stage)
    assert [index for index, yes in enumerate(moved) if yes] == [3, 6, 9]
    assert allowed == [False] * 11 + [True] * 5
    assert stage.context.meter.facts["average_density"] == pytest.approx(0.4, abs=1e-3)


def test_the_drop_fraction_is_annealed():
    method = DynamicSparsity()
    assert method.dropped(0, 750) == pytest.approx(0.3)
    assert method.dropped(375, 750) == pytest.approx(0.15)
    assert method.dropped(750, 750) == pytest.approx(0, abs=1e-12)
    assert method.dropped(250, 750) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))


def test_the_rules_differ_and_cost_the_same():
    def trained(rule: str) -> Any:
        spec = f"dynamic_sparsity(rule={rule!r}, sparsity=0.5, every=2)"
        return kit.trained(kit.stage(kit.recipe("llama", [spec], budget="6steps")))

    first, second = trained("rigl"), trained("set")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first.live.masks[name].keep, second.live.masks[name].keep)
    assert first.context.meter.totals["flops"] == second.context.meter.totals["flops"]
    assert not first.context.meter.charges
