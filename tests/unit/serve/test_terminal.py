"""The chat's commands, with a terminal and without one."""

from __future__ import annotations

import builtins
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chats import FakeModel, piped

from phlora.data.prompts import encode_chat
from phlora.display import Display
from phlora.errors import InputError
from phlora.serve import chat as module
from phlora.serve.chat import ChatSession
from phlora.serve.terminal import converse

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_each_line_is_a_turn_and_the_output_holds_replies_alone(fake: ChatSession) -> None:
    out, err = piped(fake, "سلام\n\nnamaste नमस्ते\r\n")
    assert out == "tuned says سلام 1\ntuned says سلام 2\n"
    assert err == ""
    assert "नमस्ते" in fake.model.asked[1]


def test_a_comparison_names_the_speakers(fake: ChatSession) -> None:
    out, _ = piped(fake, "/compare\nhi\n/base\nhi\n")
    assert out == "[base] base says سلام 1\n[tuned] tuned says سلام 2\nbase says سلام 3\n"


def test_the_result_of_a_call_is_given_back(fake: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    replies = iter([f"{CALL}\n{CALL}", "It is cold in both."])

    def stream(model: FakeModel, ids: list[int], tokenizer: Any, **options: Any) -> Iterator[str]:
        asked.append(ids)
        yield next(replies)

    monkeypatch.setattr(module, "stream", stream)
    fake.tools = TOOLS
    fake.model.config.max_position_embeddings = 2048
    out, err = piped(fake, "Weather?\n/result -3 °C\n/result -7 °C\n")
    assert out.endswith("It is cold in both.\n") and "1 of 2 results" in err and "/result TEXT answers" in err
    called = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    chat = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [called, called]},
        {"role": "tool", "content": "-3 °C"},
        {"role": "tool", "content": "-7 °C"},
    ]
    assert asked[1] == encode_chat(chat, fake.tokenizer.tokenizer, tools=TOOLS)
    assert fake.messages("tuned")[:-1] == chat


@pytest.mark.parametrize("line", ["/result 5", "/result"])
def test_a_result_that_no_call_waits_for_is_refused(fake: ChatSession, line: str) -> None:
    with pytest.raises(InputError, match="calls no tool"):
        piped(fake, f"hello\n{line}\n")


def test_a_command_that_is_near_none_lists_all(fake: ChatSession) -> None:
    with pytest.raises(InputError) as refusal:
        piped(fake, "/nope\n")
    assert "did you mean" not in str(refusal.value) and "/result" in str(refusal.value)


@pytest.mark.parametrize("word", ["/exit", "/quit"])
def test_exit_ends_the_chat(fake: ChatSession, word: str) -> None:
    assert piped(fake, f"one\n{word}\ntwo\n")[0] == "tuned says سلام 1\n"


def test_commands_change_the_chat(fake: ChatSession) -> None:
    _, err = piped(
        fake, '/undo\none\n/system sé breve \n/undo\ntwo\n/reset\n/system ""\n/help\n/both\n/tuned\n'
    )
    assert fake.exchanges == [] and fake.system is None and fake.speakers == ("tuned",)
    assert "sé breve" in fake.model.asked[1] and "one" not in fake.model.asked[1]
    assert "nothing to forget" in err and "/compare" in err


def test_the_system_prompt_is_shown_changed_removed_and_restored(fake: ChatSession) -> None:
    fake.system = fake.trained_system = "پاسخ کوتاه\x1b[2J"
    _, err = piped(fake, "/system\n")
    assert "پاسخ کوتاه\\x1b[2J" in err and fake.system == fake.trained_system
    piped(fake, "/system Be brief.\n")
    assert fake.system == "Be brief."
    piped(fake, '/system ""\n')
    assert fake.system is None
    assert "(none)" in piped(fake, "/system\n")[1]
    piped(fake, "/system reset\n")
    assert fake.system == fake.trained_system


def test_who_was_not_asked_is_said(fake: ChatSession) -> None:
    _, err = piped(fake, "one\n/base\ntwo\n/compare\n")
    assert "The base model has not seen 1 question of this chat" in err
    assert "The tuned model has not seen 1 question of this chat" in err


def test_an_unknown_command_names_the_nearest(fake: ChatSession) -> None:
    with pytest.raises(InputError, match="did you mean `/compare`"):
        piped(fake, "/comprae\n")


def test_two_slashes_say_one(fake: ChatSession) -> None:
    piped(fake, "//etc/hosts?\n")
    assert fake.exchanges[0].question == "/etc/hosts?"


def test_other_encodings_are_refused(fake: ChatSession) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("café\n".encode("latin-1")), encoding="utf-8")
    with pytest.raises(InputError, match="not UTF-8"):
        converse(fake, display=Display(io.StringIO()), stdin=stdin, stdout=io.StringIO())


def test_the_chat_ends_with_its_input_even_without_a_last_line_break(fake: ChatSession) -> None:
    assert piped(fake, "hi")[0] == "tuned says سلام 1\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Runs a chat on a terminal where the given lines are typed; an exception stands for its key."""

    def run(session: ChatSession, *lines: str | type[BaseException]) -> tuple[str, str]:
        keys = iter([*lines, EOFError])

        def typed_line(prompt: str) -> str:
            line = next(keys)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", typed_line)
        out, err = Terminal(), io.StringIO()
        converse(session, display=Display(err), stdin=Terminal(), stdout=out)
        return out.getvalue(), err.getvalue()

    return run


def test_ctrl_d_leaves(fake: ChatSession, typed: Callable[..., tuple[str, str]]) -> None:
    out, err = typed(fake, "hi")
    assert "tuned says سلام 1\n" in out and "/help" in err


def test_ctrl_c_at_the_prompt_does_not_leave(
    fake: ChatSession, typed: Callable[..., tuple[str, str]]
) -> None:
    out, err = typed(fake, KeyboardInterrupt, "hi")
    assert "tuned says" in out and "Ctrl-D or /exit leaves" in err


def test_ctrl_c_stops_a_reply_and_not_the_chat(
    fake: ChatSession, typed: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(model: FakeModel, *_: Any, **__: Any) -> Iterator[str]:
        model.asked.append("")
        yield "so far"
        if len(model.asked) == 1:
            raise KeyboardInterrupt
        yield " and on"

    monkeypatch.setattr(module, "stream", stream)
    out, err = typed(fake, "one", "two")
    assert "so far and on" in out and "/undo removes it" in err
    assert [turn["content"] for turn in fake.messages("tuned")] == ["one", "so far", "two", "so far and on"]


def test_a_mistake_is_explained_and_the_chat_goes_on(
    fake: ChatSession, typed: Callable[..., tuple[str, str]]
) -> None:
    out, err = typed(fake, "/baze", "x" * 600, "hi")
    assert "did you mean `/base`" in err and "the model holds 512" in err
    assert "tuned says سلام 1" in out


def test_a_reply_cannot_command_the_terminal(
    fake: ChatSession, typed: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "stream", lambda *_, **__: iter(["\x1b]0;title\x07"]))
    assert "\x1b" not in typed(fake, "hi")[0]
    assert piped(fake, "hi")[0] == "\x1b]0;title\x07\n"
