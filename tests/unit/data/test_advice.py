"""Columns are advised where they are likely right; other layouts are called by their names."""

from __future__ import annotations

import json

import pytest

from phlora.config import parse_columns
from phlora.data.advice import how_to_map
from phlora.data.dataset import load_rows
from phlora.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"Frage": "a b", "Antwort": "c"}, "question=Frage,answer=Antwort"),
        ({"id": "1", "Question": "a", "Reply": "b", "url": "x"}, "question=Question,answer=Reply"),
        ({"foo": "a", "bar": "b"}, "question=foo,answer=bar"),
        ({"سوال": "a", "پاسخ": "b"}, "question=سوال,answer=پاسخ"),
        ({"chat_id": 0, "turn": 0, "role": "user", "content": "x"}, "single messages (`role`, `content`)"),
        ({"dialogue_id": "1", "speaker": "a", "utterance": "b"}, "single messages (`speaker`, `utterance`)"),
        ({"premise": "a", "hypothesis": "b", "label": 0}, "--format classification"),
        ({"train": [{"a": 1}], "test": [{"a": 1}]}, "write each into a file of its own"),
        ({"question": {"0": "a"}, "answer": {"0": "b"}}, 'orient="records"'),
        ({"question": ["a"], "answer": ["b"]}, 'orient="records"'),
        (["q", "a"], "an object with named columns"),
    ],
)
def test_what_is_advised(record, wanted):
    assert wanted in how_to_map(record)


@pytest.mark.parametrize(
    "record",
    [
        {"id": "1", "title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}},
        {"chat_id": 0, "role": "user", "content": "x"},
        {"a_text": "1", "b_text": "2", "c_text": "3"},
        {"question": "q", "answers": ["a", "b"]},
        {"license": "x"},
    ],
)
def test_no_columns_are_advised_on_a_guess(record):
    assert "question=…,answer=…" in (hint := how_to_map(record)) or "--columns" not in hint


def test_a_table_without_a_header_is_called_one(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("Wie geht 0?,Gut 0\nWie geht 1?,Gut 1\n")
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert "no header" in caught.value.fix


def test_names_that_were_given_stay_what_they_are(tmp_path):
    from phlora.config import DataFile

    path = tmp_path / "rows.csv"
    path.write_text("Frage;Antwort\na;b\n")
    with pytest.raises(DataError) as caught:
        load_rows(DataFile(path=str(path), columns={"question": "Frage"}))
    assert "question=Frage,answer=Antwort" in caught.value.fix
    with pytest.raises(ConfigError, match="taken twice"):
        parse_columns(["question=Frage,answer=Frage"])


def test_rows_of_the_hubs_viewer_are_read_unless_it_cut_them(tmp_path):
    path = tmp_path / "rows.json"
    row = {"row_idx": 0, "row": {"question": "a", "answer": "b"}, "truncated_cells": []}
    path.write_text(json.dumps({"rows": [row]}))
    assert load_rows(path).formats[str(path)] == "qa"
    path.write_text(json.dumps({"rows": [row, {**row, "truncated_cells": ["answer"]}]}))
    with pytest.raises(DataError, match="viewer cut"):
        load_rows(path)


def test_whole_columns_are_refused_as_such(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"question": {"0": "a"}, "answer": {"0": "b"}}))
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert 'orient="records"' in caught.value.fix


def test_a_format_that_was_asked_for_names_its_own_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a", "emotion": "joy"}) + "\n")
    with pytest.raises(DataError) as caught:
        load_rows(path, format="classification")
    assert "line 0" not in str(caught.value) and "label=…" in str(caught.value)
