"""Rows in every format, splits, label spaces, and every kind of bad input."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from outlay.core.errors import ConfigError, DataError
from outlay.training.data.dataset import load, load_rows
from outlay.training.data.labels import Labels
from outlay.training.specs import DataSpec

TASK = "sequence-classification"
LM = "causal-language-modeling"


def rows_of(count=20, classes=("no", "yes")):
    return [
        {"sentence": f"text {i}", "kind": classes[i % len(classes)], "n": i} for i in range(count)
    ]


def write(path, rows):
    """Write rows in the format that the file's name says."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if name.endswith(".csv"):
        import io

        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
    elif name.endswith(".json"):
        data = json.dumps(rows).encode()
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def spec(path, **more):
    return DataSpec(**{"path": str(path), "text": "sentence", "label": "kind", **more})


def refused(path, task=TASK, error=DataError, **more):
    """The two lines that a load is refused with."""
    with pytest.raises(error) as caught:
        load(spec(path, **more), task)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2, lines
    assert all(lines)
    return lines


# Formats.


@pytest.mark.parametrize(
    "name", ["r.jsonl", "r.jsonl.gz", "r.json", "r.csv", "r.csv.gz", "r.parquet"]
)
def test_every_format_gives_the_same_rows(tmp_path, name):
    splits = load(spec(write(tmp_path / name, rows_of())), TASK)
    everything = sorted(
        ((r["text"], r["label"]) for part in ("train", "validation", "test") for r in splits[part]),
        key=lambda pair: int(pair[0].split()[1]),
    )
    assert everything == [(row["sentence"], row["kind"]) for row in rows_of()]
    assert splits.labels.names == ("no", "yes")
    assert splits.labels.id2label == {0: "no", 1: "yes"}
    assert (splits.counts["train"], splits.counts["validation"], splits.counts["test"]) == (
        16,
        2,
        2,
    )


def test_semicolons_tabs_quotes_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text('\ufeffsentence;kind\n"a;b\nc";x\n"say ""hi""";y\nd;x\n', encoding="utf-8")
    rows = load(spec(path, validation_share=0, test_share=0), TASK).train
    assert [row["text"] for row in rows] == ["a;b\nc", 'say "hi"', "d"]
    tabs = tmp_path / "r.tsv"
    tabs.write_text("sentence\tkind\na, b; c\tx\nd\ty\n")
    assert load(spec(tabs, validation_share=0, test_share=0), TASK).train[0]["text"] == "a, b; c"


def test_a_long_field_is_read_and_the_csv_module_left_as_it_was(tmp_path):
    before = csv.field_size_limit()
    path = write(
        tmp_path / "r.csv", [*rows_of(4), {"sentence": "x" * 200_000, "kind": "no", "n": 5}]
    )
    rows = load(spec(path, validation_share=0, test_share=0), TASK).train
    assert len(rows[-1]["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_text_is_paragraphs_or_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("one\ntwo\n\n\nthree\n   \nfour\n")
    splits = load(DataSpec(path=str(path), validation_share=0, test_share=0), LM)
    assert [row["text"] for row in splits.train] == ["one\ntwo", "three", "four"]
    assert [row["id"] for row in splits.train] == ["0", "1", "2"]
    path.write_text("one\r\ntwo\r\n")
    splits = load(DataSpec(path=str(path), validation_share=0, test_share=0), LM)
    assert [row["text"] for row in splits.train] == ["one", "two"]


def hub(rows):
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["yes", "no"]),
        }
    )
    plain = [{"sentence": r["sentence"], "kind": ["yes", "no"].index(r["kind"])} for r in rows]
    return datasets.Dataset.from_list(plain, features=features)


