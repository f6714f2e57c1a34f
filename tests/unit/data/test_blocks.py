"""Content that comes as blocks: text, calls, results and reasoning, whole or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from phlora.data.blocks import text_of_parts
from phlora.data.rows import BadRow


def read(*parts: Any) -> tuple[str | None, dict[str, Any], list[Any]]:
    message: dict[str, Any] = {}
    text, results = text_of_parts(list(parts), "content", message, 3)
    return text, message, results


@pytest.mark.parametrize(
    "part",
    [
        "سلام",
        {"text": "سلام"},
        {"type": "text", "text": "سلام"},
        {"type": "input_text", "text": "سلام"},
        {"type": "output_text", "content": "سلام"},
        {"type": "text", "text": {"value": "سلام", "annotations": []}},
    ],
)
def test_every_spelling_of_text_is_joined_in_order(part: Any) -> None:
    assert read("a ", part, {"text": " b"}) == ("a سلام b", {}, [])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "tool_use", "id": "7", "name": "f", "input": {"a": 1}},
        {"toolUse": {"toolUseId": "7", "name": "f", "input": {"a": 1}}},
        {"functionCall": {"id": "7", "name": "f", "args": {"a": 1}}},
        {"type": "function_call", "id": "7", "name": "f", "arguments": {"a": 1}},
    ],
)
def test_a_call_of_every_provider_is_the_same_call(part: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "id": "7"}
    assert read("x", part) == ("x", {"tool_calls": [call]}, [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sun", "sun"),
        ({"sky": "ясно"}, '{"sky": "ясно"}'),
        ([{"text": "sun"}, " and ", {"type": "text", "text": "rain"}], "sun and rain"),
        ([{"json": {"sky": "ясно"}}], '{"sky": "ясно"}'),
        ([{"sky": 1}], '{"sky": 1}'),
        ([5], "5"),
        ([], ""),
    ],
)
def test_a_result_is_a_message_with_all_that_the_tool_said(content: Any, said: str) -> None:
    for part in (
        {"type": "tool_result", "tool_use_id": "7", "content": content},
        {"toolResult": {"toolUseId": "7", "content": content}},
    ):
        assert read(part) == ("", {}, [{"role": "tool", "content": said, "tool_call_id": "7"}])
    (result,) = read({"functionResponse": {"name": "f", "response": {"a": [1]}}})[2]
    assert (result["name"], json.loads(result["content"])) == ("f", {"a": [1]})


def test_reasoning_of_every_provider_stands_apart_from_the_text() -> None:
    parts = (
        {"type": "thinking", "thinking": "one "},
        {"reasoningContent": {"reasoningText": {"text": "two "}}},
        {"text": "three", "thought": True},
    )
    assert read(*parts, "answer") == ("answer", {"reasoning_content": "one two three"}, [])


def test_train_marks_a_message_where_its_parts_agree() -> None:
    assert read({"text": "a", "train": False}, {"text": "b", "train": False})[1] == {"train": False}
    for other in ({"text": "b", "train": True}, {"text": "b"}):
        with pytest.raises(BadRow, match="turn 3 marks only some of its parts"):
            read({"text": "a", "train": False}, other)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (5, "turn 3 has .* among the parts of `content`"),
        ({"type": "image_url", "image_url": {}}, "a part of the kind `image_url`"),
        ({"inlineData": {}}, "a part of the kind `inlineData`"),
        ({}, "a part of the kind ``"),
        ({"type": "text", "text": 5}, "the text of a part is"),
        ({"type": "text"}, "the text of a part is"),
        ({"toolUse": "f"}, "turn 3 has .* as a call"),
        ({"toolResult": "sun"}, "turn 3 has .* as a result"),
        ({"type": "tool_result", "content": [{"type": "image"}]}, "the result of a tool is image"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_never_dropped(part: Any, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        read("text", part)
    broken: dict[str, Any] = {"tool_calls": "f"}
    with pytest.raises(BadRow, match="as `tool_calls`"):
        text_of_parts([{"type": "tool_use", "name": "f"}], "content", broken, 3)
