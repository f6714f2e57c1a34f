"""What of messages decides how a template renders them."""

from __future__ import annotations

import pytest

from phlora.data.rendering import TemplateRefusal
from phlora.data.template_messages import (
    LOSS_KEYS,
    fold_system,
    is_marked,
    shape_of,
    trimmed,
    without_loss_keys,
)

SYSTEM, USER, ANSWER = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))


def test_a_system_prompt_goes_to_the_first_user_turn_alone():
    greeting = {"role": "assistant", "content": "hello"}
    folded = fold_system([SYSTEM, greeting, {**USER, "name": "Ana"}, ANSWER, USER])
    assert folded == [greeting, {"role": "user", "content": "s\n\nu", "name": "Ana"}, ANSWER, USER]
    assert fold_system([{**SYSTEM, "content": ""}, USER]) == [USER]
    assert USER["content"] == "u"
    with pytest.raises(TemplateRefusal, match="no user turn"):
        fold_system([SYSTEM, ANSWER])


def test_chats_of_one_shape_differ_in_what_is_said_and_learned_only():
    chat = [USER, ANSWER]
    assert shape_of(chat, False) == shape_of([USER, {**ANSWER, "content": "else", "train": False}], False)
    assert shape_of(chat, False) != shape_of(chat, True)
    assert shape_of(chat, False) != shape_of([USER, {**ANSWER, "content": ""}], False)
    assert shape_of([USER, {**ANSWER, "tool_calls": []}], False) is None


def test_a_template_is_not_told_what_is_learned():
    for key in LOSS_KEYS:
        assert without_loss_keys([{**ANSWER, key: 0, "name": "x"}]) == [{**ANSWER, "name": "x"}]


def test_empty_contents_that_choose_a_branch_are_not_marked():
    assert is_marked(USER)
    assert is_marked({**USER, "content": ""})
    assert not is_marked({**SYSTEM, "content": ""})
    assert not is_marked({**ANSWER, "content": "", "tool_calls": [{}]})


def test_a_content_is_looked_for_as_it_is_and_as_it_may_have_been_trimmed():
    assert trimmed("a b") == ("a b",)
    found = trimmed("\n a \n")
    assert found[0] == "\n a \n"
    assert {"a", "\n a", "a \n", " a ", "\n a ", " a \n"} == set(found[1:])
