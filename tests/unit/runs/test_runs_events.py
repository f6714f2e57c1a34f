"""events.jsonl: what happened, and what of it lasted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phlora.runs.events import append_event, lasting_events, read_events, trained_seconds


def happened(*events: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"time": 100.0 + when, "event": name, "step": step} for when, (name, step) in enumerate(events)]


def test_a_cut_last_event_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    append_event(file, "log", loss=1.5, text="درود")
    with file.open("a") as opened:
        opened.write(f'[1]\n"x"\n{"[" * 100_000}\n{{"time": 1, "eve')
    (event,) = read_events(file)
    assert event["loss"] == 1.5 and event["text"] == "درود"


def test_what_was_done_again_counts_once() -> None:
    first = happened(
        ("start", 0), ("log", 1), ("log", 2), ("evaluate", 2), ("save", 2), ("log", 3), ("log", 4)
    )
    again = happened(("start", 2), ("log", 3), ("log", 4), ("evaluate", 4), ("end", 4))
    lasting = lasting_events([*first, *again])
    assert [(event["event"], event["step"]) for event in lasting] == [
        *(("start", 0), ("log", 1), ("log", 2), ("evaluate", 2), ("save", 2)),
        *(("start", 2), ("log", 3), ("log", 4), ("evaluate", 4), ("end", 4)),
    ]
    # Killed twice, the second time before anything was saved.
    assert [e["step"] for e in lasting_events([*first, *again, *happened(("start", 0), ("log", 1))])] == [
        0,
        0,
        1,
    ]


def test_odd_events_are_no_steps() -> None:
    odd = happened(("log", "7"), ("log", None), ("start", "x"), ("log", True))
    assert lasting_events([*odd, {}]) == [*odd, {}]
    assert trained_seconds([{"time": "now", "event": "start"}, {}]) == 0


def test_the_time_of_every_process_counts() -> None:
    assert trained_seconds([]) == 0
    first, pause = happened(("start", 0), ("log", 1), ("log", 2)), 1000.0
    again = [{**event, "time": event["time"] + pause} for event in happened(("start", 1), ("log", 2))]
    assert trained_seconds(first) == 2
    assert trained_seconds([*first, *again]) == 3
