"""The help: at once, with examples, and as its page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import CommandLine

COMMANDS = ["train", "evaluate", "chat", "merge", "convert", "import-config"]
COMMANDS += ["data check", "data preview", "data convert"]


@pytest.mark.parametrize("command", ["", *COMMANDS, "data"], ids=lambda command: command or "-")
def test_every_command_has_a_useful_help(phlora: CommandLine, command: str) -> None:
    done = phlora(*command.split(), "--help")
    assert done.code == 0 and done.err == ""
    if command != "data":
        assert "Examples:\n    phlora" in done.out
        assert all(len(line) <= 110 for line in done.out.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_on_the_command_line_knows_every_option(phlora: CommandLine, command: str) -> None:
    page = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
    section = page.partition(f"## phlora {command}\n")[2].partition("\n## ")[0]
    table = section.partition("| option | |")[2].partition("\n\n")[0]
    in_help = re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", phlora(*command.split(), "--help").out, re.MULTILINE)
    documented = {option for line in table.splitlines() for option in re.findall(r"`(--[a-z-]+)`", line[:50])}
    assert documented == set(in_help) - {"--help"}


def test_the_version(phlora: CommandLine) -> None:
    from phlora import __version__

    assert phlora("--version").out == f"phlora {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_comes_at_once(arguments: list[str]) -> None:
    def seconds() -> float:
        start = time.process_time(), os.times()
        subprocess.run([sys.executable, "-m", "phlora", *arguments], capture_output=True, check=True)
        end = os.times()
        return end.children_user + end.children_system - start[1].children_user - start[1].children_system

    # Processor time: the wall clock of a machine that runs other tests too says nothing.
    assert min(seconds() for _ in range(3)) < 0.3
