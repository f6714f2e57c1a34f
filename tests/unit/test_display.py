"""What a person sees: plain lines in a log, bars on a terminal, nothing but warnings when quiet."""

from __future__ import annotations

import io

import pytest

from phlora import display
from phlora.display import Display, printable


def lines(*, quiet: bool = False) -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    return Display(stream, quiet=quiet), stream


def test_a_log_gets_plain_lines() -> None:
    shown, stream = lines()
    shown.stage("Reading سلام.jsonl")
    shown.note("a [bracket] stays")
    shown.warn("look")
    shown.show("a\n  table")
    assert stream.getvalue() == "> Reading سلام.jsonl\n  a [bracket] stays\n! look\na\n  table\n"


def test_quiet_leaves_warnings_only() -> None:
    shown, stream = lines(quiet=True)
    shown.stage("x")
    shown.note("x")
    shown.show("x")
    with shown.progress("x", 3) as advance:
        advance(3)
    shown.warn("look")
    assert stream.getvalue() == "! look\n"


def test_progress_in_a_log_says_the_end_and_not_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, stream = lines()
    with shown.progress("Tokenising", 1000) as advance:
        for _ in range(1000):
            advance(1)
    assert stream.getvalue().count("\n") == 1
    assert "Tokenising: 1000/1000 rows" in stream.getvalue()


def test_slow_progress_gets_a_line_at_each_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 10))
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    shown, stream = lines()
    with shown.progress("Answering", 20) as advance:
        for _ in range(20):
            advance(1)
    assert stream.getvalue().count("Answering") == 10


def test_a_terminal_gets_text_in_brackets_as_it_is() -> None:
    stream = io.StringIO()
    shown = Display(stream, fancy=True)
    shown.note("[bold] is a word here")
    with shown.progress("[red] rows", 2) as advance:
        advance(2)
    assert "[bold] is a word here" in stream.getvalue()
    assert "[red] rows" in stream.getvalue()


def test_control_characters_are_spelled_out_and_all_scripts_left_alone() -> None:
    text = "می‌خواهم हिन्दी čšž ığş Tiếng Việt\n\t"
    assert printable(text) == text
    assert printable("a\x1b[31m\x07\r\x9b") == "a\\x1b[31m\\x07\\x0d\\x9b"
