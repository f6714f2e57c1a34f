"""Digests of whole checkpoints, kept in the cache folder beside the size, the time and the number of each file.

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
_VERSION = 1
# A file that was written to a moment ago may change once more without another time.
_SETTLED_SECONDS = 2.0


def recall(files: Sequence[Path]) -> dict[str, str] | None:
    """What `remember` was told of these files, if they are as they were then."""
    try:
        known = json.loads(_place(_state(files)).read_text(encoding="utf-8"))["whole"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = isinstance(known, dict) and known and all(isinstance(text, str) for text in known.values())
    return known if sound else None


def remember(files: Sequence[Path], whole: Mapping[str, str], *, state: str) -> None:
    """Keep the digests of files that were in this state when reading them began, unless they changed meanwhile."""
    try:
        newest = max(path.stat().st_mtime for path in files)
        if state != _state(files) or abs(time.time() - newest) < _SETTLED_SECONDS:
            return
        place = _place(state)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, {"files": [str(path) for path in files], "whole": dict(whole)})
    except OSError:
        return


def state_of(files: Sequence[Path]) -> str:
    """What tells whether files changed: path, size, time of the last change and number of each; empty: unknown."""
    try:
        return _state(files)
    except OSError:
        return ""


def _state(files: Sequence[Path]) -> str:
    facts = []
    for path in files:
        found = path.stat()
        facts.append([str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ino])
    return json.dumps([_VERSION, *facts])


def _place(state: str) -> Path:
    return cache_root() / "fingerprints" / f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.json"