def test_datasets_folders_keep_their_class_names(tmp_path):
    one = hub(rows_of())
    one.save_to_disk(str(tmp_path / "one"))
    splits = load(spec(tmp_path / "one"), TASK)
    assert splits.labels.names == ("no", "yes")
    assert {row["label"] for row in splits.train if int(row["text"].split()[1]) % 2 == 0} == {"no"}
    both = datasets.DatasetDict({"train": one, "test": hub(rows_of(6))})
    both.save_to_disk(str(tmp_path / "both"))
    splits = load(spec(tmp_path / "both"), TASK)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 2, 6)
    assert splits.test[0]["id"] == "test:0"
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    one.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    hub(rows_of(4)).to_parquet(str(folder / "validation-00000-of-00001.parquet"))
    splits = load(spec(tmp_path / "hub", test_share=0), TASK)
    assert (len(splits.train), len(splits.validation), splits.labels.names) == (
        20,
        4,
        ("no", "yes"),
    )


def test_a_folder_of_shards_is_one_training_split(tmp_path):
    for shard in range(3):
        write(tmp_path / f"part-{shard}.jsonl", rows_of()[shard * 6 : shard * 6 + 6])
    (tmp_path / "README.txt").write_text("no data")
    splits = load(spec(tmp_path, validation_share=0, test_share=0), TASK)
    assert [row["id"] for row in splits.train] == [str(i) for i in range(18)]
    write(
        tmp_path / "part-2.jsonl", [{"sentence": "a", "kind": "no"}, {"sentence": "b", "kind": ""}]
    )
    assert "part-2.jsonl line 2: no label" in refused(tmp_path)[0]


def test_a_selection_that_was_saved_reads_as_selected(tmp_path):
    hub(rows_of()).select(range(3, 13)).save_to_disk(str(tmp_path / "some"))
    splits = load(spec(tmp_path / "some", validation_share=0, test_share=0), TASK)
    assert [row["text"] for row in splits.train] == [f"text {i}" for i in range(3, 13)]


def test_rows_in_memory():
    live = {"train": hub(rows_of()), "validation": rows_of(4)}
    columns = DataSpec(asset="memory", text="sentence", label="kind")
    splits = load(live, TASK, settings=columns)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 4, 2)
    keyed = [{"id": f"k{i}", "domain": "d", "text": "t", "label": i % 2} for i in range(10)]
    splits = load(keyed, TASK)
    assert {row["domain"] for row in splits.train} == {"d"}
    assert all(row["id"].startswith("k") for row in splits.train)
    with pytest.raises(DataError, match="did you mean 'validation'"):
        load({"train": keyed, "validatio": keyed}, TASK)
    with pytest.raises(DataError, match="no training row"):
        load([], TASK)
    with pytest.raises(DataError, match="not a mapping"):
        load([1], TASK)


# Splits.


def test_splits_are_stratified_disjoint_and_decided_by_the_split_seed(tmp_path):
    rows = [{"sentence": f"t{i}", "kind": "rare" if i < 10 else "usual"} for i in range(200)]
    path = write(tmp_path / "r.jsonl", rows)
    first, again = load(spec(path), TASK), load(spec(path), TASK)
    other = load(spec(path, split_seed=1), TASK)
    assert first == again
    assert first.fingerprint != other.fingerprint
    assert [r["id"] for r in first.test] != [r["id"] for r in other.test]
    for splits in (first, other):
        ids = [row["id"] for part in ("train", "validation", "test") for row in splits[part]]
        assert len(set(ids)) == len(ids) == 200
        for part, size, rare in (("train", 160, 8), ("validation", 20, 1), ("test", 20, 1)):
            assert len(splits[part]) == size
            assert Counter(r["label"] for r in splits[part])["rare"] == rare
    assert first.counts["classes"] == {"rare": 8, "usual": 152}


def test_a_class_of_one_row_stays_in_training(tmp_path):
    rows = [*rows_of(60), {"sentence": "only", "kind": "single", "n": 0}]
    splits = load(spec(write(tmp_path / "r.jsonl", rows)), TASK)
    assert "single" in {row["label"] for row in splits.train}
    small = load(spec(write(tmp_path / "r.jsonl", rows), limit=3), TASK)
    assert {row["label"] for row in small.train} == {"no", "yes", "single"}
    assert small.counts["beyond_limit"] == len(splits.train) - 3
    assert small.test == splits.test


