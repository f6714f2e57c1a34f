"""phlora.lora beside loralib 0.1.2: equal where loralib is right, and right where loralib is not.

The second half is loralib's known defects, one test each: first the defect is shown in loralib, so that the
test tells when a later one has mended it, then what phlora.lora does.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import pickle

import loralib
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import phlora.lora as lora
from phlora.errors import ConfigError, ModelError

# Relative to the largest value (at least 1) of what is compared.
TOLERANCE = {
    "forward": 2e-6,  # the same products of at most 60 terms, added in another order
    "gradient": 5e-6,  # one product more
    "merged": 1e-6,  # one product, one sum
    "training": 1e-4,  # 30 steps of AdamW, whose early steps turn a rounding of a small gradient into lr
}


def assert_near(ours, theirs, what):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    scale = theirs.abs().max().clamp(min=1)
    assert ((ours - theirs).abs().max() / scale).item() <= TOLERANCE[what]


def rows(*shape):
    return lambda: torch.randn(shape)


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


# loralib's use in GPT-2: a fused, transposed c_attn with LoRA on q and v.


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


# loralib's defects.


def trained_linear(module, **kwargs):
    torch.manual_seed(0)
    layer = module.Linear(16, 16, r=4, lora_alpha=8, **kwargs)
    nn.init.normal_(layer.lora_B)
    return layer


def fresh_linear(module):
    torch.manual_seed(0)
    return module.Linear(16, 16, r=4, lora_alpha=8)


X = torch.linspace(-1, 1, 48).view(3, 16)


def test_adapter_loaded_after_eval():
    def load_after_eval(module):
        layer, source = fresh_linear(module), trained_linear(module)
        base = layer.weight.detach().clone()
        layer.eval()
        layer.load_state_dict(module.lora_state_dict(source), strict=False)
        with torch.no_grad():
            used = not torch.allclose(layer(X), F.linear(X, base, layer.bias))
        layer.train()
        return used, torch.equal(layer.weight, base)

    assert load_after_eval(loralib) == (False, False)  # adapter ignored, then the base corrupted
    assert load_after_eval(lora) == (True, True)


def test_state_dict_saved_in_eval_mode():
    def drift(module):
        layer = trained_linear(module)
        with torch.no_grad():
            expected = layer(X)
        layer.eval()
        reloaded = fresh_linear(module)
        reloaded.load_state_dict(copy.deepcopy(layer.state_dict()))
        reloaded.eval()
        with torch.no_grad():
            return (reloaded(X) - expected).abs().max().item()

    assert drift(loralib) > 0.1  # the delta is applied twice
    assert drift(lora) < 1e-5


@pytest.mark.parametrize("order", itertools.permutations(["train", "eval", "load"]))
def test_order_of_train_eval_and_load(order):
    source = trained_linear(lora)
    layer = fresh_linear(lora)
    for step in order:
        if step == "load":
            layer.load_state_dict(loralib.lora_state_dict(trained_linear(loralib)), strict=False)
        else:
            getattr(layer, step)()
    with torch.no_grad():
        torch.testing.assert_close(layer(X), source(X), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight, source.weight)


def test_merged_linear_with_nothing_enabled():
    theirs, ours = loralib.MergedLinear(4, 6, r=2), lora.MergedLinear(4, 6, r=2)
    with pytest.raises(AttributeError, match="lora_A"):
        theirs(torch.ones(1, 4))
    assert theirs.weight.requires_grad
    assert torch.equal(ours(torch.ones(1, 4)), F.linear(torch.ones(1, 4), ours.weight, ours.bias))
    assert not ours.weight.requires_grad and torch.equal(
        ours.eval()(torch.ones(1, 4)), ours(torch.ones(1, 4))
    )


def test_merged_linear_with_unequal_blocks():
    theirs = loralib.MergedLinear(16, 60, r=4, enable_lora=[True, False, True])
    nn.init.normal_(theirs.lora_B)
    touched = theirs.merge_AB().abs().sum(1) > 0
    assert not touched[20:40].any() and touched[40:50].all()  # half of q is left out, all of k is adapted
    with pytest.raises(AssertionError):
        loralib.MergedLinear(16, 50, r=4, enable_lora=[True, False, True])
    ours = lora.MergedLinear(
        16, 60, r=4, enable_lora=[True, False, True], out_features_per_block=(40, 10, 10)
    )
    nn.init.normal_(ours.lora_B)
    touched = (ours.merged_weight() - ours.weight).abs().sum(1) > 0
    assert touched[:40].all() and not touched[40:50].any() and touched[50:].all()


def test_merged_linear_keeps_no_dense_delta():
    def largest_kept(module):
        layer = module.MergedLinear(64, 96, r=4, enable_lora=[True, False, True])
        own = {p.data_ptr() for p in layer.parameters()}
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            layer(torch.randn(3, 64, requires_grad=True))
        return max(t.numel() for t in kept if t.data_ptr() not in own)

    assert largest_kept(loralib) == 64 * 96
    assert largest_kept(lora) == 3 * 64


def test_merged_linear_built_on_meta():
    def materialised(module):
        with torch.device("meta"):
            layer = module.MergedLinear(8, 12, r=2, enable_lora=[True, False, True])
        return layer.to_empty(device="cpu")

    assert materialised(loralib).lora_ind.is_meta  # no parameter, no buffer: it cannot be filled
    ours = materialised(lora)
    source = lora.MergedLinear(8, 12, r=2, enable_lora=[True, False, True])
    ours.load_state_dict(source.state_dict())
    torch.testing.assert_close(ours(torch.ones(1, 8)), source(torch.ones(1, 8)))


@pytest.mark.parametrize(("kind", "shape"), [("Conv1d", (2, 4, 9)), ("Conv3d", (2, 4, 5, 5, 5))])
def test_convolutions_with_kernels_above_one(kind, shape):
    x = torch.randn(shape)
    with pytest.raises(RuntimeError, match="shape"):
        getattr(loralib, kind)(4, 8, 3, r=2)(x)
    assert getattr(lora, kind)(4, 8, 3, r=2)(x).shape[:2] == (2, 8)


def test_convolutions_with_a_kernel_for_each_dimension():
    with pytest.raises(AssertionError):
        loralib.Conv2d(3, 4, (3, 5), r=2)
    assert lora.Conv2d(3, 4, (3, 5), r=2)(torch.randn(1, 3, 7, 7)).shape == (1, 4, 5, 3)


def test_dropout_of_convolutions():
    def varies(module):
        layer = module.Conv2d(3, 4, 3, r=2, lora_dropout=0.5)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(1, 3, 6, 6)
        return not torch.equal(layer(x), layer(x))

    assert not varies(loralib)
    assert varies(lora)


def test_bias_of_convolutions_with_lora_only():
    def trained_and_saved(module):
        model = nn.ModuleDict({"c": module.Conv2d(3, 4, 3, r=2)})
        module.mark_only_lora_as_trainable(model, bias="lora_only")
        return model["c"].conv.bias.requires_grad, "c.conv.bias" in module.lora_state_dict(model, "lora_only")

    assert trained_and_saved(loralib) == (False, False)
    assert trained_and_saved(lora) == (True, True)


def test_convolutions_name_their_weight_once_and_go_into_safetensors(tmp_path):
    layer = lora.Conv2d(3, 4, 3, r=2)
    assert layer.weight is layer.conv.weight
    assert list(layer.state_dict()) == ["lora_A", "lora_B", "conv.weight", "conv.bias"]
    save_file(layer.state_dict(), tmp_path / "conv.safetensors")


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.Linear(4, 4, r=2),
        lambda m: m.MergedLinear(4, 4, r=2, enable_lora=[True, False]),
        lambda m: m.Embedding(4, 4, r=2),
        lambda m: m.Conv2d(4, 4, 3, r=1),
    ],
)
def test_train_and_eval_return_the_layer(make):
    theirs, ours = make(loralib), make(lora)
    assert theirs.eval() is None and theirs.train() is None
    assert ours.eval() is ours and ours.train() is ours


def test_layers_can_be_pickled():
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(loralib.Linear(4, 4, r=2))
    layer = lora.Linear(4, 4, r=2)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, layer.weight)


def test_transposed_weights_go_into_safetensors(tmp_path):
    path = tmp_path / "layer.safetensors"
    theirs = loralib.Linear(4, 6, r=2, fan_in_fan_out=True)
    with pytest.raises(ValueError, match="non contiguous"):
        save_file(theirs.state_dict(), path)
    ours = lora.Linear(4, 6, r=2, fan_in_fan_out=True)
    save_file(ours.state_dict(), path)
    theirs.load_state_dict(load_file(path), strict=True)
    assert_near(ours(torch.ones(1, 4)), theirs(torch.ones(1, 4)), "forward")


def test_embedding_from_pretrained():
    values = torch.arange(20.0).view(5, 4)
    overwritten = values.clone()
    loralib.Embedding.from_pretrained(overwritten)
    assert not torch.equal(overwritten, values)
    kept = values.clone()
    assert torch.equal(lora.Embedding.from_pretrained(kept, r=2).weight, values)
    assert torch.equal(kept, values)


def test_embedding_tied_to_the_head():
    def head_moves(module):
        torch.manual_seed(0)
        embed, head = module.Embedding(9, 6, r=2), nn.Linear(6, 9, bias=False)
        nn.init.normal_(embed.lora_A)
        head.weight = embed.weight
        with torch.no_grad():
            before = head(torch.ones(6))
            embed.eval()
            embed(torch.tensor([1]))
            return not torch.allclose(head(torch.ones(6)), before)

    assert head_moves(loralib)
    assert not head_moves(lora)


def test_output_layer_of_torch_attention():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.out_proj = loralib.Linear(8, 8, r=2)
    x = torch.randn(1, 3, 8)
    loralib.mark_only_lora_as_trainable(attention)
    assert not attention(x, x, x)[0].requires_grad  # trains nothing, without a word
    attention.out_proj = lora.Linear(8, 8, r=2)
    with pytest.raises(ModelError, match="out_proj"):
        lora.mark_only_lora_as_trainable(attention)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_after_many_evaluations_in_16_bits(dtype):
    def changed(module):
        layer = trained_linear(module).to(dtype)
        before = layer.weight.detach().clone()
        for _ in range(100):
            layer.eval()
            layer.train()
        return not torch.equal(layer.weight, before)

    assert changed(loralib)
    assert not changed(lora)


def test_small_deltas_in_16_bits():
    def small(module):
        layer = trained_linear(module).to(torch.bfloat16)
        layer.lora_B.data.mul_(0.001)
        return layer

    theirs = small(loralib)
    base = theirs.weight.detach().double()
    exact = (theirs.lora_B.double() @ theirs.lora_A.double()).detach() * theirs.scaling
    theirs.eval()
    assert (theirs.weight.double() - base - exact).norm() > 0.2 * exact.norm()  # rounded away

    ours, x = small(lora), X.bfloat16()
    with torch.no_grad():
        assert torch.equal(ours(x), ours.eval()(x))


def test_bf16_base_with_fp32_adapter():
    def forward(module):
        layer = trained_linear(module)
        layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
        return layer(X.bfloat16())

    with pytest.raises(RuntimeError, match="dtype"):
        forward(loralib)
    assert forward(lora).dtype == torch.bfloat16


def test_names_that_contain_lora_or_bias():
    def names(module):
        model = nn.ModuleDict(
            {
                "lora_block": nn.Linear(4, 4),
                "bias_head": nn.Linear(4, 4, bias=False),
                "q": module.Linear(4, 4, r=2),
            }
        )
        module.mark_only_lora_as_trainable(model, bias="all")
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        return trainable, set(module.lora_state_dict(model, bias="all"))

    assert all({"lora_block.weight", "bias_head.weight"} <= found for found in names(loralib))
    right = {"lora_block.bias", "q.bias", "q.lora_A", "q.lora_B"}
    assert names(lora) == (right, right)


def test_models_without_lora():
    model = nn.Sequential(nn.Linear(4, 4))
    loralib.mark_only_lora_as_trainable(copy.deepcopy(model))  # freezes everything, without a word
    assert loralib.lora_state_dict(model) == {}
    with pytest.raises(ModelError):
        lora.mark_only_lora_as_trainable(model)
    with pytest.raises(ModelError):
        lora.lora_state_dict(model)


def test_a_negative_rank():
    loralib.Linear(4, 4, r=-1)
    with pytest.raises(ConfigError, match="Linear.r"):
        lora.Linear(4, 4, r=-1)


@pytest.mark.parametrize(
    "make",
    [
        lambda module: module.Linear(4, 2, r=100),
        lambda module: module.MergedLinear(8, 12, r=9, enable_lora=[True, False, True]),
        lambda module: module.Embedding(10, 4, r=8),
        lambda module: module.Conv2d(3, 8, 3, r=16),
        lambda module: module.Conv2d(2, 8, 3, r=32, groups=2),
    ],
)
def test_ranks_above_the_size_of_the_weight(make):
    torch.manual_seed(0)
    ours = make(lora)
    torch.manual_seed(0)
    theirs = make(loralib)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        a.data.add_(0.1)
        b.data.add_(0.1)
    draw = {
        "Embedding": lambda: torch.arange(10),
        "Conv2d": lambda: torch.randn(2, ours.conv.in_channels, 6, 6),
    }
    x = draw.get(type(ours).__name__, lambda: torch.randn(3, ours.in_features))()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("enable_lora", [[True, False, True], [False, True, False], [True, True, True]])
def test_helpers_of_merged_linear(fan_in_fan_out, enable_lora):
    ours, theirs = (
        module.MergedLinear(8, 12, r=2, enable_lora=enable_lora, fan_in_fan_out=fan_in_fan_out)
        for module in (lora, loralib)
    )
    nn.init.normal_(theirs.lora_B)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.lora_ind, theirs.lora_ind)
    rows = torch.randn(int(ours.lora_ind.sum()), 5)
    assert torch.equal(ours.zero_pad(rows), theirs.zero_pad(rows))
    torch.testing.assert_close(ours.merge_AB(), theirs.merge_AB())
    ours.merge_AB().square().sum().backward()
    theirs.merge_AB().square().sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A.grad)
    torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B.grad)


def test_modules_that_programs_import_from():
    for module in ("layers", "utils"):
        theirs = importlib.import_module(f"loralib.{module}")
        ours = importlib.import_module(f"phlora.lora.{module}")
        public = [
            name
            for name, value in vars(theirs).items()
            if isinstance(value, type) or getattr(value, "__module__", "").startswith("loralib")
        ]
        assert public and all(hasattr(ours, name) for name in public)
    names = [
        "layers",
        "utils",
        *(n for n, v in vars(loralib).items() if getattr(v, "__module__", "").startswith("lora")),
    ]
    assert all(hasattr(lora, name) for name in names)


def test_a_fractional_rank():
    with pytest.raises(TypeError, match="new_zeros"):
        loralib.Linear(4, 4, r=2.5)
    with pytest.raises(ConfigError, match=r"The rank is 2\.5"):
        lora.Linear(4, 4, r=2.5)


def test_a_checkpoint_with_other_names():
    model = nn.ModuleDict({"q": lora.Linear(4, 4, r=2)})
    state = {"query.lora_A": torch.ones(2, 4), "query.lora_B": torch.ones(4, 2)}
    model.load_state_dict(state, strict=False)  # torch: not a word
    with pytest.raises(ModelError, match=r"2 of 2 tensors have no place"):
        lora.load_lora_state_dict(model, state)


def test_a_bad_choice_of_bias():
    model = nn.ModuleDict({"q": loralib.Linear(4, 4, r=2)})
    with pytest.raises(NotImplementedError) as raised:
        loralib.mark_only_lora_as_trainable(model, bias="lora")
    assert str(raised.value) == ""
    with pytest.raises(ConfigError, match="`none`|`lora_only`"):
        lora.mark_only_lora_as_trainable(model, bias="lora")
