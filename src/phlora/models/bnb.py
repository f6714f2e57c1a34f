"""Linear layers and operands that bitsandbytes stores in 4 or 8 bits: the one module that imports it.

A quantised weight is read only: each product dequantises it into a matrix that lives as long as the product. So
forward and backward multiply by the same `W`, in training and in evaluation, and autograd keeps nothing but the
quantised weight. bitsandbytes 0.50 itself does otherwise, which is why its layers are only the storage here:

- `Linear8bitLt` rounds the activations to 8 bits too, on a CPU in evaluation mode only;
- `Linear4bit` on a CPU with AVX512-BF16 repacks its weight in place at the first evaluation and rounds its scales;
  from then on it computes in bfloat16 and its input gets no gradient, in training too;
- its CPU kernels read wrong scales where `K` is no multiple of the block size.

Leaves out: gradients of the quantised weight, and merging into it.

Legend: `N` out, `K` in; leading dimensions are any.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from phlora.lora import matmul
from phlora.lora.fused import frozen_linear
from phlora.lora.operands import may_borrow
from phlora.lora.workspace import borrowed
from phlora.models.stored_layers import rounded

# Numbers of 4-bit codes dequantised at a time on a CPU, into memory that the C library keeps for the next ones.
# A multiple of every block size.
_PIECE_OF_DENSE = 1 << 22


class _Dequantized(ABC):
    """Both products of a frozen weight as a dense matrix, in `compute_dtype` where that is given.

    On a CPU the matrix is made in the buffer that all such products share: in memory of its own, which the system has
    to clear first, making it takes twice as long.
    """

    compute_dtype: torch.dtype | None

    @property
    @abstractmethod
    def stored(self) -> Tensor:
        """The codes, as bitsandbytes stores them."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """(N, K)."""

    @abstractmethod
    def write_to(self, dense: Tensor) -> None:
        """Write `W` into a dense matrix (N, K) of any dtype."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """`W (N, K)`, fresh."""
        dense = torch.empty(self.shape, dtype=dtype, device=self.stored.device)
        self.write_to(dense)
        return dense

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        bias = None if bias is None else bias.to(dtype)
        with self._dense_for(x, dtype) as dense:
            return matmul.linear(x.to(dtype), dense, bias).to(x.dtype)

    def matmul_t(self, dy: Tensor) -> Tensor:
        dtype = self.compute_dtype or dy.dtype
        with self._dense_for(dy, dtype) as dense:
            return matmul.matmul(dy.to(dtype), dense).to(dy.dtype)

    @contextmanager
    def _dense_for(self, x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        if not may_borrow(self.stored, x):
            yield self.dense(dtype)
            return
        with borrowed(self.shape.numel(), dtype) as buffer:
            dense = buffer.view(self.shape)
            self.write_to(dense)
            yield dense


@dataclass(frozen=True)
class NF4Weight(_Dequantized):
    """A weight in blocks of 4-bit codes with one scale each (NF4 or FP4), the scales in 8 bits where nested."""

    weight: Any
    compute_dtype: torch.dtype | None = None

    @property
    def stored(self) -> Tensor:
        codes: Tensor = self.weight.data
        return codes

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.weight.quant_state.shape)

    def write_to(self, dense: Tensor) -> None:
        state = self.weight.quant_state
        if dense.device.type != "cpu" or not dense.is_contiguous():
            dense.copy_(
                bitsandbytes.functional.dequantize_4bit(self.stored, _aligned(state)).view(self.shape)
            )
            return
        codes, scales, flat = self.stored.view(-1), _scales(state), dense.view(-1)
        for start in range(0, len(flat), _PIECE_OF_DENSE):
            part = flat[start : start + _PIECE_OF_DENSE]
            blocks = -(-len(part) // state.blocksize)
            first = start // state.blocksize
            part.copy_(
                bitsandbytes.functional.dequantize_4bit(
                    codes[start // 2 : (start + len(part) + 1) // 2],
                    _of_a_piece(state, scales[first : first + blocks], len(part)),
                ).view(-1)
            )

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.is_cuda and not torch.is_grad_enabled():
            return self._fused_matmul(x, bias)
        return super().matmul(x, bias)

    def _fused_matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """On a GPU few tokens cost less than the dense matrix; bitsandbytes picks by shape."""
        dtype = self.compute_dtype or x.dtype
        bias = None if bias is None else bias.to(dtype)
        y: Tensor = bitsandbytes.matmul_4bit(
            x.to(dtype), self.weight.data.t(), bias=bias, quant_state=self.weight.quant_state
        )
        return y.to(x.dtype)


@dataclass(frozen=True)
class Int8Weight(_Dequantized):
    """A weight in 8-bit integers, `codes (N, K)`, with the largest magnitude of each row, `scales (N,)`."""

    codes: Tensor
    scales: Tensor
    compute_dtype: torch.dtype | None = None

    @property
    def stored(self) -> Tensor:
        return self.codes

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def write_to(self, dense: Tensor) -> None:
        dense.copy_(self.codes).mul_(self.scales.to(self.codes.device).div(127).unsqueeze(1))


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """bitsandbytes' 4-bit layer, multiplied by as an operand."""

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, operand(self), self.bias)


class Linear8bit(bitsandbytes.nn.Linear8bitLt):
    """bitsandbytes' 8-bit layer, multiplied by as an operand: no activation is rounded to 8 bits."""

    compute_dtype: torch.dtype | None = None
    dense_dtype: torch.dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, operand(self), self.bias)


