"""The demo's data: made from a seed, fair to score, and without overlap between the two sides."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "home_assistant"
SCHEMA = {
    "light": {"room", "state"},
    "dim": {"room", "percent"},
    "heat": {"room", "celsius"},
    "blinds": {"room", "state"},
    "play": {"room", "what"},
    "timer": {"minutes", "label"},
    "shop": {"item", "count"},
    "lock": {"door"},
}


def rows(name: str) -> list[list[dict[str, str]]]:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.fixture(scope="module")
def train() -> list[list[dict[str, str]]]:
    return rows("train.jsonl")


@pytest.fixture(scope="module")
def held_out() -> list[list[dict[str, str]]]:
    return rows("heldout.jsonl")


def test_the_shipped_files_come_from_the_generator(tmp_path: Path) -> None:
    make: dict[str, Any] = runpy.run_path(str(FOLDER / "make_data.py"))
    for made, name in zip(make["build"](7), ("train.jsonl", "heldout.jsonl"), strict=True):
        make["write"](made, tmp_path / name)
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_sizes_and_one_system_prompt(train: Any, held_out: Any) -> None:
    assert (len(train), len(held_out)) == (600, 100)
    assert len({chat[0]["content"] for chat in train + held_out}) == 1
    assert all(
        [message["role"] for message in chat] == ["system", "user", "assistant"] for chat in train + held_out
    )


def test_no_request_and_no_call_stands_on_both_sides(train: Any, held_out: Any) -> None:
    assert not {chat[1]["content"] for chat in train} & {chat[1]["content"] for chat in held_out}
    calls = [
        {chat[2]["content"] for chat in side if '"tool"' in chat[2]["content"]} for side in (train, held_out)
    ]
    # A door can only be locked, so its wordings are what differs.
    assert not {call for call in calls[0] & calls[1] if '"lock"' not in call}
    assert len({chat[1]["content"] for chat in train}) == 600


def test_every_answer_is_a_call_of_the_schema_or_one_of_the_plain_replies(train: Any, held_out: Any) -> None:
    num_plain = 0
    for chat in train + held_out:
        answer = chat[2]["content"]
        if not answer.startswith("{"):
            num_plain += 1
            assert answer.startswith(("Which room?", "I never unlock", "I can only help"))
            continue
        call = json.loads(answer)
        assert call.keys() - {"tool"} == SCHEMA[call["tool"]]
        assert json.dumps(call, separators=(",", ":")) == answer
        assert all(
            str(call[slot]) in chat[1]["content"]
            for slot in ("room", "what", "label", "item", "door")
            if slot in call
        )
    assert 0.05 < num_plain / 700 < 0.2
