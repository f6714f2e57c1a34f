"""Modelfiles: a template in Go that says what the chat template says, or none."""

from __future__ import annotations

import re
from typing import Any

import pytest

from phlora.export.ollama import modelfile
from phlora.models.tokenizer import prepare_tokenizer
from phlora.testing import chatml_tokenizer, llama2_tokenizer, tiny_phi3, tiny_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "سلام"},
]


def in_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few constructs that are written."""
    header = re.match(
        r'\{\{ if ne \(index \.Messages 0\)\.Role "system" \}\}(.*?)\{\{ end \}\}', template, re.S
    )
    rest = template[header.end() :] if header else template
    body, answer = re.fullmatch(
        r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", rest, re.S
    ).groups()  # type: ignore[union-attr]
    pieces = dict(re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else|\Z)', body, re.S))
    text = header[1] if header and messages[0]["role"] != "system" else ""
    return (
        text + "".join(pieces[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + answer
    )


@pytest.mark.parametrize("make", [tiny_tokenizer, chatml_tokenizer])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[1:2]])
def test_the_template_in_go_says_the_same(make: Any, messages: list[dict[str, str]]) -> None:
    tokenizer = make()
    text, notes = modelfile(
        "m.gguf", prepare_tokenizer(tokenizer, config=tiny_phi3()[0].config), system=None, context=64
    )
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.S)
    assert template and not notes
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert in_go(template[1], messages) == wanted


def test_the_rest_of_the_file() -> None:
    loaded = prepare_tokenizer(tiny_tokenizer(), config=tiny_phi3()[0].config)
    text, _ = modelfile("m.gguf", loaded, system='Say "yes".', context=64)
    lines = text.splitlines()
    assert lines[0] == "FROM ./m.gguf" and 'SYSTEM """Say "yes"."""' in lines
    assert 'PARAMETER stop "<|end|>"' in lines and 'PARAMETER stop "<|endoftext|>"' in lines
    assert "PARAMETER num_ctx 64" in lines


def test_a_template_without_a_system_role_has_no_equal() -> None:
    text, notes = modelfile(
        "m.gguf", prepare_tokenizer(llama2_tokenizer(), config=tiny_phi3()[0].config), system=None, context=64
    )
    assert "TEMPLATE" not in text and "no equal in Go" in notes[0]
