"""`outlay fit`: features from files, rows held out, the estimator kept, new rows predicted."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from outlay import estimators
from outlay.cli.app import run_app


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    labels = np.array(["ant", "bee", "cat"])[generator.integers(0, 3, 120)]
    centers = {"ant": 0, "bee": 1, "cat": 2}
    features = np.eye(4)[[centers[x] for x in labels]] + 0.1 * generator.normal(size=(120, 4))
    features = features.astype(np.float32)
    columns = {f"f{i}": features[:, i] for i in range(4)}
    pq.write_table(pa.table({**columns, "kind": labels}), "wide.parquet")
    pq.write_table(pa.table({"embedding": list(features), "kind": labels}), "lists.parquet")
    np.savez("both.npz", features=features, kind=labels)
    lines = [",".join([*map(str, row), kind]) for row, kind in zip(features.tolist(), labels)]
    (tmp_path / "rows.csv").write_text("\n".join(["f0,f1,f2,f3,kind", *lines]) + "\n")
    (tmp_path / "new.csv").write_text("f3,f2,f1,f0\n0,0,0,1\n0,1,0,0\n")

    def run(*words):
        code = run_app(["fit", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("file", ["wide.parquet", "lists.parquet", "both.npz", "rows.csv"])
def test_every_kind_of_file_gives_one_result(call, file):
    code, out, err = call("nearest_class_mean", "--data", file, "--target", "kind", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["classes"] == ["ant", "bee", "cat"] and answer["features"] == 4
    assert answer["rows"] == 96 and answer["test_rows"] == 24
    assert answer["test_accuracy"] > 0.95


def test_kept_and_used_on_new_rows(call, tmp_path):
    code, out, err = call(
        "streaming_lda(shrinkage=0.1)", "--data", "rows.csv", "--target", "kind", "--out", "head",
        "--predict", "new.csv", "--test-share", "0",
    )  # fmt: skip
    assert code == 0, err
    assert "120" in out and "head" in out
    rows = [
        json.loads(x) for x in (tmp_path / "head" / "predictions.jsonl").read_text().splitlines()
    ]
    # Columns are matched by name, whatever their order.
    assert [row["prediction"] for row in rows] == ["ant", "cat"]
    assert set(rows[0]["probabilities"]) == {"ant", "bee", "cat"}
    found = estimators.load(tmp_path / "head")
    assert found.shrinkage == 0.1 and found.class_counts_.sum() == 120
    code, _, err = call("streaming_lda", "--data", "rows.csv", "--target", "kind", "--out", "head")
    assert code == 3 and "head" in err


@pytest.mark.parametrize(("words", "text"), [
    (("nearest_class_mean", "--data", "rows.csv", "--target", "kid"), "did you mean 'kind'"),
    (("nearest_class_mean", "--data", "rows.csv", "--target", "f0"), "in column 'kind' is no"),
    (("nearest_class_mean", "--data", "none.csv", "--target", "kind"), "does not exist"),
    (("feature_probe", "--data", "rows.csv", "--target", "kind"), "give one of nearest"),
    (("nearest_class_means", "--data", "rows.csv", "--target", "kind"), "did you mean"),
    (("nearest_class_mean(metric='l1')", "--data", "rows.csv", "--target", "kind"), "metric"),
    (("nearest_class_mean", "--data", "wide.parquet", "--target", "f1", "--features", "f0,f2"),
     "no classes"),
    (("nearest_class_mean", "--data", "both.npz", "--target", "label"), "no array 'label'"),
])  # fmt: skip
def test_what_is_refused(call, words, text):
    code, _, err = call(*words)
    assert code == 2 and text in err and err.count("\n") == 2, err
