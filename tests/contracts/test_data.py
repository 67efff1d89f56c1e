"""Data, batches and rollouts: order, visits, corruption, layouts, selectors, rewards."""

from __future__ import annotations

import time

import pytest
import torch
from contracts import checks, rig, toys
from torch import nn

from outlay.core.errors import ConfigError, Conflict, DataError
from outlay.core.method import Context, Step, Watcher
from outlay.training.data.batch import padded, token_count
from outlay.training.data.pool import Pool

# ---- the pool ------------------------------------------------------------------------------------


def test_an_examples_epoch_is_its_own_visit_count():
    checks.check_visits()


def test_drawing_ahead_changes_nothing():
    checks.check_prefetch()


def test_every_example_comes_once_an_epoch():
    pool = Pool([{"id": i} for i in range(10)], 0)
    first, second = [[e["id"] for e in pool.draw(10)] for _ in range(2)]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_seek_costs_the_same_everywhere():
    pool = Pool([{"id": i, "domain": "ab"[i % 2]} for i in range(2000)], 0)
    pool.set_weights({"a": 1, "b": 2})

    def cost(position):
        best = 9.0
        for _ in range(5):
            pool.seek({"position": position, "cursors": {"domain:a": position, "domain:b": 0}})
            pool._orders.clear()
            began = time.perf_counter()
            pool.draw(16)
            best = min(best, time.perf_counter() - began)
        return best

    assert cost(10_000_000) < 5 * cost(10) + 1e-3


def test_weights_are_followed_and_zero_is_never_drawn():
    pool = Pool([{"id": i, "domain": "abc"[i % 3]} for i in range(30)], 0, {"a": 3, "b": 1, "c": 0})
    drawn = [e["domain"] for e in pool.draw(2000)]
    assert "c" not in drawn and abs(drawn.count("a") / 2000 - 0.75) < 0.05
    kept = pool.keep(lambda e: e["domain"] != "b")
    assert kept.domain_weights == {"a": 3.0, "c": 0.0}


def test_peek_neither_moves_nor_disturbs():
    pool = Pool([{"id": i, "domain": "ab"[i % 2]} for i in range(10)], 0)
    first = [e["id"] for e in pool.peek(4)]
    assert [e["id"] for e in pool.draw(4)] == first
    pool.draw(9)
    pool.set_weights({"a": 1, "b": 1})
    cursor = pool.cursor()
    pool.peek(5)
    assert pool.cursor() == cursor


def test_bad_pools_are_named():
    with pytest.raises(DataError, match="no training example"):
        Pool([])
    with pytest.raises(DataError, match="the id 1"):
        Pool([{"id": 1}, {"id": 1}])
    with pytest.raises(DataError, match="no id"):
        Pool([{"text": "a"}])
    pool = Pool([{"id": 1, "domain": "news"}])
    for weights, text in (({"newz": 1}, "newz"), ({"news": -1}, "-1"), ({"news": 0}, "above zero"),
                          ({"news": float("nan")}, "nan")):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            pool.set_weights(weights)


# ---- transforms and layouts ----------------------------------------------------------------------


def test_a_corruption_belongs_to_its_example():
    checks.check_corruption_is_per_example()


def test_a_second_visit_is_corrupted_anew():
    rows = toys.sentences(16)
    run = rig.language([toys.Corrupt()], rows=rows, size=16, steps=2)
    drawn = [run.loop.drawer.draw(Step(i, i / 2, 0))[0] for i in range(2)]
    kept = [dict(zip(b["ids"], b["input_ids"].tolist())) for b in drawn]
    assert set(kept[0]) == set(kept[1])
    assert any(kept[0][i][:3] != kept[1][i][:3] for i in kept[0])


def test_share_is_fixed_when_the_step_is_drawn():
    class Shares(toys.Corrupt):
        def transform(self, example, draw, step, context):
            return {**example, "share": step.share, "at": step.index}

    for budget in ("64examples", "300tokens", "4steps"):
        found = []
        for prefetch in (0, 3):
            drawer = rig.language([Shares()], budget=budget, prefetch=prefetch).loop.drawer
            steps = [drawer.draw(Step(i, 0.0, 0))[0] for i in range(3)]
            drawer.close()
            found.append([float(batch["share"][0]) for batch in steps])
        assert found[0] == found[1] and found[0][0] == 0.0 < found[0][1] < found[0][2] <= 1.0


