"""What a person is told of rows that were tokenised."""

from __future__ import annotations

import pytest
from tokenized_chats import (
    TOOLS,
    assistant,
    full_text,
    kinds,
    plain_row,
    system,
    tokenized,
    tokenizer_of,
    trained_text,
    user,
)

from phlora.data.prompts import encode_chat
from phlora.testing import LANGUAGES, chatml_tokenizer, phi3_tokenizer
from phlora.testing.tokenizers import (
    CHATML,
    PHI3,
    PHI3_WITHOUT_SYSTEM,
)


def test_swallowed_white_space_is_told():
    result = tokenized(tokenizer_of("phi3"), user("a"), assistant("\n\n    def f()"))
    assert kinds(result) == {"leading_whitespace"}
    assert [str(origin) for origin in result.notes[0].origins] == ["rows:1"]
    assert trained_text(tokenizer_of("phi3"), result.rows[0]) == "def f()<|end|><|endoftext|>"
    assert kinds(tokenized(tokenizer_of("phi3_plain"), user("a"), assistant("\n\n    def f()"))) == set()


@pytest.mark.parametrize("family", ["phi3", "llama2"])
def test_a_system_prompt_the_template_has_no_place_for_joins_the_first_user_turn(family):
    tokenizer = tokenizer_of(family)
    if family == "phi3":
        tokenizer.chat_template = PHI3_WITHOUT_SYSTEM
    chat = [system(LANGUAGES["hi"]), user("Hi"), assistant("Hello")]
    result = tokenized(tokenizer, *chat)
    assert f"{LANGUAGES['hi']}\n\nHi" in full_text(tokenizer, result.rows[0])
    assert kinds(result) == {"system_folded"}
    prompt = encode_chat(chat[:2], tokenizer)
    assert result.rows[0].input_ids[: len(prompt)] == prompt


def test_an_empty_system_prompt_is_no_loss():
    tokenizer = phi3_tokenizer(PHI3.replace("== 'system'", "== 'system' and message['content']"))
    result = tokenized(tokenizer, system(""), user("Hi"), assistant("Hello"))
    assert full_text(tokenizer, result.rows[0]) == "<|user|>Hi<|end|><|assistant|>Hello<|end|><|endoftext|>"
    assert kinds(result) == set()


def test_a_system_prompt_of_the_template_itself_is_told():
    head = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nI am Bot<|im_end|>\n' }}{% endif %}"
    result = tokenized(chatml_tokenizer(head + CHATML), user("Hi"), assistant("Hello"))
    assert kinds(result) == {"default_system"}
    assert "'I am Bot'" in result.notes[0].message
    assert (
        kinds(tokenized(chatml_tokenizer(head + CHATML), system("Be"), user("Hi"), assistant("Hello")))
        == set()
    )


@pytest.mark.parametrize("family", ["phi3", "chatml", "llama2"])
def test_tools_and_calls_that_the_template_has_no_place_for_are_text(family):
    call = {"type": "function", "function": {"name": "lamp", "arguments": {}}}
    tokenizer = tokenizer_of(family)
    result = tokenized(tokenizer, user("on"), assistant("", tool_calls=[call]), tools=TOOLS)
    assert "tools_as_text" in kinds(result)
    assert '<tool_call>\n{"name": "lamp", "arguments": {}}\n</tool_call>' in trained_text(
        tokenizer, result.rows[0]
    )


def test_a_template_without_end_token_is_told():
    template = CHATML.replace("<|im_end|>\n", "\n\n").replace("<|im_start|>", "## ")
    result = tokenized(chatml_tokenizer(template), user("a"), assistant("b"))
    assert kinds(result) == {"missing_end_token"}


def test_a_cut_row_is_noted_once():
    tokenizer = phi3_tokenizer(PHI3_WITHOUT_SYSTEM)
    chat = [system("s"), *[message for n in range(8) for message in (user(f"{n}"), assistant("b"))]]
    result = tokenized(tokenizer, *chat, max_length=20)
    assert [(note.kind, note.count) for note in result.notes] == [("system_folded", 1)]


def test_a_rendered_chat_as_text_is_told_and_not_ended_twice():
    tokenizer = tokenizer_of("phi3")
    text = tokenizer.apply_chat_template([user("a"), assistant("b")], tokenize=False)
    result = plain_row(tokenizer, text=text)
    assert kinds(result) == {"pre_rendered"}
    assert result.rows[0].input_ids.count(tokenizer.eos_token_id) == 1


def test_a_hand_made_prompt_with_control_tokens_is_told_and_kept():
    tokenizer = tokenizer_of("phi3")
    result = plain_row(tokenizer, prompt="<|user|>\na<|end|>\n<|assistant|>\n", completion="b<|end|>")
    assert kinds(result) == {"pre_rendered"}
    assert trained_text(tokenizer, result.rows[0]) == "b<|end|>"
    assert tokenizer.convert_tokens_to_ids("<|user|>") in result.rows[0].input_ids