def use_operands(model: nn.Module) -> None:
    """Let the layers that transformers had bitsandbytes quantise be multiplied by as operands, in place."""
    kinds = {bitsandbytes.nn.Linear4bit: Linear4bit, bitsandbytes.nn.Linear8bitLt: Linear8bit}
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))


# Numbers that are quantised at a time: bitsandbytes needs several copies of them. A multiple of every block size.
_PIECE = 1 << 20


def _quantize_nf4(weight: Tensor, *, double_quant: bool, device: torch.device) -> tuple[Tensor, Any]:
    """The codes `(N K / 2, 1)` and the scales of a weight, as `functional.quantize_4bit` gives them for all of it."""
    functional: Any = bitsandbytes.functional
    parts = [
        functional.quantize_4bit(part.to(device), compress_statistics=False, quant_type="nf4")
        for part in weight.reshape(-1).split(_PIECE)
    ]
    codes, state = torch.cat([codes for codes, _ in parts]), parts[0][1]
    state.absmax, state.shape = torch.cat([own.absmax for _, own in parts]), weight.shape
    if double_quant:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(state.absmax - state.offset, blocksize=256)
        state.nested = True
    return codes, state


def linear_nf4(
    linear: nn.Linear, *, double_quant: bool, compute_dtype: torch.dtype | None, device: torch.device
) -> Linear4bit:
    """An NF4 copy of a dense layer on `device`; the bias is shared and stays as it is."""
    with torch.device("meta"):
        kind: Any = Linear4bit
        layer: Linear4bit = kind(
            linear.in_features, linear.out_features, bias=False, compute_dtype=compute_dtype
        )
    codes, state = _quantize_nf4(linear.weight.detach(), double_quant=double_quant, device=device)
    weight: Any = bitsandbytes.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=double_quant,
        quant_type="nf4",
        bnb_quantized=True,
    )
    layer.weight, layer.bias = weight, linear.bias
    return layer.train(linear.training)


def linear_int8(
    linear: nn.Linear, *, compute_dtype: torch.dtype | None, device: torch.device, name: str = ""
) -> Linear8bit:
    """An int8 copy of a dense layer on `device`; the bias is shared and stays as it is.

    Raises:
        ModelError: the weight, called `name`, has numbers that float16 cannot hold.
    """
    with torch.device("meta"):
        layer = Linear8bit(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    rows = max(1, _PIECE // linear.in_features)
    parts = [
        bitsandbytes.functional.int8_vectorwise_quant(rounded(part.to(device), torch.float16, name=name))[:2]
        for part in linear.weight.detach().split(rows)
    ]
    codes, scales = (torch.cat(kind) for kind in zip(*parts, strict=True))
    # No `CB`: the codes twice would be twice the bytes after a move to another device.
    weight: Any = bitsandbytes.nn.Int8Params(codes, requires_grad=False, SCB=scales)
    layer.weight, layer.bias = weight, linear.bias
    layer.compute_dtype, layer.dense_dtype = compute_dtype, linear.weight.dtype
    return layer.train(linear.training)


def operand(layer: nn.Module) -> NF4Weight | Int8Weight:
    """The operand of a layer that bitsandbytes quantised, here or elsewhere."""
    compute_dtype = getattr(layer, "compute_dtype", None)
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        _unpack(layer)
        return NF4Weight(layer.weight, compute_dtype)
    assert isinstance(layer, bitsandbytes.nn.Linear8bitLt)
    weight: Any = layer.weight
    scales: Any = weight.SCB if weight.SCB is not None else layer.state.SCB
    return Int8Weight(weight.data, scales, compute_dtype)


def dense_weight(layer: nn.Module) -> Tensor:
    """`W (N, K)` of a quantised layer, in the dtype that it had before it was quantised."""
    weight = operand(layer)
    if isinstance(weight, NF4Weight):
        return weight.dense(weight.weight.quant_state.dtype)
    # bitsandbytes itself casts to float16 before it rounds to 8 bits.
    return weight.dense(getattr(layer, "dense_dtype", torch.float16))


def _scales(state: Any) -> Tensor:
    """A scale for each block, in float32, whatever they are stored as."""
    scales: Tensor = state.absmax
    if state.nested:
        scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float().view(-1)


def _of_a_piece(state: Any, scales: Tensor, size: int) -> Any:
    """The state of `size` numbers from the beginning of a block on, with the scales of their blocks."""
    piece = copy.copy(state)
    piece.absmax, piece.nested, piece.shape = scales, False, torch.Size((1, size))
    return _aligned(piece)


def _aligned(state: Any) -> Any:
    """The state with rows that are whole blocks, as the CPU kernels need them; the codes lie in one run anyway."""
    if state.shape[-1] % state.blocksize == 0:
        return state
    size, aligned = state.shape.numel(), copy.copy(state)
    whole = size % state.blocksize == 0
    aligned.shape = torch.Size((size // state.blocksize, state.blocksize) if whole else (1, size))
    return aligned


def _unpack(layer: Any) -> None:
    """Undo the CPU layout into which bitsandbytes' own forward repacks a weight, and keep it from doing so again."""
    layer.support_avx512bf16_for_cpu = False
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        layer.weight.data, layer.weight.quant_state = (
            bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
        )
