"""The messages of each provider and tool become the same chat; what is no text is an error with its turn."""

from __future__ import annotations

import json

import pytest

from phlora.data.dataset import load_rows
from phlora.data.messages import CALL_ROLES, ROLES, messages_of
from phlora.data.rows import BadRow
from phlora.errors import DataError

CHAT = [("user", "Hi"), ("assistant", "Hello")]
CALL = {"name": "weather", "arguments": {"city": "Novi Sad"}}


def chat_of(record):
    (row,) = load_rows([record]).rows
    return [(message["role"], message["content"]) for message in row.messages], row


OPENAI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
DIALECTS = {
    "ShareGPT under another name": {"conversation": OPENAI},
    "dialog": {"dialog": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "pairs of a side each": {"conversation": [{"human": "Hi", "assistant": "Hello"}]},
    "XTuner": {"conversation": [{"system": "", "input": "Hi", "output": "Hello"}]},
    "JSON in a cell": {"messages": json.dumps(OPENAI)},
    "pandas' way of a list in a cell": {"messages": str(OPENAI)},
    "content parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "Hello"}]},
        ]
    },
    "OpenAI's responses": {
        "messages": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Hello", "annotations": []}]},
        ]
    },
    "OpenAI's threads": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": {"value": "Hi", "annotations": []}}]},
            {"role": "assistant", "content": "Hello"},
        ]
    },
    "Bedrock": {
        "schemaVersion": "bedrock-conversation-2024",
        "messages": [
            {"role": "user", "content": [{"text": "Hi"}]},
            {"role": "assistant", "content": [{"text": "Hello"}]},
        ],
    },
    "Gemini": {
        "contents": [
            {"role": "user", "parts": [{"text": "Hi"}]},
            {"role": "model", "parts": [{"text": "Hel"}, {"text": "lo"}]},
        ]
    },
    "an export of Claude": {
        "uuid": "1",
        "name": "x",
        "chat_messages": [
            {"sender": "human", "text": "Hi"},
            {"sender": "assistant", "text": "", "content": [{"type": "text", "text": "Hello"}]},
        ],
    },
    "an export of ChatGPT": {
        "title": "x",
        "current_node": "d",
        "mapping": {
            "a": {"id": "a", "message": None, "parent": None, "children": ["b"]},
            "b": {
                "message": {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Hi"]}},
                "parent": "a",
                "children": ["c", "d"],
            },
            "c": {
                "message": {
                    "author": {"role": "assistant"},
                    "content": {"content_type": "text", "parts": ["another try"]},
                },
                "parent": "b",
                "children": [],
            },
            "d": {
                "message": {
                    "author": {"role": "assistant"},
                    "content": {"content_type": "text", "parts": ["Hello"]},
                },
                "parent": "b",
                "children": [],
            },
        },
    },
}


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_is_the_same_chat(name):
    assert chat_of(DIALECTS[name])[0] == CHAT


TOOL_DIALECTS = {
    "OpenAI": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "sun"},
    ],
    "OpenAI's old calls": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "weather", "arguments": '{"city": "Novi Sad"}'},
        },
        {"role": "function", "name": "weather", "content": "sun"},
    ],
    "LLaMA-Factory": [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "sun"},
    ],
    "swift": [
        {"role": "user", "content": "Weather?"},
        {"role": "tool_call", "content": json.dumps(CALL)},
        {"role": "tool_response", "content": "sun"},
    ],
    "Anthropic": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "1", "name": "weather", "input": CALL["arguments"]}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "sun"}]},
    ],
    "Bedrock": [
        {"role": "user", "content": [{"text": "Weather?"}]},
        {
            "role": "assistant",
            "content": [{"toolUse": {"toolUseId": "1", "name": "weather", "input": CALL["arguments"]}}],
        },
        {"role": "user", "content": [{"toolResult": {"toolUseId": "1", "content": [{"text": "sun"}]}}]},
    ],
    "Gemini": [
        {"role": "user", "parts": [{"text": "Weather?"}]},
        {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": CALL["arguments"]}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": "sun"}}]},
    ],
}


@pytest.mark.parametrize("name", TOOL_DIALECTS)
def test_calls_and_results_of_every_dialect(name):
    column = "contents" if name == "Gemini" else "messages"
    answer = (
        {"role": "assistant", "content": "Sunny"}
        if name != "LLaMA-Factory"
        else {"from": "gpt", "value": "Sunny"}
    )
    answer = {"role": "model", "parts": [{"text": "Sunny"}]} if name == "Gemini" else answer
    chat, row = chat_of({column: [*TOOL_DIALECTS[name], answer]})
    assert chat == [("user", "Weather?"), ("assistant", ""), ("tool", "sun"), ("assistant", "Sunny")]
    (call,) = row.messages[1]["tool_calls"]
    assert call["function"] == CALL
    assert not row.messages[2].keys() & {"tool_calls", "function_call"}


