"""Every kind of file gives the same records, with the line that each came from."""

from __future__ import annotations

import gzip
import json

import pytest

from phlora.data.dataset import load_rows
from phlora.data.rows import Origin
from phlora.errors import DataError
from phlora.testing import LANGUAGES, write_rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
def test_every_file_type_keeps_all_languages(tmp_path, suffix):
    records = [{"question": f"{code}?", "answer": text} for code, text in LANGUAGES.items()]
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        write_rows(path, records)
    elif suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        mark = "\t" if suffix == ".tsv" else ","
        lines = [mark.join(f'"{cell}"' for cell in record.values()) for record in records]
        path.write_text("\n".join([mark.join(records[0]), *lines]), encoding="utf-8-sig")
    rows = load_rows(path).rows
    assert [row.messages[1]["content"] for row in rows] == list(LANGUAGES.values())
    assert rows[0].origin == Origin(str(path), 2 if suffix in (".csv", ".tsv") else 1)


def test_missing_file_names_the_nearest_one(tmp_path, monkeypatch):
    write_rows(tmp_path / "chats.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="does not exist") as caught:
        load_rows(tmp_path / "chat.jsonl")
    assert "did you mean `chats.jsonl`?" in str(caught.value)
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(DataError, match="does not exist"):
        load_rows(f"{tmp_path.name}/chats")
    with pytest.raises(DataError, match="folder of the data file does not exist"):
        load_rows(tmp_path / "nowhere" / "chat.jsonl")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f'{{"messages": [{"x" * 300}]}}', "No data file matches the pattern"),
        (f'{{"text": "{"x" * 300}/b"}}', "cannot be read: .*too long"),
        (f'{{"text": "{"x" * 300}"}}', "does not exist"),
        ("a\0b", "does not exist"),
    ],
    ids=["rows", "path", "name", "zero"],
)
def test_rows_in_place_of_the_name_of_their_file_are_no_traceback(source, message):
    with pytest.raises(DataError, match=message):
        load_rows(source)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("empty.jsonl", b"", "The file is empty"),
        ("blank.jsonl", b"\n\n", "The file is empty"),
        ("empty.json", b"", "The file is empty"),
        ("broken.json", b'[{"text": "a"},\n{"text"]', r"broken.json:2.*Broken JSON"),
        ("scalar.json", b"3", "a number"),
        ("odd.xml", b"<x/>", "no known kind of data file"),
        ("odd.parquet", b"PAR0", "no readable Parquet"),
        ("keys.jsonl", b'{"foo": 1, "bar": 2}', "`foo`, `bar`"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-12], "cannot be read"),
        ("more.csv", b"question,answer\na,b,c\n", "more cells"),
    ],
)
def test_unreadable_files(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=match):
        load_rows(path)
