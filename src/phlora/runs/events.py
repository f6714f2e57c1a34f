"""What happened in a run, in the order in which it did: events.jsonl, one line per event.

    {"time": 1764036000.1, "event": "start", "step": 0, "max_steps": 113}
    {"time": 1764036009.7, "event": "log", "step": 5, "loss": 1.41, "learning_rate": 0.001}

The other events are `evaluate`, `save` and `end`. Nothing is ever taken out of it. A run that is continued begins with
another `start` at the step of its checkpoint: what stands before it of later steps was undone, and is done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from phlora.files import is_number

Event = dict[str, Any]


def append_event(path: Path, event: str, /, **values: Any) -> None:
    """Add one line to events.jsonl."""
    own = {"time": round(time.time(), 3), "event": event}
    # A metric may have any name.
    line = json.dumps({**own, **values, **own}, ensure_ascii=False, default=str)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_events(path: Path) -> list[Event]:
    """All whole lines of events.jsonl; a last line that a crash cut short is left out, as is what is no event."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def lasting_events(events: Iterable[Event]) -> list[Event]:
    """The events without those of steps that were undone, because the run was continued from an earlier checkpoint."""
    kept: list[Event] = []
    for event in events:
        if event.get("event") == "start" and is_number(event.get("step")):
            kept = [earlier for earlier in kept if not _is_later(earlier, event["step"])]
        kept.append(event)
    return kept


def trained_seconds(events: Iterable[Event]) -> float:
    """How long the processes trained that began in these events, each from its start to its last event."""
    total, began, last = 0.0, 0.0, 0.0
    for event in events:
        when: Any = event.get("time")
        if not is_number(when):
            continue
        if event.get("event") == "start":
            total += last - began
            began = when
        last = when
    return total + last - began


def _is_later(event: Mapping[str, Any], step: float) -> bool:
    return is_number(event.get("step")) and event["step"] > step


def curve(events: Iterable[Mapping[str, Any]], name: str, **others: float) -> list[tuple[float, ...]]:
    """The step, a value and others with their defaults, of the events that have the value; no number, no point."""
    points: list[tuple[float, ...]] = []
    for event in events:
        if not is_number(event.get("step")) or name not in event:
            continue
        with suppress(TypeError, ValueError, OverflowError):
            values = (float(event.get(key, default)) for key, default in {name: 0.0, **others}.items())
            points.append((float(event["step"]), *values))
    return points
