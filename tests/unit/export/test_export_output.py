"""What a killed export left half-written goes before the next one of that name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from phlora.errors import ModelError, RunError
from phlora.export.convert import convert
from phlora.export.output import require_new
from phlora.testing import tiny_adapter


def leftover(folder: Path, name: str, *, hours: float) -> Path:
    part = folder / f".{name}.0123456789ab.part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half")
    for path in (part / "model.safetensors", part):
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    return part


def test_leftovers_of_a_killed_merge_are_cleared(tmp_path: Path) -> None:
    old, other = leftover(tmp_path, "merged", hours=2), leftover(tmp_path, "another", hours=2)
    require_new(tmp_path / "merged")
    assert not old.exists() and other.exists()


def test_a_merge_that_is_still_writing_keeps_its_files(tmp_path: Path) -> None:
    young = leftover(tmp_path, "merged", hours=0.1)
    require_new(tmp_path / "merged")
    assert young.exists()


def test_an_output_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    require_new(tmp_path / "merged")
    (tmp_path / "merged" / "mine").touch()
    with pytest.raises(RunError, match="exists already"):
        require_new(tmp_path / "merged")


def test_links_out_of_an_adapter_are_not_copied(model_folder: Path, tmp_path: Path) -> None:
    """A hub's cache is links into its `blobs`, and is copied."""
    adapter = tiny_adapter(model_folder, tmp_path / "hub" / "snapshots" / "main")
    (tmp_path / "hub" / "blobs").mkdir()
    (adapter / "adapter_config.json").rename(tmp_path / "hub" / "blobs" / "abc")
    (adapter / "adapter_config.json").symlink_to("../../blobs/abc")
    convert(adapter, tmp_path / "out", to="peft")
    assert not (tmp_path / "out" / "adapter_config.json").is_symlink()
    (tmp_path / "mine.txt").write_text("mine alone")
    (adapter / "notes.txt").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(ModelError, match="notes.txt is a link out of the folder"):
        convert(adapter, tmp_path / "again", to="peft")
    assert not (tmp_path / "again").exists()
