"""Files as streams of bytes: compressed, in archives and folders, under patterns; and which of them are read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile

import pytest

from phlora.config import DataFile
from phlora.data.dataset import load_rows
from phlora.data.readers import files
from phlora.errors import DataError
from phlora.testing import write_rows


def test_every_compression(tmp_path):
    import pyarrow

    content = b'{"text": "a"}\n{"text": "b"}\n'
    for suffix, packed in {
        ".gz": gzip.compress(content),
        ".bz2": bz2.compress(content),
        ".xz": lzma.compress(content),
        ".zst": pyarrow.Codec("zstd").compress(content).to_pybytes(),
    }.items():
        path = tmp_path / f"rows.jsonl{suffix}"
        path.write_bytes(packed)
        assert [row.text for row in load_rows(path).rows] == ["a", "b"], suffix
        path.write_bytes(packed[: len(packed) // 2])
        with pytest.raises(DataError):
            load_rows(path)


def _patched(path, *, at, value, size=2):
    """An archive with a number in place of one of its directory's, where zip keeps what it says of a member."""
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\1\2") + at
    content[start : start + size] = value.to_bytes(size, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("field", "message", "fix"),
    [
        ({"at": 8, "value": 1}, "The archive is encrypted", "unpack it first"),
        ({"at": 8, "value": 0x41}, "The archive is encrypted", "unpack it first"),
        ({"at": 10, "value": 9}, "cannot be unpacked: That compression method", "unpack it first"),
        ({"at": 6, "value": 99}, "cannot be unpacked: zip file version 9.9", "unpack it first"),
        ({"at": 20, "value": 10**6 << 32 | 10**6, "size": 8}, "cannot be read: it ends too early", ""),
    ],
    ids=["password", "strong", "deflate64", "version", "cut"],
)
def test_an_archive_that_cannot_be_unpacked_says_why(tmp_path, field, message, fix):
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", '{"text": "a"}\n')
    _patched(path, **field)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(path)
    assert caught.value.fix == fix


def test_a_name_in_an_archive_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("é.jsonl", '{"text": "a"}\n')
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xfe"))
    with pytest.raises(DataError, match="cannot be unpacked: 'utf-8' codec"):
        load_rows(path)


def test_a_decompression_bomb_is_refused_while_it_unpacks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 1 << 20)
    monkeypatch.setattr(files, "MAX_RATIO", 10)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * (8 << 20) + b'"}\n'))
    with pytest.raises(DataError, match="more than 10 times its size"):
        load_rows(path)


def test_folders_patterns_and_archives_are_the_files_in_them(tmp_path):
    folder = tmp_path / "chats"
    (folder / "more").mkdir(parents=True)
    write_rows(folder / "a.jsonl", [{"text": "a"}])
    write_rows(folder / "more" / "b.jsonl", [{"text": "b"}])
    (folder / "README.md").write_text("# Chats")
    assert [row.text for row in load_rows(folder).rows] == ["a", "b"]
    assert [row.text for row in load_rows(str(folder / "*.jsonl")).rows] == ["a"]
    assert [row.text for row in load_rows(str(folder / "**" / "*.jsonl")).rows] == ["a", "b"]
    with zipfile.ZipFile(tmp_path / "chats.zip", "w") as archive:
        archive.write(folder / "a.jsonl", "in/a.jsonl")
        archive.writestr("__MACOSX/._a.jsonl", b"\0")
    (row,) = load_rows(tmp_path / "chats.zip").rows
    assert str(row.origin).endswith("chats.zip/in/a.jsonl:1")


def test_folders_patterns_and_archives_without_data_say_so(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    for source in (tmp_path, f"{tmp_path}/*.jsonl", f"{tmp_path}/*.md"):
        with pytest.raises(DataError, match="data file"):
            load_rows(source)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("notes.md", "x")
    with pytest.raises(DataError, match="no data file"):
        load_rows(tmp_path / "x.zip")
    (tmp_path / "y.zip").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DataError, match="cannot be read"):
        load_rows(tmp_path / "y.zip")


