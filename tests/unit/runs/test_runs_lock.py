"""Two processes never train into one folder, and no lock outlives its process."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phlora.errors import NoRoomError, RunError
from phlora.files import write_text
from phlora.runs import folder as runs_folder
from phlora.runs import lock
from phlora.runs.folder import RunFolder, begin_run, claim_folder, claimed
from phlora.runs.lock import LOCK_FILE, hold_lock, require_unlocked

HOLD = """
import sys, time
from pathlib import Path
from phlora.runs.lock import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_is_refused_until_the_first_is_gone(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(RunError, match=f"process {holder.pid}"), hold_lock(tmp_path):
        pass
    with pytest.raises(RunError, match="Another process trains"):
        require_unlocked(tmp_path)
    for flags in ((False, True), (True, False), (False, False)):
        with pytest.raises(RunError, match="Another process trains"):
            claim_folder(tmp_path, resume=flags[0], overwrite=flags[1])
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_FILE).is_file()
    require_unlocked(tmp_path)
    claim_folder(tmp_path, resume=False, overwrite=False)
    with hold_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_one_process_holds_it_once(tmp_path: Path) -> None:
    with hold_lock(tmp_path):
        with pytest.raises(RunError, match="Another process"), hold_lock(tmp_path):
            pass
        with pytest.raises(RunError, match="Another process"):
            require_unlocked(tmp_path)
    with hold_lock(tmp_path):
        pass


def test_a_link_to_the_folder_is_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with hold_lock(tmp_path / "run"), pytest.raises(RunError), hold_lock(tmp_path / "link"):
        pass


def test_a_copied_run_is_free(tmp_path: Path) -> None:
    with hold_lock(tmp_path):
        copy = Path(shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy"))
        require_unlocked(copy)
        with hold_lock(copy):
            pass


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks."""
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.parametrize(
    ("holder_facts", "is_free"),
    [
        ({"pid": os.getppid(), "host": socket.gethostname()}, False),
        ({"pid": 2**22 + 1, "host": socket.gethostname()}, True),
        ({"pid": 1, "host": "elsewhere"}, False),
        ({"pid": -1, "host": socket.gethostname()}, True),
        ({"pid": "x"}, True),
        ({}, True),
    ],
)
def test_without_locks_the_file_says_who_holds_it(
    tmp_path: Path, no_locks: None, holder_facts: dict[str, object], is_free: bool
) -> None:
    (tmp_path / LOCK_FILE).write_text(json.dumps(holder_facts))
    if is_free:
        with hold_lock(tmp_path):
            assert lock._holder(tmp_path / LOCK_FILE)["pid"] == os.getpid()
    else:
        with pytest.raises(RunError, match="Another process"), hold_lock(tmp_path):
            pass


def test_a_file_that_says_nothing_is_no_lock(tmp_path: Path, no_locks: None) -> None:
    (tmp_path / LOCK_FILE).write_bytes(b"\xff\x00")
    with hold_lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_a_folder_that_cannot_be_written_is_one_message(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(runs_folder, "write_json", refuse)
    with pytest.raises(NoRoomError if number == errno.ENOSPC else RunError) as caught:
        begin_run(folder, {}, {"config.yaml": lambda path: write_text(path, "")})
    assert str(tmp_path) in str(caught.value)


def test_somebody_came_first(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path / "run", resume=False, overwrite=False)
    begin_run(RunFolder(tmp_path / "run"), {}, {})
    with (
        pytest.raises(RunError, match="already holds a run"),
        claimed(folder, resume=False, overwrite=False),
    ):
        pass


def test_a_run_file_that_cannot_be_read_may_be_overwritten_where_all_is_the_run_s(tmp_path: Path) -> None:
    begin_run(RunFolder(tmp_path), {}, {})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="no valid JSON"):
        claim_folder(tmp_path, resume=True, overwrite=False)
    claim_folder(tmp_path, resume=False, overwrite=True)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError):
        claim_folder(tmp_path, resume=False, overwrite=True)


def test_overwriting_follows_no_link_out_of_the_run(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    begin_run(RunFolder(run), {}, {})
    (elsewhere / "checkpoint-1").mkdir(parents=True)
    (run / "checkpoints").symlink_to(elsewhere)
    begin_run(RunFolder(run), {}, {})
    assert not (run / "checkpoints").exists() and (elsewhere / "checkpoint-1").is_dir()


# ----------------------------------------------------------------------------------------------------- signals


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("seconds", [0.15, 0.6, 1.5])
def test_a_signal_before_training_is_an_interruption(tmp_path: Path, number: int, seconds: float) -> None:
    """Wherever in the start-up it falls, there is no traceback, and the exit code is the documented one."""
    start = f"import signal; signal.signal({int(number)}, signal.SIG_DFL); "
    if number == signal.SIGINT:
        start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = start + "from phlora.cli import main; print('begun', flush=True); main()"
    command = [sys.executable, "-c", code, "train", "--data", "chats.jsonl", "--model", "smollm2-135m"]
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    time.sleep(seconds)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if process.returncode != 2:  # it had read the empty row already
        assert process.returncode == 130 and "Interrupted." in error and "Traceback" not in error


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_within_a_finalizer_is_not_lost(number: int) -> None:
    """Python drops what is raised there; other errors are still shown as Python shows them."""
    code = """
import signal, sys, time
from phlora.cli import entry, main

class Slow:
    def __del__(self):
        signal.raise_signal(int(sys.argv[1]))

class Faulty:
    def __del__(self):
        raise ValueError("still shown")

def work(arguments):
    Faulty()
    Slow()
    time.sleep(5)
    print("reached")
    return 0

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
entry._invoke = work
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(int(number))], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130 and "reached" not in done.stdout
    assert "Interrupted." in done.stderr and "KeyboardInterrupt" not in done.stderr
    assert "ValueError: still shown" in done.stderr
