"""The one weight that row blocks show: written into, copied and saved."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from layer_cases import (
    Case,
)
from torch import Tensor, nn

from phlora.errors import ModelError


def block_up(case: Case) -> nn.Module:
    return case.module.get_submodule("base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.default")


@pytest.mark.parametrize("name", ["row blocks"])
def test_values_between_the_blocks_are_an_error_and_change_nothing(case: Case) -> None:
    up, expected = block_up(case), case()
    before = dict(up.named_parameters())
    with torch.no_grad(), pytest.raises(ModelError, match="lie outside the blocks"):
        nn.init.orthogonal_(up.weight)
    with torch.no_grad(), pytest.raises(ModelError, match="lie outside the blocks"):
        up.weight[64:70] = 1.0
    with pytest.raises(ModelError, match="cannot be exchanged"):
        up.weight = nn.Parameter(torch.zeros_like(up.weight))
    with pytest.raises(ValueError, match="read-only"):
        up.weight.detach().numpy()[...] = 1.0
    assert dict(up.named_parameters()) == before and torch.equal(case(), expected)


@pytest.mark.parametrize("name", ["row blocks"])
def test_a_weight_of_row_blocks_is_copied_and_saved_as_a_tensor(case: Case) -> None:
    weight = block_up(case).weight.detach()
    buffer = io.BytesIO()
    torch.save({"weight": weight}, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(buffer)["weight"]):
        assert type(twin) is Tensor and torch.equal(twin, weight)
        twin.zero_()
    assert block_up(case).weight.detach().any()
    block_up(case).weight.requires_grad_(False)
    assert not any(p.requires_grad for p in block_up(case).parameters())
