"""Every schema becomes the same row, with the line it came from; bad rows say what is wrong and where."""

from __future__ import annotations

import json

import pytest

from phlora.config import DataFile
from phlora.data.dataset import load_rows, read_rows
from phlora.errors import ConfigError, DataError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


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
    assert row.tools == tools


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


def test_unused_columns_are_named(tmp_path):
    loaded = load_rows([{"messages": CHAT, "id": 7, "source": "web"}])
    assert [(problem.severity, problem.kind) for problem in loaded.problems] == [("note", "ignored_columns")]
    assert "`id`, `source`" in loaded.problems[0].message


BAD_ROWS = [
    ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown_role", "narrator"),
    ({"messages": [{"role": "asistant", "content": "x"}]}, "unknown_role", "`assistant`"),
    ({"messages": [{"roll": "user", "content": "x"}]}, "missing_role", "`roll`"),
    ({"messages": "Hi"}, "wrong_type", "a text, not a list"),
    ({"messages": json.dumps(CHAT)[:-1]}, "broken_json", "`messages` holds broken JSON"),
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


def test_format_can_be_named_and_is_checked():
    record = {"messages": CHAT, "text": "a"}
    assert load_rows([record], format="text").rows[0].text == "a"
    assert load_rows([record], format="chat").rows[0].messages
    with pytest.raises(ConfigError, match="did you mean `alpaca`"):
        load_rows([record], format="alpacca")


def test_an_instruction_stands_before_the_question_that_it_goes_with():
    loaded = load_rows([{"instruction": "Be brief", "question": "Why?", "answer": "So"}])
    assert loaded.rows[0].messages[0]["content"] == "Be brief\n\nWhy?" and loaded.problems == []


def test_what_was_attached_to_a_claude_chat_is_read_and_pictures_are_refused():
    asked = {"sender": "human", "text": "Sum up", "attachments": [{"extracted_content": "A file"}]}
    answer = {"sender": "assistant", "text": "Short"}
    (row,) = load_rows([{"chat_messages": [asked, answer]}]).rows
    assert row.messages[0]["content"] == "A file\n\nSum up"
    picture = {"sender": "human", "text": "", "files": [{"file_name": "a.png"}]}
    with pytest.raises(DataError, match="Turn 1 holds files"):
        load_rows([{"chat_messages": [picture, answer]}])


def test_what_is_no_longer_a_part_of_a_chatgpt_chat_is_left_out():
    nodes, said = {}, [("user", "q", 1.0), ("assistant", "old", 0.0), ("assistant", "new", 1.0)]
    for number, (role, text, weight) in enumerate(said):
        content = {"content_type": "text", "parts": [text]}
        message = {"author": {"role": role}, "content": content, "weight": weight}
        parent = str(number - 1) if number else None
        nodes[str(number)] = {"message": message, "parent": parent, "children": []}
    loaded = load_rows([{"mapping": nodes, "current_node": "2"}])
    assert _contents(loaded.rows[0]) == [("user", "q"), ("assistant", "new")] and loaded.problems == []


def test_what_a_column_says_was_thought_belongs_to_the_answer():
    for record in ({"question": "a", "answer": "b"}, {"instruction": "a", "output": "b"}):
        loaded = load_rows([{**record, "reasoning": "because"}])
        assert loaded.rows[0].messages[-1] == {
            "role": "assistant",
            "content": "b",
            "reasoning_content": "because",
        }
        assert not loaded.problems


def test_a_column_is_read_once(tmp_path):
    (tmp_path / "de.csv").write_text("Frage;Antwort\na;b\n")
    file = DataFile(path=str(tmp_path / "de.csv"), columns={"question": "Frage", "answer": "Frage"})
    with pytest.raises(ConfigError, match="both read from the column `Frage`"):
        load_rows(file)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "", "rejected": "x"}, "`chosen` is empty"),
        ({"prompt": "a", "completion": "b", "label": None}, "`label` is nothing"),
    ],
)
def test_preference_data_without_a_side_are_told_what_lacks(record, message):
    loaded = load_rows([record], format="preference_chosen", on_bad="collect")
    assert message in loaded.problems[0].message


def test_ratings_out_of_a_table_are_numbers():
    completions = [{"response": "good", "overall_score": "10"}, {"response": "bad", "overall_score": "3"}]
    loaded = load_rows([{"instruction": "a", "completions": completions}], format="preference_chosen")
    assert loaded.rows[0].messages[-1]["content"] == "good"


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    "history",
    [[["a", "b"]], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]],
    ids=["pairs", "messages"],
)
def test_earlier_exchanges_as_pairs_messages_and_json(history, as_text):
    value = json.dumps(history) if as_text else history
    for asked in ({"instruction": "c", "output": "d"}, {"question": "c", "answer": "d"}):
        (row,) = load_rows([{**asked, "history": value}]).rows
        assert [message["content"] for message in row.messages] == ["a", "b", "c", "d"]
    (row,) = load_rows([{"instruction": "c", "output": "d", "history": "[]"}]).rows
    assert len(row.messages) == 2
