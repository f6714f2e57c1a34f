"""What a person sees: plain lines in a log, bars on a terminal, nothing but warnings when quiet."""

from __future__ import annotations

import io
import re
from pathlib import Path
from unittest.mock import Mock

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


def test_a_file_gets_all_that_was_said_with_its_time(tmp_path: Path) -> None:
    for quiet in (False, True):
        file = tmp_path / f"{quiet}.log"
        shown, _ = lines(quiet=quiet)
        shown.stage("before")
        with shown.logged(file):
            shown.note("within")
            shown.show("a\n  table")
            shown.log("beside a bar")
            shown.relay("from a library", level="ERROR", source="torch", is_shown=False)
        shown.warn("after")
        text = re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", file.read_text("utf-8"), flags=re.MULTILINE)
        assert text == (
            "INFO phlora: before\nINFO phlora: within\nINFO phlora: \na\n  table\n"
            "INFO phlora: beside a bar\nERROR torch: from a library\n"
        )


def test_a_file_is_added_to_and_says_what_ended_it(tmp_path: Path) -> None:
    shown, _ = lines()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), shown.logged(tmp_path / "log"):
            raise KeyboardInterrupt("Stopped")
    assert (tmp_path / "log").read_text("utf-8").count("ERROR phlora: KeyboardInterrupt: Stopped") == 2


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    shown, stream = lines()
    with shown.logged(tmp_path / "log"):
        full = Mock(writelines=Mock(side_effect=OSError(28, "No space left on device")))
        shown._log = full
        shown.note("one")
        shown.note("two")
    assert stream.getvalue().count("The log is not written any more: No space left on device") == 1
    assert "two" in stream.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_under_the_log_ends_nothing_where_the_file_is_closed_either() -> None:
    shown, stream = lines()
    with shown.logged(Path("/dev/full")):
        shown.note("one")
        shown.note("two")
    assert stream.getvalue().count("The log is not written any more: No space left on device") == 1
    assert "two" in stream.getvalue()


def test_two_bars_at_once_and_a_note_between_them_on_a_terminal() -> None:
    stream = io.StringIO()
    shown = Display(stream, fancy=True)
    with shown.progress("first", 2) as one, shown.progress("second", 2) as two:
        one(2)
        shown.note("a note")
        two(1)
    with shown.counting("third") as count:
        count(7)
    text = stream.getvalue()
    assert all(word in text for word in ("first", "second", "a note", "1/2 rows", "third", "7 rows"))
