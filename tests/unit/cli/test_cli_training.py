"""`phlora train` and `phlora evaluate`: what is trained, where it lies, what is shown, what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine, write_config

from phlora.testing import chat_rows, write_rows

TINY = ["--set", "training_config.max_steps=1", "--set", "training_config.max_length=256"]


def plan(phlora: CommandLine, *arguments: object) -> Any:
    """What a dry run resolves the arguments to."""
    done = phlora("train", *arguments, "--dry-run", "--json")
    assert done.code == 0, done.err
    return done.json


# --------------------------------------------------------------------------------------------- configuration


def test_a_model_and_data_are_enough(phlora: CommandLine, place: Path) -> None:
    write_rows(place / "more.jsonl", chat_rows(3))
    files = ["--data", "train.jsonl", "--data", "more.jsonl", "--eval-data", "heldout.jsonl"]
    done = phlora("train", "--model", "base", *files, *TINY, "--set", "evaluation.max_answers=1", "--json")
    assert done.code == 0, done.err
    assert done.json["run"] == "runs/train" and done.json["report"]["tuned"]["loss"] > 0
    facts = json.loads(Path("runs/train/run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "finished"
    assert (facts["data"]["train_rows"], facts["data"]["held_out_rows"]) == (12, 3)
    assert Path("runs/train/adapter/best/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("data", "output"),
    [
        ("chats.jsonl", "runs/chats"),
        ("deep/chats.v2.jsonl", "runs/chats.v2"),
        ("گفتگو.jsonl", "runs/گفتگو"),
        ("a: [b].jsonl", "runs/a-b"),
    ],
)
def test_the_run_folder_is_named_after_the_data(
    phlora: CommandLine, place: Path, data: str, output: str
) -> None:
    """Names are never read as YAML."""
    (place / "12").symlink_to(place / "base")
    (place / data).parent.mkdir(exist_ok=True)
    write_rows(place / data, chat_rows(12))
    document = plan(phlora, "--model", "12", "--data", data, *TINY)
    assert document["run"] == document["config"]["output"] == output
    assert document["config"]["data"]["files"][0]["path"] == data
    assert document["config"]["model"]["name"] == "12"


def test_a_script_s_output_dir_names_the_run_folder(phlora: CommandLine, place: Path) -> None:
    setting = "training_config.output_dir=elsewhere"
    document = plan(phlora, "--model", "base", "--data", "train.jsonl", "--set", setting)
    assert document["run"] == "elsewhere"


def test_options_and_assignments_override_the_file(phlora: CommandLine, place: Path) -> None:
    (place / "other").symlink_to(place / "base")
    file = write_config("model: {name: m, revision: abc}\ndata: train.jsonl\npeft_config: {r: 8}\n")
    document = plan(phlora, file, "-m", "other", "-o", "here", "--offline", "--set", "peft_config.r=16")
    config, origins = document["config"], document["origins"]
    assert (config["model"]["name"], config["model"]["revision"], config["model"]["offline"]) == (
        "other",
        None,
        True,
    )
    assert config["output"] == "here" and config["peft_config"] == {"r": 16}
    assert (origins["model.name"], origins["output"]) == ("--model", "--output")
    assert (origins["data.files"], origins["peft_config.r"]) == ("run.yaml", "--set")


def test_a_quantised_base_is_trained_on_request(phlora: CommandLine, place: Path) -> None:
    pytest.importorskip("bitsandbytes")
    done = phlora("train", "run.yaml", "--quantization", "nf4", "--output", "runs/nf4", "--json")
    assert done.code == 0, done.err
    facts = json.loads(Path("runs/nf4/run.json").read_text(encoding="utf-8"))
    assert facts["model"]["fingerprint"].endswith("+nf4")


# ----------------------------------------------------------------------------------------- what is shown


def test_the_result_alone_stands_on_standard_output(phlora: CommandLine, place: Path) -> None:
    done = phlora("train", "run.yaml")
    assert done.code == 0, done.err
    report = json.loads(Path("runs/file/report.json").read_text(encoding="utf-8"))
    assert f"{report['tuned']['loss']:.3f}" in done.out and "step 2/2" not in done.out
    assert "step 2/2" in done.err and "phlora chat runs/file" in done.err


def test_quiet_says_the_result_only(phlora: CommandLine, place: Path) -> None:
    done = phlora("train", "run.yaml", "--quiet")
    assert done.code == 0 and done.out and done.err == ""


def test_json_holds_the_run_and_its_report(phlora: CommandLine, place: Path) -> None:
    done = phlora("train", "run.yaml", "--json")
    report = json.loads(Path("runs/file/report.json").read_text(encoding="utf-8"))
    assert done.json == {"run": "runs/file", "report": report}


def test_a_dry_run_shows_what_can_be_run_and_writes_nothing(phlora: CommandLine, place: Path) -> None:
    before = sorted(place.rglob("*"))
    arguments = ["run.yaml", "--set", "peft_config.r=4"]
    text, document = phlora("train", *arguments, "--dry-run"), plan(phlora, *arguments)
    assert sorted(place.rglob("*")) == before
    assert "r: 4  # --set" in text.out
    assert document["config"]["peft_config"]["r"] == 4 and document["plan"]["num_optimizer_steps"] == 2
    (place / "shown.yaml").write_text(text.out, encoding="utf-8")
    again = plan(phlora, "shown.yaml")
    assert again["plan"] == document["plan"]


# ------------------------------------------------------------------------------- a run that is there already


def test_a_run_is_neither_replaced_nor_continued_unless_asked(phlora: CommandLine, trained: Path) -> None:
    weights = Path("runs/file/adapter/last/adapter_model.safetensors")
    before = weights.read_bytes()
    refused = phlora("train", "run.yaml", "--json")
    assert refused.code == 2 and "already holds a run (finished)" in refused.json["error"]["message"]
    both = phlora("train", "run.yaml", "--resume", "--overwrite")
    assert both.code == 2 and "choose one" in both.err
    assert weights.read_bytes() == before

    assert phlora("train", "run.yaml", "--resume", "--quiet").code == 0
    assert weights.read_bytes() == before
    other = ["--set", "training_config.seed=7", "--quiet"]
    assert phlora("train", "run.yaml", "--overwrite", *other).code == 0
    assert weights.read_bytes() != before


def test_a_changed_run_is_not_continued(phlora: CommandLine, trained: Path) -> None:
    done = phlora("train", "run.yaml", "--resume", "--set", "training_config.learning_rate=1e-3")
    assert done.code == 2 and "learning_rate" in done.err and "0.02" in done.err


# ------------------------------------------------------------------------------------------------ evaluate


def test_evaluate_proves_the_run_s_own_rows_again(phlora: CommandLine, trained: Path) -> None:
    before = json.loads(Path("runs/file/report.json").read_text(encoding="utf-8"))
    text, document = phlora("evaluate", "runs/file"), phlora("evaluate", "runs/file", "--json").json
    for side in ("base", "tuned"):
        assert document[side]["loss"] == pytest.approx(before[side]["loss"], rel=1e-5)
    assert f"{before['tuned']['loss']:.3f}" in text.out and "report" in text.err.lower()


def test_evaluate_takes_other_rows_metrics_and_lengths(phlora: CommandLine, trained: Path) -> None:
    write_rows(trained / "other.jsonl", chat_rows(5))
    options = ["--data", "other.jsonl", "--metric", "rouge_l", "--metric", "contains:a"]
    options += ["--max-answers", 1, "--max-new-tokens", 3, "--offline", "--quiet"]
    done = phlora("evaluate", "runs/file", *options, "--json")
    assert done.code == 0 and done.err == ""
    assert {"rouge_l", "contains:a"} <= done.json["tuned"].keys()
    assert done.json["tuned"].get("exact_match") is None
    loss_only = phlora("evaluate", "runs/file", "--max-answers", 0, "--json").json
    assert loss_only["tuned"]["loss"] > 0


def test_evaluate_needs_a_trained_run(phlora: CommandLine, place: Path) -> None:
    done = phlora("evaluate", "runs/none", "--json")
    assert done.code == 2 and "runs/none" in done.json["error"]["message"]


# --------------------------------------------------------------------------------------------- interruption


@pytest.fixture
def ctrl_c() -> Any:
    """Sends this process SIGINT once a condition holds."""
    threads = []

    def watch(condition: Callable[[], bool]) -> None:
        def wait() -> None:
            end = time.monotonic() + 60
            while time.monotonic() < end and not condition():
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGINT)

        threads.append(threading.Thread(target=wait, daemon=True))
        threads[-1].start()

    yield watch
    for thread in threads:
        thread.join()


def steps_logged(run: str) -> int:
    events = Path(run, "events.jsonl")
    return events.read_text(encoding="utf-8").count('"loss"') if events.is_file() else 0


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(
    phlora: CommandLine, place: Path, ctrl_c: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ["--set", "training_config.max_steps=400", "--set", "training_config.logging_steps=1"]
    long += ["--set", "training_config.save_steps=1000"]
    arguments = ["train", "run.yaml", *long]
    monkeypatch.setattr(sys, "argv", ["phlora", *arguments])
    ctrl_c(lambda: steps_logged("runs/file") >= 2)
    done = phlora(*arguments)
    assert done.code == 130, done.err
    (checkpoint,) = Path("runs/file/checkpoints").glob("checkpoint-*")
    assert f"Kept: {checkpoint}" in done.err
    assert done.err.splitlines()[-1].endswith("--resume")
    assert json.loads(Path("runs/file/run.json").read_text(encoding="utf-8"))["status"] == "interrupted"

    step = int(checkpoint.name.partition("-")[2])
    ctrl_c(
        lambda: (
            json.loads(Path("runs/file/run.json").read_text(encoding="utf-8"))["status"] == "running"
            and steps_logged("runs/file") > step + 1
        )
    )
    again = phlora(*arguments, "--resume", "--json")
    assert again.code == 130 and again.json["error"]["kind"] == "Interrupted"
    steps = [int(path.name.partition("-")[2]) for path in Path("runs/file/checkpoints").glob("checkpoint-*")]
    assert max(steps) > step


def test_an_early_interruption_says_that_nothing_is_kept(
    phlora: CommandLine, place: Path, failing: Callable[[BaseException], None]
) -> None:
    failing(KeyboardInterrupt())
    done = phlora("train", "run.yaml", "--json")
    assert done.code == 130 and "No checkpoint" in done.err and "--overwrite" not in done.err
    assert done.json["error"]["kind"] == "Interrupted"
    Path("runs/file").mkdir(parents=True)
    Path("runs/file/run.json").touch()
    assert "runs/file again with --overwrite" in phlora("train", "run.yaml").err


def test_the_format_of_preference_data_can_be_named(phlora: CommandLine, place: Path) -> None:
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
    write_rows(place / "pairs.jsonl", [{**pair, "prompt": f"Hi {n}"} for n in range(8)])
    arguments = ["--model", "base", "--data", "pairs.jsonl", *TINY, "--dry-run"]
    assert "--format" in phlora("train", *arguments).err
    done = phlora("train", *arguments, "--format", "preference_chosen", "--json")
    assert done.code == 0, done.err
    assert done.json["origins"]["data.format"] == "--format"
    assert "256 keeps 100 % of the rows whole" in done.err
