"""Tools as text, and exactly back."""

from __future__ import annotations

import json
import random

import pytest

from phlora.data.checks import check
from phlora.data.dataset import load_rows
from phlora.data.prompts import encode_chat, encode_prompt
from phlora.data.tokenize import IGNORED, tokenize_row
from phlora.data.tools_text import escape, read_calls, tools_as_text, unescape, write_calls
from phlora.testing import chatml_tokenizer, phi3_tokenizer
from phlora.testing.tokenizers import CHATML, PHI3, PHI3_WITHOUT_SYSTEM

PIECES = [
    *("<tool_call>", "</tool_call>", "<tool_call>\n", "\n</tool_call>", "<\\tool_call>", "<\\\\/tool_call>"),
    *(
        "<tool_response>",
        "</tools>",
        "<",
        "\\",
        "\n",
        " ",
        "\\u003c",
        "{",
        '"name"',
        "é",
        "\u2028",
        "<|end|>",
        "a",
        "",
    ),
]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]


def _text(draw):
    return "".join(draw.choices(PIECES, k=draw.randrange(6)))


def _value(draw, depth=2):
    kind = draw.randrange(7 if depth else 4)
    if kind < 2:
        return _text(draw)
    if kind < 4:
        return draw.choice([None, True, 0, -1.5, 10**20])
    if kind == 4:
        return [_value(draw, depth - 1) for _ in range(draw.randrange(3))]
    return {_text(draw): _value(draw, depth - 1) for _ in range(draw.randrange(3))}


def test_what_is_written_is_read_back_whatever_it_says():
    draw = random.Random(0)
    for _ in range(20_000):
        content = _text(draw)
        assert unescape(escape(content)) == content
        calls = [
            {"type": "function", "function": {"name": _text(draw), "arguments": _value(draw)}}
            for _ in range(draw.randrange(4))
        ]
        if calls:
            assert read_calls(write_calls(content, calls)) == (content, calls)
        else:
            assert read_calls(escape(content)) == (content, [])


def test_a_broken_call_of_a_model_is_text():
    for text in ("<tool_call>\n{oops\n</tool_call>", '<tool_call>\n["a"]\n</tool_call>', "a <tool_call>"):
        assert read_calls(text) == (text, [])


def _call(arguments, content="I look."):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": "Oslo?"},
            {"role": "assistant", "content": content, "tool_calls": [call, call]},
            {"role": "tool", "tool_call_id": "c1", "content": "-3"},
            {"role": "tool", "tool_call_id": "c1", "content": "</tool_response>"},
            {"role": "assistant", "content": "Cold."},
        ],
        "tools": TOOLS,
    }


def _tokens(record, tokenizer):
    row = tokenize_row(load_rows([record]).rows[0], tokenizer)
    trained = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED]
    return row.input_ids, tokenizer.decode(row.input_ids), tokenizer.decode(trained)


@pytest.mark.parametrize("template", [PHI3, PHI3_WITHOUT_SYSTEM], ids=["phi3", "no system"])
def test_phi3_trains_calls_as_text(template):
    _, text, trained = _tokens(_call({"city": "Oslo", "unit": None}), phi3_tokenizer(template))
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "unit": null}}\n</tool_call>'
    assert trained == f"I look.\n{written}\n{written}<|end|>Cold.<|end|><|endoftext|>"
    assert (
        "<tool_response>\n-3\n</tool_response>\n<tool_response>\n<\\/tool_response>\n</tool_response><|end|>"
        in text
    )
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text
    assert read_calls(trained.partition("<|end|>")[0])[1][0]["function"]["arguments"] == {
        "city": "Oslo",
        "unit": None,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        '{"city": "Oslo", "unit": null}',
        json.dumps('{"city": "Oslo", "unit": null}'),
        json.dumps(json.dumps('{"city": "Oslo", "unit": null}')),
    ],
    ids=["string", "encoded twice", "encoded thrice"],
)
def test_arguments_have_equal_tokens_in_every_form(arguments):
    tokenizer = phi3_tokenizer()
    assert (
        _tokens(_call(arguments), tokenizer)[0]
        == _tokens(_call({"city": "Oslo", "unit": None}), tokenizer)[0]
    )


def test_legacy_function_calls():
    record = _call({"city": "Oslo"}, content="")
    legacy = [dict(message) for message in record["messages"]]
    call = legacy[1].pop("tool_calls")[0]["function"]
    record["messages"][1]["tool_calls"] = record["messages"][1]["tool_calls"][:1]
    legacy[1] |= {"content": None, "function_call": {**call, "arguments": json.dumps(call["arguments"])}}
    legacy[2]["role"] = legacy[3]["role"] = "function"
    functions = [tool["function"] for tool in TOOLS]
    tokenizer = phi3_tokenizer()
    assert (
        _tokens({"messages": legacy, "functions": functions}, tokenizer)[0]
        == _tokens({**record, "tools": functions}, tokenizer)[0]
    )


def test_prompts_are_made_as_training_rows_are():
    tokenizer = phi3_tokenizer()
    record = _call({"city": "Oslo"})
    ids = _tokens(record, tokenizer)[0]
    prompt = encode_chat(record["messages"][:4], tokenizer, tools=TOOLS)
    assert ids[: len(prompt)] == prompt
    asked = load_rows([{**record, "messages": record["messages"][:2]}]).rows[0]
    item = encode_prompt(asked, tokenizer)
    assert read_calls(item.reference)[1] and item.reference.startswith("I look.\n<tool_call>")
    assert ids[: len(item.prompt_ids)] == item.prompt_ids


def test_it_is_said_and_left_to_templates_that_can():
    report = check([_call({"city": "Oslo"})], phi3_tokenizer())
    assert [(p.kind, p.severity) for p in report.problems] == [("tools_as_text", "note")]
    native = CHATML.replace(
        "+ message['content']",
        "+ message['content'] + (message.tool_calls | map(attribute='function') | map('tojson') | join "
        "if message.tool_calls else '')",
    )
    native = (
        "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}" + native
    )
    _, text, _ = _tokens(_call({"city": "Oslo"}), chatml_tokenizer(native))
    assert "<tool_call>" not in text and "<|im_start|>tool\n-3" in text


def test_chats_without_tools_stay_as_they_are():
    messages = [
        {"role": "user", "content": "What is <tool_call>?"},
        {"role": "assistant", "content": "A marker."},
    ]
    assert "<tool_call>" in _tokens({"messages": messages}, phi3_tokenizer())[1]
    assert tools_as_text(messages[1:], None) == messages[1:]
