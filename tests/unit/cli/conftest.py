"""A command line that runs in the process of the tests, a folder to run it in, and a run that it trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import CHATS, CommandLine, Failing, write_config

from phlora.testing import chat_rows, invoke, write_rows


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "PHLORA_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def phlora() -> CommandLine:
    """Runs a command line in this process."""
    return invoke


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "chats.jsonl", CHATS)


def furnish(folder: Path, model_folder: Path) -> None:
    """A base, chats and a configuration, under the names that the commands of the tests use."""
    (folder / "base").symlink_to(model_folder, target_is_directory=True)
    rows = chat_rows(12, turns=2)
    write_rows(folder / "train.jsonl", rows[:9])
    write_rows(folder / "heldout.jsonl", rows[9:])


@pytest.fixture
def place(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `base`, `train.jsonl`, `heldout.jsonl` and `run.yaml`; nothing is trained yet."""
    furnish(tmp_path, model_folder)
    monkeypatch.chdir(tmp_path)
    write_config()
    return tmp_path


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """As `place`, with the finished run `runs/file`; read it, do not write into the run."""
    folder = tmp_path_factory.mktemp("workshop")
    furnish(folder, model_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = invoke("train", write_config(), "--quiet")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def trained(place: Path, workshop: Path) -> Path:
    """`place` with a copy of the finished run in `runs/file`."""
    shutil.copytree(workshop / "runs", place / "runs")
    return place


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Let the training fail with an error from now on."""

    def fail(error: BaseException) -> None:
        monkeypatch.setattr("phlora.train.finetune.finetune", Failing(error))

    return fail
