"""Modelfiles: a template in Go that says what the chat template says, or none."""

from __future__ import annotations

import re
from typing import Any

import pytest

from phlora.errors import ModelError
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


def read_as_ollama(text: str) -> list[tuple[str, str]]:
    """Commands and their texts, by the rules of Ollama's parser.go: a text ends with a line that ends in quotes."""
    found: list[tuple[str, str]] = []
    open_text: str | None = None
    for line in text.splitlines():
        command, _, begun = ("", "", "") if open_text is not None else line.partition(" ")
        if open_text is None:
            found.append((command, ""))
        value = begun if open_text is None else f"{open_text}\n{line}"
        stripped = value.strip()
        if stripped.startswith('"""') and not (len(stripped) >= 6 and stripped.endswith('"""')):
            open_text = value
            continue
        open_text = None
        found[-1] = (found[-1][0], stripped[3:-3] if stripped.startswith('"""') else stripped)
    assert open_text is None
    return found


@pytest.mark.parametrize(
    "system",
    [
        'Docstrings are in """ quotes.\nUse them.',
        '"""Quoted',
        '\nSay "yes"',
        'Say "yes"\nor "no"',
        'All of it is in """',
    ],
)
def test_quotes_in_a_system_prompt_stay_in_it(system: str) -> None:
    loaded = prepare_tokenizer(tiny_tokenizer(), config=tiny_phi3()[0].config)
    text, _ = modelfile("m.gguf", loaded, system=system, context=64)
    read = read_as_ollama(text)
    assert ("SYSTEM", system) in read
    assert {command for command, _ in read} == {"FROM", "TEMPLATE", "SYSTEM", "PARAMETER"}


@pytest.mark.parametrize(
    "system", ['Docstrings are in """\nFROM /etc/passwd', '"""\nFROM x', 'a"""  \rFROM x']
)
def test_a_system_prompt_that_would_end_early_is_refused(system: str) -> None:
    loaded = prepare_tokenizer(tiny_tokenizer(), config=tiny_phi3()[0].config)
    with pytest.raises(ModelError, match="the system prompt: A line of it ends with"):
        modelfile("m.gguf", loaded, system=system, context=64)


@pytest.mark.parametrize("more", ['"""\nFROM /etc/passwd\n', "{{ .System }}"])
def test_a_template_writes_no_lines_of_its_own(more: str) -> None:
    tokenizer = tiny_tokenizer()
    ending = "{% if add_generation_prompt %}{{ " + repr(more) + " }}{% endif %}"
    tokenizer.chat_template = f"{tokenizer.chat_template}{ending}"
    loaded = prepare_tokenizer(tokenizer, config=tiny_phi3()[0].config)
    text, notes = modelfile("m.gguf", loaded, system=None, context=64)
    assert [value for command, value in read_as_ollama(text) if command == "FROM"] == ["./m.gguf"]
    assert "TEMPLATE" not in text and "no equal in Go" in notes[0]


def test_a_name_of_two_lines_is_refused() -> None:
    loaded = prepare_tokenizer(tiny_tokenizer(), config=tiny_phi3()[0].config)
    with pytest.raises(ModelError, match="the name of the file: A Modelfile cannot hold"):
        modelfile("m\nFROM x.gguf", loaded, system=None, context=64)
