"""What a killed export left half-written goes before the next one of that name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from phlora.errors import RunError
from phlora.export.output import require_new


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
