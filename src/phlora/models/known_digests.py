"""Digests of whole checkpoints, kept in the cache folder beside the size, the times and the number of each file.

Reading gigabytes costs seconds, counting every byte of them another one or two: files that did not change since are not
counted again. Where the cache cannot be read or written they are; nothing depends on it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from phlora.files import cache_root, write_json

# Raised when digests are made otherwise.
_VERSION = 2
# A file that was written to a moment ago may change once more without another time.
_SETTLED_SECONDS = 2.0


def recall(state: str) -> dict[str, str] | None:
    """What `remember` was told of files in this `state_of`."""
    try:
        known = json.loads(_place(state).read_text(encoding="utf-8"))["whole"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = isinstance(known, dict) and known and all(isinstance(text, str) for text in known.values())
    return known if sound else None


def remember(files: Sequence[Path], names: Sequence[str], whole: Mapping[str, str], *, state: str) -> None:
    """Keep the digests of tensors in files that were in this state when reading began, unless they changed."""
    try:
        newest = max(path.stat().st_ctime for path in files)
        if not state or state != state_of(files, names) or abs(time.time() - newest) < _SETTLED_SECONDS:
            return
        place = _place(state)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, {"files": [str(path) for path in files], "whole": dict(whole)})
    except OSError:
        return


def state_of(files: Sequence[Path], names: Sequence[str]) -> str:
    """What tells whether these tensors of these files changed: path, size, times and number of each; empty: unknown.

    The time of the last change in the file system is among them, since the other one can be set back.
    """
    facts = []
    try:
        for path in files:
            found = path.stat()
            times = found.st_mtime_ns, found.st_ctime_ns
            facts.append([str(path.resolve()), found.st_size, *times, found.st_ino])
    except OSError:
        return ""
    return json.dumps([_VERSION, sorted(names), facts])


def _place(state: str) -> Path:
    return cache_root() / "fingerprints" / f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.json"
