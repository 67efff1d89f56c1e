"""Bad rows of every kind are set aside by line; good ones come through whatever their file is."""

from __future__ import annotations

import gzip
import json
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from outlay.core.errors import ConfigError, DataError
from outlay.shards.reading import date_of, read
from outlay.shards.sets import Fields, open_shards


def everything(path, fields=None, **more):
    fields = fields or Fields()
    documents, aside = [], []
    for shard in open_shards(path, fields).shards:
        for batch in read(shard, fields, **more):
            documents += batch.documents
            aside += batch.quarantined
    return documents, aside


def line(**row):
    return json.dumps(row).encode()


def test_every_bad_line_is_named_and_nothing_else_is_lost(tmp_path):
    lines = [
        b"\xef\xbb\xbf" + line(text="after a byte order mark"),
        b'{"text": "cut off',
        line(words="no text"),
        line(text=7),
        b'{"text": "bad \xff byte"}',
        b'{"text": "raw \x00 zero"}',
        line(text="written \0 zero"),
        b'{"text": "half a pair \\ud800"}',
        b"[1, 2]",
        b"",
        line(text="  "),
        line(text="x" * 2000),
        line(text="last", domain=3, date="2001-05-06T07:08"),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    documents, aside = everything(tmp_path / "a.jsonl", row_limit=1000)
    assert [(d.row, d.text) for d in documents] == [(1, "after a byte order mark"), (13, "last")]
    assert (documents[1].domain, documents[1].date) == ("3", "2001-05-06")
    assert {bad.line: bad.reason for bad in aside} == {
        2: "broken JSON",
        3: "no field 'text'",
        4: "'text' is int, not text",
        5: "invalid UTF-8",
        6: "NUL character",
        7: "NUL character",
        8: "invalid UTF-8",
        9: "not a JSON object",
        11: "empty text",
        12: "longer than 1,000 bytes",
    }


def test_a_row_of_fifty_megabytes_is_set_aside(tmp_path):
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(line(text="before") + b"\n" + b'{"text": "' + b"y" * (50 << 20) + b'"}\n')
        file.write(line(text="behind") + b"\n")
    documents, aside = everything(tmp_path)
    assert [d.text for d in documents] == ["before", "behind"]
    assert [(bad.line, bad.reason) for bad in aside] == [(2, "longer than 16,777,216 bytes")]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_and_cut_short(tmp_path, ending):
    import random

    draw = random.Random(0)
    rows = [line(text=f"number {n} {draw.random()}") for n in range(3000)]
    data = b"\n".join(rows) + b"\n"
    if ending == "gz":
        packed = gzip.compress(data)
    else:
        packed = pa.Codec("zstd").compress(data, asbytes=True)
    (tmp_path / f"a.jsonl.{ending}").write_bytes(packed)
    documents, aside = everything(tmp_path)
    assert len(documents) == 3000 and not aside
    (tmp_path / f"a.jsonl.{ending}").write_bytes(packed[: len(packed) // 2])
    documents, aside = everything(tmp_path)
    assert [d.row for d in documents] == list(range(1, len(documents) + 1))
    assert len(documents) < 3000
    assert [bad.reason for bad in aside] == ["the compressed file ends early"]


def test_parquet_arrow_and_lines_give_the_same_documents(tmp_path):
    rows = [{"text": f"text {n}", "id": f"i{n}", "date": date(2000 + n, 1, 2)} for n in range(5)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    plain = "".join(json.dumps(row, default=str) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(plain)
    found = [
        everything(tmp_path / f"a.{kind}", Fields(id="id"))[0]
        for kind in ("parquet", "arrow", "jsonl")
    ]
    assert found[0] == found[1] == found[2] and len(found[0]) == 5
    assert [d.key for d in found[0]] == [d.key for d in found[2]]
    assert found[0][3].date == "2003-01-02"


def test_invalid_utf8_in_a_column_costs_its_own_row(tmp_path):
    good, bad = pa.array([b"good", b"b\xffd", b"fine"], pa.binary()), pa.string()
    array = pa.Array.from_buffers(bad, 3, good.buffers())
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    documents, aside = everything(tmp_path)
    assert [d.text for d in documents] == ["good", "fine"]
    assert [(b.line, b.reason) for b in aside] == [(2, "invalid UTF-8")]


def test_mixed_schemas_and_empty_files(tmp_path):
    pq.write_table(pa.table({"text": ["one"], "tokens": [3]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"words": ["two"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.array([4])}), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl").write_bytes(b"")
    documents, aside = everything(tmp_path)
    assert [d.text for d in documents] == ["one"]
    assert [(b.file, b.reason) for b in aside] == [
        ("b.parquet", "no field 'text'"), ("c.parquet", "'text' is int, not text"),
    ]  # fmt: skip
    documents, aside = everything(tmp_path / "a.parquet", Fields(tokens="tokens"))
    assert documents[0].tokens == 3


def test_a_limit_counts_rows_of_each_file(tmp_path):
    for name in "ab":
        lines = b"\n".join([b"broken", line(text="one"), line(text="two")])
        (tmp_path / f"{name}.jsonl").write_bytes(lines)
    documents, aside = everything(tmp_path, limit=2)
    assert [d.id for d in documents] == ["a.jsonl:2", "b.jsonl:2"] and len(aside) == 2


def test_a_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["one", "two", "three"]})
    data.save_to_disk(tmp_path / "plain")
    assert [d.text for d in everything(tmp_path / "plain")[0]] == ["one", "two", "three"]
    data.select([2, 0]).save_to_disk(tmp_path / "view")
    documents = everything(tmp_path / "view")[0]
    assert [d.text for d in documents] == ["three", "one"]


def test_names_do_not_depend_on_where_files_lie(tmp_path):
    for base in ("here", "there"):
        for name in ("b/x.jsonl", "a/x.jsonl"):
            path = tmp_path / base / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(line(text=name))
    names = [[s.name for s in open_shards(tmp_path / base).shards] for base in ("here", "there")]
    assert names == [["a/x.jsonl", "b/x.jsonl"]] * 2
    glob = open_shards(str(tmp_path / "here" / "*" / "x.jsonl"))
    assert [s.name for s in glob.shards] == names[0]


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        open_shards(tmp_path / "none")
    with pytest.raises(ConfigError, match="no data in"):
        open_shards(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="no file of shards"):
        open_shards(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no footer")
    with pytest.raises(DataError, match="no whole Parquet file"):
        open_shards(tmp_path)


def test_a_column_of_ids_or_tokens_is_checked(tmp_path):
    rows = [line(text="a", id=1, n=2), line(text="b"), line(text="c", id=1.5, n=1),
            line(text="d", id="x", n=-1)]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    documents, aside = everything(tmp_path, Fields(id="id", tokens="n"))
    assert [(d.id, d.tokens) for d in documents] == [("1", 2)]
    assert [bad.reason for bad in aside] == [
        "no field 'id'", "'id' is float, not an id", "'n' is no count of tokens",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [(1999, "1999"), ("1999", "1999"), ("2001-02", "2001-02"), (date(2001, 2, 3), "2001-02-03"),
     ("2001-02-03T04:05:06Z", "2001-02-03"), ("March 2001", ""), ("20010203", ""), (None, ""),
     (True, ""), (1.5, "")],
)  # fmt: skip
def test_dates(given, expected):
    assert date_of(given) == expected
