"""What reaches the training and the evaluation, and what an interruption leaves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from command_line import CommandLine, FakeReport, FakeTraining, write_config


def test_a_model_and_data_are_enough(phlora: CommandLine, training: FakeTraining) -> None:
    done = phlora("train", "--model", "m", "--data", "a.jsonl", "--data", "b.jsonl", "--eval-data", "c.jsonl")
    config = training.calls[0]["config"]
    assert done.code == 0
    assert config.model.name == "m"
    assert [file.path for file in config.data.files] == ["a.jsonl", "b.jsonl"]
    assert [file.path for file in config.data.eval] == ["c.jsonl"]
    assert config.output == "runs/a"


@pytest.mark.parametrize(
    ("data", "output"),
    [
        ("chats.jsonl", "runs/chats"),
        ("deep/chats.v2.jsonl.gz", "runs/chats.v2"),
        ("گفتگو.csv", "runs/گفتگو"),
        ("owner/chats:train", "runs/chats-train"),
        ("..", "runs/run"),
    ],
)
def test_the_run_folder_is_named_after_the_data(
    phlora: CommandLine, training: FakeTraining, data: str, output: str
) -> None:
    phlora("train", "--model", "m", "--data", data)
    assert training.calls[0]["config"].output == output


def test_a_script_s_output_dir_names_the_run_folder(phlora: CommandLine, training: FakeTraining) -> None:
    phlora("train", "--model", "m", "--data", "d", "--set", "training_config.output_dir=elsewhere")
    assert training.calls[0]["config"].output == "elsewhere"


def test_options_and_assignments_override_the_file(phlora: CommandLine, training: FakeTraining) -> None:
    file = write_config("model: {name: m, revision: abc}\ndata: file.jsonl\npeft_config: {r: 8}\n")
    phlora("train", file, "-m", "other", "-o", "here", "--offline", "--set", "peft_config.r=16")
    config = training.calls[0]["config"]
    assert (config.model.name, config.model.revision, config.model.offline) == ("other", None, True)
    assert config.data.files[0].path == "file.jsonl"
    assert config.peft_config == {"r": 16}
    assert config.origins == {
        "model.name": "--model",
        "model.offline": "--offline",
        "data.files": "run.yaml",
        "output": "--output",
        "peft_config.r": "--set",
    }
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_names_are_never_read_as_yaml(phlora: CommandLine, training: FakeTraining) -> None:
    phlora("train", "--model", "12", "--data", "a: [b].jsonl")
    config = training.calls[0]["config"]
    assert (config.model.name, config.data.files[0].path) == ("12", "a: [b].jsonl")


def test_flags_reach_the_training(phlora: CommandLine, training: FakeTraining) -> None:
    phlora("train", write_config(), "--resume", "--quiet")
    phlora("train", write_config(), "--overwrite")
    first, second = training.calls
    assert (first["resume"], first["overwrite"], first["display"].quiet) == (True, False, True)
    assert (second["resume"], second["overwrite"], second["display"].quiet) == (False, True, False)


def test_the_result_alone_stands_on_standard_output(phlora: CommandLine, training: FakeTraining) -> None:
    done = phlora("train", write_config())
    assert done.out == "exact_match 0.02 -> 0.91\n"
    assert "phlora chat runs/file" in done.err and "{'loss': 1.0}" in done.err


def test_json_holds_the_run_and_its_report(phlora: CommandLine, training: FakeTraining) -> None:
    done = phlora("train", write_config(), "--json")
    assert done.json == {"run": "runs/file", "report": FakeReport().to_json()}


def test_a_dry_run_shows_the_configuration_and_its_origins(
    phlora: CommandLine, training: FakeTraining
) -> None:
    arguments = ["train", write_config(), "--dry-run", "--set", "peft_config.r=16"]
    text, document = phlora(*arguments), phlora(*arguments, "--json").json
    assert training.calls[0]["dry_run"] is True
    assert text.out.strip() == "peft_config:\n  r: 16  # --set"
    assert document["config"]["peft_config"] == {"r": 16}
    assert document["plan"] == {"num_optimizer_steps": 7}
    assert document["origins"]["model.name"] == "run.yaml"


# ------------------------------------------------------------------------------------------------ evaluate


def test_evaluate_passes_its_options_on(phlora: CommandLine, training: FakeTraining) -> None:
    done = phlora(
        *("evaluate", "runs/x", "--data", "d", "--metric", "rouge_l", "--metric", "contains:a"),
        *("--max-answers", "0", "--max-new-tokens", "5", "--json"),
    )
    call = training.calls[0]
    assert done.json["tuned"] == {"exact_match": 0.91}
    assert (call["run"], call["data"], call["metrics"]) == ("runs/x", ["d"], ["rouge_l", "contains:a"])
    assert (call["max_answers"], call["max_new_tokens"]) == (0, 5)


def test_evaluate_leaves_the_run_s_own_settings(phlora: CommandLine, training: FakeTraining) -> None:
    done = phlora("evaluate", "runs/x")
    assert done.out == "exact_match 0.02 -> 0.91\n"
    assert {training.calls[0][key] for key in ("data", "metrics", "max_answers", "max_new_tokens")} == {None}


# --------------------------------------------------------------------------------------------- interruption


def test_an_interrupted_run_says_what_is_kept_and_how_to_go_on(
    phlora: CommandLine, training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path("runs/file/checkpoints/checkpoint-40")
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").write_text("{}", encoding="utf-8")
    training.raises = KeyboardInterrupt()
    arguments = ["train", write_config(), "--overwrite", "--set", "peft_config.r=16"]
    monkeypatch.setattr(sys, "argv", ["phlora", *arguments])
    done = phlora(*arguments)
    assert done.code == 130
    assert done.err.splitlines()[-1] == (
        f"Interrupted. Kept: {checkpoint}. "
        "Continue with: phlora train run.yaml --set peft_config.r=16 --resume"
    )


def test_an_early_interruption_says_that_nothing_is_kept(phlora: CommandLine, training: FakeTraining) -> None:
    training.raises = KeyboardInterrupt()
    done = phlora("train", write_config(), "--json")
    assert done.code == 130 and "No checkpoint" in done.err and "--overwrite" not in done.err
    assert done.json["error"]["kind"] == "Interrupted"
    Path("runs/file").mkdir(parents=True)
    Path("runs/file/run.json").touch()
    assert "runs/file again with --overwrite" in phlora("train", write_config()).err
