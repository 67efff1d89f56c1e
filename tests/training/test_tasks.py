"""Tasks in sequence: data, pool, the matrix that a run leaves, and going on in any task."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conformance import kit
from conformance.test_resume import check

import outlay
from outlay.core.errors import ConfigError, Conflict, DataError, NoEffect
from outlay.core.method import Step, Watcher
from outlay.training.continual import TaskMatrix
from outlay.training.data.dataset import load
from outlay.training.data.tasks import TaskPool, first_steps
from outlay.training.finished import open_run
from outlay.training.planning.plan import plan
from outlay.training.recipe import Recipe
from outlay.training.sequence import TaskRecord
from outlay.training.specs import DataSpec


def pool(counts=(5, 3, 4), steps=(4, 3, 2), size=2, seed=7):
    examples = [
        {"id": f"{task}:{i}", "task": task} for task, n in enumerate(counts) for i in range(n)
    ]
    starts = [0, *np.cumsum(steps).tolist()]
    return TaskPool(examples, seed, starts, size)


# ---- where tasks begin ---------------------------------------------------------------------------


def test_tasks_part_the_steps_by_weight():
    assert first_steps([1, 1], 10) == (0, 5, 10)
    assert first_steps([1, 1, 1], 10) == (0, 3, 7, 10)
    assert first_steps([3, 2], 780) == (0, 468, 780)
    with pytest.raises(ConfigError, match="2 steps leave one of 3 tasks"):
        first_steps([1, 1, 1], 2)
    with pytest.raises(ConfigError, match="without a step"):
        first_steps([1, 1000], 100)


def test_a_step_draws_from_its_task_alone_and_each_example_once_an_epoch():
    some = pool()
    drawn = [some.draw(2) for _ in range(9)]
    tasks = [[example["task"] for example in step] for step in drawn]
    assert tasks == [[0, 0]] * 4 + [[1, 1]] * 3 + [[2, 2]] * 2
    assert [some.task_of_step(i) for i in range(11)] == [0] * 4 + [1] * 3 + [2] * 4
    first = [example for step in drawn[:4] for example in step]
    assert (
        len({e["id"] for e in first[:5]}) == 5 and [e["visit"] for e in first] == [0] * 5 + [1] * 3
    )
    assert sorted(some.seen_of(2)) == [8, 9, 10, 11]
    assert [some.examples[i]["id"] for i in some.seen_of(1)] == [
        e["id"] for step in drawn[4:7] for e in step
    ][:3]


def test_the_whole_state_is_a_cursor():
    whole = pool()
    cursors, drawn = [], []
    for _ in range(9):
        cursors.append(whole.cursor())
        drawn.append(whole.draw(2))
    for at in (8, 0, 4, 3, 7):
        other = pool()
        other.seek(json.loads(json.dumps(cursors[at])))
        assert [other.draw(2) for _ in range(at, 9)] == drawn[at:]
    before = whole.cursor()
    assert [e["task"] for e in whole.peek(6)] == [0] * 6 and whole.cursor() == before


def test_selectors_keep_the_tasks_and_domains_get_no_weights():
    kept = pool().keep(lambda example: not example["id"].endswith(":0"))
    assert isinstance(kept, TaskPool) and len(kept) == 9
    assert Counter(kept.task_of_step(s) for s in range(9)) == {0: 4, 1: 3, 2: 2}
    with pytest.raises(DataError, match="task 1 has no training example left"):
        pool().keep(lambda example: example["task"] != 1)
    with pytest.raises(Conflict, match=r"data\.tasks"):
        pool().set_weights({"": 1.0})


# ---- data ----------------------------------------------------------------------------------------


def write(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    one = [{"text": f"apple {i}", "label": "ab"[i % 2]} for i in range(40)]
    two = [{"words": f"wave {i}", "label": "bc"[i % 2]} for i in range(30)]
    return write(tmp_path / "one.jsonl", one), write(tmp_path / "two.jsonl", two)


def test_rows_labels_and_what_a_task_names_itself(files):
    spec = DataSpec(
        label="label", test_share=10, validation_share=4,
        tasks=({"path": files[0], "text": "text"},
               {"path": files[1], "text": "words", "limit": 6, "name": "late"}),
    )  # fmt: skip
    found = load(spec, "sequence-classification")
    assert found.labels.names == ("a", "b", "c")
    assert Counter(row["task"] for row in found.train) == {0: 26, 1: 6}
    assert Counter(row["id"].partition(":")[0] for row in found.test) == {"one": 10, "late": 10}
    assert found.counts["train"] == 32 and found.counts["tasks"]["late"]["beyond_limit"] == 10
    turned = spec.model_copy(update={"tasks": spec.tasks[::-1]})
    assert load(turned, "sequence-classification").fingerprint != found.fingerprint


def test_a_recipe_of_tasks_comes_back_from_its_file(tmp_path, files):
    recipe = kit.recipe(tasks=True)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    longer = recipe.changed({"data.test_share": 7})
    assert [task.test_share for task in longer.data.in_sequence()] == [7.0, 7.0]
    text = "model: {config: bert}\ndata:\n  label: label\n  tasks:\n    - {path: one.jsonl}\n"
    text += "    - {path: two.jsonl, text: words}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    read = Recipe.read(tmp_path / "recipe.yaml")
    assert [task.path for task in read.data.in_sequence()] == list(files)
    assert [task.name for task in read.data.in_sequence()] == ["one", "two"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"tasks": [{"asset": "digits"}]}, "at least two tasks"),
        ({"tasks": [{"asset": "digits"}, {"asset": "digits"}]}, "names of their own"),
        ({"asset": "digits", "tasks": [{"asset": "digits"}, {"asset": "mnist"}]}, "exactly one"),
        ({"tasks": [{"asset": "digits"}, {"name": "none"}]}, "exactly one of path"),
        ({"tasks": [{"asset": "digits"}, {"asset": "mnist", "wieght": 2}]}, "'weight'"),
        ({"tasks": [{"asset": "digits"}, {"asset": "mnist", "weight": 0}]}, "greater than 0"),
        ({"tasks": [{"asset": "digits"}, {"asset": "mnist"}], "blocks": True}, "blocks"),
        ({"tasks": [{"asset": "digits"}, {"asset": "mnist"}], "test": "x.csv"}, "each task"),
        (
            {"tasks": [{"asset": "digits"}, {"tasks": [{"asset": "a"}, {"asset": "b"}]}]},
            "no tasks of its own",
        ),
    ],
)  # fmt: skip
def test_sequences_that_are_refused(data, said):
    with pytest.raises(ConfigError, match=said):
        Recipe(model={"config": "cnn"}, task="image-classification", data=data)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"budget": "1e9flops"}, "cannot be parted"),
        ({"budget": "90s"}, "cannot be parted"),
        ({"budget": "5000tokens"}, "cannot be parted"),
        ({"every": {"evaluate": 1}, "evaluate": {"patience": 2}}, "one best moment"),
        ({"evaluate": {"keep_best": True}}, "one best moment"),
    ],
)
def test_recipes_that_do_not_go_with_a_sequence(fields, said):
    with pytest.raises(ConfigError, match=said):
        kit.recipe(tasks=True, **fields)


def test_images_of_two_sizes_are_refused(tmp_path):
    def images(name, side):
        rows = [{"pixels": np.eye(side).tolist(), "label": "xy"[i % 2]} for i in range(12)]
        return write(tmp_path / name, rows)

    spec = DataSpec(tasks=({"path": images("a.jsonl", 4)}, {"path": images("b.jsonl", 5)}))
    with pytest.raises(DataError, match="'b' has images of 1x5x5, 'a' of 1x4x4"):
        load(spec, "image-classification")


# ---- in a run ------------------------------------------------------------------------------------


def test_the_whole_matrix_and_its_figures(tmp_path):
    recipe = kit.recipe(
        tasks=True, budget="24steps", data={**kit.recipe(tasks=True).data.model_dump(),
        "test_share": 9, "validation_share": 0}, every={"log": 4},
    )  # fmt: skip
    result = outlay.run(recipe, out=tmp_path)
    names = ("one", "two")
    found = {
        (t, j): result.metrics[f"test/accuracy after {t} on {j}"] for t in names for j in names
    }
    assert not any(key.startswith("validation") for key in result.metrics)
    items = pq.read_table(Path(result.folder) / "items-main-test.parquet").to_pydict()
    for name in names:
        right = [c for i, c in zip(items["id"], items["correct"]) if i.startswith(f"{name}:")]
        assert found["two", name] == pytest.approx(np.mean(right)) and len(right) == 9
    assert result.metrics["test/final"] == pytest.approx(result.metrics["test/accuracy"])
    assert result.metrics["test/forgetting"] == pytest.approx(
        found["one", "one"] - found["two", "one"]
    )
    lines = [line for line in result.curves if "test/accuracy after one on two" in line]
    assert [line["step"] for line in lines] == [7]
    assert lines[0]["test/accuracy after one on two"] == pytest.approx(found["one", "two"])


def test_figures_of_an_accuracy_and_of_a_loss_by_hand():
    splits = {"test": [{"task": t} for t in (0, 0, 0, 1, 2, 2)], "validation": [{"task": 0}]}
    record = TaskRecord(["a", "b", "c"], "accuracy", True, splits)
    record.add("test", [0.8, 0.1, 0.0])
    record.add("test", [0.9, 0.7, 0.2])
    assert record.metrics() == {
        "test/accuracy after a on a": 0.8, "test/accuracy after a on b": 0.1,
        "test/accuracy after a on c": 0.0, "test/accuracy after b on a": 0.9,
        "test/accuracy after b on b": 0.7, "test/accuracy after b on c": 0.2,
    }  # fmt: skip
    again = TaskRecord(["a", "b", "c"], "accuracy", True, splits)
    again.load_state_dict(json.loads(json.dumps(record.state_dict())))
    again.add("test", [0.5, 0.6, 0.9])
    figures = again.metrics()
    assert figures["test/final"] == pytest.approx((3 * 0.5 + 0.6 + 2 * 0.9) / 6)
    assert figures["test/backward_transfer"] == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)
    assert figures["test/forgetting"] == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)
    loss = TaskMatrix(("a", "b"), np.array([[1.0, 3.0], [1.5, 2.0]]), np.array([1, 1]), False)
    assert loss.forgetting == pytest.approx(0.5)


class Sums(Watcher):
    """Keeps the optimizer's accumulated squares after every step."""

    def __init__(self, live):
        self.live, self.totals, self.optimizers = live, [], set()

    def after_update(self, step: Step) -> None:
        (optimizer,) = self.live.optimizers
        self.optimizers.add(id(optimizer))
        self.totals.append(
            torch.cat([optimizer.state[p]["sum"].flatten() for g in optimizer.param_groups
                       for p in g["params"]]).clone()
        )  # fmt: skip


