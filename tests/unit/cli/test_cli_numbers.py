"""No number, however odd, is more than a message for any option of any command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from command_line import CommandLine
from typer.main import get_command

from phlora.cli.program import app

# A command line of each command that has options with numbers; what is asked for is put behind it.
LINES = {
    "evaluate": "evaluate runs/file",
    "chat": "chat base --max-new-tokens 2 --temperature 1",
    "merge": "merge runs/file -o merged",
    "export": "export runs/file --for peft -o exported",
    "convert": "convert adapter.pt --to peft -o adapter --lora-alpha 4",
    "data check": "data check train.jsonl --model base",
    "data convert": "data convert train.jsonl converted.jsonl",
    "data preview": "data preview train.jsonl --model base",
}
ODD = ["0", "-1", "1e-300", "nan", "inf", "٣", "1" + "0" * 30, "", "many"]


def numeric_options(command: Any = None, words: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    command = command or get_command(app)
    found = []
    hints = get_type_hints(command.callback) if words and command.callback else {}
    for parameter in command.params:
        kinds = {hints.get(parameter.name), *get_args(hints.get(parameter.name))}
        if kinds & {int, float} and parameter.opts[0].startswith("--"):
            found.append((" ".join(words), parameter.opts[0]))
    for name, inner in getattr(command, "commands", {}).items():
        found += numeric_options(inner, (*words, name))
    return found


@pytest.mark.parametrize(("command", "option"), numeric_options())
def test_odd_numbers(phlora: CommandLine, trained: Path, command: str, option: str) -> None:
    assert command in LINES, f"add a line for {command} to LINES in {Path(__file__).name}"
    phlora("convert", "runs/file", "--to", "loralib", "-o", "adapter.pt", "--quiet")
    for value in ODD:
        began = time.monotonic()
        done = phlora(*LINES[command].split(), option, value, stdin="say 1\n")
        assert done.code in (0, 1, 2, 3), (value, done.err)
        assert done.code == 0 or done.err.strip(), value
        assert time.monotonic() - began < 60, value


def test_every_line_is_of_a_command_with_numbers() -> None:
    have = {command for command, _ in numeric_options()}
    assert have <= LINES.keys() and {"chat", "evaluate", "merge"} <= have


@pytest.mark.parametrize(
    "setting",
    [
        *(f"evaluation.max_answers={value}" for value in ("1e30", "-1", "nan", "1.5")),
        *(f"data.eval_size={value}" for value in ("1e30", "-1", "nan", ".inf", "0.99999")),
        *(f"peft_config.r={value}" for value in ("1e30", "0", "nan", "1.5")),
        *(f"training_config.learning_rate={value}" for value in ("1e30", "-1", "nan", ".inf")),
        *(f"training_config.max_length={value}" for value in ("1e30", "-1", "0", "1.5")),
        *(f"training_config.seed={value}" for value in ("1e30", "-1", "1.5")),
        *(f"training_config.per_device_train_batch_size={value}" for value in ("1e30", "-1", "0")),
    ],
)
def test_odd_settings_of_a_run(phlora: CommandLine, place: Path, setting: str) -> None:
    done = phlora("train", "run.yaml", "--dry-run", "--set", setting)
    assert done.code in (0, 1, 2, 3), done.err
    assert done.code == 0 or done.err.strip()
