"""Killed at any file operation, a run folder is whole again at the next start, or says why not."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phlora.files import replaced_folder, write_text
from phlora.runs.folder import RunFolder, begin_run, claim_folder, claimed, continue_run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

IDENTITY = {"data": "a"}
FILES: dict[str, Callable[[Path], None]] = {
    "config.yaml": lambda path: write_text(path, "model: tiny\n"),
    "heldout.jsonl": lambda path: write_text(path, "{}\n"),
}
_TOUCHING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def killed_at(operation: int, under: Path, work: Callable[[], object]) -> bool:
    """Do `work` in a process that dies just before its n-th change to the disk; False when it ended before that."""
    child = os.fork()
    if child == 0:
        left = operation

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
            if (event in _TOUCHING or is_write) and arguments and str(under) in str(arguments[0]):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(watch)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def open_run(path: Path, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """What a training does until its first step."""
    folder = claim_folder(path, resume=resume, overwrite=overwrite)
    with claimed(folder, resume=resume, overwrite=overwrite):
        if resume and folder.has_facts:
            continue_run(folder, {"identity": IDENTITY}, FILES)
        else:
            begin_run(folder, {"identity": IDENTITY, "run": "new"}, FILES)
    return folder


def old_run(path: Path) -> None:
    """A finished run, with a file of its user in it."""
    folder = claim_folder(path, resume=False, overwrite=False)
    begin_run(folder, {"identity": IDENTITY, "run": "old"}, FILES)
    for name in ("checkpoints/checkpoint-2", "adapter/best", "evaluations/one"):
        (path / name).mkdir(parents=True)
        (path / name / "file").write_text("old")
    (path / "report.json").write_text("{}")
    (path / "notes.txt").write_text("mine")


def require_whole(path: Path) -> None:
    assert RunFolder(path).facts()["status"] == "running"
    assert all((path / name).is_file() for name in FILES)
    assert not [p for p in path.rglob("*") if p.suffix in (".part", ".old") or p.name == ".lock"]


def count_kills(attempt: Callable[[int], bool]) -> int:
    number = 0
    while attempt(number):
        number += 1
    return number


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}, {}])
def test_a_run_killed_while_it_is_opened_is_opened_whole(tmp_path: Path, flags: dict[str, bool]) -> None:
    def attempt(number: int) -> bool:
        path = tmp_path / f"run{number}"
        killed = killed_at(number, path, lambda: open_run(path))
        begun = path.is_dir() and RunFolder(path).has_facts
        is_there = path.is_dir() and (path / "run.json").is_file()
        if killed and (is_there if "resume" in flags else not begun or "overwrite" in flags):
            open_run(path, **flags)
            require_whole(path)
        return killed

    assert count_kills(attempt) > 8


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}])
def test_an_overwrite_that_was_killed_leaves_the_old_run_or_one_to_open_anew(
    tmp_path: Path, flags: dict[str, bool]
) -> None:
    def attempt(number: int) -> bool:
        path = tmp_path / f"run{number}"
        old_run(path)
        killed = killed_at(number, path, lambda: open_run(path, overwrite=True))
        folder = RunFolder(path)
        old_is_whole = folder.has_facts and folder.facts()["run"] == "old"
        if old_is_whole:
            assert (path / "checkpoints/checkpoint-2/file").is_file() and (
                path / "adapter/best/file"
            ).is_file()
        open_run(path, **flags)
        require_whole(path)
        if not (old_is_whole and "resume" in flags):
            assert folder.facts()["run"] == "new"
            assert not (path / "checkpoints").exists() and not (path / "evaluations").exists()
        assert (path / "notes.txt").read_text() == "mine"
        return killed

    assert count_kills(attempt) > 20


def test_an_adapter_that_was_being_replaced_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    def attempt(number: int) -> bool:
        path = tmp_path / f"run{number}"
        old_run(path)

        def save() -> None:
            with replaced_folder(path / "adapter" / "best") as part:
                (part / "file").write_text("new")

        killed = killed_at(number, path, save)
        open_run(path, resume=True)
        require_whole(path)
        assert (path / "adapter" / "best" / "file").read_text() in ("old", "new")
        assert [p.name for p in (path / "adapter").iterdir()] == ["best"]
        return killed

    assert count_kills(attempt) > 4
