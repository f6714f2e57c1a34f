"""Mistakes, bugs and noise: what is said where, and with which exit code."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CommandLine

from phlora import errors
from phlora.cli import entry
from phlora.testing import write_rows

Fail = Callable[[BaseException], None]


def _caused_by(cause: BaseException, error: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("train", "`model` is missing"),
        ("train --model m", "`data` is missing"),
        ("train --data d", "`model` is missing"),
        ("train none.yaml", "none.yaml: The configuration file does not exist"),
        ("train rnu.yaml", "did you mean `run.yaml`?"),
        ("train broken.yaml", "broken.yaml:3"),
        ("train unknown.yaml", "did you mean `training_config`?"),
        ("train run.yaml --set learning_rate", "is no assignment"),
        ("train run.yaml --set a=[", "no valid YAML"),
        ("train run.yaml --set evaluation.metrik=x", "did you mean `metrics`?"),
        ("train run.yaml --set evaluation.max_answers=many", "a whole number"),
        ("train run.yaml --lr 3", "No such option"),
        ("trian run.yaml", "Did you mean"),
        ("train run.yaml more.yaml", "unexpected extra argument"),
        ("evaluate", "Missing argument"),
        ("evaluate runs/x --max-answers -1", "'--max-answers'"),
        ("evaluate runs/x --max-answers many", "'--max-answers'"),
        ("chat", "Missing argument"),
        ("chat ./none", "The folder does not exist"),
        ("chat smollm2-135n", "smollm2-135m"),
        ("data", "Usage"),
        ("data check", "Missing argument"),
        ("data check none.jsonl", "none.jsonl"),
        ("data check empty.jsonl", "empty.jsonl: The file is empty"),
        ("data check run.yaml", "run.yaml"),
        ("data check chats.jsonl --format mesages", "did you mean `messages`?"),
        ("data check chats.jsonl --train-on answers", "answers"),
        ("data check chats.jsonl --eval-data none.jsonl", "none.jsonl"),
        ("data check chats.jsonl --model ./none", "The folder does not exist"),
        ("data preview none.jsonl", "none.jsonl"),
        ("data preview chats.jsonl --rows 0", "'--rows'"),
        ("data preview chats.jsonl --model ./none", "The folder does not exist"),
    ],
)
def test_bad_input_is_one_clear_message(
    phlora: CommandLine, place: Path, chats: Path, arguments: str, says: str
) -> None:
    Path("broken.yaml").write_text("model: m\ndata: [a\n", encoding="utf-8")
    Path("unknown.yaml").write_text("model: m\ndata: d\ntrainig_config: {}\n", encoding="utf-8")
    Path("empty.jsonl").touch()
    before = sorted(Path().rglob("*"))
    done = phlora(*arguments.split())
    assert done.code == 2, done.err
    assert says in done.err
    assert done.out == "" and "Traceback" not in done.err
    assert sorted(Path().rglob("*")) == before

    document = phlora(*arguments.split(), "--json")
    if "chat" not in arguments.split()[0]:
        assert document.code == 2 and document.json["error"]["exit_code"] == 2


def test_a_run_folder_without_a_run(phlora: CommandLine, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"status": "interrupted"}', encoding="utf-8")
    done = phlora("chat", str(run))
    assert done.code == 2 and "no adapter yet (interrupted)" in done.err


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (errors.DataError("A role", where="d.jsonl:3", fix="rename it"), 2, "DataError"),
        (errors.MissingExtraError("`x` is not installed"), 3, "MissingExtraError"),
        (errors.NetworkError("No hub"), 3, "NetworkError"),
        (errors.NonFiniteError("NaN at step 3"), 1, "NonFiniteError"),
        (OSError(errno.ENOSPC, "No space left on device", "/disk/x"), 3, "NoRoomError"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/runs"), 2, "InputError"),
        (MemoryError(), 3, "NoRoomError"),
        (torch.OutOfMemoryError("CUDA out of memory"), 3, "NoRoomError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 3, "NoRoomError"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), 3, "NoRoomError"),
        (OSError("libgomp.so.1: cannot open: Cannot allocate memory"), 3, "NoRoomError"),
        (OSError(errno.ENOMEM, "Cannot allocate memory", "chats.jsonl"), 3, "NoRoomError"),
        (
            _caused_by(MemoryError(), ModuleNotFoundError("Could not import module 'Trainer'")),
            3,
            "NoRoomError",
        ),
        (RuntimeError("can't start new thread"), 3, "EnvironmentProblem"),
    ],
)
def test_errors_become_a_message_and_an_exit_code(
    phlora: CommandLine, place: Path, failing: Fail, error: Exception, code: int, kind: str
) -> None:
    failing(error)
    done = phlora("train", "run.yaml", "--json")
    assert done.code == code
    assert done.json["error"]["kind"] == kind and done.json["error"]["exit_code"] == code
    assert done.json["error"]["message"] in done.err
    assert "Traceback" not in done.err
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES):
        assert error.filename in done.err


def test_a_bug_is_called_one_and_its_traceback_kept(
    phlora: CommandLine, place: Path, failing: Fail, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(entry.tempfile, "tempdir", str(tmp_path))
    failing(ZeroDivisionError("division by zero"))
    done = phlora("train", "run.yaml", "--json")
    (log,) = tmp_path.glob("phlora-*.log")
    assert done.code == done.json["error"]["exit_code"] == entry.EXIT_BUG
    assert "bug in Phlora: ZeroDivisionError" in done.err and str(log) in done.err
    assert "Traceback" not in done.err
    text = log.read_text(encoding="utf-8")
    assert "Traceback" in text and "phlora train run.yaml --json" in text


def test_debugging_shows_the_traceback(
    phlora: CommandLine, place: Path, failing: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHLORA_DEBUG", "1")
    failing(ZeroDivisionError("division by zero"))
    assert "Traceback" in phlora("train", "run.yaml").err
    failing(errors.ModelError("no such model"))
    assert "Traceback" in phlora("train", "run.yaml").err


@pytest.mark.parametrize("error", [ZeroDivisionError("cut short"), errors.ModelError("cut short")])
def test_what_a_stop_cut_short_is_an_interruption_and_shown_when_debugging(
    phlora: CommandLine, place: Path, failing: Fail, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(entry, "was_asked", lambda: True)
    failing(error)
    done = phlora("train", "run.yaml")
    assert done.code == errors.EXIT_INTERRUPTED and done.err.endswith("Interrupted.\n")
    assert "cut short" not in done.err
    monkeypatch.setenv("PHLORA_DEBUG", "1")
    assert "Traceback" in phlora("train", "run.yaml").err


def test_a_full_temporary_folder_does_not_hide_the_bug(
    phlora: CommandLine, place: Path, failing: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry.tempfile, "tempdir", "/does/not/exist")
    failing(ZeroDivisionError("division by zero"))
    done = phlora("train", "run.yaml")
    assert done.code == entry.EXIT_BUG and "Traceback" in done.err


# ------------------------------------------------------------------------------------------ streams and log


def test_warnings_of_libraries_go_to_the_log(
    phlora: CommandLine, place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def noisy(*_: Any, **__: Any) -> None:
        logging.getLogger("trl").warning("a warning")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("python's own", stacklevel=1)
        logging.getLogger("peft").error("an error")
        raise ZeroDivisionError

    monkeypatch.setattr(entry.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("phlora.train.finetune.finetune", noisy)
    done = phlora("train", "run.yaml")
    log = next(tmp_path.glob("phlora-*.log")).read_text(encoding="utf-8")
    assert "an error" in done.err and "a warning" not in done.err and "python's own" not in done.err
    assert "a warning" in log and "python's own" in log


def test_warnings_go_to_the_log_also_where_another_program_captured_them_before(
    phlora: CommandLine, place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings(record=True):
            test_warnings_of_libraries_go_to_the_log(phlora, place, monkeypatch, tmp_path)
    finally:
        logging.captureWarnings(False)


def test_importing_phlora_leaves_logging_alone() -> None:
    code = "import logging, phlora.cli; print(logging.getLogger().handlers, logging.getLogger().level)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 30"


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "many.jsonl", [{"messages": [{"role": f"r{i}"}]} for i in range(20_000)])
    with subprocess.Popen(
        [sys.executable, "-m", "phlora", "data", "check", str(file), "--json", "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (errors.EXIT_DONE, 2)


def test_every_script_passes_where_the_locale_has_no_utf8(chats: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    chats.rename(chats.with_name("گفتگو.jsonl"))
    done = subprocess.run(
        [sys.executable, "-m", "phlora", "data", "check", str(chats.with_name("گفتگو.jsonl"))],
        capture_output=True,
        env=environment,
        check=True,
    )
    assert "گفتگو.jsonl: messages" in done.stdout.decode("utf-8")
