"""Replacing the layers of an existing model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import phlora.lora as lora
from phlora.errors import ConfigError, ModelError


class Conv1D(nn.Module):
    """GPT-2's linear layer as transformers has it: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj = nn.Linear(8, 16, bias=False)
        self.o_proj = nn.Linear(8, 8)
        self.c_attn = Conv1D(24, 8)

    def forward(self, x):
        q, k, v = self.qkv_proj(x).split([8, 4, 4], dim=-1)
        a, b, c = self.c_attn(self.o_proj(q)).chunk(3, dim=-1)
        return a * b + c + torch.cat([k, v], dim=-1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(8, 6, 3, stride=2, padding=1, bias=False, padding_mode="circular")
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h), self.conv(h.transpose(-1, -2))


x = torch.arange(12).view(2, 6) % 11


def outputs(model):
    with torch.no_grad():
        return torch.cat([y.flatten() for y in model(x)])


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def test_replaces_by_the_last_parts_of_the_name(model):
    assert lora.replace(model, "o_proj", r=2) == ["layers.0.o_proj", "layers.1.o_proj"]
    assert all(isinstance(block.o_proj, lora.Linear) for block in model.layers)


def test_replaces_by_the_full_name_and_by_several(model):
    assert lora.replace(model, ["layers.1.o_proj", "head"], r=2) == ["layers.1.o_proj", "head"]
    assert type(model.layers[0].o_proj) is nn.Linear


def test_a_part_of_a_name_component_does_not_match(model):
    with pytest.raises(ConfigError, match="did you mean `o_proj`"):
        lora.replace(model, "_proj", r=2)


def test_every_kind_of_layer_starts_as_no_change_and_shares_its_weight(model):
    expected = outputs(model)
    weights = {name: parameter for name, parameter in model.named_parameters()}
    targets = ["embed", "qkv_proj", "o_proj", "c_attn", "conv", "head"]
    lora.replace(model, targets, r=2, lora_alpha=4)
    kinds = [type(m) for m in (model.embed, model.layers[0].c_attn, model.conv, model.head)]
    assert kinds == [lora.Embedding, lora.Linear, lora.Conv1d, lora.Linear]
    torch.testing.assert_close(outputs(model), expected)
    for name, parameter in model.named_parameters():
        old_name = name.replace("conv.conv", "conv")
        if "lora_" not in name:
            assert parameter is weights[old_name]
            assert parameter.requires_grad == name.endswith("bias")
    assert model.head.weight is model.embed.weight


def test_chosen_blocks_of_a_fused_weight(model):
    lora.replace(
        model,
        ["qkv_proj"],
        r=2,
        enable_lora=[True, False, True],
        out_features_per_block=(8, 4, 4),
        lora_dropout=0.1,
    )
    layer = model.layers[0].qkv_proj
    assert isinstance(layer, lora.MergedLinear) and layer.bias is None
    assert layer.lora_B.shape == (12, 2) and layer.lora_dropout.p == 0.1


def test_blocks_of_a_transposed_layer(model):
    before = outputs(model)
    lora.replace(model, "c_attn", r=2, enable_lora=[True, False, True])
    layer = model.layers[0].c_attn
    assert isinstance(layer, lora.MergedLinear) and layer.fan_in_fan_out
    assert layer.weight.shape == (8, 24)
    torch.testing.assert_close(outputs(model), before)


def test_trains_and_saves_what_was_replaced(model):
    lora.replace(model, ["qkv_proj", "conv"], r=2)
    lora.mark_only_lora_as_trainable(model)
    model.layers[0].qkv_proj.lora_B.data.normal_()
    fresh = Model()
    fresh.load_state_dict(model.state_dict(), strict=False)
    lora.replace(fresh, ["qkv_proj", "conv"], r=2)
    fresh.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(outputs(fresh), outputs(model))


def test_a_layer_under_two_names_becomes_one_layer(model):
    model.again = model.layers[0]
    names = lora.replace(model, "o_proj", r=2)
    assert "again.o_proj" in names
    assert model.again.o_proj is model.layers[0].o_proj
    model.twin = model.head
    lora.replace(model, ["head", "twin"], r=2)
    assert model.twin is model.head and isinstance(model.head, lora.Linear)


def test_mode_dtype_and_device_follow_the_replaced_layer(model):
    model = model.to(torch.bfloat16).eval()
    lora.replace(model, ["o_proj"], r=2)
    layer = model.layers[0].o_proj
    assert layer.lora_A.dtype == torch.bfloat16 and not layer.training
    lora.replace(model, ["qkv_proj"], r=2, lora_dtype=torch.float32)
    assert model.layers[0].qkv_proj.lora_A.dtype == torch.float32
    with torch.device("meta"):
        empty = Model()
    lora.replace(empty, ["o_proj"], r=2)
    assert empty.layers[0].o_proj.lora_A.is_meta


@pytest.mark.parametrize(
    ("targets", "settings", "error", "message"),
    [
        (["o_proj", "k_porj"], {}, ConfigError, "`k_porj` matches no module"),
        (["o_prjo"], {}, ConfigError, "did you mean `o_proj`"),
        (["o_proj", "layers.0"], {}, ModelError, r"layers\.0: A Block cannot be replaced"),
        (["layers.0"], {}, ModelError, "name layers inside it: c_attn, o_proj, qkv_proj"),
        (["o_proj"], {"r": -1}, ConfigError, "The rank is -1"),
        (["o_proj", "conv"], {"enable_lora": [True, False]}, ModelError, "has no row blocks"),
        (["qkv_proj"], {"enable_lora": [True, False, True]}, ConfigError, "out_features_per_block"),
    ],
)
def test_mistakes_are_named_and_leave_the_model_as_it_was(model, targets, settings, error, message):
    before = {name: (type(m), id(m)) for name, m in model.named_modules()}
    with pytest.raises(error, match=message):
        lora.replace(model, targets, **{"r": 2, **settings})
    assert {name: (type(m), id(m)) for name, m in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_is_not_replaced_twice(model):
    lora.replace(model, "o_proj", r=2)
    with pytest.raises(ModelError, match="A Linear cannot be replaced"):
        lora.replace(model, "o_proj", r=2)


def test_subclasses_are_left_alone(model):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model.head = Scaled(8, 11)
    with pytest.raises(ModelError, match="A Scaled cannot be replaced"):
        lora.replace(model, "head", r=2)


def test_attention_output_is_refused():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ModelError, match=r"attn\.out_proj: nn\.MultiheadAttention reads"):
        lora.replace(model, "out_proj", r=2)


def test_copies_do_not_share(model):
    twin = copy.deepcopy(model)
    lora.replace(model, "o_proj", r=2)
    assert twin.layers[0].o_proj.weight is not model.layers[0].o_proj.weight
    assert twin.layers[0].o_proj.weight.requires_grad
