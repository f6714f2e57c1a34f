"""Known columns and keys mean the same however they are spelled, and two names of one thing never hide each other."""

from __future__ import annotations

import csv
import json

import pytest

from phlora.data.checks import check
from phlora.data.dataset import index_rows, load_rows
from phlora.data.rows import BadRow
from phlora.data.spelling import known_column, with_known_columns
from phlora.errors import DataError

PAIR = {"Question": "Hi", "Answer": "Hello"}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def _found(record):
    return [(p.kind, p.severity) for p in load_rows([record], on_bad="collect").problems]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Weight", "weight"),
        ("weight ", "weight"),
        ("SAMPLE WEIGHT", "sample_weight"),
        ("sampleWeight", "sample_weight"),
        ("Is-Test", "is_test"),
        ("\ufeffTrain", "train"),
        ("A", "A"),
        ("ID", "ID"),
        ("weights", "weights"),
    ],
)
def test_the_spelling_of_a_column(name, known):
    assert known_column(name) == known


def test_two_spellings_of_one_column():
    assert with_known_columns({"Weight": 1, "weight": 1}) == {"weight": 1}
    assert with_known_columns({"Weight": None, "weight": 1}) == {"weight": 1}
    assert with_known_columns({"weight": 1, "Weight": ""}) == {"weight": 1}
    with pytest.raises(BadRow, match="`weight` and `Weight`"):
        with_known_columns({"weight": 1, "Weight": 0})


@pytest.mark.parametrize(
    "keys",
    [{"Weight": "0"}, {"Train": "False"}, {"Sample Weight": "0.0"}, {"Masked": "TRUE"}, {"LOSS_MASK": 0}],
    ids=str,
)
def test_rows_that_may_not_be_trained_are_not(tmp_path, keys):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*PAIR, *keys])
        writer.writeheader()
        writer.writerow(PAIR | keys)
    for source in (path, [PAIR | keys], [{"messages": CHAT} | keys]):
        (row,) = load_rows(source).rows
        assert row.weight == 0


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"Split": "TEST"}, [("held_out_split", "warning")]),
        ({"is_test": True}, [("held_out_split", "warning")]),
        ({"Is Train": "false"}, [("held_out_split", "warning")]),
        ({"is_train": 1}, []),
        ({"mask": 1}, [("ambiguous", "error")]),
        ({"mask": "The [MASK] sat"}, [("ignored_columns", "note")]),
        ({"Images": ["a.png"]}, [("media", "error")]),
    ],
    ids=str,
)
def test_marks_of_rows(keys, found):
    assert _found(PAIR | keys) == found


def test_preference_pairs_in_capitals_are_refused():
    with pytest.raises(DataError, match="preference_chosen"):
        load_rows([{"Prompt": "Hi", "Chosen": "Hello", "Rejected": "Go"}])


def test_keys_of_messages_and_parts_in_capitals():
    turns = [CHAT[0], {"Role": "assistant", "Content": "Hello", "Weight": 0, "Train": False}]
    (row,) = load_rows([{"Messages": turns}]).rows
    assert row.messages[1] == {"role": "assistant", "content": "Hello", "weight": 0.0, "train": False}
    turns[1] = {"role": "assistant", "content": [{"type": "text", "text": "Hello", "Train": False}]}
    (row,) = load_rows([{"dialogue": turns}]).rows
    assert row.messages[1]["train"] is False


def test_settings_name_columns_as_the_file_does():
    rows = [{"messages": CHAT, "Category": "a", "Conversation_ID": n} for n in range(2)]
    index = index_rows(rows, stratify_by="Category", group_by="Conversation_ID")
    assert index.categories == ["a", "a"] and index.groups == [b"0", b"1"]


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.csv"])
@pytest.mark.parametrize("empty", [None, "", " "])
def test_an_empty_group_is_told_alike(tmp_path, name, empty):
    rows = [
        {"question": "a", "answer": "b", "chat_id": "1"},
        {"question": "c", "answer": "d", "chat_id": empty},
    ]
    path = tmp_path / name
    if name.endswith("csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="`chat_id` is empty") as refused:
        index_rows(path, group_by="chat_id")
    assert "did you mean" not in str(refused.value)


@pytest.mark.parametrize(
    "columns",
    [
        {"system": "S", "system_prompt": "T"},
        {"system_prompt": "S", "system_message": "T"},
        {"tools": [{"name": "a"}], "functions": [{"name": "b"}]},
    ],
    ids=str,
)
def test_two_names_of_one_thing_are_refused_where_they_differ(columns):
    assert _found({"messages": CHAT, **columns}) == [("two_columns", "error")]
    first = next(iter(columns.values()))
    loaded = load_rows([{"messages": CHAT, **dict.fromkeys(columns, first)}])
    assert not loaded.problems
    assert loaded.rows[0].messages[0]["content"] in ("S", "Hi")


def test_tools_and_functions_that_are_the_same_tools():
    tool = {"name": "a", "parameters": {}}
    row = {
        "messages": CHAT,
        "tools": [{"type": "function", "function": tool}],
        "functions": json.dumps([tool]),
    }
    assert not load_rows([row]).problems


NOTED = [("ignored_columns", "note")]
WARNED = [("unused_column", "warning")]


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"question": "Hi", "query": "Ho", "answer": "Hello"}, WARNED),
        ({"question": "Hi", "answer": "Hello", "response": "Hey there"}, WARNED),
        ({"question": "Hi", "answer": "Hello", "response": "Hello "}, NOTED),
        ({"instruction": "Hi", "output": "Hello", "response": "Hey there"}, WARNED),
        ({"messages": CHAT, "prompt": "Hi"}, NOTED),
        ({"messages": CHAT, "prompt": "Something else"}, WARNED),
        ({"messages": CHAT, "text": "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>"}, NOTED),
        ({"messages": CHAT, "conversations": CHAT}, NOTED),
        ({"messages": CHAT, "conversations": [{"from": "human", "value": "other"}]}, WARNED),
        ({"messages": CHAT, "context": "A passage of words"}, WARNED),
        ({"messages": CHAT, "document": "doc-17"}, NOTED),
        ({"messages": CHAT, "history": [["a", "b"]]}, WARNED),
        ({"prompt": "a", "completion": "b", "system": "Be kind"}, WARNED),
        ({"prompt": "a", "completion": "b", "tools": [{"name": "t"}]}, WARNED),
        ({"prompt": "a", "completion": "b", "history": [["a", "c"]]}, WARNED),
        ({"prompt": "a", "completion": "b", "context": "A passage of words"}, WARNED),
        ({"text": "abc", "context": ["A passage of words"]}, WARNED),
        ({"question": "q", "answer": "a", "context": "One.", "passage": "Another one."}, WARNED),
        ({"question": "q", "answer": "a", "thinking": "x", "reasoning": "y"}, [("two_columns", "error")]),
        ({"question": "q", "answer": "a", "thinking": ["x"]}, [("wrong_type", "error")]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_texts_without_a_place_are_said(record, found):
    assert _found(record) == found
    report = check([record])
    assert report.exit_code(strict=True) == (2 if "error" in str(found) else 1 if found == WARNED else 0)
