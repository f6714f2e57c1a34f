"""`training_config`: dictionaries of existing scripts work, mistakes get one clear message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phlora.errors import ConfigError, MissingExtraError
from phlora.train.arguments import DEFAULTS, training_arguments

# In the manner of the sample of Phi-3's model card, with names from several library versions.
SAMPLE = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
    "evaluation_strategy": "epoch",
    "max_seq_length": 512,
}


def test_the_sample_dictionary_works_on_a_cpu_and_says_what_changed(tmp_path: Path) -> None:
    settings = training_arguments(SAMPLE, output_dir=tmp_path)
    args = settings.args
    assert (args.learning_rate, args.warmup_steps, args.max_length) == (5e-6, 0.2, 512)
    assert (args.eval_strategy, args.bf16, args.seed) == ("epoch", False, 0)
    notes = "\n".join(settings.notes)
    for word in ("warmup_steps", "eval_strategy", "max_length", "overwrite_output_dir", "bf16"):
        assert word in notes
    assert settings.origins["learning_rate"] == "user"


def test_defaults_stand_where_the_user_is_silent(tmp_path: Path) -> None:
    settings = training_arguments({"learning_rate": 1e-3}, output_dir=tmp_path)
    assert settings.args.learning_rate == 1e-3
    assert settings.args.gradient_checkpointing is DEFAULTS["gradient_checkpointing"][0] is False
    assert settings.origins["save_total_limit"] == "phlora"
    assert settings.args.per_device_eval_batch_size == settings.args.per_device_train_batch_size


def test_numbers_written_as_text_are_numbers(tmp_path: Path) -> None:
    settings = training_arguments({"learning_rate": "2e-4", "max_steps": "10"}, output_dir=tmp_path)
    assert settings.args.learning_rate == 2e-4 and settings.args.max_steps == 10
    assert "'2e-4' was read as the number" in settings.notes[0]


@pytest.mark.parametrize(
    ("training_config", "message"),
    [
        ({"learning_rat": 1e-4}, "did you mean `learning_rate`"),
        ({"learning_rate": "fast"}, "learning_rate: `fast`"),
        ({"learning_rate": -1e-4}, "above 0"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"per_device_train_batch_size": 0}, "1 or more"),
        ({"per_device_train_batch_size": 1.5}, "whole number"),
        ({"gradient_accumulation_steps": True}, "a number"),
        ({"gradient_checkpointing": "yes"}, "true or false"),
        ({"max_steps": 0}, "1 or more, or -1"),
        ({"seed": [1]}, "a number"),
        ({"lr_scheduler_type": "cosinus"}, "cosinus"),
    ],
)
def test_a_mistake_names_key_and_expectation(
    training_config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="training_config") as error:
        training_arguments(training_config, output_dir=tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["model_init_kwargs", "chat_template_path", "eos_token"])
def test_what_would_change_the_model_behind_the_rows_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` cannot be set here"):
        training_arguments({key: "x"}, output_dir=tmp_path)


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install wandb"):
        training_arguments({"report_to": ["wandb"]}, output_dir=tmp_path)


def test_nothing_is_created_while_settings_are_checked(tmp_path: Path) -> None:
    training_arguments({}, output_dir=tmp_path / "checkpoints")
    assert list(tmp_path.iterdir()) == []


def test_z_loss_is_phlora_s_own_setting(tmp_path):
    assert training_arguments({}, output_dir=tmp_path).z_loss == 0
    assert training_arguments({"z_loss": 1e-4}, output_dir=tmp_path).z_loss == 1e-4
    # What YAML makes of 1e-4 without a dot.
    from_text = training_arguments({"z_loss": "1e-4"}, output_dir=tmp_path)
    assert from_text.z_loss == 1e-4 and "1e-4" in from_text.notes[0]
    for wrong in (-1, True, "much", float("nan")):
        with pytest.raises(ConfigError, match="z_loss"):
            training_arguments({"z_loss": wrong}, output_dir=tmp_path)
    with pytest.raises(ConfigError, match="did you mean `z_loss`"):
        training_arguments({"zloss": 1e-4}, output_dir=tmp_path)
