"""phlora.lora beside loralib 0.1.2: equal where loralib is right."""

from __future__ import annotations

import math

import loralib
import pytest
import torch
import torch.nn.functional as F
from loralib_layers import assert_near, rows
from torch import nn
from transformers.pytorch_utils import Conv1D

import phlora.lora as lora


def indices(size, *shape):
    return lambda: torch.randint(size, shape)


# A layer made from either package, and a draw of its input. Sizes are odd and unequal on purpose.
LAYERS = {
    "Linear": (lambda m: m.Linear(13, 7, r=3, lora_alpha=5), rows(5, 13)),
    "Linear, no bias, 3-d input": (lambda m: m.Linear(13, 7, r=7, bias=False), rows(2, 3, 13)),
    "Linear, fan_in_fan_out": (
        lambda m: m.Linear(13, 7, r=1, lora_alpha=2, fan_in_fan_out=True),
        rows(5, 13),
    ),
    "Linear, r=0": (lambda m: m.Linear(13, 7), rows(5, 13)),
    "MergedLinear q and v": (
        lambda m: m.MergedLinear(13, 21, r=3, lora_alpha=6, enable_lora=[True, False, True]),
        rows(5, 13),
    ),
    "MergedLinear all": (lambda m: m.MergedLinear(13, 22, r=2, enable_lora=[True, True]), rows(2, 3, 13)),
    "MergedLinear middle, fan_in_fan_out": (
        lambda m: m.MergedLinear(13, 21, r=3, enable_lora=[False, True, False], fan_in_fan_out=True),
        rows(1, 13),
    ),
    "MergedLinear one block": (lambda m: m.MergedLinear(13, 7, r=3, enable_lora=[True]), rows(5, 13)),
    "Embedding": (lambda m: m.Embedding(17, 9, r=4, lora_alpha=3), indices(17, 3, 5)),
    "Embedding, padding_idx": (lambda m: m.Embedding(17, 9, r=4, padding_idx=2), indices(17, 3, 5)),
    "Embedding, r=0": (lambda m: m.Embedding(17, 9), indices(17, 3, 5)),
    "Conv1d, kernel 1": (lambda m: m.Conv1d(5, 8, 1, r=2, lora_alpha=3), rows(2, 5, 11)),
    "Conv2d": (lambda m: m.Conv2d(3, 8, 3, r=2, lora_alpha=3, stride=2, padding=1), rows(2, 3, 9, 7)),
    "Conv2d, groups": (lambda m: m.Conv2d(6, 8, 3, r=2, groups=2, bias=False), rows(2, 6, 5, 6)),
    "Conv2d, r=0": (lambda m: m.Conv2d(3, 8, 3), rows(2, 3, 5, 6)),
    "Conv3d, kernel 1": (lambda m: m.Conv3d(3, 4, 1, r=2), rows(2, 3, 3, 4, 5)),
}


each_layer = pytest.mark.parametrize("name", LAYERS)


def pair(name, device="cpu"):
    """The two packages' layers, made under one seed."""
    make, draw = LAYERS[name]
    torch.manual_seed(0)
    theirs = make(loralib)
    torch.manual_seed(0)
    return make(lora).to(device), theirs.to(device), draw().to(device)


def trained_pair(name, device="cpu"):
    """The same with adapters that do something."""
    ours, theirs, x = pair(name, device)
    for parameter_name, parameter in theirs.named_parameters():
        if "lora_" in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs, x


@each_layer
def test_same_parameters_bit_for_bit_under_the_same_seed(name):
    ours, theirs, _ = pair(name)
    random_state = torch.get_rng_state()
    pair(name)
    assert torch.equal(torch.get_rng_state(), random_state)
    theirs_by_name = dict(theirs.named_parameters())
    assert list(dict(ours.named_parameters())) == list(theirs_by_name)
    for parameter_name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs_by_name[parameter_name])
        assert parameter.requires_grad == theirs_by_name[parameter_name].requires_grad


@each_layer
def test_forward_and_every_gradient(name, device):
    ours, theirs, x = trained_pair(name, device)
    for layer in (ours, theirs):
        layer.requires_grad_(True)
    xs = [x.clone().requires_grad_() if x.is_floating_point() else x for _ in range(2)]
    y, expected = ours(xs[0]), theirs(xs[1])
    assert_near(y, expected, "forward")
    gradient = torch.randn_like(expected)
    y.backward(gradient)
    expected.backward(gradient)
    if x.is_floating_point():
        assert_near(xs[0].grad, xs[1].grad, "gradient")
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(p.grad, q.grad, "gradient")


@each_layer
def test_merged_output_and_weight(name, device):
    ours, theirs, x = trained_pair(name, device)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        assert_near(ours(x), theirs(x), "forward")
    their_weight = theirs.conv.weight if hasattr(theirs, "conv") else theirs.weight
    assert ours.merged == ("r=0" not in name)
    if ours.merged:
        assert_near(ours.merged_weight(), their_weight.detach(), "merged")


@each_layer
def test_state_dicts_load_both_ways(name, tmp_path):
    ours, theirs, x = trained_pair(name)
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    torch.manual_seed(1)
    fresh_theirs = LAYERS[name][0](loralib)
    fresh_theirs.load_state_dict(torch.load(tmp_path / "ours.pt"), strict=True)
    with torch.no_grad():
        assert_near(ours(x), fresh_theirs(x), "forward")
    if "r=0" in name:
        return
    for bias in ("none", "all"):
        of_ours, of_theirs = lora.lora_state_dict(ours, bias), loralib.lora_state_dict(theirs, bias)
        assert list(of_ours) == list(of_theirs)
        assert all(torch.equal(of_ours[key], of_theirs[key]) for key in of_ours)


