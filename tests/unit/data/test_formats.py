"""Every schema becomes the same row, with the line it came from; bad rows say what is wrong and where."""

from __future__ import annotations

import gzip
import json
import socket

import pytest
from chat_tokenizers import LANGUAGES

from phlora.config import DataFile
from phlora.data.formats import (
    Origin,
    Selection,
    fingerprint,
    fingerprint_of,
    load_rows,
    read_rows,
    row_key,
    split_keys,
    split_rows,
    survey_rows,
)
from phlora.errors import ConfigError, DataError, NetworkError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def _write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def _contents(row):
    return [(message["role"], message["content"]) for message in row.messages]


@pytest.mark.parametrize(
    ("record", "schema"),
    [
        ({"messages": CHAT}, "messages"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            "conversations",
        ),
        (
            {"conversations": [{"role": "User", "content": "Hi"}, {"role": "bot", "content": "Hello"}]},
            "conversations",
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca"),
        ({"question": "Hi", "answer": "Hello"}, "qa"),
        ({"Query": "Hi", "Response": "Hello"}, "qa"),
        ({"prompt": "Hi", "response": "Hello"}, "qa"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt_completion"),
    ],
)
def test_chat_schemata_become_the_same_chat(record, schema):
    loaded = load_rows([record])
    assert _contents(loaded.rows[0]) == [("user", "Hi"), ("assistant", "Hello")]
    assert loaded.formats == {"rows": schema}
    assert loaded.problems == []


def test_plain_schemata_stay_plain():
    (row,) = load_rows([{"prompt": "1+1=", "completion": "2"}]).rows
    assert (row.messages, row.prompt, row.completion) == (None, "1+1=", "2")
    (row,) = load_rows([{"text": "Once."}]).rows
    assert (row.messages, row.text) == (None, "Once.")


def test_alpaca_input_stands_below_the_instruction():
    (row,) = load_rows([{"instruction": "Sum up", "input": "A long text", "output": "Short"}]).rows
    assert row.messages[0]["content"] == "Sum up\n\nA long text"


def test_chat_prompt_is_not_trained():
    prompt = [*CHAT, {"role": "user", "content": "And?"}]
    (row,) = load_rows([{"prompt": prompt, "completion": [{"role": "assistant", "content": "Bye"}]}]).rows
    assert [message.get("train") for message in row.messages] == [False, False, False, None]


def test_system_and_tools_columns_join_the_chat():
    tools = [{"type": "function", "function": {"name": "lamp", "strict": None}}]
    (row,) = load_rows([{"conversations": CHAT, "system": "Be brief", "tools": json.dumps(tools)}]).rows
    assert row.messages[0] == {"role": "system", "content": "Be brief"}
    assert row.tools == [{"type": "function", "function": {"name": "lamp"}}]


def test_developer_is_system_and_tool_arguments_are_parsed():
    call = {"function": {"name": "lamp", "arguments": '{"on": true}'}}
    messages = [
        {"role": "developer", "content": "Be brief"},
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "observation", "content": "done"},
    ]
    (row,) = load_rows([{"messages": messages}]).rows
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant", "tool"]
    assert row.messages[2]["tool_calls"][0]["function"]["arguments"] == {"on": True}


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
    one = _write(tmp_path / "a.jsonl", [{"text": "a"}])
    two = _write(tmp_path / "b.jsonl", [{"question": "q", "answer": "a"}])
    rows = load_rows([DataFile(path=str(one)), DataFile(path=str(two), weight=0.25)]).rows
    assert [row.weight for row in rows] == [1.0, 0.25]
    with pytest.raises(ConfigError, match="positive"):
        load_rows(DataFile(path=str(one), weight=-1))


def test_unused_columns_are_named(tmp_path):
    loaded = load_rows([{"messages": CHAT, "id": 7, "source": "web"}])
    assert [(problem.severity, problem.kind) for problem in loaded.problems] == [("note", "ignored_columns")]
    assert "`id`, `source`" in loaded.problems[0].message


BAD_ROWS = [
    ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown_role", "narrator"),
    ({"messages": [{"role": "asistant", "content": "x"}]}, "unknown_role", "`assistant`"),
    ({"messages": [{"roll": "user", "content": "x"}]}, "missing_role", "`roll`"),
    ({"messages": json.dumps(CHAT)}, "wrong_type", "JSON string"),
    ({"messages": []}, "empty_chat", "empty list"),
    ({"messages": [{"role": "user"}]}, "missing_content", "Turn 1"),
    ({"messages": [{"role": "user", "content": 3}]}, "wrong_type", "a number (3)"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "wrong_type", "images"),
    ({"messages": [*CHAT, "Bye"]}, "wrong_type", "Turn 3 is a text"),
    ({"messages": [{**CHAT[1], "train": "no"}]}, "wrong_type", "true or false"),
    ({"messages": [{**CHAT[1], "weight": -1}]}, "wrong_type", "at least 0"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "encoding", "surrogate"),
    ({"message": CHAT}, "missing_column", "`messages`, as in line 1"),
    ({"messages": None}, "missing_column", "`messages` is empty"),
    ({"question": "q", "answer": "a"}, "mixed_schemata", "unlike the rest"),
    ([1, 2], "wrong_type", "a list"),
]


@pytest.mark.parametrize(("record", "kind", "text"), BAD_ROWS)
def test_bad_rows_are_named_with_their_line(tmp_path, record, kind, text):
    good = {"messages": CHAT}
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (good, good, record)), encoding="utf-8")
    loaded = load_rows(path, on_bad="collect")
    (problem,) = loaded.problems
    assert (problem.kind, problem.severity, len(loaded.rows)) == (kind, "error", 2)
    assert text in problem.message
    assert [str(origin) for origin in problem.origins] == [f"{path}:3"]
    with pytest.raises(DataError, match="chats.jsonl:3"):
        load_rows(path)
    with pytest.raises(DataError, match="chats.jsonl:3"):
        list(read_rows(path))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "answer": "b"},
        {"prompt": "a", "completion": 3},
        {"prompt": "a", "completion": None},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": CHAT[:1], "completion": "b"},
    ],
)
def test_plain_rows_mixed_with_other_kinds(record):
    good = {"prompt": "a", "completion": "b"}
    loaded = load_rows([good, good, record], on_bad="collect")
    assert len(loaded.rows) == 2
    assert [
        origin.line
        for problem in loaded.problems
        for origin in problem.origins
        if problem.severity == "error"
    ] == [3]