def test_the_clean_batch_comes_on_request_in_the_same_layout():
    class Ask(toys.Focus):
        def shape(self, objective, model, context):
            context.request("clean")
            return objective

    for methods in ([toys.Corrupt()], [toys.Corrupt(), toys.Pack()]):
        run = rig.language([*methods, Ask(), toys.Note()], steps=1)
        rig.trained(run)
        batch = rig.notes(run).batches[0][0]
        clean = batch["clean"]
        assert clean["input_ids"].shape == batch["input_ids"].shape
        assert bool((batch["input_ids"] == 10).any()) and not bool((clean["input_ids"] == 10).any())
        assert torch.equal(clean["labels"], batch["labels"]) and clean["ids"] == batch["ids"]


def test_two_layouts_are_refused_by_name():
    class Other(toys.Pack):
        card = toys.Card(name="other", title="toy")

    with pytest.raises(Conflict, match="'pack' and 'other' both lay out"):
        rig.language([toys.Pack(), Other()])


def test_padding():
    examples = [
        {"id": 0, "input_ids": [1, 2, 3], "labels": [1, 2, 3], "score": [0.1, 0.2, 0.3],
         "rewards": {"a": 1.0}, "several": [0.0, 1.0]},
        {"id": 1, "input_ids": [4], "labels": [4], "score": [0.4], "rewards": {"a": 2.0},
         "several": [1.0, 0.0]},
    ]  # fmt: skip
    batch = padded(examples, pad_id=9, pad_to=4)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert batch["labels"].tolist() == [[1, 2, 3, -100], [4, -100, -100, -100]]
    assert batch["score"].shape == (2, 4) and float(batch["score"][1, 1]) == 0.0
    assert batch["several"].shape == (2, 2) and batch["rewards"]["a"].tolist() == [1.0, 2.0]
    assert token_count(batch) == 4
    del examples[1]["score"]
    with pytest.raises(DataError, match="'score'"):
        padded(examples)


# ---- selectors -----------------------------------------------------------------------------------


def test_a_fitted_selector_scores_selects_saves_and_loads(tmp_path):
    pool = Pool(toys.sentences(), 0)
    context = Context(pool=pool)
    fitted = toys.Shortest().fit(pool, context)
    assert context.meter.charges["sample"] == {"examples": 8}
    fitted.save(tmp_path / "selector")
    again = toys.ShortFirst.load(tmp_path / "selector")
    assert torch.equal(fitted.score(pool.examples), again.score(pool.examples))
    assert fitted.select(pool).ids == again.select(pool).ids == toys.Shortest().select(pool).ids


def test_a_selector_in_a_run_is_charged_and_sees_what_selectors_before_left():
    class Long(toys.Shortest):
        card = toys.Card(name="long", title="toy")

        def select(self, pool, context=None):
            return pool.keep(lambda e: len(e["input_ids"]) > 5)

    run = rig.language([Long(), toys.Shortest()], steps=2)
    assert len(run.live.pool) <= 20
    assert all(len(e["input_ids"]) > 5 for e in run.live.pool.examples)
    assert run.context.pool is run.live.pool
    assert {"long", "shortest", "sample"} <= set(run.context.meter.charges)
    rig.trained(run)


def test_what_does_not_learn_says_so():
    class Fixed(toys.Shortest):
        def fit(self, pool, context=None):
            return toys.OnData.fit(self, pool, context)

    with pytest.raises(ConfigError, match="learns nothing"):
        Fixed().fit(Pool([{"id": 0}]))
    with pytest.raises(ConfigError, match="no pool"):
        Context().sample(3)


# ---- rollouts ------------------------------------------------------------------------------------


def rollouts(steps=6, reuse=2, micro=4, **more):
    prompts = [{"id": f"p{i}", "domain": "x", "prompt_ids": i} for i in range(4)]
    model = toys.filled(toys.Bandit())
    return rig.make(
        [toys.Weigh(), toys.Note()], model=model, rows=prompts, objective=toys.Reinforce,
        pool=toys.Answers(prompts, 0, group=4, reuse=reuse), steps=steps, micro=micro, size=16,
        prefetch=3, optimizer={"lr": 0.1, "clip": None}, **more,
    )  # fmt: skip


