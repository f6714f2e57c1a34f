"""What a chat has of tools, and the chats by which templates are asked for their places."""

from __future__ import annotations

import json

import pytest

from phlora.data.tool_probes import speaks_of_tools, tool_probes

USER = {"role": "user", "content": "x"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{}]}
RESULT = {"role": "tool", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "tools", "expected"),
    [
        ([USER], None, set()),
        ([USER], [], set()),
        ([USER], [{}], {"tools"}),
        ([USER, CALL], None, {"calls"}),
        ([USER, CALL, RESULT], [{}], {"tools", "calls", "results"}),
        ([USER, RESULT], None, {"results"}),
    ],
)
def test_what_a_chat_has_of_tools(messages, tools, expected):
    assert speaks_of_tools(messages, tools) == expected


def test_each_probe_has_what_it_asks_for_and_the_texts_that_tell():
    probes = tool_probes()
    assert probes.keys() == {"tools", "calls", "results"}
    for name, (messages, tools, texts) in probes.items():
        assert name in speaks_of_tools(messages, tools)
        said = json.dumps([messages, tools])
        assert texts
        assert all(text in said for text in texts)
    # A template that echoes the question alone passes for none.
    assert not any(text in probes["tools"][0][0]["content"] for text in probes["tools"][2])
