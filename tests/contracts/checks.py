"""The contracts as functions that raise AssertionError: used by tests and by planted faults."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from contracts import rig, toys
from torch import Tensor

from outlay.training import checkpoint
from outlay.training.data.pool import Pool

SPLITS = (16, 4, 1)


def same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float, what: str) -> None:
    assert set(first) == set(second), f"{what}: {set(first) ^ set(second)}"
    for name, value in first.items():
        gap = float((value - second[name]).abs().max()) if value.numel() else 0.0
        assert gap <= tolerance * max(1.0, float(value.abs().max())), f"{what} of {name}: {gap}"


def values(assembly: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in assembly.live.named_parameters()}


def check_splits(make: Any, methods: Any = (), **more: Any) -> None:
    """1x16 = 4x4 = 16x1: gradients of every step, weights after several, what was seen."""
    runs = {}
    for micro in SPLITS:
        runs[micro] = rig.trained(make([*methods, toys.Note()], micro=micro, **more))
    first = runs[SPLITS[0]]
    start = values(make(list(methods)))
    moved = max(float((v - start[n]).abs().max()) for n, v in values(first).items() if n in start)
    assert moved > 1e-4, "nothing was learned"
    for micro in SPLITS[1:]:
        other = runs[micro]
        same(rig.notes(first).gradients[0], rig.notes(other).gradients[0], 1e-12, "gradient")
        for a, b in zip(rig.notes(first).gradients, rig.notes(other).gradients):
            same(a, b, 1e-9, "gradient")
        same(values(first), values(other), 1e-9, "weights")
        for a, b in zip(rig.notes(first).seen, rig.notes(other).seen):
            assert a.ids == b.ids and a.domains == b.domains
            assert abs(a.loss - b.loss) < 1e-9 * max(1.0, abs(a.loss)), (a.loss, b.loss)
            assert len(a.values) == len(a.ids)
            torch.testing.assert_close(a.values, b.values, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(a.weights, b.weights)


def check_gradient_of_whole_step(make: Any, methods: Any, loss_of: Any) -> None:
    """The accumulated gradient equals autograd's of the loss written out over the whole step."""
    run = make([*methods, toys.Note()], micro=4, steps=1, optimizer={"clip": None})
    reference = copy.deepcopy(run.model)
    rig.trained(run)
    parts = rig.notes(run).batches[0]
    whole = {
        key: torch.cat([part[key] for part in parts])
        for key in parts[0]
        if isinstance(parts[0][key], Tensor)
    }
    loss_of(reference, whole).backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    same(rig.notes(run).gradients[0], expected, 1e-12, "gradient")


