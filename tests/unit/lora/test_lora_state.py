"""Freezing, saving, loading, merging and counting whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import phlora.lora as lora
from phlora.errors import ConfigError, ModelError


class Model(nn.Module):
    """An embedding, linear, convolutional and plain layers, and names that mislead."""

    def __init__(self, r: int = 2):
        super().__init__()
        self.embed = lora.Embedding(11, 8, r=r)
        self.qkv = lora.MergedLinear(
            8, 14, r=r, enable_lora=[True, False, True], out_features_per_block=(8, 2, 4)
        )
        self.conv = lora.Conv1d(14, 6, 3, r=r, padding=1)
        self.lora_block = nn.Sequential(nn.Linear(6, 6))
        self.bias_head = nn.Linear(6, 3)
        self.rank_zero = lora.Linear(3, 3)

    def forward(self, x):
        h = self.qkv(self.embed(x))
        h = self.conv(h.transpose(-1, -2)).transpose(-1, -2)
        return self.rank_zero(self.bias_head(self.lora_block(h)))


class PlainModel(Model):
    """The same model before its layers were replaced."""

    def __init__(self):
        nn.Module.__init__(self)
        self.embed = nn.Embedding(11, 8)
        self.qkv = nn.Linear(8, 14)
        self.conv = nn.Conv1d(14, 6, 3, padding=1)
        self.lora_block = nn.Sequential(nn.Linear(6, 6))
        self.bias_head = nn.Linear(6, 3)
        self.rank_zero = nn.Linear(3, 3)


LORA = {f"{layer}.lora_{m}" for layer in ("embed", "qkv", "conv") for m in "AB"}
BIASES = {
    "none": set(),
    "lora_only": {"qkv.bias", "conv.conv.bias"},
    "all": {"qkv.bias", "conv.conv.bias", "lora_block.0.bias", "bias_head.bias", "rank_zero.bias"},
}


def trained(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model()
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


x = torch.arange(10).view(2, 5)


@pytest.mark.parametrize("bias", BIASES)
def test_marks_and_saves_the_same_parameters(bias):
    model = trained()
    assert lora.mark_only_lora_as_trainable(model, bias=bias) is None
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == LORA | BIASES[bias]
    assert set(lora.lora_state_dict(model, bias=bias)) == trainable


def test_marks_lora_parameters_that_were_frozen_before():
    model = trained().requires_grad_(False)
    lora.mark_only_lora_as_trainable(model)
    assert model.qkv.lora_A.requires_grad


@pytest.mark.parametrize("function", [lora.mark_only_lora_as_trainable, lora.lora_state_dict])
def test_bad_bias_names_the_choices(function):
    with pytest.raises(ConfigError, match="lora_only"):
        function(trained(), bias="lora")


@pytest.mark.parametrize(
    "function",
    [
        lora.mark_only_lora_as_trainable,
        lora.lora_state_dict,
        lora.merge,
        lora.unmerge,
        lora.merged_state_dict,
    ],
)
def test_a_model_without_lora_is_an_error_and_stays_as_it_is(function):
    model = PlainModel()
    with pytest.raises(ModelError, match="no LoRA parameters"):
        function(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_attention_that_bypasses_its_output_layer_is_refused():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "head": lora.Linear(8, 8, r=2)})
    model["attn"].out_proj = lora.Linear(8, 8, r=2)
    with pytest.raises(ModelError, match=r"attn\.out_proj"):
        lora.mark_only_lora_as_trainable(model)
    assert model["attn"].in_proj_weight.requires_grad


def test_two_step_loading_of_the_guide(tmp_path):
    plain = PlainModel()
    torch.save(plain.state_dict(), tmp_path / "pretrained.pt")
    source = trained()
    torch.save(lora.lora_state_dict(source), tmp_path / "lora.pt")

    model = Model()
    model.load_state_dict(torch.load(tmp_path / "pretrained.pt"), strict=False)
    model.load_state_dict(torch.load(tmp_path / "lora.pt"), strict=False)
    with torch.no_grad():
        source.load_state_dict(plain.state_dict(), strict=False)
        torch.testing.assert_close(model(x), source(x))
        assert not torch.allclose(model(x), plain(x))


def test_loading_reports_how_much_found_its_place():
    assert lora.load_lora_state_dict(Model(), lora.lora_state_dict(trained(), bias="all")) == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {f"base.{k}": v for k, v in s.items()}, "6 of 6 tensors have no place"),
        (lambda s: {**s, "qvk.lora_A": s["qkv.lora_A"]}, r"did you mean `qkv\.lora_A`"),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("conv")},
            "2 LoRA parameters of the model",
        ),
        (lambda s: {**s, "qkv.lora_A": s["qkv.lora_A"][:2]}, r"shape \(2, 8\), the model \(4, 8\)"),
        (lambda s: {}, "6 LoRA parameters of the model"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_loaded(change, message):
    model = Model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=message):
        lora.load_lora_state_dict(model, change(lora.lora_state_dict(trained())))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merge_and_unmerge_a_model():
    model = trained()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        lora.merge(model)
        assert model.qkv.merged and model.conv.merged and not model.rank_zero.merged
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        lora.unmerge(model)
        assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_written_after_an_evaluation_resumes_exactly():
    model = trained()
    lora.mark_only_lora_as_trainable(model)
    with torch.no_grad():
        model.eval()(x)
    resumed = Model()
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        # Not bit for bit: torch picks another kernel for a convolution whose weight has requires_grad.
        torch.testing.assert_close(resumed.train()(x), model.train()(x))
        torch.testing.assert_close(resumed.eval()(x), model.eval()(x))


def test_merged_state_dict_loads_strictly_into_the_plain_model():
    model, plain = trained(), PlainModel()
    plain.load_state_dict(lora.merged_state_dict(model), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


def test_merged_state_dict_of_a_single_layer():
    layer, plain = lora.Conv1d(2, 3, 3, r=1), nn.Conv1d(2, 3, 3)
    plain.load_state_dict(lora.merged_state_dict(layer), strict=True)
    assert torch.equal(plain.weight, layer.weight)


def test_a_tied_head_keeps_the_pretrained_weight_and_cannot_be_merged_away():
    torch.manual_seed(0)
    embed = lora.Embedding(11, 8, r=2)
    nn.init.normal_(embed.lora_A)
    head = nn.Linear(8, 11, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, head)
    with torch.no_grad():
        before = head(torch.ones(8))
        torch.testing.assert_close(model.eval()(x), model.train()(x))
        model.eval()(x)
        assert torch.equal(head(torch.ones(8)), before)
    with pytest.raises(ModelError, match=r"also `1\.weight`"):
        lora.merged_state_dict(model)


def test_a_layer_under_two_names_is_merged_under_both():
    layer = lora.Linear(4, 4, r=1)
    nn.init.normal_(layer.lora_B)
    state = lora.merged_state_dict(nn.ModuleDict({"a": layer, "b": layer}))
    assert sorted(state) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    assert torch.equal(state["a.weight"], state["b.weight"])
    assert not torch.equal(state["a.weight"], layer.weight)


def test_counts():
    model = nn.Sequential(lora.Linear(10, 5, r=2), nn.Linear(5, 5, bias=False))
    lora.mark_only_lora_as_trainable(model)
    counts = lora.count_parameters(model)
    assert (counts.lora, counts.trainable, counts.total) == (30, 30, 50 + 5 + 30 + 25)
    assert str(counts) == "30 of 110 parameters trainable (27.27%), 30 LoRA"


def test_layers_of_other_packages_that_name_their_parameters_so_are_understood():
    class Foreign(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.lora_magnitude = nn.Parameter(torch.ones(4))

    model = nn.Sequential(Foreign())
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.lora_magnitude", "0.bias"}
