"""loralib's known defects, one test each.

First the defect is shown in loralib 0.1.2, so that the test tells when a later one has mended it, then what
phlora.lora does.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle

import loralib
import pytest
import torch
import torch.nn.functional as F
from loralib_layers import assert_near
from safetensors.torch import load_file, save_file
from torch import nn

import phlora.lora as lora
from phlora.errors import ConfigError, ModelError


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
