"""Hostile values and files: one message with file and line, never an exception of another kind, in bounded time."""

from __future__ import annotations

import copy
import datetime
import json
import random
import time

import pytest

from phlora.config import DataFile
from phlora.data.dataset import load_rows, read_rows
from phlora.data.rows import BadRow, row_digest, row_key
from phlora.data.values import MAX_DEPTH, checked, renamed, sound
from phlora.errors import DataError, PhloraError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "\ud83d",
        {"\udc00": 1},
        {1: "a"},
        {"a": [{"b": "\ud83d"}]},
        10**400,
        -(10**5000),
        float("nan"),
        [float("inf")],
        nested(100),
        nested(100_000),
    ],
    ids=range(10),
)
def test_what_nothing_can_take_is_refused(value):
    with pytest.raises(BadRow) as caught:
        sound(value)
    assert len(str(caught.value)) < 400


def test_plain_values_stay_and_values_of_tables_become_plain():
    import numpy

    kept = {"a": [1, 2.5, None, True, "سلام 😀"], "b": nested(MAX_DEPTH - 1)}
    assert sound(kept) == kept
    assert sound({"a": numpy.array([1, 2]), "b": numpy.float32(0.5)}) == {"a": [1, 2], "b": 0.5}
    assert sound(datetime.date(2024, 5, 1)) == "2024-05-01"


def test_columns_are_renamed_by_path():
    record = {"Frage": "a", "meta": {"reply": ["b", "c"]}, "note": 1}
    columns = {"question": "Frage", "answer": "meta.reply[1]"}
    assert renamed(record, columns) == {"question": "a", "answer": "c", "note": 1}
    with pytest.raises(BadRow, match="has no `Frge`") as caught:
        renamed(record, {"question": "Frge"})
    assert "Frage" in caught.value.expected


def test_files_say_for_themselves_how_they_are_read(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("prompt;completion;Frage;Antwort\na;b;c;d\ne;f;g;h\n", encoding="utf-8")
    columns = {"question": "Frage", "answer": "Antwort"}
    file = DataFile(path=str(path), columns=columns, format="qa", limit=1, weight=2.0)
    (row,) = load_rows(file).rows
    assert [message["content"] for message in row.messages] == ["c", "d"] and row.weight == 2.0
    assert [message["content"] for message in next(read_rows(file)).messages] == ["c", "d"]
    with pytest.raises(DataError, match="table.csv:2.*has no `Frge`"):
        load_rows(DataFile(path=str(path), columns={"question": "Frge"}))


# ------------------------------------------------------------------------------------------------ fuzzing

SEEDS = [
    {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": 0.5}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f"},
    {"question": "a", "answer": "b"},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {
        "contents": [
            {"role": "user", "parts": [{"text": "a"}]},
            {"role": "model", "parts": [{"functionCall": {}}]},
        ]
    },
    {"query": "a", "tools": "[]", "answers": "[]"},
    {"chat_messages": [{"sender": "human", "text": "a", "content": [{"type": "text", "text": "b"}]}]},
    {"mapping": {"a": {"message": {"author": {"role": "user"}}, "parent": "a"}}, "current_node": "a"},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
    {"message_tree_id": "a", "prompt": {"text": "a", "role": "prompter", "replies": [{}]}},
    {"text": "a"},
]
BAD = [
    None,
    True,
    0,
    -1,
    1.5,
    10**400,
    float("nan"),
    "",
    "\ud800",
    "[",
    "[1]",
    [],
    {},
    [[]],
    [{}],
    {"a": 1},
    nested(70),
]
BAD += ["\x1b]0;\x07", "x" * 5000, {"text": "a"}, ["a"], b"x", {1: 2}, datetime.date(2024, 1, 1)]


def mutated(value, chance):
    """The value with one of its inner values replaced, removed or moved."""
    value = copy.deepcopy(value)
    spot, parent = value, None
    while isinstance(spot, dict | list) and spot and (parent is None or chance.random() < 0.8):
        parent, key = spot, chance.choice(list(spot) if isinstance(spot, dict) else range(len(spot)))
        spot = spot[key]
    if parent is None:
        return chance.choice(BAD)
    if chance.random() < 0.2:
        del parent[key]
    elif isinstance(parent, dict) and chance.random() < 0.3:
        parent[
            chance.choice(["role", "content", "text", "type", "train", "weight", "tool_calls", "\ud800"])
        ] = chance.choice(BAD)
    else:
        parent[key] = chance.choice(BAD)
    return value


def test_the_short_way_over_sound_records_finds_what_the_long_one_finds():
    chance = random.Random(9)
    values = [mutated(mutated(chance.choice(SEEDS), chance), chance) for _ in range(1500)]
    values += [{"a": value} for value in (*BAD, True, None, 1, 0.5, "é", (1, 2), {"é": {}}, [[]], nested(64))]
    for value in [{"a": value} if isinstance(value, list) else value for value in values]:
        ((_, found),) = checked(iter([(1, value)]), {})
        try:
            wanted = sound(value)
        except BadRow as bad:
            assert (found.kind, found.message) == (bad.kind, bad.message)
        else:
            assert repr(found) == repr(wanted)
            assert found is not value or not isinstance(value, dict | list)


def test_mutated_rows_are_rows_or_problems():
    chance = random.Random(5)
    start = time.monotonic()
    for _ in range(1500):
        seed = chance.choice(SEEDS)
        rows = [seed, *(mutated(mutated(seed, chance), chance) for _ in range(2))]
        try:
            loaded = load_rows(rows, on_bad="collect")
        except PhloraError as error:
            assert len(str(error)) < 4000
            continue
        for row in loaded.rows:
            row_key(row), row_digest(row)
            json.dumps([row.messages, row.tools, row.text]).encode("utf-8")
            str(row.messages).encode("utf-8")
        assert all(len(problem.message) < 2000 for problem in loaded.problems)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".json", ".csv", ".tsv", ".txt", ".jsonl.gz", ".parquet", ".zip"]
)
def test_mutated_files_are_read_or_refused(tmp_path, suffix):
    import gzip
    import io
    import zipfile

    chance = random.Random(suffix)
    lines = "".join(json.dumps(seed) + "\n" for seed in SEEDS[:2] * 3).encode()
    table = "question,answer\n" + "".join(f'"a, {n}",سلام\n' for n in range(9))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("a.jsonl", lines)
    content = {
        ".json": json.dumps(SEEDS[:1] * 3, indent=1).encode(),
        ".csv": table.encode(),
        ".tsv": table.replace(",", "\t").encode("utf-16"),
        ".jsonl.gz": gzip.compress(lines),
        ".zip": archive.getvalue(),
    }.get(suffix, lines)
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"question": ["a"] * 50, "answer": ["b"] * 50}), path)
        content = path.read_bytes()
    for _ in range(60):
        torn = bytearray(content)
        for _ in range(chance.choice([1, 1, 3, 20])):
            torn[chance.randrange(len(torn))] = chance.randrange(256)
        path.write_bytes(torn[: chance.randrange(len(torn))] if chance.random() < 0.3 else torn)
        try:
            load_rows(path, on_bad="collect")
        except PhloraError as error:
            assert "data" in str(error)