def test_counts_and_shares(tmp_path):
    path = write(tmp_path / "r.jsonl", rows_of(40))
    splits = load(spec(path, validation_share=7, test_share=0.25), TASK)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (23, 7, 10)
    splits = load(spec(path, validation_share=0, test_share=0), TASK)
    assert (len(splits.train), splits.validation, splits.test) == (40, [], [])
    refused(path, validation_share=1.5, error=ConfigError)
    assert "leave none" in refused(path, validation_share=40)[0]


def test_given_splits_and_duplicates(tmp_path):
    rows = rows_of(20)
    train = write(tmp_path / "train.jsonl", [*rows, *rows[:5], {**rows[6], "kind": "yes"}])
    test = write(tmp_path / "test.jsonl", rows[:2])
    splits = load(spec(train, test=str(test), validation_share=0, deduplicate=True), TASK)
    # 7 rows that were there before, and 2 that the test holds.
    assert splits.counts["duplicates"] == 8
    assert splits.counts["duplicates_with_another_label"] == 1
    assert len(splits.train) == 18
    assert not {r["text"] for r in splits.train} & {r["text"] for r in splits.test}
    assert splits.sources["test"] == str(test)


def test_relative_paths_start_from_the_base(tmp_path):
    write(tmp_path / "r.jsonl", rows_of())
    write(tmp_path / "t.jsonl", rows_of(4))
    splits = load(spec("r.jsonl", test="t.jsonl"), TASK, base=tmp_path)
    assert len(splits.test) == 4


def test_the_fingerprint_follows_content_order_and_columns(tmp_path):
    def print_of(rows, **more):
        return load(spec(write(tmp_path / "r.jsonl", rows), **more), TASK).fingerprint

    rows = rows_of()
    first = print_of(rows)
    assert print_of(rows) == first
    assert print_of(rows[::-1]) != first
    assert print_of([{**rows[0], "sentence": "other"}, *rows[1:]]) != first
    assert print_of([{**row, "b": row["sentence"]} for row in rows], text="b") != first
    # A column that is not read does not count.
    assert print_of([{**row, "n": 7} for row in rows]) == first


# Labels.


def test_numbers_sort_by_value_and_booleans_have_names(tmp_path):
    rows = [{"sentence": "t", "kind": i % 12} for i in range(48)]
    assert load(spec(write(tmp_path / "r.jsonl", rows)), TASK).labels.names == tuple(
        str(i) for i in range(12)
    )
    rows = [{"sentence": "t", "kind": float(i % 2)} for i in range(20)]
    assert load(spec(write(tmp_path / "r.csv", rows)), TASK).labels.names == ("0.0", "1.0")
    assert load(spec(write(tmp_path / "r.parquet", rows)), TASK).labels.names == ("0", "1")
    rows = [{"sentence": "t", "kind": i % 2 == 0} for i in range(20)]
    assert load(spec(write(tmp_path / "r.jsonl", rows)), TASK).labels.names == ("false", "true")


def test_class_weights(tmp_path):
    rows = [{"sentence": f"t{i}", "kind": "rare" if i % 4 == 0 else "usual"} for i in range(40)]
    path = write(tmp_path / "r.jsonl", rows)
    balanced = load(spec(path, class_weights="balanced", validation_share=0, test_share=0), TASK)
    assert balanced.labels.weights == pytest.approx((2.0, 2 / 3))
    named = load(spec(path, class_weights={"rare": 5}), TASK)
    assert named.labels.weights == (5.0, 1.0)
    assert "did you mean 'rare'" in refused(path, class_weights={"rar": 5}, error=ConfigError)[1]
    refused(path, class_weights={"rare": -1}, error=ConfigError)


