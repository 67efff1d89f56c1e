"""How far the weights went, in all and by layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from outlay import Recipe, run
from outlay.core.errors import ConfigError
from outlay.methods.measures.distance_to_initial import DistanceToInitial, distances
from outlay.training import checkpoint


def test_distances_by_hand():
    initial = {"h.0.w": torch.tensor([3.0, 4.0]), "h.1.w": torch.tensor([6.0, 8.0]),
               "norm": torch.tensor([0.0, 2.0]), "gone": torch.ones(3)}  # fmt: skip
    weights = {"h.0.w": torch.tensor([3.0, 7.0]), "h.1.w": torch.tensor([6.0, 8.0]),
               "norm": torch.tensor([4.0, 2.0]), "new": torch.ones(3)}  # fmt: skip
    found = distances(weights, initial, "h")
    assert found["distance"] == 5.0
    assert found["relative_distance"] == pytest.approx(5 / 129**0.5)
    assert found["relative_distance.0"] == pytest.approx(3 / 5)
    assert found["relative_distance.1"] == 0.0
    assert found["relative_distance.rest"] == pytest.approx(4 / 2)


@pytest.fixture
def rows(tmp_path):
    place = tmp_path / "rows.jsonl"
    table = [{"text": ["salt fish", "saw file"][n % 2], "label": "ab"[n % 2]} for n in range(24)]
    place.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(place)


def recipe(rows, *methods, **more):
    return Recipe(
        model={"config": "bert", "layers": 2, "width": 32, "heads": 2}, data={"path": rows},
        batch={"size": 4, "length": 12}, budget="4steps", methods=methods,
        optimizer={"lr": 0.01}, schedule={"warmup": 0.0, "name": "constant"}, **more,
    )  # fmt: skip


def test_it_changes_nothing_and_measures_what_was_trained(rows, tmp_path):
    plain = run(recipe(rows), out=tmp_path / "plain")
    watched = run(recipe(rows, "distance_to_initial(every=3)"), out=tmp_path / "watched")
    assert plain.weights_sha256 == watched.weights_sha256
    lines = [line for line in watched.curves if "distance" in line]
    assert len(lines) == 2 and lines[1]["distance"] > lines[0]["distance"] > 0
    assert {"relative_distance.0", "relative_distance.1", "relative_distance.rest"} <= set(lines[0])


def test_the_last_figure_is_that_of_the_weights(rows, tmp_path):
    of = recipe(rows, "distance_to_initial(every=1)", stages=[{"name": "one"}, {"name": "two"}])
    result = run(of, out=tmp_path)
    folder = Path(result.folder)
    lines = [json.loads(line) for line in (folder / "metrics-one.jsonl").read_text().splitlines()]
    from outlay.training.materials import load_materials

    start = load_materials(of).model(of)
    end = checkpoint.read_folder(folder / "stages/one")["model"]
    apart = sum(
        (end[n].double() - p.detach().double()).square().sum().item()
        for n, p in start.named_parameters()
        if n.startswith("bert.")
    )
    logged = [line["distance"] for line in lines if "distance" in line]
    assert logged[-1] == pytest.approx(apart**0.5, rel=1e-6)
    # The second stage goes on from the first and is measured from the original all the same.
    second = [json.loads(line) for line in (folder / "metrics-two.jsonl").read_text().splitlines()]
    assert next(line["distance"] for line in second if "distance" in line) > 0.5 * logged[-1]


def test_a_frozen_weight_under_an_adapter_stays(rows, tmp_path):
    result = run(recipe(rows, "bone(r=4)", "distance_to_initial(every=1)"), out=tmp_path)
    found = [line["relative_distance.0"] for line in result.curves if "distance" in line]
    assert found == [0.0] * 4


def test_a_bad_interval_is_refused():
    with pytest.raises(ConfigError, match="every"):
        DistanceToInitial(every=0)