def test_all_bad_rows_are_counted_in_the_error(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"text": "a"}\n{broken\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"chats.jsonl:2: Broken JSON at column 2.*1 more row"):
        load_rows(path)


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


def test_no_data_and_no_rows():
    with pytest.raises(DataError, match="No data"):
        load_rows([])
    with pytest.raises(DataError, match="No rows"):
        load_rows(iter(()))


def test_format_can_be_named_and_is_checked():
    record = {"messages": CHAT, "text": "a"}
    assert load_rows([record], format="text").rows[0].text == "a"
    assert load_rows([record], format="chat").rows[0].messages
    with pytest.raises(ConfigError, match="did you mean `alpaca`"):
        load_rows([record], format="alpacca")


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


def _texts(*texts):
    return load_rows([{"text": text} for text in texts]).rows


def test_split_depends_on_the_seed_only_and_keeps_order():
    rows = _texts(*(f"row {index}" for index in range(40)))
    train, held_out = split_rows(rows, eval_size=0.25, seed=1)
    assert (train, held_out) == split_rows(rows, eval_size=0.25, seed=1)
    assert held_out != split_rows(rows, eval_size=0.25, seed=2)[1]
    assert (len(train), len(held_out)) == (30, 10)
    assert [row.origin.line for row in train] == sorted(row.origin.line for row in train)
    assert len(split_rows(rows, eval_size=7, seed=1)[1]) == 7
    assert split_rows(rows, eval_size=0, seed=1) == (rows, [])


def test_duplicates_never_stand_on_both_sides():
    rows = _texts(*(f"row  {index // 4}" if index % 2 else f"row {index // 4} " for index in range(40)))
    for seed in range(10):
        train, held_out = split_rows(rows, eval_size=0.2, seed=seed)
        assert len(held_out) == 8
        assert not {row_key(row) for row in train} & {row_key(row) for row in held_out}


@pytest.mark.parametrize("eval_size", [3, 4, 0.99, -1])
def test_impossible_eval_sizes(eval_size):
    with pytest.raises(DataError):
        split_rows(_texts("a", "b", "c"), eval_size=eval_size, seed=0)


def test_rows_that_are_all_the_same_cannot_be_split():
    with pytest.raises(DataError, match="1 different"):
        split_rows(_texts("a", "a ", "a"), eval_size=1, seed=0)


def test_fingerprint_sees_content_order_and_weight():
    one, two = _texts("a", "b"), _texts("b", "a")
    assert fingerprint(one) == fingerprint(_texts("a", "b"))
    assert len({fingerprint(one), fingerprint(two), fingerprint(one[:1])}) == 3


def test_a_survey_knows_what_loading_finds_and_reads_the_rows_again(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [
        {"messages": CHAT, "id": 1},
        {"messages": 3},
        *({"messages": [*CHAT, *CHAT[:n]]} for n in range(3)),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    loaded = load_rows(path, on_bad="collect")
    seen = []
    survey = survey_rows(path, on_bad="collect", inspect=seen.append)
    assert seen == list(survey.all()) == list(survey.all()) == loaded.rows
    assert (survey.problems, survey.formats) == (loaded.problems, loaded.formats)
    assert [key.hex() for key in survey.keys] == [row_key(row) for row in loaded.rows]
    assert fingerprint_of(survey.all().digests()) == fingerprint(loaded.rows)
    some = Selection(survey, [1, 3])
    assert list(some) == [loaded.rows[1], loaded.rows[3]]
    assert list(some.origins()) == [row.origin for row in some]
    with pytest.raises(DataError, match="messages"):
        survey_rows(path)


def test_what_can_be_read_only_once_is_kept_and_what_changes_is_told(tmp_path):
    survey = survey_rows({"text": text} for text in "ab")
    assert [row.text for row in survey.all()] == [row.text for row in survey.all()] == ["a", "b"]
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    survey = survey_rows(path)
    for changed in ('{"text": "a"}\n{"text": "c"}\n', '{"text": "a"}\n'):
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(DataError, match="changed while it was read"):
            list(survey.all())


def test_the_split_by_keys_is_that_of_the_rows():
    rows = _texts("a", "b", "a", *map(str, range(40)))
    train, held_out = split_keys([row_key(row) for row in rows], eval_size=0.2, seed=3)
    assert split_rows(rows, eval_size=0.2, seed=3) == ([rows[i] for i in train], [rows[i] for i in held_out])
    assert sorted([*train, *held_out]) == list(range(43))
