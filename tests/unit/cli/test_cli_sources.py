"""Chat, merge, convert and evaluate read one source alike: a run, its adapters, a bare adapter, and what is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import CommandLine

from phlora.testing import Outcome, tiny_adapter

COMMANDS = {
    "chat": ["chat", "SOURCE", "--max-new-tokens", "1"],
    "merge": ["merge", "SOURCE", "-o", "merged", "--dtype", "float32"],
    "convert": ["convert", "SOURCE", "--to", "loralib", "-o", "adapter.pt"],
    "evaluate": ["evaluate", "SOURCE", "--max-answers", "0"],
}


def run_all(phlora: CommandLine, source: str, *names: str) -> dict[str, Outcome]:
    outcomes = {}
    for name in names or COMMANDS:
        words = [source if word == "SOURCE" else word for word in COMMANDS[name]]
        if name == "merge" and not source.startswith("runs/"):
            words += ["--rows", "heldout.jsonl"]
        outcomes[name] = phlora(*words, stdin="say 1\n")
    return outcomes


def test_a_run_is_taken_by_all(phlora: CommandLine, trained: Path) -> None:
    assert {name: done.code for name, done in run_all(phlora, "runs/file").items()} == dict.fromkeys(
        COMMANDS, 0
    )


@pytest.mark.parametrize("source", ["runs/file/adapter/best", "runs/file/adapter/last", "copy", "bare"])
def test_an_adapter_is_taken_by_all_that_need_no_run(phlora: CommandLine, trained: Path, source: str) -> None:
    shutil.copytree("runs/file/adapter/best", "copy")
    tiny_adapter("base", trained / "bare", target_modules=["qkv_proj", "o_proj"])
    outcomes = run_all(phlora, source, "chat", "merge", "convert")
    assert {name: done.code for name, done in outcomes.items()} == dict.fromkeys(outcomes, 0), outcomes


def test_the_folder_around_the_adapters_means_one_thing(phlora: CommandLine, trained: Path) -> None:
    codes = {
        name: done.code for name, done in run_all(phlora, "runs/file/adapter").items() if name != "evaluate"
    }
    assert len(set(codes.values())) == 1, codes


@pytest.mark.parametrize("source", ["nothing-there", "empty", "text.txt"])
def test_what_is_none_is_refused_by_all(phlora: CommandLine, trained: Path, source: str) -> None:
    (trained / "empty").mkdir()
    (trained / "text.txt").write_text("hello", encoding="utf-8")
    for name, done in run_all(phlora, source).items():
        assert done.code in (2, 3) and source in done.err, (name, done)
        assert not (trained / "merged").exists() and not (trained / "adapter.pt").exists()


def test_a_run_without_an_adapter_is_said_by_all(phlora: CommandLine, trained: Path) -> None:
    shutil.rmtree("runs/file/adapter")
    for name, done in run_all(phlora, "runs/file").items():
        assert done.code == 2 and "no adapter yet" in done.err, (name, done)


@pytest.mark.parametrize("damage", ["", "[]", "{}", "{", '{"status": "finished"}'])
def test_a_damaged_run_file_is_one_message(phlora: CommandLine, trained: Path, damage: str) -> None:
    Path("runs/file/run.json").write_text(damage, encoding="utf-8")
    for name, done in run_all(phlora, "runs/file").items():
        assert done.code == 2 and "run.json" in done.err, (name, done)


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"r": "four"},
        {"lora_alpha": None},
        {"target_modules": 5},
        {"alpha_pattern": "x"},
        {"rank_pattern": {"qkv_proj": -1}},
        {"base_model_name_or_path": 7},
    ],
)
def test_a_damaged_adapter_is_one_message(
    phlora: CommandLine, trained: Path, change: dict[str, object]
) -> None:
    file = Path("runs/file/adapter/best/adapter_config.json")
    facts = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**facts, **change}), encoding="utf-8")
    shutil.copytree("runs/file/adapter/best", "copy")
    (key,) = change
    for name, done in run_all(phlora, "copy", "chat", "merge", "convert").items():
        assert done.code == 2, (name, done)
        assert "adapter_config.json" in done.err and (key in done.err or "kind" in done.err), (name, done)
