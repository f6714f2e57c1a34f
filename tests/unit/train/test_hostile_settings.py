"""Whatever stands in a configuration or on a command line: a plan or one message, in bounded time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
import yaml

from phlora import PhloraError, finetune
from phlora.config import build_config
from phlora.display import Display
from phlora.testing import invoke, tiny_folder, write_rows

SEEDS, LINES, FILES = 300, 100, 60
# What a dry run of the tiny model takes is a tenth of a second; a hang is what this is about.
MOST_SECONDS = 20.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    tiny_folder(folder / "base")
    write_rows(folder / "rows.jsonl", [{"question": f"q{i}", "answer": "a"} for i in range(6)])
    return folder


@pytest.fixture(autouse=True)
def bounded(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(place)
    # No name that a mutation makes up is asked of a hub.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(place.iterdir())
    yield
    assert sorted(place.iterdir()) == before, "a dry run writes nothing"


def base() -> dict[str, Any]:
    return {
        "model": {"name": "base", "dtype": "float32", "device": "cpu", "offline": True},
        "data": {"files": "rows.jsonl", "cache": False},
        "training_config": {"max_steps": 2},
        "peft_config": {"r": 2},
        "evaluation": {"max_answers": 1},
        "output": "out",
    }


@pytest.mark.filterwarnings("ignore")
def test_configurations() -> None:
    plans = 0
    for seed in range(SEEDS):
        values, said = hostile.mutated(base(), seed)
        began = time.monotonic()
        try:
            # As a file has it, and as arguments.
            by_arguments = seed % 2 and values.keys() <= base().keys()
            given = values if by_arguments else {"config": build_config(values)}
            finetune(**given, dry_run=True, display=Display(quiet=True))
            plans += 1
        except PhloraError as error:
            assert 10 < len(str(error)) < 4000, said
        except Exception as error:
            raise AssertionError(f"seed {seed}: {said}") from error
        assert time.monotonic() - began < MOST_SECONDS, said
    assert 0 < plans < SEEDS


@pytest.mark.filterwarnings("ignore")
def test_command_lines() -> None:
    line = [
        "train",
        "--model",
        "base",
        "--data",
        "rows.jsonl",
        "--output",
        "out",
        "--set",
        "model.device=cpu",
    ]
    codes = []
    for seed in range(LINES):
        words = [*hostile.mutated_line(line, seed), "--dry-run", "--offline"]
        began = time.monotonic()
        outcome = invoke(*words)
        codes.append(outcome.code)
        assert outcome.code in (0, 1, 2, 3), (seed, words, outcome)
        assert time.monotonic() - began < MOST_SECONDS, words
    assert 0 in codes and 2 in codes


@pytest.mark.filterwarnings("ignore")
def test_configuration_files(tmp_path: Path) -> None:
    text, codes = yaml.safe_dump(base()), []
    for seed in range(FILES):
        file = tmp_path / "run.yaml"
        file.write_text(hostile.mutated_text(text, seed), encoding="utf-8")
        codes.append(invoke("train", file, "--dry-run", "--offline").code)
        assert codes[-1] in (0, 1, 2, 3), (seed, file.read_text(encoding="utf-8"))
    assert 2 in codes
