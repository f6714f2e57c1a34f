"""Several sources, read whole or indexed and read again."""

from __future__ import annotations

import json

import pytest

from phlora.config import DataFile
from phlora.data.dataset import RowSubset, index_rows, load_rows, read_rows
from phlora.data.rows import fingerprint_of, row_digest, row_key
from phlora.errors import ConfigError, DataError
from phlora.testing import write_rows

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def _contents(row):
    return [(message["role"], message["content"]) for message in row.messages]


def test_datasets_objects_and_saved_folders(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([{"messages": CHAT}])
    assert _contents(load_rows(data).rows[0]) == [("user", "Hi"), ("assistant", "Hello")]
    splits = DatasetDict({"train": data, "test": Dataset.from_list([{"text": "held out"}])})
    assert load_rows(splits).formats == {"train": "messages"}
    splits.save_to_disk(str(tmp_path / "saved"))
    assert load_rows(f"{tmp_path / 'saved'}:test").rows[0].text == "held out"
    with pytest.raises(DataError, match="tset"):
        load_rows(f"{tmp_path / 'saved'}:tset")


def test_weights_of_several_files(tmp_path):
    one = write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    two = write_rows(tmp_path / "b.jsonl", [{"question": "q", "answer": "a"}])
    rows = load_rows([DataFile(path=str(one)), DataFile(path=str(two), weight=0.25)]).rows
    assert [row.weight for row in rows] == [1.0, 0.25]
    with pytest.raises(ConfigError, match="positive"):
        load_rows(DataFile(path=str(one), weight=-1))


def test_all_bad_rows_are_counted_in_the_error(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"text": "a"}\n{broken\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"chats.jsonl:2: Broken JSON at column 2.*1 more row"):
        load_rows(path)


def test_no_data_and_no_rows():
    with pytest.raises(DataError, match="No data"):
        load_rows([])
    with pytest.raises(DataError, match="No rows"):
        load_rows(iter(()))


def test_an_index_knows_what_loading_finds_and_reads_the_rows_again(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [
        {"messages": CHAT, "id": 1},
        {"messages": 3},
        *({"messages": [*CHAT, *CHAT[:n]]} for n in range(3)),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    loaded = load_rows(path, on_bad="collect")
    seen = []
    index = index_rows(path, on_bad="collect", inspect=seen.append)
    assert seen == list(index.all()) == list(index.all()) == loaded.rows
    assert (index.problems, index.formats) == (loaded.problems, loaded.formats)
    assert [key.hex() for key in index.keys] == [row_key(row) for row in loaded.rows]
    assert fingerprint_of(index.all().digests()) == fingerprint_of(map(row_digest, loaded.rows))
    some = RowSubset(index, [1, 3])
    assert list(some) == [loaded.rows[1], loaded.rows[3]]
    assert list(some.origins()) == [row.origin for row in some]
    with pytest.raises(DataError, match="messages"):
        index_rows(path)


def test_what_can_be_read_only_once_is_kept_and_what_changes_is_told(tmp_path):
    index = index_rows({"text": text} for text in "ab")
    assert [row.text for row in index.all()] == [row.text for row in index.all()] == ["a", "b"]
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    index = index_rows(path)
    for changed in ('{"text": "a"}\n{"text": "c"}\n', '{"text": "a"}\n'):
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(DataError, match="changed while it was read"):
            list(index.all())


def test_rows_are_read_one_by_one_past_what_is_only_noted():
    rows = [
        {"prompt": "Hi", "completion": "Hello", "label": True},
        {"prompt": "Hi", "completion": "Go away", "label": False},
        {"prompt": "Bye", "completion": "So long", "label": True},
    ]
    found = list(read_rows(rows, format="preference_chosen"))
    assert [row.messages[-1]["content"] for row in found] == ["Hello", "So long"]
    assert [problem.severity for problem in load_rows(rows, format="preference_chosen").problems] == ["note"]


def test_what_holds_no_rows_is_refused():
    with pytest.raises(DataError, match="cannot be taken from a int"):
        load_rows(3)
