"""Every command with every option runs for real; a new option is added to RUNS."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import CommandLine
from typer.main import get_command

from phlora.cli.program import app
from phlora.testing import Outcome, chat_rows, invoke, write_rows

COLUMNS = "--columns question=Frage,answer=Antwort"
# What the command line says; its exit code where it is not 0. Each starts from a fresh copy of a trained run.
RUNS = [
    "--version",
    "train run.yaml --output runs/a --offline --quiet --json",
    "train -m base -d train.jsonl --eval-data heldout.jsonl -o runs/b --set training_config.max_steps=1 -q",
    "train --model base --data train.jsonl --dry-run",
    "train run.yaml --quantization nf4 -o runs/c",
    "train run.yaml --overwrite --fit",
    "train run.yaml -o runs/g --set training_config.max_steps=1 --overcommit",
    "plan run.yaml --set training_config.activation_memory=recompute -o runs/p --fit --offline --quiet --json",
    "plan -m base -d train.jsonl --eval-data heldout.jsonl --format messages --strict",
    f"plan --model base --data fragen.csv {COLUMNS}",
    "plan run.yaml --quantization nf4",
    "train run.yaml --resume",
    "train -m base -d twice.jsonl -o runs/d --strict --dry-run -> 1",
    "evaluate runs/file --data train.jsonl --metric rouge_l --max-answers 1 --max-new-tokens 2 --offline",
    f"evaluate runs/file --data fragen.csv --format qa {COLUMNS} --max-answers 0",
    "train -m base -d train.jsonl --format messages -o runs/e --dry-run",
    "evaluate runs/file --quiet --json",
    "chat runs/file --tools tools.json --max-new-tokens 2",
    "chat runs/file --system Brief. --max-new-tokens 2 --temperature 0.5 --top-p 0.9 --top-k 5 --seed 3 --offline",
    "merge runs/file -o m --base full --model base --dtype float16 --rows train.jsonl --max-rows 2 --device cpu",
    "merge runs/file --output m --offline --quiet --json",
    "merge runs/file -o m --quantize gptq",
    f"merge runs/file -o m --base full --rows fragen.csv --format qa {COLUMNS} --quiet",
    "convert runs/file --to loralib -o adapter.pt --offline --json",
    "convert blocks.pt --to peft -o a --lora-alpha 4 --enable q,v --blocks qkv_proj=64,32,32",
    "convert blocks.pt --to peft --output a --lora-alpha 4 --enable q,v --model base --offline --quiet",
    "convert vision.pt --to peft -o a --lora-alpha 4 --kernel conv1=3,3",
    "convert runs/file --to merged -o m --base full --dtype float16 --rows train.jsonl --quiet --json",
    f"convert runs/file --to merged -o m --base full --rows fragen.csv --format qa {COLUMNS} --quiet",
    "export runs/file --for peft -o out --model base --offline --quiet --json",
    "export runs/file --for gguf --type q8_0 -o out --rows train.jsonl --max-rows 2 --max-new-tokens 4",
    f"export runs/file --for gguf --adapter-only -o out --rows fragen.csv --format qa {COLUMNS} --no-verify",
    "export runs/file --for vllm --vllm-before 0.32 --output out --verify",
    "export runs/file --for merged -o m --verify-only -> 2",
    "import-config sft.json --from llamafactory --dataset-info info.json -o new.yaml --overwrite --quiet",
    "import-config sft.json --dataset-info info.json --json",
    "migrate old.py",
    "migrate old.py --write --json",
    "migrate old.py --check -> 1",
    "migrate old.py --quiet",
    "data check train.jsonl --eval-data heldout.jsonl --model base --format messages --max-length 64 --offline",
    "data check train.jsonl --train-on last --quiet --json",
    "data check twice.jsonl --strict -> 1",
    "data preview train.jsonl --model base --rows 2 --format messages --max-length 64 --train-on all --offline",
    "data preview train.jsonl -m base -n 1 --quiet --json",
    f"train --model base --data fragen.csv {COLUMNS} --dry-run",
    f"data check fragen.csv {COLUMNS} --encoding utf-8",
    f"data preview fragen.csv -m base {COLUMNS} --encoding utf-8 --plain",
    f"data convert fragen.csv train.jsonl {COLUMNS} --encoding utf-8 --format qa --overwrite --offline --json",
    "data convert log.txt new.jsonl --assistant Shop --gap-hours 2 --quiet",
]


def commands(command: object = None, words: tuple[str, ...] = ()) -> Iterator[tuple[str, frozenset[str]]]:
    """Every command of the program with its long options."""
    command = command or get_command(app)
    options = (name for parameter in command.params for name in parameter.opts if name.startswith("--"))  # type: ignore[attr-defined]
    yield " ".join(words), frozenset(options) - {"--help"}
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


COMMANDS = dict(commands())
SHORT = {"-m": "--model", "-d": "--data", "-o": "--output", "-q": "--quiet", "-n": "--rows"}


def words_of(run: str) -> tuple[str, list[str]]:
    """The command of a run, and its words."""
    words = run.partition(" -> ")[0].split()
    name = next((n for n in sorted(COMMANDS, key=len, reverse=True) if n and run.startswith(f"{n} ")), "")
    return name, words


def test_every_option_of_every_command_is_run() -> None:
    run: dict[str, set[str]] = {name: set() for name in COMMANDS}
    for name, words in map(words_of, RUNS):
        run[name] |= {SHORT.get(word, word) for word in words if word.startswith("-")}
    missing = {name: sorted(options - run[name]) for name, options in COMMANDS.items() if options - run[name]}
    assert not missing, f"add a line to RUNS in {Path(__file__).name} for {missing}"


@pytest.fixture
def furnished(trained: Path) -> Path:
    torch.manual_seed(0)
    qkv = "model.layers.0.self_attn.qkv_proj"
    torch.save(
        {f"{qkv}.lora_A": torch.randn(4, 64), f"{qkv}.lora_B": torch.randn(96, 2)}, trained / "blocks.pt"
    )
    conv = {"conv1.lora_A": torch.randn(6, 12), "conv1.lora_B": torch.randn(24, 6)}
    torch.save(conv, trained / "vision.pt")
    write_rows(trained / "twice.jsonl", [*chat_rows(3), *chat_rows(1)])
    rows = "".join(f"say {number};{number}\n" for number in range(12))
    (trained / "fragen.csv").write_text(f"Frage;Antwort\n{rows}", encoding="utf-8")
    said = "1/9/24, 09:01 - Ana: When?\n1/9/24, 09:02 - Shop: At ten\n"
    (trained / "log.txt").write_text(said, encoding="utf-8")
    tool = {"type": "function", "function": {"name": "light", "parameters": {"type": "object"}}}
    sft = {"stage": "sft", "model_name_or_path": "base", "dataset": "chats", "template": "phi"}
    (trained / "sft.json").write_text(json.dumps(sft), encoding="utf-8")
    table = {"chats": {"file_name": "train.jsonl", "formatting": "openai"}}
    (trained / "info.json").write_text(json.dumps(table), encoding="utf-8")
    (trained / "old.py").write_text("from trl import SFTTrainer\n", encoding="utf-8")
    (trained / "tools.json").write_text(json.dumps([tool]), encoding="utf-8")
    return trained


@pytest.mark.parametrize("run", RUNS)
def test_it_runs(furnished: Path, run: str) -> None:
    if "nf4" in run:
        pytest.importorskip("bitsandbytes")
    if "gptq" in run:
        pytest.importorskip("auto_round")
    words, (_, _, code) = words_of(run)[1], run.partition(" -> ")
    done = invoke(*words, stdin="say 1\n")
    assert done.code == int(code or 0), done.err
    assert done.out or done.code
    if "--json" in words:
        assert isinstance(done.json, dict)
    if "--quiet" in words or "-q" in words:
        assert done.err == ""


# ---------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("run", "code", "says"),
    [
        ("data check train.jsonl", 0, ""),
        ("data check twice.jsonl --strict", 1, ""),
        ("train run.yaml", 2, "already holds a run"),
        ("train run.yaml --overwrite --set model.device=cuda:77", 3, "cuda"),
        ("train run.yaml --overwrite --set model.dtype=flaot32", 2, "float32"),
    ],
)
def test_exit_codes(furnished: Path, run: str, code: int, says: str) -> None:
    done = invoke(*run.split())
    assert done.code == code and says in done.err


def test_json_on_standard_output_is_one_document_also_for_a_mistake(
    phlora: CommandLine, furnished: Path
) -> None:
    def of(*words: str) -> Outcome:
        return phlora(*words, "--json")

    for words in (
        ("train", "none.yaml"),
        ("evaluate", "runs/none"),
        ("merge", "none", "-o", "m"),
        ("convert", "none.pt", "--to", "peft", "-o", "m", "--lora-alpha", "1"),
        ("data", "check", "none.jsonl"),
        ("data", "preview", "none.jsonl", "--model", "base"),
        ("train", "run.yaml", "--no-such-option"),
    ):
        done = of(*words)
        assert done.code == 2, words
        error = done.json["error"]
        assert error["exit_code"] == 2 and error["message"] and error["kind"]
