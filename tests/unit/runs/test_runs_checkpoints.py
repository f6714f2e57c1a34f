"""Which checkpoints a run goes on from: whole ones, and its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from phlora.errors import RunError
from phlora.runs.checkpoints import (
    COMPLETE_FILE,
    complete_checkpoints,
    damage_of,
    drop_incomplete,
    mark_complete,
    whole_checkpoint,
)
from phlora.runs.folder import RunFolder

FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")


def checkpoint_in(folder: Path, step: int, *, run: str = "mine") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in FILES:
        (path / name).write_text(json.dumps({name: step}), encoding="utf-8")
    mark_complete(path, {"step": step}, run=run)
    return path


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("harm", "says"), [(Path.unlink, "is missing"), (cut, "bytes and had"), (flip, "is not what was written")]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, name: str, harm: Callable[[Path], None], says: str
) -> None:
    before, damaged = checkpoint_in(tmp_path, 8), checkpoint_in(tmp_path, 10)
    harm(damaged / name)
    said: list[str] = []
    assert whole_checkpoint(tmp_path, run="mine", warn=said.append) == before
    assert len(said) == 1 and "checkpoint-10" in said[0] and name in said[0] and says in said[0]
    assert not damaged.exists() and (tmp_path / "damaged-checkpoint-10" / COMPLETE_FILE).is_file()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {"optimizer.pt": 1}}'])
def test_a_list_of_files_that_cannot_be_read_is_damage(tmp_path: Path, content: str) -> None:
    (checkpoint_in(tmp_path, 2) / COMPLETE_FILE).write_text(content, encoding="utf-8")
    said: list[str] = []
    assert whole_checkpoint(tmp_path, run="mine", warn=said.append) is None
    assert COMPLETE_FILE in said[0] and (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()


def test_people_may_write_into_the_card(tmp_path: Path) -> None:
    checkpoint = checkpoint_in(tmp_path, 2)
    (checkpoint / "README.md").write_text("mine", encoding="utf-8")
    mark_complete(checkpoint, {"step": 2}, run="mine")
    (checkpoint / "README.md").write_text("mine, edited", encoding="utf-8")
    assert damage_of(checkpoint, run="mine") is None


def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    other = checkpoint_in(tmp_path, 4, run="another")
    with pytest.raises(RunError, match="of another run") as refusal:
        whole_checkpoint(tmp_path, run="mine", warn=lambda _: None)
    assert str(other) in str(refusal.value) and other.is_dir()


@pytest.mark.parametrize(("name", "harm"), [("optimizer.pt", Path.unlink), ("trainer_state.json", cut)])
def test_of_an_earlier_version_the_files_that_it_needs_are_there(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    old = checkpoint_in(tmp_path, 6)
    (old / COMPLETE_FILE).write_text('{"step": 6}', encoding="utf-8")
    assert damage_of(old, run="mine") is None
    harm(old / name)
    assert name in str(damage_of(old, run="mine"))


def test_the_newest_comes_first_and_what_was_cut_short_goes(tmp_path: Path) -> None:
    checkpoint_in(tmp_path, 8)
    newest = checkpoint_in(tmp_path, 10)
    (checkpoint_in(tmp_path, 12) / COMPLETE_FILE).unlink()
    assert complete_checkpoints(tmp_path)[0] == newest
    assert [path.name for path in drop_incomplete(tmp_path)] == ["checkpoint-12"]


def test_a_real_checkpoint_lists_all_that_resuming_reads(run: Path, tmp_path: Path) -> None:
    folder = RunFolder(run)
    checkpoint = folder.latest_checkpoint()
    assert checkpoint is not None
    listed = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))["files"]
    assert set(FILES) <= set(listed)
    shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    assert damage_of(tmp_path / checkpoint.name, run=folder.identity_digest()) is None
