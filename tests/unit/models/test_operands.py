"""The operands of frozen weights: what bitsandbytes stores, multiplied by exactly."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import phlora
from phlora.errors import ModelError
from phlora.lora.operands import DenseWeight
from phlora.models.operands import frozen_weight, is_quantized
from phlora.models.quantization import stored_bytes

bnb = pytest.importorskip("bitsandbytes")
# Imported and not asked for: what is wrong with it is a failure.
layers = importlib.import_module("phlora.models.bnb")

CPU = torch.device("cpu")
# The quantiles of NF4 in the appendix of the QLoRA paper.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
# K: whole blocks, part of a block in every row (where bitsandbytes' own CPU kernel is wrong), less than a block.
SHAPES = [(48, 128), (64, 112), (96, 96), (30, 50), (5, 129)]


def dense_linear(
    shape: tuple[int, int], *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape[1], shape[0], bias=bias).to(dtype)


def quantized(linear: nn.Linear, storage: str, *, double_quant: bool = True, compute_dtype=None) -> nn.Module:
    if storage == "int8":
        return layers.linear_int8(linear, compute_dtype=compute_dtype, device=CPU)
    return layers.linear_nf4(linear, double_quant=double_quant, compute_dtype=compute_dtype, device=CPU)


def nearest_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Each value as the nearest quantile times the largest magnitude of its run of 64."""
    flat = weight.flatten()
    scales = torch.stack([part.abs().max() for part in flat.split(64)]).repeat_interleave(64)[: flat.numel()]
    codes = (flat / scales).unsqueeze(1).sub(NF4).abs().argmin(1)
    return (NF4[codes] * scales).view_as(weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_the_nearest_quantile_of_each_block_for_every_row_length(shape: tuple[int, int]) -> None:
    linear = dense_linear(shape)
    dense = frozen_weight(quantized(linear, "nf4", double_quant=False)).dense(torch.float32)
    torch.testing.assert_close(dense, nearest_nf4(linear.weight.detach()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_double_quantisation_changes_the_scales_only_and_little(shape: tuple[int, int]) -> None:
    linear = dense_linear(shape)
    double = frozen_weight(quantized(linear, "nf4")).dense(torch.float32)
    single = frozen_weight(quantized(linear, "nf4", double_quant=False)).dense(torch.float32)
    assert (double - single).norm() < 0.03 * single.norm()


def test_double_quantisation_takes_less_room() -> None:
    linear = dense_linear((512, 512))
    double, single = (stored_bytes(quantized(linear, "nf4", double_quant=choice)) for choice in (True, False))
    assert double < single < 0.16 * stored_bytes(linear)


def test_int8_is_within_half_a_step_of_each_row() -> None:
    linear = dense_linear((48, 80))
    dense = frozen_weight(quantized(linear, "int8")).dense(torch.float32)
    step = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    # bitsandbytes casts to float16 first: another 127 / 2^12 of a step.
    assert ((dense - linear.weight).abs() <= 0.54 * step).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_products_are_those_of_the_dense_weight_in_the_dtype_of_the_argument(
    storage: str, dtype: torch.dtype
) -> None:
    operand = frozen_weight(quantized(dense_linear((64, 112)), storage))
    x, dy, bias = torch.randn(2, 5, 112, dtype=dtype), torch.randn(2, 5, 64, dtype=dtype), torch.randn(64)
    dense = operand.dense(dtype)
    assert dense.dtype == dtype
    y, dx = operand.matmul(x, bias), operand.matmul_t(dy)
    assert y.dtype == dx.dtype == dtype
    assert torch.equal(y, torch.nn.functional.linear(x, dense, bias.to(dtype)))
    assert torch.equal(dx, dy @ dense)
    y.zero_(), dx.zero_()
    assert torch.equal(operand.dense(dtype), dense)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_compute_dtype_holds_for_both_products_and_the_result_keeps_its_own(storage: str) -> None:
    layer = quantized(dense_linear((64, 112)), storage, compute_dtype=torch.bfloat16)
    operand, x = frozen_weight(layer), torch.randn(5, 112)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, (x.bfloat16() @ operand.dense(torch.bfloat16).t()).float())
    dx = operand.matmul_t(y)
    assert torch.equal(dx, (y.bfloat16() @ operand.dense(torch.bfloat16)).float())


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_layer_computes_the_same_in_training_and_evaluation_with_gradients_of_the_dense_one(
    storage: str,
) -> None:
    layer = quantized(dense_linear((64, 112), bias=True), storage)
    x = torch.randn(2, 5, 112, requires_grad=True)
    dense = frozen_weight(layer).dense(torch.float32)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    y = layer.train()(x)
    assert torch.equal(y, evaluated)
    y.square().sum().backward()
    reference_x = x.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    torch.nn.functional.linear(reference_x, dense, bias).square().sum().backward()
    torch.testing.assert_close(x.grad, reference_x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None and not layer.weight.requires_grad


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_nothing_dense_is_kept_for_backward(storage: str) -> None:
    layer = quantized(dense_linear((64, 112)), storage)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 112, requires_grad=True))
    assert kept == []


@pytest.mark.parametrize("K", [128, 112])
def test_a_layer_of_bitsandbytes_itself_gives_its_weight_also_after_it_repacked_it(K: int) -> None:
    linear = dense_linear((64, K))
    foreign = bnb.nn.Linear4bit(K, 64, bias=False, quant_type="nf4")
    foreign.load_state_dict(linear.state_dict())
    foreign.to("cpu")
    own = frozen_weight(quantized(linear, "nf4")).dense(torch.float32)
    assert torch.equal(frozen_weight(foreign).dense(torch.float32), own)
    if K % 64 or not foreign.support_avx512bf16_for_cpu and not bnb.functional.has_avx512bf16():
        return
    foreign.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        foreign.eval()(torch.randn(2, K))
    assert foreign.weight.quant_state.packing_format_for_cpu
    # The repacking itself rounds the scales to bfloat16.
    torch.testing.assert_close(frozen_weight(foreign).dense(torch.float32), own, rtol=2**-7, atol=0)


def test_an_8_bit_layer_of_bitsandbytes_gives_its_weight_before_and_after_its_first_forward() -> None:
    linear = dense_linear((32, 64))
    foreign = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    foreign.load_state_dict(linear.state_dict())
    foreign.to("cpu")
    own = frozen_weight(quantized(linear, "int8")).dense(torch.float32)
    assert torch.equal(frozen_weight(foreign).dense(torch.float32), own)
    foreign.train()(torch.randn(2, 64))
    assert torch.equal(frozen_weight(foreign).dense(torch.float32), own)


def test_dense_layers_are_dense_operands_that_share_their_weight() -> None:
    linear, conv = nn.Linear(6, 4), Conv1D(4, 6)
    assert isinstance(frozen_weight(linear), DenseWeight) and not is_quantized(linear)
    assert frozen_weight(linear).weight is linear.weight
    x = torch.randn(3, 6)
    torch.testing.assert_close(frozen_weight(conv).matmul(x, conv.bias), conv(x))
    assert frozen_weight(conv).weight.data_ptr() == conv.weight.data_ptr()


def test_an_unknown_storage_is_one_message() -> None:
    with pytest.raises(ModelError, match="Embedding"):
        frozen_weight(nn.Embedding(3, 4))


def test_one_module_imports_bitsandbytes() -> None:
    source = Path(phlora.__file__).parent
    importing = {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(
            name.split(".")[0] == "bitsandbytes"
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        )
    }
    assert importing == {"models/bnb.py"}


def test_dense_operands_do_without_the_package() -> None:
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from torch import nn; from phlora.models.operands import frozen_weight\n"
        "frozen_weight(nn.Linear(2, 2))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
def test_quantising_in_pieces_gives_the_bits_of_quantising_at_once(shape, double_quant, monkeypatch) -> None:
    monkeypatch.setattr(layers, "_PIECE", 256)
    linear = dense_linear(shape)
    ours = quantized(linear, "nf4", double_quant=double_quant).weight
    codes, state = bnb.functional.quantize_4bit(
        linear.weight.detach(), compress_statistics=double_quant, quant_type="nf4"
    )
    assert torch.equal(ours.data, codes)
    theirs = state.as_dict(packed=True)
    assert ours.quant_state.as_dict(packed=True).keys() == theirs.keys()
    for name, value in ours.quant_state.as_dict(packed=True).items():
        assert torch.equal(value, theirs[name]), name
    rounded = quantized(linear, "int8")
    expected, scales, _ = bnb.functional.int8_vectorwise_quant(linear.weight.detach().half())
    assert torch.equal(rounded.weight.data, expected) and torch.equal(rounded.weight.SCB, scales)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantising_in_pieces_gives_the_bits_of_dequantising_at_once(
    shape, dtype, double_quant, monkeypatch
) -> None:
    """At once: bitsandbytes, over rows that are whole blocks."""
    weight = frozen_weight(
        quantized(dense_linear(shape, dtype=dtype), "nf4", double_quant=double_quant)
    ).weight
    whole = bnb.functional.dequantize_4bit(weight.data, layers._aligned(weight.quant_state)).view(shape)
    monkeypatch.setattr(layers, "_PIECE_OF_DENSE", 4096)
    for into in (torch.float32, torch.bfloat16):
        assert torch.equal(layers.NF4Weight(weight).dense(into), whole.to(into))


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_matrix_that_autograd_keeps_is_not_the_one_that_products_share(storage: str) -> None:
    first, second = (quantized(dense_linear((64, 128)), storage) for _ in range(2))
    x = torch.randn(5, 128, requires_grad=True)
    kept = frozen_weight(first).matmul(x)
    dense = frozen_weight(first).dense(torch.float32)
    with torch.no_grad():
        frozen_weight(second).matmul(torch.randn(5, 128))
    kept.sum().backward()
    assert torch.equal(x.grad, torch.ones(5, 64) @ dense)
