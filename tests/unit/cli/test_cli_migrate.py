"""`phlora migrate` on the command line: what is shown, what is written, and the exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phlora import extras
from phlora.testing import invoke

OLD = "from trl import SFTTrainer\nt = SFTTrainer(m, x, packing=True)\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "old.py"
    file.write_text(OLD, encoding="utf-8")
    return file


def test_a_preview_writes_nothing(script: Path) -> None:
    done = invoke("migrate", script)
    assert done.code == 0 and script.read_text() == OLD
    assert "-from trl import SFTTrainer\n+from phlora import SFTTrainer\n" in done.out
    assert "1 left to you" in done.out and "--write does it" in done.out


def test_colours_on_a_terminal(script: Path) -> None:
    """In a process of its own: what decides is its environment alone."""

    def shown(**variables: str) -> str:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
        command = [sys.executable, "-m", "phlora", "migrate", str(script)]
        return subprocess.run(
            command, env=kept | variables, capture_output=True, encoding="utf-8", check=True
        ).stdout

    forced = shown(TERM="xterm", FORCE_COLOR="1")
    assert "\x1b[31m-from trl" in forced and "\x1b[32m+from phlora" in forced
    assert "\x1b[3" not in shown(TERM="xterm", FORCE_COLOR="1", NO_COLOR="1")
    assert "\x1b" not in shown(TERM="xterm") and "\x1b" not in shown(TERM="dumb", FORCE_COLOR="1")


def test_writing_once_is_enough(script: Path) -> None:
    first = invoke("migrate", script, "--write", "--json").json["files"][0]
    assert first["written"] and Path(first["original"]).read_text() == OLD
    assert [entry["where"] for entry in first["left"]] == ["line 2"]
    again = invoke("migrate", script, "--check")
    assert again.code == 0 and "Nothing to migrate" in again.out


def test_a_script_with_something_to_migrate_is_a_finding(script: Path) -> None:
    assert invoke("migrate", script, "--check").code == 1


def test_a_broken_script_is_one_message(script: Path) -> None:
    script.write_text("import trl\nx = = 1\n")
    done = invoke("migrate", script)
    assert done.code == 2 and "Line 2 is no Python 3: `x = = 1`" in done.err and not done.out
    whole = invoke("migrate", script.parent)
    assert whole.code == 2 and "old.py: not read" in whole.out


def test_without_libcst(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = extras.is_installed
    monkeypatch.setattr(extras, "is_installed", lambda name: name != "libcst" and installed(name))
    done = invoke("migrate", script)
    assert done.code == 3 and 'pip install "phlora[migrate]"' in done.err
