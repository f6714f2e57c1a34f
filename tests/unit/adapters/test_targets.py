"""What `target_modules` means: every requested name is accounted for, or it is an error that says what exists."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from peft import get_peft_model
from transformers import LlamaConfig

from phlora.adapters.attach import attach, lora_settings
from phlora.adapters.targets import Targets, resolve_targets
from phlora.errors import ConfigError
from phlora.models.families import fused_row_blocks
from phlora.testing import tiny_llama, tiny_phi3

LLAMA_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def counts(targets: Targets) -> dict[str, int]:
    """The last parts of the modules, and how many of each."""
    return dict(Counter(module.rpartition(".")[2] for module in targets.modules))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_phi3()[0]


@pytest.mark.parametrize("request_", [None, "all-linear", LLAMA_NAMES, [*LLAMA_NAMES, "qkv_proj"]])
def test_the_usual_names_mean_all_four_linears_of_every_layer(model: Any, request_: Any) -> None:
    targets = resolve_targets(model, request_)
    assert counts(targets) == {"o_proj": 2, "qkv_proj": 2, "gate_up_proj": 2, "down_proj": 2}
    assert bool(targets.notes) == isinstance(request_, list)


def test_all_linear_is_what_peft_means_by_it(model: Any) -> None:
    theirs = get_peft_model(tiny_phi3()[0], lora_settings({"target_modules": "all-linear"}))
    assert set(theirs.targeted_module_names) == set(resolve_targets(model, "all-linear").modules)


def test_names_suffixes_and_expressions_match_as_in_peft(model: Any) -> None:
    assert counts(resolve_targets(model, ["self_attn.o_proj"])) == {"o_proj": 2}
    assert resolve_targets(model, ["layers.1.mlp.down_proj"]).modules == ("model.layers.1.mlp.down_proj",)
    assert resolve_targets(model, r".*layers\.0.*(o|down)_proj").modules == (
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
    )


def test_the_head_is_adapted_only_when_it_is_named(model: Any) -> None:
    assert "lm_head" not in counts(resolve_targets(model))
    assert resolve_targets(model, ["lm_head"]).modules == ("lm_head",)


@pytest.mark.parametrize(
    "request_", [["o_proj", "q_pro"], ["Wqkv"], [".*nothing.*"], "no_such_module", "(unclosed"]
)
def test_a_name_that_matches_nothing_is_an_error_even_beside_one_that_does(model: Any, request_: Any) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_targets(model, request_)
    assert "target_modules" in str(error.value)
    if request_ != "(unclosed":
        assert "gate_up_proj (2×)" in str(error.value)


QKV, GATE_UP = "model.layers.{}.self_attn.qkv_proj", "model.layers.{}.mlp.gate_up_proj"


@pytest.mark.parametrize(
    ("request_", "blocks"),
    [
        (["v_proj", "q_proj"], {QKV.format(i): ("q_proj", "v_proj") for i in (0, 1)}),
        (["layers.1.mlp.up_proj"], {GATE_UP.format(1): ("up_proj",)}),
        (r".*layers\.0.*\.(k|gate)_proj", {QKV.format(0): ("k_proj",), GATE_UP.format(0): ("gate_proj",)}),
    ],
)
def test_a_part_of_a_fused_weight_is_a_row_block(model: Any, request_: Any, blocks: Any) -> None:
    targets = resolve_targets(model, request_)
    assert targets.blocks == blocks and set(targets.modules) == set(blocks)
    assert "each with its own A and B" in targets.notes[0]


@pytest.mark.parametrize("request_", [["qkv_proj", "v_proj"], r".*v_proj"])
def test_the_whole_weight_wins_over_its_parts(model: Any, request_: Any) -> None:
    targets = resolve_targets(model, request_)
    assert counts(targets) == {"qkv_proj": 2} and not targets.blocks
    assert targets.notes == (
        "v_proj is a part of qkv_proj, which is adapted as a whole: what was asked for matches qkv_proj too",
    )


def test_an_excluded_part_leaves_the_others(model: Any) -> None:
    everything = resolve_targets(model, "all-linear", exclude_modules=["k_proj"])
    assert everything.blocks == {QKV.format(i): ("q_proj", "v_proj") for i in (0, 1)}
    assert counts(everything) == {"o_proj": 2, "qkv_proj": 2, "gate_up_proj": 2, "down_proj": 2}
    assert not resolve_targets(model, ["q_proj"], exclude_modules=r".*\.q_proj").modules
    with pytest.raises(ConfigError, match="exclude_modules: No module is called `k_pro`"):
        resolve_targets(model, "all-linear", exclude_modules=["k_pro"])


def test_row_blocks_are_known_for_the_sizes_of_the_configuration(model: Any) -> None:
    sizes = fused_row_blocks(model.config)
    layer = model.model.layers[0]
    assert sizes["qkv_proj"] == {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    assert sum(sizes["qkv_proj"].values()) == layer.self_attn.qkv_proj.out_features
    assert sum(sizes["gate_up_proj"].values()) == layer.mlp.gate_up_proj.out_features
    assert fused_row_blocks(LlamaConfig()) == {} == fused_row_blocks(None)


def test_a_model_with_separate_projections_is_taken_by_its_own_names() -> None:
    llama = tiny_llama(num_hidden_layers=1)
    assert counts(resolve_targets(llama, ["q_proj", "v_proj"])) == {"q_proj": 1, "v_proj": 1}
    assert sorted(counts(resolve_targets(llama))) == sorted(LLAMA_NAMES)


def test_only_the_adapter_trains_and_the_summary_counts_it() -> None:
    base = tiny_phi3()[0]
    attached = attach(base, {"r": 4})
    trainable = {name for name, p in attached.model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    by_hand = 2 * 4 * ((64 + 128) + (64 + 64) + (64 + 224) + (112 + 64))
    assert attached.summary.num_trainable == by_hand
    assert attached.summary.modules["qkv_proj"] == (2, 2 * 4 * (64 + 128))
    assert f"{by_hand:,} of" in attached.summary.render()


def test_layers_to_transform_narrows_the_targets() -> None:
    attached = attach(tiny_phi3()[0], {"layers_to_transform": [1], "target_modules": ["o_proj"]})
    assert attached.summary.modules == {"o_proj": (1, 16 * (64 + 64))}


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        ({"rank": 8}, "Unknown key `rank`"),
        ({"lora_alfa": 8}, "did you mean `lora_alpha`"),
        ({"r": -4}, "1 or more"),
        ({"r": 2.5}, "whole number"),
        ({"r": "16"}, "whole number"),
        ({"lora_alpha": 0}, "above 0"),
        ({"lora_dropout": 1.0}, "below 1"),
        ({"bias": "some"}, "one of none, all, lora_only"),
        ({"rank_pattern": {"o_proj": 0}}, "rank_pattern.o_proj"),
    ],
)
def test_wrong_lora_settings_are_named(peft_config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match="peft_config") as error:
        lora_settings(peft_config)
    assert message in str(error.value)


def test_alpha_follows_the_rank_where_it_is_not_given() -> None:
    assert lora_settings({"r": 8}).lora_alpha == 16
    assert lora_settings({}).r == 16
    assert lora_settings({"r": 8, "lora_alpha": 4}).lora_alpha == 4