def test_one_optimizer_whose_state_survives_the_change_of_task():
    recipe = kit.recipe(tasks=True, budget="6steps", optimizer={"name": "adagrad", "lr": 0.01})
    stage = kit.stage(recipe)
    sums = Sums(stage.live)
    stage.loop.watchers = [sums]
    kit.trained(stage)
    assert stage.live.pool.starts == (0, 2, 6) and len(sums.optimizers) == 1
    for earlier, later in zip(sums.totals, sums.totals[1:]):
        assert (later >= earlier).all() and (later > earlier).any()


def test_adagrad_takes_parameters_that_come_later():
    from outlay.training.optimizer import _Adagrad

    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    first, second = _Adagrad([ours], lr=0.1), torch.optim.Adagrad([theirs], lr=0.1)
    first.state.clear()
    for _ in range(3):
        for parameter, optimizer in ((ours, first), (theirs, second)):
            parameter.grad = torch.tensor([0.1, -2.0, 0.0])
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_classp_settings_begin_with_their_task():
    spec = "classp(threshold=1e-6, decay_from_task=1, threshold_from_task=1)"
    stage = kit.stage(kit.recipe(methods=[spec], tasks=True, budget="6steps"))
    seen = []

    class Look(Watcher):
        def after_update(self, step: Step) -> None:
            group = stage.live.optimizers[0].param_groups[0]
            seen.append((group["apply_decay"], group["threshold"]))

    stage.loop.watchers = [*stage.loop.watchers, Look()]
    kit.trained(stage)
    assert seen == [(False, 0.0)] * 2 + [(True, 1e-6)] * 4