def test_real_targets_keep_their_unit(tmp_path):
    rows = [{"sentence": f"t{i}", "kind": i * 10} for i in range(101)]
    path = write(tmp_path / "r.csv", rows)
    splits = load(spec(path, validation_share=0, test_share=0), "regression")
    assert splits.labels.names == ("kind",)
    assert splits.labels.mean == (500.0,)
    assert splits.labels.scale == pytest.approx((np.std([r["kind"] for r in rows]),))
    assert splits.train[3]["label"] == 30.0
    both = load(spec(path, label=None, labels=("kind", "kind"), test_share=0), "regression")
    assert both.train[0]["label"] == [both.train[0]["label"][0]] * 2
    held = load(spec(path), "regression")
    assert sorted(int(row["label"]) // 101 for row in held.test) == list(range(10))


def test_several_labels_as_lists_text_and_columns(tmp_path):
    rows = [
        {"sentence": f"t{i}", "kind": [x for x, k in (("a", 2), ("b", 3)) if i % k == 0]}
        for i in range(30)
    ]
    task = "multi-label-classification"
    lists = load(spec(write(tmp_path / "r.jsonl", rows), label=None, labels="kind"), task)
    assert lists.labels.names == ("a", "b")
    text = [{**row, "kind": "|".join(row["kind"])} for row in rows]
    piped = load(spec(write(tmp_path / "r.csv", text), label=None, labels="kind"), task)
    columns = [
        {"sentence": r["sentence"], "b": int("b" in r["kind"]), "a": "a" in r["kind"]} for r in rows
    ]
    path = write(tmp_path / "c.jsonl", columns)
    wide = load(spec(path, label=None, labels=("b", "a")), task)
    assert lists.train == piped.train == wide.train
    assert wide.labels.names == ("a", "b")
    weighted = load(
        spec(path, label=None, labels=("b", "a"), class_weights="balanced", validation_share=0,
             test_share=0), task,
    )  # fmt: skip
    assert weighted.labels.weights == (1.0, 2.0)


def test_pairs_prompts_messages_and_images(tmp_path):
    pairs = [{"text": "a", "b": "c", "label": i % 2} for i in range(10)]
    splits = load(DataSpec(path=str(write(tmp_path / "p.jsonl", pairs)), text_pair="b"), TASK)
    assert splits.train[0]["text_pair"] == "c"
    prompts = [{"prompt": "q", "completion": f"a{i}", "x": 1} for i in range(10)]
    path = write(tmp_path / "q.jsonl", prompts)
    for task in (LM, "sequence-to-sequence"):
        row = load(DataSpec(path=str(path)), task).train[0]
        assert (row["prompt"], row["completion"][0]) == ("q", "a")
    talk = [{"messages": [{"role": "user", "content": "hi"},
                          {"role": "assistant", "content": "ho", "extra": 1}]}] * 10  # fmt: skip
    for name in ("m.jsonl", "m.parquet"):
        row = load(DataSpec(path=str(write(tmp_path / name, talk))), LM).train[0]
        assert row["messages"][1] == {"role": "assistant", "content": "ho"}
    images = [{"image": [[i, 255], [0, 51]], "label": i % 2} for i in range(10)]
    splits = load(DataSpec(path=str(write(tmp_path / "i.jsonl", images))), "image-classification")
    assert splits.labels.image == (1, 2, 2)
    assert splits.train[0]["pixel_values"].ravel()[[1, 3]] == pytest.approx([1.0, 0.2])


def test_rows_for_prediction(tmp_path):
    path = write(tmp_path / "new.csv", [{"sentence": "a"}, {"sentence": "b"}])
    labels = Labels(("no", "yes"))
    rows = load_rows(path, spec("x"), TASK, labels, labeled=False)
    assert [row["text"] for row in rows] == ["a", "b"]
    assert "label" not in rows[0]
    with pytest.raises(DataError, match="no column 'kind'"):
        load_rows(path, spec("x"), TASK, labels)
    with pytest.raises(DataError, match=r"row 0: label 'maybe'"):
        load_rows([{"sentence": "a", "kind": "maybe"}], spec("x"), TASK, labels)


def test_empty_texts_are_counted_and_left_out_of_language_modeling(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["a", " ", "b", "c", ""]))
    splits = load(DataSpec(path=str(path), validation_share=1, test_share=1), LM)
    assert splits.counts["empty"] == 2
    assert splits.counts["train"] == 1


