"""Every field of PEFT's `LoraConfig` is decided about, and every name in it stands for something in the model."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
from peft import LoraConfig, TaskType

from phlora.adapters.attach import attach, lora_settings
from phlora.adapters.lora_fields import HONOURED, INITS, NOT_COMPUTED, REFUSED
from phlora.errors import ConfigError
from phlora.testing import tiny_phi3


def refusal(**peft_config: Any) -> str:
    with pytest.raises(ConfigError) as error:
        attach(tiny_phi3()[0], {"target_modules": ["qkv_proj"], "r": 4, **peft_config})
    return str(error.value)


def test_every_field_is_honoured_or_refused() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert not HONOURED & REFUSED.keys()
    assert fields == HONOURED | REFUSED.keys()


def test_every_way_to_start_is_computed_or_refused() -> None:
    hint = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    named = {name for part in typing.get_args(hint) for name in typing.get_args(part)}
    assert named | {"lora_ga"} == {name for name in INITS if isinstance(name, str)} | NOT_COMPUTED.keys()


@pytest.mark.parametrize("init", [*NOT_COMPUTED, "EVA", "corda_x"])
def test_a_start_that_is_not_computed_is_refused_with_the_way_out(init: str) -> None:
    text = refusal(init_lora_weights=init)
    assert "peft_config.init_lora_weights" in text and f"`{init}` would not be computed" in text
    assert "What to do" in text


@pytest.mark.parametrize("init", ["", "pisa", "kaiming"])
def test_an_unknown_start_is_an_error_with_the_nearest(init: str) -> None:
    text = refusal(init_lora_weights=init)
    assert "is not known" in text and "pissa" in text


@pytest.mark.parametrize(
    "init", [True, False, "gaussian", "Gaussian", "olora", "pissa", "pissa_niter_2", "mica"]
)
def test_a_start_that_peft_computes_is_accepted(init: Any) -> None:
    attach(tiny_phi3()[0], {"target_modules": ["qkv_proj"], "r": 4, "init_lora_weights": init})


@pytest.mark.parametrize("task", ["SEQ_CLS", TaskType.SEQ_2_SEQ_LM, "causal_lm"])
def test_other_tasks_are_refused(task: Any) -> None:
    with pytest.raises(ConfigError, match="(?s)peft_config.task_type.*CAUSAL_LM"):
        lora_settings({"task_type": task})


def test_the_task_of_chat_models_may_be_written_out() -> None:
    for task in ("CAUSAL_LM", TaskType.CAUSAL_LM, None):
        lora_settings({"task_type": task})


@pytest.mark.parametrize("key", REFUSED)
def test_refused_fields_are_named_and_ask_for_nothing_by_default(key: str) -> None:
    default = getattr(LoraConfig(), key)
    lora_settings({key: default})
    values: dict[str, Any] = {
        "inference_mode": True,
        "layer_replication": [[0, 2], [0, 2]],
        "alora_invocation_tokens": [5],
        "use_qalora": True,
        "qalora_group_size": 8,
        "megatron_core": "other",
        "megatron_config": {"a": 1},
        "loftq_config": {"loftq_bits": 4},
    }
    if key not in values:
        kind = next(
            part
            for part in typing.get_args(typing.get_type_hints(LoraConfig)[key])
            if dataclasses.is_dataclass(part)
        )
        values[key] = kind()
    text = refusal(**{key: values[key]})
    assert f"`{key}` cannot be set here" in text and "What to do" in text


@pytest.mark.parametrize(
    ("peft_config", "where", "nearest"),
    [
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save", "lm_head"),
        ({"modules_to_save": ["lm_head", "classifier"]}, "modules_to_save", "`classifier`"),
        ({"target_parameters": ["down_prj.weight"]}, "target_parameters", "down_proj.weight"),
        ({"target_parameters": ["down_proj.weight", "x.weight"]}, "target_parameters", "`x.weight`"),
        ({"layers_to_transform": [0], "layers_pattern": "layer"}, "layers_pattern", "layers"),
        ({"layers_to_transform": [0], "layers_pattern": ["layers", "h"]}, "layers_pattern", "`h`"),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform", "from 0 to 1"),
        ({"layers_to_transform": -1}, "layers_to_transform", "from 0 to 1"),
        ({"trainable_token_indices": {"embed_token": [1]}}, "trainable_token_indices", "embed_tokens"),
        ({"trainable_token_indices": [1, 10**6]}, "trainable_token_indices", "from 0 to"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices", "no token -1"),
        ({"exclude_modules": ["o_prj"]}, "exclude_modules", "o_proj"),
        ({"rank_pattern": {"qkv": 8}}, "rank_pattern", "qkv_proj"),
        ({"alpha_pattern": {"down_proj": 8}}, "alpha_pattern", "`down_proj`"),
    ],
)
def test_what_matches_nothing_is_an_error(peft_config: dict[str, Any], where: str, nearest: str) -> None:
    text = refusal(**peft_config)
    assert f"peft_config.{where}" in text and nearest in text


@pytest.mark.parametrize(
    "peft_config",
    [
        {"modules_to_save": ["lm_head", "norm"]},
        {"modules_to_save": ["model.norm"]},
        {"target_parameters": ["down_proj.weight"]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"trainable_token_indices": [0, 1]},
        {"trainable_token_indices": {"embed_tokens": [1]}},
    ],
)
def test_names_that_the_model_has_are_taken(peft_config: dict[str, Any]) -> None:
    attach(tiny_phi3()[0], {"target_modules": ["qkv_proj"], "r": 4, **peft_config})