def test_the_current_model_writes_the_examples_and_two_rewards_are_weighed():
    run = rollouts()
    assert run.loop.drawer.depth == 0
    phases = []
    write = type(run.live.pool).write

    class Watched(toys.Answers):
        def write(self, prompts, model, generator):
            phases.append((run.live.phase, model is run.model))
            return write(self, prompts, model, generator)

    run.live.pool.__class__ = Watched
    rig.trained(run)
    assert phases == [("rollout", True)] * 3, "six steps, each rollout used twice"
    assert run.model.training
    ids = [[i for b in step for i in b["ids"]] for step in rig.notes(run).batches]
    assert ids[0] == ids[1] != ids[2]
    weighing = run.watchers[-1]
    assert weighing.calls == 6 and abs(sum(weighing.now.values()) - 1) < 1e-9
    assert run.context.meter.charges["rollout"]["seconds"] > 0
    assert run.context.meter.charges["term_gradients"]["passes"] == 6 * 2 * 4


def test_group_statistics_are_the_pools():
    run = rollouts(steps=1)
    rig.trained(run)
    for name in ("high", "near"):
        batches = rig.notes(run).batches[0]
        normal = torch.cat([b["rewards"][name] for b in batches]).reshape(4, 4).double()
        plain = torch.cat([b["raw_rewards"][name] for b in batches]).reshape(4, 4).double()
        spread = plain.std(1, correction=0, keepdim=True)
        expected = (plain - plain.mean(1, keepdim=True)) / (spread + 1e-6)
        torch.testing.assert_close(normal, expected, rtol=1e-5, atol=1e-6)


def test_splits_of_a_rollout_change_nothing():
    def make(methods, micro, **more):
        run = rollouts(micro=micro)
        run.model.drop.p = 0.0
        return run

    found = [rig.trained(make([], micro)) for micro in (16, 4, 1)]
    for other in found[1:]:
        checks.same(checks.values(found[0]), checks.values(other), 1e-9, "weights")


def test_reused_rollouts_are_resumed():
    checks.check_resume(rollouts)


def test_a_weighting_without_rewards_says_so():
    with pytest.raises(ConfigError, match="no rewards"):
        rig.trained(rig.make([toys.Weigh()]))


def test_a_reward_that_does_not_apply_counts_nowhere():
    class Holes(toys.Answers):
        def write(self, prompts, model, generator):
            answers = super().write(prompts, model, generator)
            for answer in answers[::4]:
                answer["rewards"]["high"] = float("nan")
            return answers

    pool = Holes([{"id": i, "prompt_ids": i} for i in range(4)], 0, group=4)
    with torch.no_grad():
        drawn = pool.draw(16, toys.filled(toys.Bandit()).eval())
    assert all(e["rewards"]["high"] == 0.0 for e in drawn[::4])
    for i in range(4):
        group = [e["rewards"]["high"] for e in drawn[4 * i + 1 : 4 * i + 4]]
        assert abs(sum(group)) < 1e-9
    with pytest.raises(ConfigError, match="no multiple"):
        pool.draw(6, nn.Identity())


# ---- evaluation ----------------------------------------------------------------------------------


def test_an_evaluation_that_a_method_reads_is_charged():
    for reads in (False, True):
        run = rig.make(steps=1)

        class Reader(Watcher):
            if reads:

                def after_eval(self, split, metrics):
                    self.seen = split, dict(metrics)

        watcher = Reader()
        run.loop.watchers = [watcher]

        def measure(run=run):
            assert run.live.phase == "evaluation" and not run.live.open
            run.model.eval()
            run.model(torch.zeros(2, 6, dtype=toys.F64))
            return {"accuracy": 0.5}

        run.model.train()
        assert run.loop.evaluating("validation", measure) == {"accuracy": 0.5}
        assert run.model.training and run.live.phase == "train" and run.live.open
        assert ("evaluation" in run.context.meter.charges) is reads
        if reads:
            assert watcher.seen == ("validation", {"accuracy": 0.5})