@pytest.mark.parametrize("prefetch", [0, 3])
def test_killed_in_each_task_it_goes_on_to_the_bit(tmp_path, prefetch):
    """Three tasks of two, four and three steps: killed in each, and before a change is saved."""
    data = kit.recipe(tasks=True).data.model_dump()
    path = data["tasks"][0]["path"]
    data["tasks"] = [
        {"path": path, "name": name, "weight": weight, "split_seed": weight}
        for name, weight in (("one", 2), ("two", 4), ("three", 3))
    ]
    recipe = kit.recipe(
        methods=["classp(p=2, threshold=1e-8, decay_from_task=1)"], data=data, budget="9steps",
        every={"save": 2, "evaluate": 4}, model={"dropout": 0.1},
        batch={"size": 8, "length": 48, "prefetch": prefetch},
    )  # fmt: skip
    whole = check(recipe, tmp_path, (1, 2, 4), (2,), (6, 1))
    assert len([k for k in whole.metrics if k.startswith("test/accuracy after")]) == 9


def test_a_finished_run_opens_with_and_without_its_rows(tmp_path):
    recipe = kit.recipe(methods=["ewc(samples=2)", "classp(decay_from_task=1)"], tasks=True)
    result = outlay.run(recipe, out=tmp_path)
    found = open_run(result.folder).evaluate(["test"])
    assert found["test/accuracy"] == result.metrics["test/accuracy"]
    (row,) = open_run(result.folder, rows=False).predict([{"text": "apple pear"}])
    assert row["prediction"] in "abc"


def test_a_longer_budget_moves_the_tasks_and_is_refused(tmp_path):
    fields = {"tasks": True, "schedule": {"name": "constant", "warmup": 0.0}}
    first = outlay.run(kit.recipe(budget="3steps", **fields), out=tmp_path)
    with pytest.raises(Conflict, match="differs"):
        outlay.run(kit.recipe(budget="6steps", **fields), out=tmp_path, resume=first.folder)


def test_it_is_planned_and_needs_a_step_a_task():
    planned = plan(kit.recipe(tasks=True), device="cpu")
    assert planned.steps == 3 and planned.flops > 0
    with pytest.raises(ConfigError, match="1 steps leave one of 2 tasks"):
        kit.stage(kit.recipe(tasks=True, budget="1steps"))


def test_a_share_that_replays_nothing():
    with pytest.raises(NoEffect, match="is none"):
        pool().rehearse(lambda pool, task: [0], 0.01)
