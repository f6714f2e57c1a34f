"""What every layer does in training, evaluation and merged, and the checks of the settings."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

import phlora.lora as lora
from phlora.errors import ConfigError

# Merged and unmerged add the same terms in another order; relative to values around 1.
MERGED = {torch.float32: 5e-6, torch.float64: 1e-13}

KINDS = {
    "Linear": (lambda **k: lora.Linear(12, 8, r=3, lora_alpha=5, **k), lambda: torch.randn(4, 12)),
    "Linear fan_in_fan_out": (
        lambda **k: lora.Linear(12, 8, r=3, fan_in_fan_out=True, **k),
        lambda: torch.randn(4, 12),
    ),
    "MergedLinear": (
        lambda **k: lora.MergedLinear(
            12, 10, r=2, enable_lora=[True, False, True], out_features_per_block=(5, 3, 2), **k
        ),
        lambda: torch.randn(4, 12),
    ),
    "Embedding": (lambda **k: lora.Embedding(20, 8, r=3, **k), lambda: torch.randint(20, (4, 5))),
    "Conv1d": (lambda **k: lora.Conv1d(4, 6, 3, r=2, **k), lambda: torch.randn(2, 4, 9)),
    "Conv2d": (lambda **k: lora.Conv2d(4, 6, (3, 2), r=2, groups=2, **k), lambda: torch.randn(2, 4, 7, 6)),
    "Conv3d": (lambda **k: lora.Conv3d(3, 4, 2, r=2, **k), lambda: torch.randn(1, 3, 4, 4, 5)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def trained(kind: str, **kwargs):
    """A layer whose adapter does something, and an input."""
    torch.manual_seed(0)
    make, draw = KINDS[kind]
    layer = make(**kwargs)
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter, std=0.3)
    return layer, draw()


def assert_same_output(a, b, dtype=torch.float32):
    assert (a - b).abs().max() <= MERGED[dtype] * b.abs().max().clamp(min=1)


@each_kind
def test_eval_merges_and_train_unmerges(kind):
    layer, x = trained(kind)
    with torch.no_grad():
        before = layer(x)
        assert layer.eval() is layer and layer.merged
        assert_same_output(layer(x), before)
        assert layer.train() is layer and not layer.merged
        assert torch.equal(layer(x), before)


@each_kind
def test_state_dict_is_the_same_in_train_and_eval(kind):
    layer, x = trained(kind)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        layer.eval()(x)
    after = layer.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@each_kind
def test_any_order_of_train_eval_load_and_use_gives_the_same(kind):
    source, x = trained(kind)
    checkpoint = source.state_dict()
    with torch.no_grad():
        expected = source(x)
    for order in itertools.permutations(["train", "eval", "load", "use"]):
        torch.manual_seed(1)
        layer = KINDS[kind][0]()
        for step in order:
            if step == "load":
                layer.load_state_dict(checkpoint)
            elif step == "use":
                with torch.no_grad():
                    layer(x)
            else:
                getattr(layer, step)()
        with torch.no_grad():
            assert_same_output(layer(x), expected)
        assert torch.equal(layer.base, source.base)


@each_kind
def test_merge_is_exact_in_bf16_a_hundred_times_over(kind):
    layer, x = trained(kind)
    layer = layer.to(torch.bfloat16)
    x = x.to(torch.bfloat16) if x.is_floating_point() else x
    before = layer.base.detach().clone()
    with torch.no_grad():
        unmerged = layer(x)
        for _ in range(100):
            layer.merge()
            layer.unmerge()
        layer.merge()
        layer(x)
        layer.unmerge()
        assert torch.equal(layer.base, before)
        assert torch.equal(layer(x), unmerged)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_state_rounds_or_changes_what_is_computed(kind, dtype):
    layer, x = trained(kind)
    layer = layer.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer.eval()(x), before)
        layer.merge()
        assert torch.equal(layer(x), before)


def write_by_data(parameter):
    parameter.data.mul_(1.5)


def write_by_numpy(parameter):
    parameter.detach().numpy()[...] *= 1.5


def write_by_foreach(parameter):
    with torch.no_grad():
        torch._foreach_mul_([parameter], 1.5)


def write_by_vmap(parameter):
    torch.func.vmap(lambda row: row.mul_(1.5))(parameter.data)


def write_by_set(parameter):
    with torch.no_grad():
        parameter.set_((parameter * 1.5).clone())


def write_by_fused_optimizer(parameter):
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.3, fused=True).step()


def write_in_inference_mode(parameter):
    with torch.inference_mode():
        parameter.mul_(1.5)


@each_kind
@pytest.mark.parametrize("name", ["base", "lora_A", "lora_B"])
@pytest.mark.parametrize(
    "write",
    [
        write_by_data,
        write_by_numpy,
        write_by_foreach,
        write_by_vmap,
        write_by_set,
        write_by_fused_optimizer,
        write_in_inference_mode,
    ],
)
def test_the_output_is_that_of_the_present_parameters_however_they_were_written(kind, name, write):
    layer, x = trained(kind)
    lora.merge(layer.eval())
    with torch.no_grad():
        before = layer(x)
    write(getattr(layer, name))
    with torch.no_grad():
        after = layer(x)
    assert not torch.allclose(after, before)
    fresh, _ = trained(kind)
    fresh.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert_same_output(after, fresh(x))


@each_kind
def test_exchanged_parameters_count_even_where_their_memory_is_that_of_the_former(kind):
    layer, x = trained(kind)
    layer.eval()
    A = layer.lora_A.detach().clone()
    with torch.no_grad():
        for factor in (1.0, 2.0, 3.0, 4.0):
            values = {"lora_A": A * factor}
            y = torch.func.functional_call(layer, values, (x,))
            del values
            expected = copy.deepcopy(layer)
            expected.lora_A.mul_(factor)
            assert_same_output(y, expected(x))


@each_kind
def test_training_goes_on_after_merge(kind):
    layer, x = trained(kind)
    twin = copy.deepcopy(layer)
    lora.merge(layer)
    for module in (layer, twin):
        optimizer = torch.optim.SGD([module.lora_A, module.lora_B], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    assert layer.merged and torch.equal(layer(x), twin(x))


@each_kind
def test_a_weight_that_trains_beside_a_frozen_adapter_gets_its_gradient_in_eval_mode(kind):
    layer, x = trained(kind)
    layer.lora_A.requires_grad_(False)
    layer.lora_B.requires_grad_(False)
    layer.base.requires_grad_(True)
    layer.train()(x).square().sum().backward()
    expected, layer.base.grad = layer.base.grad, None
    layer.eval()(x).square().sum().backward()
    assert layer.base.grad.abs().sum() > 0
    torch.testing.assert_close(layer.base.grad, expected)


@each_kind
def test_gradients_flow_in_eval_mode(kind):
    layer, x = trained(kind)
    layer.eval()(x).sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0 and layer.lora_B.grad.abs().sum() > 0


@each_kind
def test_a_step_of_the_optimizer_in_eval_mode_counts(kind):
    layer, x = trained(kind)
    layer.eval()
    with torch.no_grad():
        stale = layer(x)
        layer.lora_B.mul_(2)
        fresh = layer(x)
        assert not torch.allclose(stale, fresh)
        layer.train()
        assert_same_output(fresh, layer(x))


@each_kind
def test_a_replaced_parameter_counts(kind):
    layer, x = trained(kind)
    layer.eval()
    with torch.no_grad():
        layer(x)
        values = {**layer.state_dict(), "lora_B": torch.zeros_like(layer.lora_B)}
        layer.load_state_dict(values, assign=True)
        base_only = layer(x)
        layer.lora_B.data = torch.ones_like(layer.lora_B)
        assert not torch.allclose(layer(x), base_only)


@each_kind
def test_conversion_of_the_dtype_while_merged(kind):
    layer, x = trained(kind)
    with torch.no_grad():
        layer.eval()(x)
        layer.double()
        x = x.double() if x.is_floating_point() else x
        merged = layer(x)
        assert merged.dtype == torch.float64
        assert_same_output(merged, layer.train()(x), torch.float64)


@each_kind
def test_copies_and_pickles_compute_with_their_own_parameters(kind):
    layer, x = trained(kind)
    with torch.no_grad():
        expected = layer.eval()(x)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(buffer, weights_only=False),
        ]
        for twin in copies:
            assert twin.merged
            torch.testing.assert_close(twin(x), expected)
            twin.lora_B.zero_()
        assert torch.equal(layer(x), expected)


@each_kind
def test_inference_mode_leaves_nothing_that_autograd_refuses(kind):
    layer, x = trained(kind)
    layer.lora_A.requires_grad_(False)
    layer.lora_B.requires_grad_(False)
    layer.eval()
    with torch.inference_mode():
        layer(x)
    if x.is_floating_point():
        x.requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None


@each_kind
def test_merge_weights_false_leaves_merging_to_the_caller(kind):
    layer, x = trained(kind, merge_weights=False)
    assert not layer.eval().merged
    layer.merge()
    assert layer.train().merged and layer.eval().merged
    layer.unmerge()
    assert not layer.merged


@each_kind
def test_built_on_meta_and_materialised(kind):
    source, x = trained(kind)
    with torch.device("meta"):
        layer = KINDS[kind][0]()
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), source(x))


@each_kind
def test_mixed_dtypes_of_base_and_adapter(kind):
    layer, x = trained(kind)
    for name, parameter in layer.named_parameters():
        if not name.startswith("lora_"):
            parameter.data = parameter.data.bfloat16()
    x = x.bfloat16() if x.is_floating_point() else x
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32 and layer.lora_B.grad.abs().sum() > 0
    layer.merge()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, rtol=0.05, atol=0.1)  # bf16 rounding of W + ΔW


@each_kind
def test_rank_zero_is_the_plain_layer(kind):
    make = {
        "Linear": lambda: lora.Linear(4, 3),
        "Linear fan_in_fan_out": lambda: lora.Linear(4, 3, fan_in_fan_out=True),
        "MergedLinear": lambda: lora.MergedLinear(4, 6, enable_lora=[True, False, True]),
        "Embedding": lambda: lora.Embedding(5, 4),
        "Conv1d": lambda: lora.Conv1d(4, 2, 3),
        "Conv2d": lambda: lora.Conv2d(4, 2, 3),
        "Conv3d": lambda: lora.Conv3d(4, 2, 3),
    }[kind]
    layer = make().eval()
    assert not layer.is_adapted() and not layer.merged
    assert layer.base.requires_grad
    assert not [name for name in layer.state_dict() if "lora_" in name]


@pytest.mark.parametrize("r", [-1, 2.5, "8", None, True])
def test_a_rank_that_is_no_whole_number_is_refused(r):
    with pytest.raises(ConfigError, match="Linear.r"):
        lora.Linear(8, 8, r=r)


@pytest.mark.parametrize("setting", [{"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"lora_alpha": "16"}])
def test_lora_alpha_is_checked(setting):
    with pytest.raises(ConfigError, match="lora_alpha"):
        lora.Linear(8, 8, r=2, **setting)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 5, "0.1"])
def test_lora_dropout_is_checked(dropout):
    with pytest.raises(ConfigError, match="lora_dropout"):
        lora.Linear(8, 8, r=2, lora_dropout=dropout)


def test_dropout_can_be_turned_off_from_outside():
    layer = lora.Linear(16, 16, r=4, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 16)
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(layer(x), layer(x))