def test_what_an_archive_holds_besides_is_named(tmp_path):
    inner = tmp_path / "in.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("b.jsonl", json.dumps({"text": "b"}))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jsonl", json.dumps({"text": "a"}))
        archive.writestr("../../up.jsonl", json.dumps({"text": "up"}))
        archive.write(inner, "in.zip")
    loaded = load_rows(tmp_path / "x.zip")
    assert [row.text for row in loaded.rows] == ["up", "a"]
    (note,) = [problem for problem in loaded.problems if problem.kind == "left_out_files"]
    assert "in.zip" in note.message


# ------------------------------------------------------------------------------------------------ splits


def test_a_folder_of_splits_gives_the_training_rows_only_and_says_so(tmp_path):
    for name in ("train-0", "train-1", "test-0"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    loaded = load_rows(tmp_path)
    assert [row.text for row in loaded.rows] == ["train-0", "train-1"]
    assert "test-0.jsonl" in loaded.problems[0].message
    assert [row.text for row in load_rows(f"{tmp_path}:test").rows] == ["test-0"]
    assert [row.text for row in load_rows(DataFile(path=str(tmp_path), split="test")).rows] == ["test-0"]
    with pytest.raises(DataError, match="No split `tset`"):
        load_rows(f"{tmp_path}:tset")


def test_an_archive_of_splits_gives_the_training_rows_only_as_a_folder_does(tmp_path):
    names = ("train", "test", "heldout", "hold-out", "extra")
    with zipfile.ZipFile(tmp_path / "mix.zip", "w") as archive:
        for name in names:
            text = json.dumps({"text": name}) + "\n"
            archive.writestr(f"mix/{name}.jsonl", text)
            (tmp_path / "mix").mkdir(exist_ok=True)
            (tmp_path / "mix" / f"{name}.jsonl").write_text(text)
        archive.writestr("mix/README.txt", "about the data")
    (tmp_path / "mix" / "README.txt").write_text("about the data")
    for source in ("mix.zip", "mix"):
        loaded = load_rows(tmp_path / source)
        assert [row.text for row in loaded.rows] == ["extra", "train"]
        assert any("heldout.jsonl" in problem.message for problem in loaded.problems)


def _splits_as_folders(tmp_path):
    folder = tmp_path / "data"
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in ("train", "test", "validation"):
            (folder / name).mkdir(parents=True)
            write_rows(folder / name / "a.jsonl", [{"text": name}])
            archive.write(folder / name / "a.jsonl", f"data/{name}/a.jsonl")
    return folder


@pytest.mark.parametrize("source", ["data", "data.zip", "data/*/a.jsonl", "data/**/*.jsonl"])
def test_splits_that_are_folders_give_the_training_rows_only(tmp_path, source):
    _splits_as_folders(tmp_path)
    loaded = load_rows(str(tmp_path / source))
    assert [row.text for row in loaded.rows] == ["train"]
    (note,) = [problem for problem in loaded.problems if problem.kind == "split"]
    assert "test/a.jsonl" in note.message and "validation/a.jsonl" in note.message
    asked = DataFile(path=str(tmp_path / source), split="test")
    assert [row.text for row in load_rows(asked).rows] == ["test"]


def test_what_a_pattern_spells_out_is_read(tmp_path):
    folder = _splits_as_folders(tmp_path)
    assert [row.text for row in load_rows(str(folder / "test" / "*.jsonl")).rows] == ["test"]
    assert [row.text for row in load_rows(folder / "test").rows] == ["test"]


def test_a_held_out_file_beside_others_of_a_folder_is_left_out(tmp_path):
    write_rows(tmp_path / "test.jsonl", [{"text": "test"}])
    with pytest.raises(DataError, match="files of test, and none to train on") as caught:
        load_rows(tmp_path)
    assert f"{tmp_path}:test" in caught.value.fix
    write_rows(tmp_path / "chats.jsonl", [{"text": "chats"}])
    loaded = load_rows(tmp_path)
    assert [row.text for row in loaded.rows] == ["chats"]
    (note,) = loaded.problems
    assert note.kind == "split" and "test.jsonl" in note.message


def test_a_held_out_file_beside_others_of_an_archive_is_left_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("chats", "test"):
            archive.writestr(f"{name}.jsonl", json.dumps({"text": name}))
        archive.writestr("README.txt", "about the data")
    loaded = load_rows(tmp_path / "x.zip")
    assert [row.text for row in loaded.rows] == ["chats"]
    assert {problem.kind for problem in loaded.problems} == {"split", "left_out_files"}
    assert any("README.txt" in problem.message for problem in loaded.problems)
