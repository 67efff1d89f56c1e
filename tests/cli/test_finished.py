"""evaluate, predict and export of a finished run."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from outlay.cli import export, predict
from outlay.core.errors import CheckpointError, ConfigError
from outlay.training.finished import _whole_texts, open_run


def test_evaluate_repeats_what_the_run_measured(outlay, finished):
    recorded = json.loads((finished / "result.json").read_text())["metrics"]
    again = outlay("evaluate", finished, "--json").json
    assert again["metrics"] == pytest.approx(recorded, rel=1e-5)
    assert again["run"] == finished.name
    test = outlay("evaluate", finished, "--split", "test", "--json").json["metrics"]
    assert set(test) == {k for k in recorded if k.startswith("test/")}
    assert outlay("evaluate", finished, "--split", "train").code == 2
    assert "test/accuracy" in outlay("evaluate", finished).out


def test_evaluate_takes_rows_of_ones_own(outlay, finished):
    data = finished.parents[1] / "rows.csv"
    metrics = outlay("evaluate", finished, "--data", data, "--json").json["metrics"]
    assert set(metrics) == {"data/loss", "data/accuracy", "data/macro_f1"}
    assert outlay("evaluate", finished, "--data", finished.parents[1] / "new.csv").code == 2


def test_predict_writes_probabilities(outlay, finished, work):
    plain = outlay("predict", finished, "--data", "new.csv")
    rows = [json.loads(line) for line in plain.out.splitlines()]
    assert len(rows) == 3 and plain.code == 0
    for row in rows:
        assert set(row["probabilities"]) == {"fruit", "sea", "tool"}
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)
    assert outlay("predict", finished, "--data", "new.csv", "--out", "p.jsonl").code == 0
    assert (work / "p.jsonl").read_text() == plain.out
    said = outlay("predict", finished, "--data", "new.csv", "--out", "p.csv", "--json").json
    assert said == {"run": finished.name, "rows": 3, "out": "p.csv"}
    with (work / "p.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [r["prediction"] for r in table] == [r["prediction"] for r in rows]
    assert float(table[0]["probability_sea"]) == rows[0]["probabilities"]["sea"]


def test_predict_refuses_before_it_works(outlay, finished, work):
    (work / "there.csv").write_text("mine")
    refused = outlay("predict", finished, "--data", "new.csv", "--out", "there.csv")
    assert refused.code == 3 and (work / "there.csv").read_text() == "mine"
    assert outlay("predict", finished, "--data", "new.csv", "--out", "p.xlsx").code == 2
    assert outlay("predict", finished, "--data", "nowhere.csv", "--out", "p.csv").code == 2
    assert not (work / "p.csv").exists() and not (work / ".p.csv.part").exists()


def test_lists_and_maps_become_columns():
    rows = [{"id": "1", "prediction": ["a", "b"], "probabilities": {"a": 0.5, "b": 0.6}}]
    assert predict.as_csv(rows) == "id,prediction,probability_a,probability_b\n1,a|b,0.5,0.6\n"


def test_windows_of_a_text_are_put_together():
    parts = [
        {"id": "a", "loss": 1.0, "tokens": 3, "perplexity": 0.0},
        {"id": "a#1", "loss": 2.0, "tokens": 1, "perplexity": 0.0},
        {"id": "b#2", "loss": 5.0, "tokens": 2, "perplexity": 148.0},
    ]
    whole = list(_whole_texts(parts))
    assert [(r["id"], r["loss"], r["tokens"]) for r in whole] == [("a", 1.25, 4), ("b#2", 5.0, 2)]


def test_an_exported_folder_just_works_in_a_pipeline(outlay, finished, work):
    said = outlay("export", finished, "--out", "model", "--json").json
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(said["files"])
    from transformers import pipeline

    texts = ["apple pear", "saw axe", "salt tide"]
    found = pipeline("text-classification", model=str(work / "model"), device="cpu", top_k=None)(
        texts
    )
    rows = [json.loads(line) for line in
            outlay("predict", finished, "--data", "new.csv").out.splitlines()]  # fmt: skip
    for scores, row in zip(found, rows, strict=True):
        assert {s["label"]: s["score"] for s in scores} == pytest.approx(
            row["probabilities"], abs=1e-5
        )


def test_export_refuses_what_is_there_unless_forced(outlay, finished, work):
    (work / "model").mkdir()
    assert outlay("export", finished, "--out", "model").code == 0
    before = (work / "model" / "model.safetensors").read_bytes()
    (work / "model" / "mine.txt").write_text("mine")
    refused = outlay("export", finished, "--out", "model")
    assert refused.code == 3 and (work / "model" / "mine.txt").exists()
    assert outlay("export", finished, "--out", "model", "--force").code == 0
    assert not (work / "model" / "mine.txt").exists()
    assert (work / "model" / "model.safetensors").read_bytes() == before
    assert [p.name for p in work.iterdir() if p.name.startswith(".")] == []


def test_export_as_an_adapter(outlay, finished, work):
    said = outlay("export", finished, "--out", "adapter", "--format", "peft", "--json").json
    assert said["kind"] == "MISS"
    config = json.loads((work / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("MISS", 4)
    assert outlay("export", finished, "--out", "x", "--format", "onnx").code == 2


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kind", ["LORA", "DORA", "MISS", "VERA"])
def test_pefts_own_adapters_load_in_peft(outlay, work, kind):
    from peft import PeftModel

    folder = outlay(
        "run", "mine.yaml", "--json", "--quiet", "--set", "methods=[]",
        "--method", f"peft(type='{kind}', r=2)",
    ).last["folder"]  # fmt: skip
    said = outlay("export", folder, "--out", "adapter", "--format", "peft", "--json").json
    assert said["kind"] == kind.replace("DORA", "LORA")
    finished = open_run(folder)
    base = finished.materials.model(finished.recipe)
    loaded = PeftModel.from_pretrained(base, str(work / "adapter")).eval()
    batch = next(iter(finished.assembly.batches("test")))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = loaded(**inputs).logits
        ours = finished.model.eval()(**inputs).logits
    assert torch.allclose(theirs, ours, atol=1e-6)


def test_export_of_a_run_without_adapter_says_so(outlay, work):
    folder = outlay(
        "run", "mine.yaml", "--json", "--quiet", "--set", "methods=[full]", "--budget", "2steps"
    ).last["folder"]
    answer = outlay("export", folder, "--out", "adapter", "--format", "peft")
    assert answer.code == 2 and "holds no adapter" in answer.err
    assert not (work / "adapter").exists()
    assert outlay("export", folder, "--out", "model").code == 0


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    def broken(draft: Path) -> str:
        (draft / "half").write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("old")
    for name in ("there", "new"):
        with pytest.raises(OSError, match="No space"):
            export.write_folder(tmp_path / name, broken)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "old").read_text() == "old"


def test_runs_are_found_by_the_beginning_of_their_name(outlay, finished, monkeypatch):
    monkeypatch.chdir(finished.parents[1])
    assert outlay("evaluate", "mine", "--json").json["run"] == finished.name
    near = outlay("evaluate", finished.name[:-1] + "x")
    assert near.code == 2 and finished.name in near.err


def test_what_changed_since_is_refused(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    tensors = copy / "trained" / "main" / "tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        open_run(copy)
    facts = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(facts | {"data": "0" * 64}))
    with pytest.raises(CheckpointError, match="the data of run run changed"):
        open_run(copy)
    (copy / "result.json").unlink()
    with pytest.raises(ConfigError, match="not finished"):
        open_run(copy)


@pytest.mark.parametrize(
    "method",
    ["adalora(init_r=4, target_r=2)", "lamda(r=8, freeze_fraction=0.5)", "svfit(rank=8)",
     "bone(r=4, variant='bat')", "peft(type='LORA', r=2)", "probe", "full"],
)  # fmt: skip
def test_every_methods_trained_weights_come_back(outlay, work, method):
    result = outlay(
        "run", "mine.yaml", "--json", "--quiet", "--set", "methods=[]", "--method", method
    ).last
    again = outlay("evaluate", result["folder"], "--json").json["metrics"]
    assert again == pytest.approx(result["metrics"], rel=1e-5)
    finished = open_run(result["folder"])
    before = list(finished.predict("new.csv"))
    finished.exported()
    after = list(finished.predict("new.csv"))
    for one, other in zip(before, after, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


@pytest.mark.parametrize("method", ["bone(r=4)", "svfit(rank=8)", "lamda(r=8)", "probe"])
def test_a_run_outlives_its_data(outlay, work, method):
    folder = outlay(
        "run", "mine.yaml", "--json", "--quiet", "--set", "methods=[]", "--method", method
    ).last["folder"]
    before = outlay("predict", folder, "new.csv").out
    (work / "rows.csv").unlink()
    assert outlay("predict", folder, "new.csv").out == before
    assert outlay("export", folder, "--out", "model").code == 0
    gone = outlay("evaluate", folder)
    assert gone.code == 2 and "rows.csv" in gone.err


def test_the_last_of_several_stages_is_opened(outlay, work):
    stages = "stages=[{name: first, methods: [full]}, {name: second, budget: 4steps}]"
    result = outlay("run", "mine.yaml", "--json", "--quiet", "--set", stages).last
    again = outlay("evaluate", result["folder"], "--json").json["metrics"]
    assert again == pytest.approx({k: result["metrics"][k] for k in again}, rel=1e-5)
