"""Which checkpoints of a run can be continued from: whole ones, and its own.

`complete.json` is the last file that is written into a checkpoint. It names every other file with its size and digest,
and the run that the checkpoint is of:

    {"step": 40, "epoch": 1.0, "run": "1f0c…", "files": {"optimizer.pt": {"bytes": 51712, "sha256": "9a3e…"}, …}}

Without it a checkpoint was cut short. A file that is missing, or not what it was, makes it damaged: transformers
would begin with a fresh optimizer or scheduler where theirs is missing, without a word.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phlora.errors import RunError
from phlora.files import leftover_of, read_json, write_json

COMPLETE_FILE = "complete.json"
# What a checkpoint of an earlier version, whose files are not listed, has to have.
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "adapter_model.safetensors", "rng_state.pth")
_STATE_FILE = "trainer_state.json"
# Written beside an adapter for people to read, and for them to write in.
_CARD = "README.md"


def mark_complete(checkpoint: Path, facts: Mapping[str, Any], *, run: str) -> None:
    """Declare a checkpoint whole: the last file to be written into it.

    Args:
        facts: what else is written down.
        run: what tells the run from others.
    """
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in _files(checkpoint)
    }
    write_json(checkpoint / COMPLETE_FILE, {**facts, "run": run, "files": files})


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were written to their end, the newest first."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE_FILE).is_file()]
    return sorted(complete, key=_step_of, reverse=True)


def drop_incomplete(folder: Path) -> list[Path]:
    """Remove what a crash left half-written; returns what was removed."""
    broken = [path for path in folder.glob("checkpoint-*") if not (path / COMPLETE_FILE).is_file()]
    for path in broken:
        shutil.rmtree(path)
    return broken


def whole_checkpoint(folder: Path, *, run: str, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint to continue a run from, or None; a damaged one before it is named and kept aside.

    Where all are damaged they stay where they are: a copy of the file may be at hand.

    Args:
        folder: of the checkpoints.
        run: what tells the run from others.
        warn: takes one sentence for each that is damaged.

    Raises:
        RunError: a checkpoint is of another run.
    """
    damaged: dict[Path, str] = {}
    found = None
    for checkpoint in complete_checkpoints(folder):
        damage = damage_of(checkpoint, run=run)
        if damage is None:
            found = checkpoint
            break
        damaged[checkpoint] = damage
    for checkpoint, damage in damaged.items():
        said = f"{checkpoint.name} is damaged ({damage})"
        if found is not None:
            said += f": it is kept as {_set_aside(checkpoint).name}, and {found.name} is used"
        warn(said)
    return found


def _set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that nothing takes it for one; returns where it is now."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    if aside.exists():
        shutil.rmtree(aside)
    return checkpoint.rename(aside)


def damage_of(checkpoint: Path, *, run: str) -> str | None:
    """What is wrong with the files of a checkpoint, None where nothing is.

    Raises:
        RunError: it is of another run.
    """
    try:
        facts = read_json(checkpoint / COMPLETE_FILE, RunError)
    except RunError as error:
        return f"{COMPLETE_FILE}: {error.found}"
    if facts.get("run", run) != run:
        raise RunError(
            "The checkpoint is of another run",
            where=str(checkpoint),
            expected="checkpoints that this run wrote",
            fix="move it out of the folder, then resume again",
        )
    listed = facts.get("files")
    if listed is None:
        return _damage_unlisted(checkpoint)
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        return f"{COMPLETE_FILE} does not list its files"
    for name, entry in listed.items():
        if name == _CARD:
            continue
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry.get("bytes"):
            return f"{name} has {file.stat().st_size:,} bytes and had {entry.get('bytes')}"
        if _digest(file) != entry.get("sha256"):
            return f"{name} is not what was written"
    return None


def _damage_unlisted(checkpoint: Path) -> str | None:
    """Of a checkpoint of an earlier version: what is missing or empty."""
    for name in _NEEDED:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if not file.stat().st_size:
            return f"{name} is empty"
    try:
        read_json(checkpoint / _STATE_FILE, RunError)
    except RunError as error:
        return f"{_STATE_FILE}: {error.found}"
    return None


def _files(checkpoint: Path) -> list[Path]:
    return sorted(
        path
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name not in (COMPLETE_FILE, _CARD) and leftover_of(path) is None
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_of(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
