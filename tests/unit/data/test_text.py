"""Lines of a text with their numbers; what is no text says what it is."""

from __future__ import annotations

import gzip

import pytest

from phlora.data.dataset import load_rows, read_rows
from phlora.errors import DataError


def test_jsonl_lines_are_real_lines_past_blanks_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n\n  \n{"text": "b"}\n')
    assert [row.origin.line for row in read_rows(path)] == [1, 4]


def test_a_damaged_line_among_utf8_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_bytes('{"text": "é"}\n{"text": "ç"}\n'.encode() + b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"mixed.jsonl:3.*0xe9 at offset 43"):
        load_rows(path)


def test_files_under_a_wrong_name_say_what_they_are(tmp_path):
    for name, content, kind in [
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "gzip"),
        ("b.csv", b"PK\x03\x04...", "Excel"),
        ("c.jsonl", b"PAR1....", "Parquet"),
        ("d.jsonl", b"\x01\x00\x02\x00\x00", "no text"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=kind):
            load_rows(tmp_path / name)
