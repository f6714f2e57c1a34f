"""What the layers compute beyond loralib; parity with loralib is in tests/parity/test_loralib.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import phlora.lora as lora
from phlora.errors import ConfigError
from phlora.lora import functional


def randomise(layer):
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter, std=0.3)
    return layer


def test_needs_nothing_but_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import phlora.lora; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'torch', 'phlora'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("sizes", [(40, 10, 10), (30, 10, 10), (24, 8, 4)])
def test_unequal_blocks_change_their_own_rows_only(sizes):
    n = sum(sizes)
    layer = randomise(
        lora.MergedLinear(
            16,
            n,
            r=4,
            enable_lora=[True, False, True],
            out_features_per_block=sizes,
        )
    )
    delta = layer.merged_weight() - layer.weight
    q, k, v = delta.split(sizes)
    assert (q.abs().sum(1) > 0).all() and not k.any() and (v.abs().sum(1) > 0).all()
    assert layer.lora_A.shape == (8, 16) and layer.lora_B.shape == (sizes[0] + sizes[2], 4)


def test_each_block_is_a_linear_layer_of_its_own():
    sizes = (6, 2, 4)
    fused_layer = randomise(
        lora.MergedLinear(
            5, 12, r=2, lora_alpha=3, enable_lora=[True, True, True], out_features_per_block=sizes
        )
    )
    x = torch.randn(7, 5)
    parts, start = [], 0
    for i, size in enumerate(sizes):
        single = lora.Linear(5, size, r=2, lora_alpha=3)
        rows = slice(start, start + size)
        single.load_state_dict(
            {
                "weight": fused_layer.weight[rows],
                "bias": fused_layer.bias[rows],
                "lora_A": fused_layer.lora_A[2 * i : 2 * i + 2],
                "lora_B": fused_layer.lora_B[rows],
            }
        )
        parts.append(single(x))
        start += size
    torch.testing.assert_close(fused_layer(x), torch.cat(parts, dim=-1))


@pytest.mark.parametrize(
    ("out_features", "enable_lora", "sizes"),
    [
        (10, [True, False, True], None),
        (10, [], None),
        (10, [True, True], (5, 4)),
        (10, [True], (5, 5)),
        (4, [True, True], (4, 0)),
    ],
)
def test_blocks_that_do_not_add_up_are_refused(out_features, enable_lora, sizes):
    with pytest.raises(ConfigError, match="MergedLinear"):
        lora.MergedLinear(8, out_features, r=2, enable_lora=enable_lora, out_features_per_block=sizes)


def test_unequal_sizes_are_suggested_where_equal_ones_fail():
    with pytest.raises(ConfigError, match="out_features_per_block"):
        lora.MergedLinear(3072, 5120, r=16, enable_lora=[True, False, True])


def test_disabled_blocks_cost_nothing():
    layer = randomise(lora.MergedLinear(8, 24, r=2, enable_lora=[False, True, False]))
    assert layer.lora_A.shape == (2, 8) and layer.lora_B.shape == (8, 2)
    assert [block.rows for block in layer.blocks] == [slice(8, 16)]


def test_no_tensor_of_the_size_of_the_weight_is_kept():
    layer = randomise(lora.MergedLinear(64, 96, r=4, enable_lora=[True, False, True]))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64))
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    assert max(t.numel() for t in kept if t.data_ptr() not in own) <= 3 * 64


def test_the_reference_formulas_can_take_the_place_of_the_fused_functions():
    layer = randomise(lora.MergedLinear(8, 12, r=2, enable_lora=[True, False, True]))
    x = torch.randn(4, 8)
    fused_output = layer(x)
    layer.lora_blocks = functional.lora_blocks
    torch.testing.assert_close(layer(x), fused_output)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        ("Conv1d", 1),
        ("Conv1d", 3),
        ("Conv2d", (3, 5)),
        ("Conv2d", (1, 4)),
        ("Conv3d", 2),
        ("Conv3d", (2, 1, 3)),
    ],
)
def test_convolutions_of_any_kernel_and_groups(kind, kernel, groups):
    make = getattr(lora, kind)
    layer = randomise(make(4, 6, kernel, r=1, lora_alpha=3, groups=groups, padding=1))
    dims = layer.conv.weight.ndim - 2
    x = torch.randn(2, 4, *range(6, 6 + dims))
    delta = 3 * (layer.lora_B @ layer.lora_A).view_as(layer.weight)
    expected = layer.conv._conv_forward(x, layer.weight + delta, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0 and layer.lora_B.grad.abs().sum() > 0
    assert layer.weight.grad is None


def test_dropout_of_convolutions_acts_on_the_adapter_only():
    torch.manual_seed(0)
    layer = randomise(lora.Conv2d(3, 4, 3, r=2, lora_dropout=0.5))
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        first, second = layer(x), layer(x)
        assert not torch.equal(first, second)
        mean = torch.stack([layer(x) for _ in range(2000)]).mean(0)
        expected = layer.eval()(x)
        base = layer.conv(x)
    assert (mean - expected).norm() < 0.1 * (expected - base).norm()


def test_plain_convolution_checkpoints_load():
    plain, layer = nn.Conv2d(3, 4, 3), lora.Conv2d(3, 4, 3, r=2)
    result = layer.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys == ["lora_A", "lora_B"] and not result.unexpected_keys
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(layer(x), plain(x))


def test_embedding_options_of_torch():
    torch.manual_seed(0)
    plain = nn.Embedding(10, 6, padding_idx=0, scale_grad_by_freq=True)
    layer = lora.Embedding(10, 6, r=2, padding_idx=0, scale_grad_by_freq=True)
    layer.load_state_dict(plain.state_dict(), strict=False)
    indices = torch.tensor([[0, 1, 1, 3]])
    assert torch.equal(layer(indices), plain(indices))
    layer(indices).sum().backward()
    assert not layer.lora_A.grad[:, 0].any() and layer.lora_A.grad[:, 1].any()


def test_embedding_with_max_norm_never_bends_the_merged_rows():
    layer = randomise(lora.Embedding(10, 6, r=2, max_norm=0.5))
    indices = torch.arange(10)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(indices), layer.train()(indices))


@pytest.mark.parametrize("r", [0, 2])
def test_embedding_from_pretrained_keeps_the_values(r):
    values = torch.randn(10, 6)
    before = values.clone()
    layer = lora.Embedding.from_pretrained(values, r=r, padding_idx=3)
    assert torch.equal(values, before) and torch.equal(layer.weight, before)
    assert torch.equal(layer(torch.arange(10)), F.embedding(torch.arange(10), before))
    assert layer.padding_idx == 3 and layer.is_adapted() == bool(r)


@pytest.mark.parametrize("adapted", ["linear1", "linear2"])
def test_torch_encoder_layers_use_the_adapter_in_eval_mode_too(adapted):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    old = getattr(layer, adapted)
    new = lora.Linear(old.in_features, old.out_features, r=2)
    new.load_state_dict(old.state_dict(), strict=False)
    setattr(layer, adapted, randomise(new))
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=1e-4, atol=1e-5)


def test_reset_parameters_of_a_transposed_layer_uses_the_right_fan_in():
    layer = lora.Linear(1000, 4, r=2, fan_in_fan_out=True)
    layer.reset_parameters()
    assert layer.weight.shape == (1000, 4)
    assert layer.weight.abs().max() <= 1 / 1000**0.5


def test_repr_names_rank_and_alpha():
    assert "r=2, lora_alpha=8" in repr(lora.Linear(4, 4, r=2, lora_alpha=8))