def model_of(module):
    """Linear, merged and plain layers with biases, in one model."""
    torch.manual_seed(0)
    return nn.Sequential(
        module.Embedding(17, 12, r=2),
        module.MergedLinear(12, 12, r=2, enable_lora=[True, False, True]),
        nn.LayerNorm(12),
        module.Linear(12, 5, r=2),
        nn.Linear(5, 3),
    )


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_models_are_marked_and_saved_alike(bias):
    ours, theirs = model_of(lora), model_of(loralib)
    lora.mark_only_lora_as_trainable(ours, bias=bias)
    loralib.mark_only_lora_as_trainable(theirs, bias=bias)
    expected = [name for name, p in theirs.named_parameters() if p.requires_grad]
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == expected
    assert sorted(lora.lora_state_dict(ours, bias)) == sorted(loralib.lora_state_dict(theirs, bias))


def test_mixed_with_loralib_layers_in_one_model():
    model = nn.Sequential(loralib.Linear(4, 4, r=2), lora.Linear(4, 4, r=2))
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    assert sorted(lora.lora_state_dict(model, bias="lora_only")) == sorted(
        name for name, p in model.named_parameters() if p.requires_grad
    )


class Attention(nn.Module):
    def __init__(self, module, n=24, *, lora_dropout=0.0):
        super().__init__()
        self.c_attn = module.MergedLinear(
            n,
            3 * n,
            r=4,
            lora_alpha=32,
            lora_dropout=lora_dropout,
            enable_lora=[True, False, True],
            fan_in_fan_out=True,
            merge_weights=False,
        )
        self.ln = nn.LayerNorm(n)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.ln(x + y)


class TinyGPT2(nn.Module):
    def __init__(self, module, **kwargs):
        super().__init__()
        self.wte = nn.Embedding(31, 24)
        self.blocks = nn.Sequential(Attention(module, **kwargs), Attention(module, **kwargs))

    def forward(self, tokens):
        return self.blocks(self.wte(tokens)) @ self.wte.weight.t()


def losses(module, package, device):
    torch.manual_seed(0)
    model = TinyGPT2(module).to(device)
    package.mark_only_lora_as_trainable(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-3, weight_decay=0.01)
    g = torch.Generator().manual_seed(1)
    history = []
    for step in range(30):
        model.train()
        tokens = torch.randint(31, (4, 9), generator=g).to(device)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        if step % 10 == 9:
            model.eval()
            with torch.no_grad():
                history.append(model(tokens).square().mean().item())
    return torch.tensor(history), model


def test_gpt2_trains_step_for_step_like_loralib(device):
    ours, our_model = losses(lora, lora, device)
    theirs, their_model = losses(loralib, loralib, device)
    assert_near(ours, theirs, "training")
    assert_near(ours[:5], theirs[:5], "forward")
    for p, q in zip(our_model.parameters(), their_model.parameters(), strict=True):
        assert_near(p, q, "training")
    assert (our_model.blocks[0].c_attn.lora_B.abs().sum()) > 0


def test_gpt2_dropout_has_the_mean_and_variance_of_loralib():
    p, n = 0.1, 4000

    def draws(module):
        torch.manual_seed(0)
        layer = Attention(module, lora_dropout=p).c_attn
        g = torch.Generator().manual_seed(2)
        layer.lora_B.data.normal_(generator=g)
        x = torch.randn(3, 24, generator=g)
        with torch.no_grad():
            samples = torch.stack([layer(x) for _ in range(n)])
            layer.lora_dropout.p = 0.0
            return samples, layer(x), layer, x

    (ours, expected, layer, x), (theirs, same, *_) = draws(lora), draws(loralib)
    assert_near(expected, same, "forward")
    # Each input is dropped apart from the others: Var y_n = p / (1 - p) · Σ_k (x_k ΔW_kn)².
    delta = layer.merged_weight() - layer.weight
    deviation = (p / (1 - p) * x.square() @ delta.square()).sqrt().detach()
    varies = deviation > 0
    assert varies.sum() == 3 * 48  # q and v of three tokens; k does not vary at all
    for samples in (ours, theirs):
        errors = (samples.mean(0) - expected)[varies] / deviation[varies]
        assert errors.abs().max() < 5 / math.sqrt(n)
        # One draw is heavy-tailed, so that a standard deviation of 4,000 draws is known to about 2 %.
        assert (samples.std(0)[varies] / deviation[varies] - 1).abs().max() < 0.08
        assert samples.std(0)[~varies].max() < 1e-5


def test_gpt2_of_transformers_gets_the_same_adapter_in_one_call():
    torch.manual_seed(0)
    model = nn.ModuleDict({"c_attn": Conv1D(72, 24)})
    theirs = loralib.MergedLinear(
        24, 72, r=4, lora_alpha=32, enable_lora=[True, False, True], fan_in_fan_out=True
    )
    theirs.load_state_dict(model["c_attn"].state_dict(), strict=False)
    nn.init.normal_(theirs.lora_B)
    lora.replace(model, "c_attn", r=4, lora_alpha=32, enable_lora=[True, False, True])
    model["c_attn"].load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 5, 24)
    assert_near(model["c_attn"](x), theirs(x), "forward")
