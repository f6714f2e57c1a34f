"""JSON that stands in a text of a row is read as strictly as the row itself."""

from __future__ import annotations

import json

import pytest

from phlora.data.checks import check
from phlora.data.dataset import load_rows
from phlora.errors import DataError

ASK = {"role": "user", "content": "Hi"}
BROKEN = ['{"a": 1e400}', '{"a": NaN}', '{"a": -Infinity}', '{"a": 1, "a": 2}', '{"a": "\\ud800"}', '{"a": 1']


def _places(text):
    call = {"type": "function", "function": {"name": "f", "arguments": text}}
    inner = json.dumps({"name": "f", "arguments": text})
    yield {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    yield {"conversations": [ASK, {"from": "function_call", "value": inner}]}
    yield {
        "conversations": [ASK, {"from": "function_call", "value": f'{{"name": "f", "arguments": {text}}}'}]
    }
    yield {
        "messages": [ASK, {"role": "assistant", "content": "x"}],
        "tools": f'[{{"name": "f", "parameters": {text}}}]',
    }
    yield {"query": "Hi", "tools": "[]", "answers": f'[{{"name": "f", "arguments": {text}}}]'}
    yield {
        "messages": f'[{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "x", "meta": {text}}}]'
    }


@pytest.mark.parametrize("text", BROKEN)
def test_what_a_row_may_not_hold_its_texts_may_not(text):
    for record in _places(text):
        with pytest.raises(DataError):
            load_rows([record])
        assert check([record]).exit_code() == 2


def test_sound_json_in_texts_is_read():
    for record in _places('{"a": 1.5, "b": "\\ud83d\\ude00"}'):
        assert load_rows([record]).rows


def test_a_python_literal_is_read_as_strictly():
    turns = "[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'x', 'score': 1e999}]"
    with pytest.raises(DataError):
        load_rows([{"messages": turns}])
    assert load_rows([{"messages": turns.replace("1e999", "1")}]).rows