def test_calls_made_at_once_are_one_turn():
    calls = [{"from": "function_call", "value": json.dumps({**CALL, "name": name})} for name in ("a", "b")]
    turns = [{"from": "human", "value": "x"}, *calls, {"from": "observation", "value": "y"}]
    chat, row = chat_of({"conversations": turns})
    assert [role for role, _ in chat] == ["user", "assistant", "tool"]
    assert [call["function"]["name"] for call in row.messages[1]["tool_calls"]] == ["a", "b"]


def test_xlam_rows_are_a_question_and_its_calls():
    record = {
        "query": "Weather?",
        "tools": json.dumps([{"name": "weather", "parameters": {}}]),
        "answers": json.dumps([CALL]),
    }
    chat, row = chat_of(record)
    assert chat == [("user", "Weather?"), ("assistant", "")]
    assert row.messages[1]["tool_calls"][0]["function"] == CALL and row.tools[0]["name"] == "weather"


def test_reasoning_blocks_stand_beside_the_answer():
    content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hello"}]
    _, row = chat_of({"messages": [OPENAI[0], {"role": "assistant", "content": content}]})
    assert row.messages[1]["content"] == "Hello" and row.messages[1]["reasoning_content"] == "hm"


@pytest.mark.parametrize("system", ["Be kind", [{"text": "Be kind"}], {"parts": [{"text": "Be kind"}]}])
def test_system_prompts_of_every_provider(system):
    for record in (
        {"messages": OPENAI, "system": system},
        {**DIALECTS["Gemini"], "systemInstruction": system},
    ):
        assert chat_of(record)[0] == [("system", "Be kind"), *CHAT]


def test_alpacas_history_context_and_input_are_used():
    record = {"instruction": "c", "context": "d", "input": "e", "output": "f", "history": [["a", "b"]]}
    assert chat_of(record)[0] == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c\n\nd\n\ne"),
        ("assistant", "f"),
    ]


HOSTILE = [
    {"role": "user", "content": [{"type": "text", "text": 5}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
    {"role": "user", "content": [["a"]]},
    {"role": "user", "content": [{"type": "text", "text": "\ud800"}]},
    {"role": "assistant", "tool_calls": 5},
    {"role": "assistant", "tool_calls": "calls"},
    {"role": "assistant", "tool_calls": {"a": 1}},
    {"role": "assistant", "tool_calls": [5]},
    {"role": "assistant", "tool_calls": [{"function": 5}]},
    {"role": "assistant", "tool_calls": [{"function": {"name": 5}}]},
    {"role": "assistant", "tool_calls": [{"function": {"name": "\udc00"}}]},
    {"role": "assistant", "content": "x", "weight": 10**400},
    {"role": "assistant", "content": "x", "weight": "much"},
    {"role": "assistant", "content": [{"text": "x", "train": True}, {"text": "y"}]},
    {"role": "function_call", "content": "no JSON"},
    {"role": "\ud800", "content": "x"},
    {"role": ["user"], "content": "x"},
    {"role": "user", "content": "x", "\ud800": 1},
    {"role": "user", "content": {"deep": "object"}},
]


@pytest.mark.parametrize("turn", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_chat_is_one_error_with_its_line(turn):
    with pytest.raises(DataError, match="^rows:2: ") as caught:
        load_rows([{"messages": OPENAI}, {"messages": [*OPENAI, turn]}])
    assert len(str(caught.value)) < 800


def test_a_chat_may_be_a_bare_list_of_its_turns(tmp_path):
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps(OPENAI) + "\n" + json.dumps(OPENAI[:1] + OPENAI[1:]) + "\n")
    rows = load_rows(path).rows
    assert [message["content"] for row in rows for message in row.messages] == ["Hi", "Hello"] * 2


@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value"), ("from", "content")])
def test_plain_turns_become_what_others_with_the_same_keys_do(role, content):
    for name in [*ROLES, "User", " gpt ", *CALL_ROLES]:
        text = '{"name": "f"}' if name in CALL_ROLES else ""
        turn = {role: name, content: text}
        assert messages_of([turn], "messages") == messages_of([{**turn, "name": None}], "messages")


@pytest.mark.parametrize("role", ["role", "from"])
def test_two_contents_of_one_turn_are_refused_where_they_differ(role):
    with pytest.raises(BadRow, match="`content`.*`value`|`value`.*`content`"):
        messages_of([{role: "user", "content": "a", "value": "b"}], "messages")
    (turn,) = messages_of([{role: "user", "content": "a", "value": "a"}], "messages")
    assert turn["content"] == "a"
