"""`training_config`: dictionaries of existing scripts work, mistakes get one clear message."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml

from phlora.errors import ConfigError, MissingExtraError
from phlora.train.arguments import DEFAULTS, train_on_of, training_arguments
from phlora.train.fields import HONOURED, MAPPED, REFUSED

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


@pytest.mark.parametrize(
    ("training_config", "level", "checkpointing"),
    [
        ({}, "auto", False),
        ({"activation_memory": "recompute_mlp"}, "recompute_mlp", False),
        ({"activation_memory": "recompute"}, "recompute", True),
        ({"gradient_checkpointing": True}, "recompute", True),
        ({"gradient_checkpointing": False}, "keep", False),
        ({"activation_checkpointing": True}, "recompute", True),
        ({"activation_memory": "auto", "gradient_checkpointing": True}, "recompute", True),
        ({"activation_memory": "keep", "gradient_checkpointing": False}, "keep", False),
    ],
)
def test_activation_memory_and_checkpointing_are_one(
    tmp_path: Path, training_config: dict[str, Any], level: str, checkpointing: bool
) -> None:
    settings = training_arguments(training_config, output_dir=tmp_path)
    assert settings.activation_memory == level
    assert bool(settings.args.gradient_checkpointing) is checkpointing
    decided = settings.with_activation_memory("recompute")
    assert decided.args.gradient_checkpointing and bool(settings.args.gradient_checkpointing) is checkpointing


@pytest.mark.parametrize(
    ("training_config", "message"),
    [
        ({"activation_memory": "recomput"}, "did you mean `recompute`"),
        ({"activation_memory": 3}, "one of auto, keep, recompute_mlp, recompute"),
        ({"activation_memory": "keep", "gradient_checkpointing": True}, "contradict each other"),
        ({"activation_memory": "recompute", "activation_checkpointing": False}, "contradict each other"),
    ],
)
def test_words_of_activation_memory_that_mean_nothing(
    tmp_path: Path, training_config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        training_arguments(training_config, output_dir=tmp_path)


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
        ({"per_device_train_batch_size": 0}, "from 1 to"),
        ({"per_device_train_batch_size": 1.5}, "whole number"),
        ({"gradient_accumulation_steps": True}, "a whole number"),
        ({"gradient_checkpointing": "yes"}, "true or false"),
        ({"max_steps": 0}, "or -1 to count epochs"),
        ({"seed": [1]}, "a whole number"),
        ({"max_steps": 10**18}, "1 to 100,000,000"),
        ({"max_length": 10**18}, "a number from 1 to"),
        ({"seed": -1}, "a number from 0 to"),
        ({"learning_rate": 10**400}, "a number"),
        ({"save_total_limit": 0}, "a number from 1 to"),
        ({"eval_strategy": True}, "one of no, steps, epoch"),
        ({"eval_strategy": "epochs"}, "did you mean `epoch`"),
        ({"run_name": 5}, "expected: text"),
        ({"lr_scheduler_kwargs": "abc"}, "a mapping"),
        ({"lr_scheduler_kwargs": {"nonsense": 1}}, "a mapping with num_cycles"),
        ({"optim_args": "nonsense"}, "optim"),
        ({"adam_beta1": 2}, "0 to below 1"),
        ({"lr_scheduler_type": "cosinus"}, "cosinus"),
    ],
)
def test_a_mistake_names_key_and_expectation(
    training_config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="training_config") as error:
        training_arguments(training_config, output_dir=tmp_path)
    assert message.lower() in str(error.value).lower()


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


def test_every_field_of_the_installed_trl_is_decided_about() -> None:
    decided = [*HONOURED, *MAPPED, *REFUSED]
    assert len(decided) == len(set(decided)), "one decision each"
    installed = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    assert not installed - set(decided), "honour it, map it or refuse it in train/fields.py"


def test_every_field_that_is_left_to_the_trainer_reaches_it(tmp_path: Path) -> None:
    fields = {field.name: field for field in dataclasses.fields(trl.SFTConfig)}
    for name in HONOURED & fields.keys() - {"dataloader_pin_memory"}:
        default = fields[name].default
        if isinstance(default, int | float) and not isinstance(default, bool) and default > 0:
            args = training_arguments({name: default}, output_dir=tmp_path).args
            assert getattr(args, name) == default, name


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_refused_field_names_what_does_it_and_accepts_its_default(key: str, tmp_path: Path) -> None:
    fields = {field.name: field for field in dataclasses.fields(trl.SFTConfig)}
    training_arguments({key: fields[key].default}, output_dir=tmp_path)
    with pytest.raises(ConfigError, match=f"`{key}` cannot be set here") as error:
        training_arguments({key: "cuda" if key == "use_cpu" else True}, output_dir=tmp_path, device="cuda")
    assert error.value.fix == REFUSED[key].fix


@pytest.mark.parametrize("key", sorted(MAPPED))
def test_a_mapped_field_says_what_does_it_and_does_not_reach_the_trainer(key: str, tmp_path: Path) -> None:
    field = {field.name: field for field in dataclasses.fields(trl.SFTConfig)}[key]
    values = {"ddp_timeout": 5, "ddp_bucket_cap_mb": 5, "dataset_num_proc": 2, "local_rank": 0}
    words = {"ddp_backend": "gloo", "hub_strategy": "end", "truncation_mode": "keep_end"}
    switches = isinstance(field.default, bool) or "bool" in str(field.type)
    value = {**values, **words}.get(key, (not field.default) if switches else "x")
    arguments = training_arguments({key: value}, output_dir=tmp_path)
    assert any(key in note and MAPPED[key] in note for note in arguments.notes)
    if key != "output_dir":
        assert getattr(arguments.args, key) == getattr(training_arguments({}, output_dir=tmp_path).args, key)


@pytest.mark.parametrize(
    ("training_config", "train_on"),
    [
        ({}, None),
        ({"assistant_only_loss": True}, "assistant"),
        ({"assistant_only_loss": False}, "all"),
        ({"completion_only_loss": True}, "assistant"),
        ({"completion_only_loss": False}, "all"),
        ({"completion_only_loss": None}, None),
        ({"completion_only_loss": False, "assistant_only_loss": True}, "assistant"),
        ({"completion_only_loss": True, "assistant_only_loss": False}, "assistant"),
    ],
)
def test_the_switches_of_trl_say_what_trains(training_config: dict[str, Any], train_on: str | None) -> None:
    assert train_on_of(training_config) == train_on


WORDS = [
    (key, text)
    for key in ("eval_strategy", "logging_strategy", "save_strategy")
    for text in ("no", "off", "null")
]


@pytest.mark.parametrize(
    ("key", "text"), [*WORDS, *(("report_to", text) for text in ("no", "off", "null", "none"))]
)
def test_what_yaml_makes_of_no_is_read_as_the_word(key: str, text: str, tmp_path: Path) -> None:
    args = training_arguments({key: yaml.safe_load(text)}, output_dir=tmp_path).args
    if text == "null" and key != "report_to":
        assert getattr(args, key) == DEFAULTS.get(key, ("steps",))[0], "the default"
    else:
        assert getattr(args, key) == ([] if key == "report_to" else "no")