# Bad input: always two lines, with file and line.


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("r.jsonl", b'{"sentence": "a", "kind": 1}\n{"sentence": \n', "r.jsonl line 2: not JSON"),
        ("r.jsonl", b'{"sentence": "a", "kind": 1}\n\n[1]\n', "r.jsonl line 3: list instead"),
        ("r.jsonl", b"[" * 100_000, "r.jsonl line 1: not JSON"),
        ("r.jsonl", b'{"sentence": "a"}\n{"sentence": "\xff"}\n', "line 2: byte 0xff is not UTF-8"),
        ("r.jsonl", b'{"sentence": "a"}\n\0\n', "line 2: NUL byte"),
        ("r.jsonl", b'{"sentence": "a\\u0000", "kind": 1}\n', "line 1: NUL character"),
        ("r.jsonl", b'{"sentence": "\\ud800", "kind": 1}\n', "line 1: half a surrogate"),
        ("r.jsonl", "\ufeffa".encode("utf-16"), "line 1: the file is in UTF-16"),
        ("r.jsonl", b"", "holds no rows"),
        ("r.jsonl", b"\n \n", "holds no rows"),
        ("r.jsonl.gz", b"no gzip", "not a complete gzip"),
        ("r.jsonl.gz", gzip.compress(b'{"sentence": "a"}')[:-9], "not a complete gzip"),
        ("r.json", b'[{"sentence": "a"}, 3]', "r.json row 1: int instead"),
        ("r.json", b'[\n{"sentence": }]', "r.json line 2: not JSON"),
        ("r.csv", b"sentence,kind\na,x\nb\n", "r.csv line 3: 1 fields, the first line has 2"),
        ("r.csv", b'sentence,kind\n"a\nb",x\nc,d,e\n', "r.csv line 4: 3 fields"),
        ("r.csv", b'sentence,kind\n"a,x\nb,y\n', "r.csv line 3"),
        ("r.csv", b"sentence,sentence\na,x\n", "line 1: column 'sentence' is there twice"),
        ("r.csv", b"sentence,\na,x\n", "line 1: a column has no name"),
        ("r.csv", b"sentence,kind\n", "holds no rows"),
        ("r.csv", b"", "holds no rows"),
        ("r.parquet", b"PAR1 no", "r.parquet cannot be read"),
        ("r.xlsx", b"x", "files of kind '.xlsx' are not read"),
        ("r", b"x", "files of kind 'without ending' are not read"),
        ("r.csv", b"sentenc,kind\na,x\n", "no column 'sentence'"),
        ("r.csv", b"sentence,kind\na,x\nb,\n", "r.csv line 3: no label in column 'kind'"),
        ("r.jsonl", b'{"sentence": 3, "kind": 1}\n', "column 'sentence' is int (3), not text"),
        ("r.jsonl", b'{"sentence": "a", "kind": 1}\n{"kind": 1}\n', "line 2: column 'sentence' is"),
        ("r.jsonl", b'{"sentence": "a", "kind": 0.5}\n', "label '0.5' in column 'kind' is float"),
        ("r.jsonl", b'{"sentence": "a", "kind": [1]}\n', "is list, not a class"),
        ("r.jsonl", b'{"sentence": "a", "kind": NaN}\n', "no label"),
        ("r.jsonl", b'{"sentence": "a", "kind": 1}\n' * 20, "1 kinds of label"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    assert words in refused(path)[0]


def test_bad_places(tmp_path):
    write(tmp_path / "rows.csv", rows_of())
    lines = refused(tmp_path / "row.csv")
    assert "does not exist" in lines[0]
    assert "did you mean 'rows.csv'" in lines[1]
    (tmp_path / "empty").mkdir()
    assert "no training split" in refused(tmp_path / "empty")[0]
    assert "did you mean 'sentence'" in refused(tmp_path / "rows.csv", text="sentense")[1]
    assert "data.label" in refused(tmp_path / "rows.csv", label="kindd")[1]
    assert "data.text_pair" in refused(tmp_path / "rows.csv", text_pair="m")[1]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "state.json").write_text("{}")
    assert "no `datasets` folder" in refused(broken)[0]
    (broken / "state.json").write_text('{"_data_files": [{"filename": "../rows.csv"}]}')
    assert "outside the folder" in refused(broken)[0]
    (broken / "state.json").write_text('{"_data_files": [{"filename": "d.arrow"}]}')
    assert "cannot be read" in refused(broken)[0]


