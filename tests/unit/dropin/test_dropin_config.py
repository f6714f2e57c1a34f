"""`phlora.SFTConfig` and `phlora.TrainingArguments`: scripts of any age, on any machine."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from transformers import HfArgumentParser
from transformers.training_args import OptimizerNames

import phlora
from phlora.dropin import machine
from phlora.errors import ConfigError, MissingExtraError

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has what is replaced here")


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.WARNING, "phlora.dropin")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "phlora.dropin"]


def test_settings_of_a_script_of_2024(tmp_path: Path, notes: Any) -> None:
    args = phlora.SFTConfig(
        str(tmp_path),
        evaluation_strategy="steps",
        overwrite_output_dir=True,
        warmup_ratio=0.2,
        max_seq_length=128,
        logging_dir="logs",
        save_safetensors=True,
        no_cuda=True,
        group_by_length=True,
        dataset_kwargs={"add_special_tokens": False},
    )
    assert isinstance(args, trl.SFTConfig)
    assert (args.eval_strategy, args.warmup_steps, args.max_length, args.use_cpu) == ("steps", 0.2, 128, True)
    assert args.train_sampling_strategy == "group_by_length" and args.output_dir == str(tmp_path)
    told = "\n".join(notes())
    for name in (
        "evaluation_strategy",
        "overwrite_output_dir",
        "warmup_ratio",
        "max_seq_length",
        "logging_dir",
    ):
        assert told.count(f"{name} ") == 1
    assert "dataset_kwargs: add_special_tokens has no effect" in told


def test_one_error_says_all_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        phlora.SFTConfig(
            str(tmp_path), split_batches=True, tokenizer=object(), learning_rat=1, sharded_ddp="simple"
        )
    for word in (
        "4 arguments",
        "accelerator_config",
        "SFTTrainer(processing_class=...)",
        "`learning_rate`",
        "FSDP",
    ):
        assert word in str(error.value)


def test_training_arguments_name_the_configuration_that_has_a_setting(tmp_path: Path) -> None:
    args = phlora.TrainingArguments(str(tmp_path), evaluation_strategy="no")
    assert isinstance(args, transformers.TrainingArguments) and not isinstance(args, trl.SFTConfig)
    with pytest.raises(ConfigError, match="max_length is a setting of SFTConfig"):
        phlora.TrainingArguments(str(tmp_path), max_seq_length=128)


@on_a_cpu
def test_what_a_cpu_lacks_is_replaced_with_a_line(tmp_path: Path, notes: Any) -> None:
    args = phlora.SFTConfig(
        str(tmp_path),
        bf16=True,
        tf32=True,
        use_liger_kernel=True,
        activation_offloading=True,
        model_init_kwargs={
            "torch_dtype": "auto",
            "attn_implementation": "flash_attention_2",
            "device_map": "cuda",
            "use_auth_token": True,
        },
    )
    assert not (args.bf16 or args.tf32 or args.use_liger_kernel or args.activation_offloading)
    assert args.model_init_kwargs == {"dtype": "auto", "attn_implementation": "sdpa", "token": True}
    told = "\n".join(notes())
    for word in (
        "bf16 has no effect",
        "tf32",
        "use_liger_kernel",
        "flash_attention_2 needs CUDA",
        "device_map",
    ):
        assert told.count(word) == 1


@on_a_cpu
def test_a_cpu_says_nothing_of_what_nobody_asked_for(tmp_path: Path, notes: Any) -> None:
    args = phlora.SFTConfig(str(tmp_path))
    assert not args.bf16 and notes() == []
    asked = phlora.SFTConfig(str(tmp_path), use_cpu=True, bf16=True)
    assert asked.bf16 and notes() == []
    half = phlora.SFTConfig(str(tmp_path), fp16=True)
    assert not half.fp16 and not half.bf16 and len(notes()) == 1


def test_quantised_loading_moves_into_its_own_configuration() -> None:
    told: list[str] = []
    values = machine.loading_arguments({"load_in_4bit": True, "load_in_8bit": False}, told, device="cpu")
    assert values["quantization_config"].load_in_4bit and "load_in_4bit" not in values
    assert machine.loading_arguments({"load_in_8bit": False}, told, device="cpu") == {}


def test_paged_optimizers_without_bitsandbytes(
    tmp_path: Path, notes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "is_installed", lambda module: False)
    args = phlora.SFTConfig(str(tmp_path), optim="paged_adamw_8bit")
    assert args.optim == "adamw_torch" and "needs bitsandbytes" in notes()[-1]


@on_a_cpu
@pytest.mark.parametrize("paged", machine.UNPAGED)
def test_paged_optimizers_on_a_cpu(tmp_path: Path, notes: Any, paged: str) -> None:
    pytest.importorskip("bitsandbytes")
    args = phlora.SFTConfig(str(tmp_path), optim=paged)
    assert args.optim == machine.UNPAGED[paged] and f"optim: {paged} pages the memory" in notes()[0]
    named = {member.value for member in OptimizerNames if member.value.startswith("paged")}
    assert named == machine.UNPAGED.keys()


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match="wandb"):
        phlora.SFTConfig(str(tmp_path), report_to="wandb")


@pytest.mark.parametrize("kind", [phlora.SFTConfig, phlora.TrainingArguments])
def test_a_configuration_is_one_of_its_library_in_every_other_way(kind: Any, tmp_path: Path) -> None:
    args = kind(str(tmp_path), learning_rate=1e-3)
    for other in (
        pickle.loads(pickle.dumps(args)),
        copy.deepcopy(args),
        dataclasses.replace(args),
    ):
        assert type(other) is kind and other.learning_rate == 1e-3
        assert other.to_dict() == args.to_dict()
    (parsed,) = HfArgumentParser(kind).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--learning_rate", "3e-4"]
    )
    assert type(parsed) is kind and parsed.learning_rate == 3e-4


@dataclasses.dataclass
class Settings(phlora.SFTConfig):
    extra: int = 3
    learning_rate: float = 5e-4
    gradient_checkpointing: bool = False


class Later(Settings):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(extra=7, **kwargs)


@dataclasses.dataclass
class Arguments(phlora.TrainingArguments):
    extra: int = 3
    bf16: bool = True


@on_a_cpu
@pytest.mark.parametrize("kind", [Settings, Later, Arguments])
def test_a_dataclass_of_the_scripts_is_of_any_age(tmp_path: Path, notes: Any, kind: Any) -> None:
    args = kind(output_dir=str(tmp_path), evaluation_strategy="steps", no_cuda=False)
    assert (args.eval_strategy, args.bf16, args.extra) == ("steps", False, 7 if kind is Later else 3)
    assert "\n".join(notes()).count("evaluation_strategy ") == 1
    if kind is not Arguments:
        assert kind(output_dir=str(tmp_path), max_seq_length=64).max_length == 64
        assert args.learning_rate == 5e-4 and {"gradient_checkpointing", "learning_rate"} <= args.given
    else:
        assert "bf16 has no effect" in "\n".join(notes())
    with pytest.raises(ConfigError, match="learning_rat"):
        kind(output_dir=str(tmp_path), learning_rat=1.0)
    for copied in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert copied.extra == args.extra and copied.given == args.given


@on_a_cpu
def test_a_dataclass_of_the_scripts_is_filled_by_a_parser_and_by_position(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--extra", "5", "--max_length", "32"]
    (parsed,) = HfArgumentParser(Settings).parse_args_into_dataclasses(words)
    assert (parsed.extra, parsed.max_length, parsed.learning_rate) == (5, 32, 5e-4)
    assert Settings(str(tmp_path)).output_dir == str(tmp_path)
    assert dataclasses.replace(parsed, extra=6).extra == 6