def check_resume(make: Any, every: int = 1) -> None:
    """Resuming from any checkpoint gives the bits of the uninterrupted run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = make()
        rig.keeper_of(whole, folder / "whole")
        rig.trained(whole)
        expected = rig.digest(whole)
        found = checkpoint.Checkpoints(folder / "whole").all()
        assert len(found) == whole.context.meter.totals["steps"]
        for path in found[::every]:
            again = make()
            keeper = rig.keeper_of(again, folder / "again")
            keeper.restore(checkpoint.read_folder(path)["tree"])
            rig.trained(again)
            assert rig.digest(again) == expected, f"resumed from {path.name}: other bits"


def check_prefetch(depths: Any = (0, 1, 4)) -> None:
    """Weights that change online give one result whatever is drawn ahead."""
    runs = [
        rig.trained(rig.make([toys.Mix(), toys.Note()], prefetch=d, steps=8, micro=4))
        for d in depths
    ]
    orders = [[s.ids for s in rig.notes(run).seen] for run in runs]
    assert runs[0].live.pool.version > 2, "the weights never changed"
    for order, run in zip(orders[1:], runs[1:]):
        assert order == orders[0], "drawing ahead changed the order"
        same(values(runs[0]), values(run), 0.0, "weights")


def check_dropout_replay() -> None:
    """With dropout on, the coupled gradient is that of one forward pass, drawn once."""
    model = toys.filled(toys.Net(dropout=0.5))
    run = rig.make(
        [toys.Focus(), toys.Note()], model=model, micro=4, steps=1, optimizer={"clip": None}
    )
    reference = copy.deepcopy(run.model).train()
    rig.trained(run)
    seed_of = rig_seed
    sums, weights = [], []
    for index, batch in enumerate(rig.notes(run).batches[0]):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_of(0, "dropout", 0, index, 0))
            logits = reference(batch["x"])
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        sums.append(loss)
        weights.append(torch.ones_like(loss))
    whole, weight = torch.cat(sums), torch.cat(weights)
    factors = torch.softmax(whole, 0) * len(whole)
    ((whole * factors).sum() / (weight * factors).sum()).backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    same(rig.notes(run).gradients[0], expected, 1e-12, "gradient")


def rig_seed(*parts: Any) -> int:
    from outlay.core.method import seed_of

    return seed_of(*parts)


def check_mask_holds(kind: str = "hard") -> None:
    """Masked entries, and their moments, stay where they are under momentum and decay."""
    run = rig.make([toys.Operate(script=((1, kind),))], steps=6)
    live = run.live
    name = "body.4.weight" if kind == "hard" else "head.weight"
    seen: list[Tensor] = []

    def look(step: Any) -> bool:
        if name in live.masks:
            seen.append(live.parameter(name).detach().clone())
        return False

    run.loop.after_step = look
    rig.trained(run)
    gone = ~live.masks[name].keep
    assert len(seen) == 5 and bool(gone.any())
    for later in seen[1:]:
        assert bool((later[gone] == seen[0][gone]).all()), "a masked entry moved"
        assert bool((later[~gone] != seen[0][~gone]).any()), "the living entries stopped"
    state = live.optimizers[0].state[live.parameter(name)]
    assert bool((state["exp_avg"][gone] == 0).all()), "moments of masked entries live on"
    assert bool((state["exp_avg_sq"][gone] == 0).all()), "moments of masked entries live on"


def check_state_follows() -> None:
    """Moments follow a replaced parameter: kept, reset, or through a function."""
    run = rig.make(steps=3)
    rig.trained(run)
    live, optimizer = run.live, run.live.optimizers[0]
    before = {k: v.clone() for k, v in optimizer.state[live.parameter("head.weight")].items()}
    fresh = live.replace("head.weight", live.parameter("head.weight").detach() * 2, state="keep")
    assert live.parameter("head.weight") is fresh and run.model.head.weight is fresh
    held = optimizer.state.get(fresh, {})
    assert "exp_avg" in held, "the moments did not follow"
    assert torch.equal(held["exp_avg"], before["exp_avg"]) and held["step"] == before["step"]
    fresh = live.replace("head.weight", torch.zeros(2, 8, dtype=toys.F64), state=lambda m: m[:2])
    assert torch.equal(optimizer.state[fresh]["exp_avg"], before["exp_avg"][:2])
    assert optimizer.state[fresh]["step"] == before["step"]
    assert any(p is fresh for g in optimizer.param_groups for p in g["params"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 6
    fresh = live.replace("head.weight", torch.ones(2, 8, dtype=toys.F64))
    assert not optimizer.state.get(fresh)


def check_inside_equals_ordinary(methods: Any = (), optimizer: str = "adamw") -> None:
    """Updates inside backward end where the ordinary update ends, accumulation included."""
    for micro in (16, 4):
        setting = {"clip": None, "name": optimizer, "betas": (0.9, 0.99)}
        plain = rig.trained(rig.make(methods, micro=micro, steps=5, optimizer=setting))
        inside = rig.trained(
            rig.make([*methods, toys.Inside()], micro=micro, steps=5, optimizer=setting)
        )
        assert len(inside.live.optimizers) > 1
        same(values(plain), values(inside), 1e-12, "weights")


def check_visits() -> None:
    """An example's epoch is its own visit count, also where weights come later."""
    rows = [{"id": i, "domain": "ab"[i % 2]} for i in range(10)]
    pool = Pool(rows, 3)
    count: dict[int, int] = {}

    def draw(amount: int) -> None:
        for example in pool.draw(amount):
            seen = count.get(example["id"], 0)
            assert example["visit"] == seen, (example["id"], example["visit"], seen)
            count[example["id"]] = seen + 1

    draw(13)
    pool.set_weights({"a": 1.0, "b": 3.0})
    draw(31)
    pool.set_weights({"a": 1.0, "b": 0.0})
    draw(17)
    cursor = pool.cursor()
    ahead = [(e["id"], e["visit"]) for e in pool.draw(9)]
    pool.seek(cursor)
    assert [(e["id"], e["visit"]) for e in pool.draw(9)] == ahead


def check_corruption_is_per_example() -> None:
    """Neither the split, nor drawing ahead, nor another method changes a corruption."""
    settings = [
        {"micro": 16},
        {"micro": 1},
        {"micro": 4, "prefetch": 3},
        {"micro": 16, "more": [toys.Shuffle()]},
    ]
    found = []
    for setting in settings:
        methods = [*setting.pop("more", []), toys.Corrupt(), toys.Note()]
        run = rig.language(methods, steps=4, **setting)
        found.append(_rows_drawn(run))
    assert all(other == found[0] for other in found[1:]), "a corruption depends on the drawing"
    clean = _rows_drawn(rig.language([toys.Note()], steps=4))
    assert clean != found[0] and [r[0] for r in clean] == [r[0] for r in found[0]]


def _rows_drawn(run: Any) -> list[tuple[Any, ...]]:
    from outlay.core.method import Step

    rows = []
    for index in range(4):
        for batch in run.loop.drawer.draw(Step(index, index / 4, 0)):
            for i, name in enumerate(batch["ids"]):
                length = int(batch["attention_mask"][i].sum())
                rows.append((name, tuple(batch["input_ids"][i, :length].tolist())))
    run.loop.drawer.close()
    return rows
