"""What a configuration says of each module: ranks and scalings of row blocks, and the plain adapter of the same sum."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from phlora.adapters.layout import (
    lay_out,
    narrowed,
    plain_config,
    require_known_patterns,
    with_blocks,
    with_plain_names,
)
from phlora.adapters.targets import Targets
from phlora.errors import ConfigError
from phlora.testing import tiny_phi3

QKV = [f"model.layers.{i}.self_attn.qkv_proj" for i in (0, 1)]
DOWN = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
Q_AND_V = Targets((*QKV, *DOWN), (), {name: ("q_proj", "v_proj") for name in QKV})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_phi3()[0]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_each_block_has_the_rank_and_the_scaling_of_the_pattern_that_names_it(
    model: Any, use_rslora: bool
) -> None:
    lora = LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"v_proj": 9}, alpha_pattern={"q_proj": 5}, use_rslora=use_rslora
    )
    root = math.sqrt if use_rslora else float
    for rows in lay_out(model, Q_AND_V, lora).values():
        # 64 rows of q, 32 of k between them, then 32 of v.
        assert [(row.name, row.start, row.stop) for row in rows] == [("q_proj", 0, 64), ("v_proj", 96, 128)]
        assert [row.r for row in rows] == [4, 9]
        assert [row.scaling for row in rows] == pytest.approx([5 / root(4), 6 / root(9)])


def test_a_pattern_may_name_one_layer_only(model: Any) -> None:
    lora = LoraConfig(r=4, rank_pattern={"layers.1.self_attn.q_proj": 7})
    ranks = {name: [row.r for row in rows] for name, rows in lay_out(model, Q_AND_V, lora).items()}
    assert ranks == {QKV[0]: [4, 4], QKV[1]: [7, 4]}


def test_a_start_that_is_taken_out_of_the_base_keeps_both_and_needs_no_fused_weight(model: Any) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa")
    laid_out = lay_out(model, Targets((*QKV, *DOWN), (), {}), lora)
    assert set(laid_out) == {*QKV, *DOWN}
    for name, (row,) in laid_out.items():
        assert (row.name, row.start) == (name.rpartition(".")[2], 0)
        assert (row.r, row.scaling) == (8, 2.0)
        assert row.stop == model.get_submodule(name).out_features


@pytest.mark.parametrize("use_rslora", [False, True])
def test_stock_peft_is_told_the_total_rank_and_an_alpha_of_the_smallest_scaling(
    model: Any, use_rslora: bool
) -> None:
    lora = LoraConfig(r=4, lora_alpha=6, rank_pattern={"v_proj": 9}, use_rslora=use_rslora)
    blocks = lay_out(model, Q_AND_V, lora)
    plain = plain_config(model, lora, Q_AND_V, blocks)
    assert (plain.r, plain.rank_pattern) == (13, {"down_proj": 4})
    # One scaling for all, the smallest: B of the plain form holds what the others have beyond it.
    scalings = [6 / 2, 6 / 3] if use_rslora else [6 / 4, 6 / 9]
    assert plain.lora_alpha / (math.sqrt(13) if use_rslora else 13) == pytest.approx(min(scalings))
    assert plain.alpha_pattern == {"down_proj": 6}
    assert plain.blocks[QKV[0]] == {
        "sizes": {"q_proj": 64, "k_proj": 32, "v_proj": 32},
        "enabled": ["q_proj", "v_proj"],
        "r": [4, 9],
        "scaling": pytest.approx(scalings),
    }
    assert (lora.r, lora.rank_pattern) == (4, {"v_proj": 9})


def test_layers_that_disagree_are_named_in_full(model: Any) -> None:
    lora = LoraConfig(r=4, rank_pattern={"layers.1.mlp.down_proj": 2})
    plain = plain_config(model, lora, Targets(tuple(DOWN), (), {}), {})
    assert (plain.r, plain.rank_pattern) == (4, {DOWN[1]: 2})


def test_what_is_said_of_blocks_is_saved_beside_what_stands_there(tmp_path: Path) -> None:
    (tmp_path / "phlora.json").write_text('{"base_model": "some/base"}', encoding="utf-8")
    lora = LoraConfig(r=4, target_modules=["qkv_proj"])
    with_blocks(lora, {"x": {"enabled": ["q_proj"]}}).save_pretrained(str(tmp_path))
    facts = json.loads((tmp_path / "phlora.json").read_text("utf-8"))
    assert facts == {"base_model": "some/base", "blocks": {"x": {"enabled": ["q_proj"]}}}
    # What stock PEFT reads says nothing of it.
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["target_modules"], "blocks" in config) == (4, ["qkv_proj"], False)


def test_names_are_short_where_they_mean_these_modules_alone(model: Any) -> None:
    every = with_plain_names(model, Q_AND_V, LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]))
    assert every.target_modules == {"qkv_proj", "down_proj"}
    one = Targets((QKV[1],), (), {QKV[1]: ("q_proj",)})
    named = with_plain_names(model, one, LoraConfig(target_modules=["layers.1.self_attn.q_proj"]))
    assert named.target_modules == {QKV[1].removeprefix("model.")}


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"layers_to_transform": [1]}, {QKV[1], DOWN[1]}),
        ({"exclude_modules": ["down_proj"]}, set(QKV)),
        ({}, {*QKV, *DOWN}),
    ],
)
def test_layers_that_are_left_out_have_no_blocks_either(settings: dict[str, Any], left: set[str]) -> None:
    found = narrowed(Q_AND_V, LoraConfig(target_modules=["qkv_proj", "down_proj"], **settings))
    assert set(found.modules) == left
    assert set(found.blocks) == left & set(QKV)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_about_nothing_is_told_with_the_nearest(key: str) -> None:
    require_known_patterns(LoraConfig(**{key: {"v_proj": 3, "down_proj": 2}}), Q_AND_V)
    with pytest.raises(ConfigError, match="(?s)`dwn_proj` matches nothing that is adapted.*down_proj"):
        require_known_patterns(LoraConfig(**{key: {"dwn_proj": 3}}), Q_AND_V)
    # A fused weight of which rows are adapted is not adapted as a whole.
    with pytest.raises(ConfigError, match="`qkv_proj` matches nothing"):
        require_known_patterns(LoraConfig(**{key: {"qkv_proj": 3}}), Q_AND_V)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa", "lora_dropout": 0.1}, "would be dropped out too"),
        ({"init_lora_weights": "eva"}, "cannot be done for q_proj, v_proj alone"),
        ({"lora_bias": True}, "cannot be had for q_proj, v_proj"),
    ],
)
def test_what_has_no_meaning_on_rows_is_refused(model: Any, settings: dict[str, Any], message: str) -> None:
    lora = LoraConfig(r=4)
    for name, value in settings.items():
        setattr(lora, name, value)  # PEFT itself would refuse or warn of some
    with pytest.raises(ConfigError, match=message):
        lay_out(model, Q_AND_V, lora)
