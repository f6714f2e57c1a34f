"""Files and folders that are written whole or not at all, and JSON files that hold one object."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from phlora.errors import InputError, NoRoomError, shown

# Written beside an adapter's tensors; `base_fingerprint` in it names the weights it was trained on.
ADAPTER_FACTS = "phlora.json"
# Key -> whether a value is right, and in words what it has to be.
Expected: TypeAlias = Mapping[str, tuple[Callable[[Any], bool], str]]
_LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{12}\.(?:part|old)")


def read_json(path: Path, problem: type[InputError]) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        problem: the error to raise, by what the file is a part of.

    Raises:
        InputError: as `problem`: the file cannot be read, is no JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise problem(f"The file is no valid JSON ({error})", where=str(path)) from error
    except RecursionError:
        raise problem("The file is nested too deeply", where=str(path)) from None
    except OSError as error:
        raise problem(f"The file cannot be read ({error.strerror})", where=str(path)) from error
    if not isinstance(content, dict):
        raise problem("The file is no JSON object", where=str(path))
    return content


def require_values(
    content: Mapping[str, Any], expected: Expected, problem: type[InputError], *, where: str
) -> None:
    """Refuse values that whoever writes a file would not have written; a key may be left out, or be null.

    Raises:
        InputError: as `problem`, with the key, what it holds and what it should.
    """
    for key, (is_right, words) in expected.items():
        value = content.get(key)
        if value is not None and not is_right(value):
            raise problem(f"`{key}` is {shown(repr_of(value))}", where=where, expected=words)


def repr_of(value: Any) -> str:
    """A value as Python writes it, also a number of more digits than it writes."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold, and no infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object, indented, whole or not at all; what JSON does not know is written as text."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with replaced_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Fill a file beside `path`, then put it in its place in one rename; on an error the old one stays.

    Readers see the old file or the new one, never a part. The folder has to exist: one that was removed in the
    meantime must not come back with this file alone.
    """
    part = _beside(path, "part")
    try:
        yield part
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Fill a new folder beside `path`, then put it in its place in one rename; on an error the old one stays."""
    part, old = _beside(path, "part"), _beside(path, "old")
    part.mkdir(parents=True)
    try:
        yield part
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(part, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def require_room(folder: Path, needed_bytes: int, *, what: str, fix: str) -> None:
    """Refuse to write what does not fit.

    Args:
        folder: where it goes; it need not exist yet.
        what: takes the room, as the subject of a sentence in the singular.

    Raises:
        NoRoomError: less free disk than `needed_bytes`.
    """
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise NoRoomError(
            f"{what} takes about {needed_bytes / 1e6:,.0f} MB; {free_bytes / 1e6:,.0f} MB are free",
            where=str(folder),
            fix=fix,
        )


def leftover_of(path: Path) -> str | None:
    """The name that a half-written file or folder was meant for, None for any other path."""
    match = _LEFTOVER.fullmatch(path.name)
    return match[1] if match else None


def clear_leftovers(folder: Path, *, only: str | None = None, idle_seconds: float = 0) -> None:
    """Clear away what a killed process left half-written in a folder.

    What it had moved aside goes back to its place where its successor did not get there.

    Args:
        only: leave what was meant for other names than this one.
        idle_seconds: leave what was written to since then; another process may be at it.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        name = leftover_of(path)
        if name is None or only not in (None, name) or _idle_seconds(path) < idle_seconds:
            continue
        if path.suffix == ".old" and not os.path.lexists(folder / name):
            os.rename(path, folder / name)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _idle_seconds(path: Path) -> float:
    """Since anything in it was last written to."""
    times = [0.0]
    for part in (path, *path.rglob("*")):
        with suppress(OSError):
            times.append(part.lstat().st_mtime)
    return time.time() - max(times)


def _beside(path: Path, ending: str) -> Path:
    """A hidden name in the same folder that no other thread, process or machine has."""
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}.{ending}")


def cache_root() -> Path:
    """The folder for what is made once and used again: `$PHLORA_CACHE`, or `phlora` in the platform's cache folder."""
    chosen = os.environ.get("PHLORA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "phlora"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "phlora"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phlora"
