"""What loralib's file leaves open is told from its shapes, or asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from both_forms import (
    SIZES,
    stacked,
)
from torch import nn

from phlora.adapters.loralib_file import read_loralib
from phlora.errors import ConfigError, ModelError


@pytest.mark.parametrize(
    ("rows", "num_blocks", "enabled"),
    [
        (64, 1, ("q_proj",)),
        (64, 2, ("k_proj", "v_proj")),
        (128, 3, ("q_proj", "k_proj", "v_proj")),
        (128, 1, None),
    ],
)
def test_shapes_tell_the_blocks_where_only_one_choice_fits(
    tmp_path: Path, rows: int, num_blocks: int, enabled: tuple[str, ...] | None
) -> None:
    file = stacked(tmp_path / "a.pt", rows, num_blocks=num_blocks)
    (layer,) = read_loralib(file, lora_alpha=1, blocks=SIZES).layers
    assert (layer.layout.enabled if layer.layout else None) == enabled


@pytest.mark.parametrize(
    ("rows", "num_blocks", "leaf", "options", "message"),
    [
        (96, 2, "qkv_proj", {"blocks": SIZES}, "--enable q_proj,k_proj or --enable q_proj,v_proj"),
        (96, 2, "qkv_proj", {"blocks": SIZES, "enable": ["k", "v"]}, "k_proj, v_proj do not fit"),
        (90, 2, "qkv_proj", {"blocks": SIZES}, "no choice fits"),
        (128, 3, "qkv_proj", {}, "no 3 equal blocks"),
        (16, 2, "c_attn", {}, "several choices fit"),
        (16, 2, "mixer", {}, "--blocks mixer="),
        (16, 2, "c_attn", {"enable": ["qq"]}, "did you mean|one of"),
        (16, 1, "mixer", {"enable": ["q"]}, "leave it out"),
    ],
)
def test_blocks_that_cannot_be_told_are_a_question_not_a_guess(
    tmp_path: Path, rows: int, num_blocks: int, leaf: str, options: dict[str, Any], message: str
) -> None:
    file = stacked(tmp_path / "a.pt", rows, num_blocks=num_blocks, leaf=leaf)
    with pytest.raises(ConfigError, match=message):
        read_loralib(file, lora_alpha=1, **options)


def test_a_convolution_whose_kernel_is_not_known_is_a_question(tmp_path: Path) -> None:
    file, conv = tmp_path / "a.pt", nn.ModuleDict({"c": loralib.Conv2d(6, 4, 3, r=2)})
    torch.save(loralib.lora_state_dict(conv, bias="all"), file)
    with pytest.raises(ConfigError, match="convolution, and the file does not know its kernel"):
        read_loralib(file, lora_alpha=1)
    with pytest.raises(ConfigError, match="no layer `d`"):
        read_loralib(file, lora_alpha=1, kernels={"d": (3, 3)})
    with pytest.raises(ModelError, match=r"not those of a kernel of 5"):
        read_loralib(file, lora_alpha=1, kernels={"c": (5, 5)})