def test_labels_that_training_does_not_know(tmp_path):
    train = write(tmp_path / "r.csv", rows_of())
    test = write(
        tmp_path / "t.csv", [{"sentence": "a", "kind": "no"}, {"sentence": "b", "kind": "noo"}]
    )
    lines = refused(train, test=str(test))
    assert lines[0] == "t.csv line 3: label 'noo' does not occur in training"
    assert "did you mean 'no'" in lines[1]


def test_ids_are_checked(tmp_path):
    path = write(tmp_path / "r.csv", rows_of())
    assert load(spec(path, id="n"), TASK).test[0]["id"].isdigit()
    twice = write(tmp_path / "t.csv", [*rows_of(), *rows_of(1)])
    assert "was there before (t.csv line 2)" in refused(twice, id="n")[0]
    none = write(tmp_path / "n.csv", [{**row, "n": ""} for row in rows_of()])
    assert "id in column 'n'" in refused(none, id="n")[0]


@pytest.mark.parametrize("value", ["much", "inf", "nan", ""])
def test_targets_are_checked(tmp_path, value):
    path = write(
        tmp_path / "r.csv",
        [*({**r, "kind": 1} for r in rows_of()), {"sentence": "a", "kind": value, "n": 1}],
    )
    assert "r.csv line 22" in refused(path, task="regression")[0]


@pytest.mark.parametrize(
    ("value", "words"),
    [(5, "is int, not a list"), ("[1", "holds no list"), ([[1]], "not a class")],
)
def test_label_lists_are_checked(tmp_path, value, words):
    path = write(tmp_path / "r.jsonl", [{"sentence": "a", "kind": value}])
    assert words in refused(path, task="multi-label-classification", label=None, labels="kind")[0]


def test_label_columns_are_checked(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"sentence": "a", "kind": 2, "n": 1}])
    lines = refused(path, task="multi-label-classification", label=None, labels=("kind", "n"))
    assert "'2' in column 'kind' is neither 0 nor 1" in lines[0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("x", "holds no list of messages"),
        ([], "holds no list of messages"),
        (
            [{"role": "robot", "content": "a"}],
            "message 0 of column 'messages' has the role 'robot'",
        ),
        ([{"role": "user", "content": 1}], "message 0 of column 'messages' has no text"),
        (["hi"], "message 0 of column 'messages' has the role None"),
        ([{"role": "user", "content": "a"}], "no message of the assistant"),
    ],
)
def test_messages_are_checked(tmp_path, value, words):
    path = write(tmp_path / "r.jsonl", [{"messages": value}])
    lines = refused(path, task=LM, text=None, label=None)
    assert words in lines[0]
    assert "r.jsonl line 1" in lines[0]


@pytest.mark.parametrize("value", ["x", [1, 2], [[1], [2, 3]], [[[["a"]]]], None])
def test_images_are_checked(tmp_path, value):
    path = write(tmp_path / "r.jsonl", [{"image": value, "label": 1}])
    assert "holds no image" in refused(path, task="image-classification", text=None, label=None)[0]


def test_images_of_two_sizes_are_refused(tmp_path):
    rows = [{"image": [[0.0] * (2 + i // 9)] * 2, "label": i % 2} for i in range(10)]
    path = write(tmp_path / "r.jsonl", rows)
    lines = refused(path, task="image-classification", text=None, label=None)
    assert "r.jsonl line 10: the image is 1x2x3" in lines[0]


def test_class_weights_go_with_classes_alone(tmp_path):
    path = write(tmp_path / "r.csv", [{**row, "kind": row["n"]} for row in rows_of()])
    lines = refused(path, task="regression", class_weights="balanced", error=ConfigError)
    assert "does not go with regression" in lines[0]
