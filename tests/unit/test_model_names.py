"""Settings of `model` under the names of transformers and bitsandbytes: the same, one note; else one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phlora.config import ModelConfig, QuantizationConfig, RunConfig, build_config, load_config
from phlora.config_values import apply_overrides, read_config
from phlora.errors import ConfigError
from phlora.model_names import in_own_words, other_spellings

NF4_AS_IN_TRANSFORMERS = QuantizationConfig(type="nf4", double_quant=False)


def config_of(**model: Any) -> RunConfig:
    return build_config({"model": {"name": "m", **model}, "data": "chats.jsonl"})


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": torch.float16}, {"dtype": "float16"}),
        ({"torch_dtype": "torch.float32"}, {"dtype": "float32"}),
        ({"torch_dtype": "bf16"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "auto"}, {"dtype": "auto"}),
        ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
        ({"dtype": "bfloat16", "torch_dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
        ({"device_map": "auto"}, {"device": "auto"}),
        ({"device_map": "cuda"}, {"device": "cuda"}),
        ({"device_map": 1}, {"device": "cuda:1"}),
        ({"device_map": {"": 0}}, {"device": "cuda:0"}),
        ({"device_map": {"": "cpu"}}, {"device": "cpu"}),
        ({"device_map": torch.device("cuda", 2)}, {"device": "cuda:2"}),
        ({"device_map": None, "torch_dtype": None, "quantization_config": None}, {}),
        ({"attn_implementation": "eager"}, {"attn_implementation": "eager"}),
        ({"use_flash_attention_2": True}, {"attn_implementation": "flash_attention_2"}),
        ({"use_flash_attention_2": False}, {}),
        ({"local_files_only": True}, {"offline": True}),
        ({"low_cpu_mem_usage": True}, {}),
        ({"load_in_4bit": True}, {"quantization": NF4_AS_IN_TRANSFORMERS}),
        ({"load_in_8bit": True}, {"quantization": QuantizationConfig(type="int8")}),
        ({"load_in_4bit": True, "load_in_8bit": False}, {"quantization": NF4_AS_IN_TRANSFORMERS}),
        ({"load_in_4bit": False, "bnb_4bit_quant_type": "fp4"}, {}),
        (
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": torch.bfloat16,
            },
            {"quantization": QuantizationConfig(type="nf4", double_quant=True, compute_dtype="bfloat16")},
        ),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"}},
            {"quantization": QuantizationConfig(type="nf4", double_quant=False, compute_dtype="float32")},
        ),
        (
            {"quantization": "nf4", "bnb_4bit_use_double_quant": False},
            {"quantization": NF4_AS_IN_TRANSFORMERS},
        ),
        (
            {"quantization": "nf4", "load_in_4bit": True},
            {"quantization": QuantizationConfig(type="nf4")},
        ),
        (
            {"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": 6.0}},
            {"quantization": QuantizationConfig(type="int8")},
        ),
    ],
)
def test_a_known_name_means_the_own_one(given: dict[str, Any], own: dict[str, Any]) -> None:
    config = config_of(**given)
    assert config.model == ModelConfig(name="m", **own)
    foreign = [key for key in given if key not in ModelConfig.__dataclass_fields__ and given[key] is not None]
    for key in foreign:
        assert any(key in note for note in config.notes), (key, config.notes)
    assert bool(config.notes) == bool(foreign)


def test_an_object_of_transformers_counts_for_what_was_set() -> None:
    from transformers import BitsAndBytesConfig

    given = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    assert config_of(quantization_config=given).model.quantization == QuantizationConfig(
        type="nf4", double_quant=False, compute_dtype="bfloat16"
    )
    assert config_of(
        quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    ).model.quantization == QuantizationConfig(type="int8")


def test_every_setting_of_bitsandbytes_that_transformers_has_is_decided_about() -> None:
    from transformers import BitsAndBytesConfig

    fields = {name.removeprefix("_") for name in BitsAndBytesConfig(load_in_4bit=True).to_dict()}
    undecided = fields - {"quant_method"} - other_spellings("quantization")
    assert not undecided


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, "contradict each other"),
        ({"torch_dtype": 16}, "model.dtype"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "`load_in_4bit` and `load_in_8bit` contradict"),
        ({"load_in_4bit": True, "quantization": "int8"}, "`quantization: {type: int8}`"),
        ({"load_in_4bit": False, "quantization": "nf4"}, "load_in_4bit: false"),
        ({"load_in_4bit": "yes"}, "true or false"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "quantization: nf4"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int3"}, "compute_dtype"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": "x"}, "double_quant"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, "kept as bytes"),
        ({"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}, "one device"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["o_proj"]}, "leave it out"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "`gptq`"),
        ({"quantization_config": {"bits": 4}}, "Unknown key `bits`"),
        ({"quantization_config": {"load_in_4bit": True}, "load_in_4bit": False}, "contradict"),
        ({"quantization_config": "nf4"}, "a mapping"),
        ({"quantization": ["nf4"], "load_in_4bit": True}, "quantization"),
        ({"device_map": "balanced"}, "one device"),
        ({"device_map": {"model.layers.0": 0, "model.layers.1": 1}}, "one device"),
        ({"device_map": {}}, "one device"),
        ({"device_map": "auto", "device": "cpu"}, "contradict"),
        ({"max_memory": {0: "10GB"}}, "phlora plan"),
        ({"max_seq_length": 2048}, "training_config.max_length"),
        ({"token": "hf_abcdefghijklmnopqrstuvwx"}, "hf auth login"),
        ({"model_name_or_path": "other"}, "contradict"),
        ({"torch_dtyp": "auto"}, "Unknown key"),
    ],
)
def test_what_has_no_equal_or_contradicts_is_one_error(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(**given)
    assert says in str(error.value) and "abcdefghijkl" not in str(error.value)


def test_a_value_keeps_the_place_that_it_came_from(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: m, torch_dtype: bf16, load_in_4bit: true}\ndata: d\n")
    config = load_config(path)
    assert config.origins["model.dtype"] == str(path)
    assert config.origins["model.quantization"] == str(path)
    assert not {"model.torch_dtype", "model.load_in_4bit"} & config.origins.keys()


@pytest.mark.parametrize(
    ("file", "override", "own"),
    [
        ("torch_dtype: float16", "dtype=float32", {"dtype": "float32"}),
        ("dtype: float16", "torch_dtype=float32", {"dtype": "float32"}),
        ("device_map: cuda", "device=cpu", {"device": "cpu"}),
        ("load_in_4bit: true", "quantization=int8", {"quantization": QuantizationConfig(type="int8")}),
        ("quantization: int8", "load_in_4bit=true", {"quantization": NF4_AS_IN_TRANSFORMERS}),
        ("quantization: {type: nf4}", "load_in_8bit=true", {"quantization": QuantizationConfig(type="int8")}),
    ],
)
def test_a_later_source_has_the_last_word_whatever_the_name(
    tmp_path: Path, file: str, override: str, own: dict[str, Any]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model:\n  name: m\n  {file}\ndata: d\n")
    values, origins = read_config(path)
    config = build_config(*apply_overrides(values, [f"model.{override}"], origins))
    assert config.model == ModelConfig(name="m", **own)
    key = f"model.{next(iter(own))}"
    assert {config.origins.get(key), config.origins.get(f"{key}.type")} - {None} == {"--set"}


def test_the_section_that_was_handed_over_stays_as_it_was() -> None:
    section = {"name": "m", "torch_dtype": "bf16", "quantization_config": {"load_in_4bit": True}}
    before = {**section, "quantization_config": dict(section["quantization_config"])}  # type: ignore[call-overload]
    in_own_words(section)
    assert section == before
