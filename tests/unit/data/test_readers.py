"""Every kind of file gives the same records, with the line that each came from."""

from __future__ import annotations

import gzip
import json
import socket

import pytest
from chat_tokenizers import LANGUAGES

from phlora.data.dataset import load_rows, read_rows
from phlora.data.rows import Origin
from phlora.errors import DataError, NetworkError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def _write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def _contents(row):
    return [(message["role"], message["content"]) for message in row.messages]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
def test_every_file_type_keeps_all_languages(tmp_path, suffix):
    records = [{"question": f"{code}?", "answer": text} for code, text in LANGUAGES.items()]
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        _write(path, records)
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


def test_jsonl_lines_are_real_lines_past_blanks_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n\n  \n{"text": "b"}\n')
    assert [row.origin.line for row in read_rows(path)] == [1, 4]


def test_csv_lines_count_line_breaks_inside_cells(tmp_path):
    path = tmp_path / "qa.csv"
    path.write_text('question,answer\n"two\nlines",a\nq,b\n', encoding="utf-8")
    assert [row.origin.line for row in read_rows(path)] == [2, 4]


def test_csv_messages_are_parsed(tmp_path):
    path = tmp_path / "chat.csv"
    cell = json.dumps(CHAT).replace('"', '""')
    path.write_text(f'messages\n"{cell}"\n', encoding="utf-8")
    assert _contents(load_rows(path).rows[0])[1] == ("assistant", "Hello")


def test_jsonl_under_the_name_of_json_and_a_list_inside_an_object(tmp_path):
    path = tmp_path / "rows.json"
    _write(path, [{"text": "a"}, {"text": "b"}])
    assert len(load_rows(path).rows) == 2
    path.write_text('{"version": "1", "data": [{"text": "a"}]}', encoding="utf-8")
    assert len(load_rows(path).rows) == 1


def test_missing_file_names_the_nearest_one(tmp_path, monkeypatch):
    _write(tmp_path / "chats.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="does not exist") as caught:
        load_rows(tmp_path / "chat.jsonl")
    assert "did you mean `chats.jsonl`?" in str(caught.value)
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(DataError, match="does not exist"):
        load_rows(f"{tmp_path.name}/chats")
    with pytest.raises(DataError, match="folder of the data file does not exist"):
        load_rows(tmp_path / "nowhere" / "chat.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("empty.jsonl", b"", "The file is empty"),
        ("blank.jsonl", b"\n\n", "The file is empty"),
        ("empty.json", b"", "The file is empty"),
        (
            "latin.jsonl",
            '{"text": "a"}\n{"text": "caf\u00e9"}'.encode("latin-1"),
            r"latin.jsonl:2.*0xe9 at offset 27",
        ),
        ("latin.csv", "question,answer\nq,caf\u00e9".encode("latin-1"), r"latin.csv:2.*0xe9 at offset 21"),
        ("wide.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16"),
        ("broken.json", b'[{"text": "a"},\n{"text"]', r"broken.json:2.*Broken JSON"),
        ("scalar.json", b"3", "a number"),
        ("odd.xml", b"<x/>", "no known kind of data file"),
        ("odd.parquet", b"PAR0", "no readable Parquet"),
        ("keys.jsonl", b'{"foo": 1, "bar": 2}', "`foo`, `bar`"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-12], "cannot be read"),
        ("more.csv", b"question,answer\na,b,c\n", "more cells"),
    ],
)
def test_unreadable_files(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=match):
        load_rows(path)


def test_a_folder_of_something_else_names_its_files(tmp_path):
    _write(tmp_path / "chats.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="folder") as caught:
        load_rows(tmp_path)
    assert "chats.jsonl" in str(caught.value)


def test_an_unreachable_hub_is_a_network_error_at_once(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(NetworkError, match="cannot be reached") as caught:
        load_rows("someone/some-chats")
    assert caught.value.exit_code == 3


# ------------------------------------------------------------------------------------------------ splitting
