"""Weights that GPTQ or AWQ rounded to a few bits, read as the dense matrices that such a model computes with.

Both keep, for a linear layer of `out` rows and `in` columns, whole numbers q of 2, 4 or 8 bits, and for each group of
columns of a row a scale s and a zero z, the numbers packed into int32, the lowest bits first:

    W[o, i] = (q[o, i] - z[o, g(i)]) * s[o, g(i)]

    GPTQ  qweight (in*bits/32, out)   qzeros (groups, out*bits/32)   scales (groups, out)   g_idx (in): the group g(i)
          where i is packed along columns, and the zeros are stored less one (`checkpoint_format: gptq`) or as they are
          (`gptq_v2`); without g_idx a group is a run of columns
    AWQ   qweight (in, out*bits/32)   qzeros (groups, out*bits/32)   scales (groups, out)
          where eight numbers of 4 bits lie in the order 0 2 4 6 1 3 5 7

The product is rounded to the dtype of the scales, as the kernels for these formats do. Kernels that multiply by packed
weights have no backward on most machines, and PEFT knows few of them. A dense base is trained, evaluated and merged
like any other, and takes the room of one in 16 bits.
Sources: GPTQ (Frantar et al. 2022), AWQ (Lin et al. 2023); the layouts as GPTQModel and AutoAWQ write them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from phlora.errors import ModelError
from phlora.models.checkpoint import Checkpoint, StoredTensor

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_BITS = {"gptq": (2, 4, 8), "awq": (4,)}
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Packing:
    """How the weights of a model are packed.

    Attributes:
        method: `gptq` or `awq`.
        zeros_less_one: whether GPTQ's zeros are stored less one.
    """

    method: str
    zeros_less_one: bool = True


def method_of(config: PreTrainedConfig) -> str | None:
    """What a model says that it is quantised by; None for one that is not."""
    facts = _stated(config)
    return None if facts is None else _plain(facts.get("quant_method"))


def _stated(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """What a configuration says about the quantisation: as it was read, or as transformers' object."""
    stated = getattr(config, "quantization_config", None)
    return stated if stated is None or isinstance(stated, Mapping) else stated.to_dict()


def _plain(value: Any) -> str:
    """A word, or a member of an enumeration that stands for it."""
    return str(getattr(value, "value", value))


def packing_of(config: PreTrainedConfig) -> Packing | None:
    """How a model's weights are packed; None where they are not, or in a way that transformers has to read."""
    facts = _stated(config)
    if facts is None:
        return None
    method = _plain(facts.get("quant_method"))
    layout = str(facts.get("checkpoint_format") or facts.get("format") or "gptq")
    if method == "auto-round":
        # Says which of the two it wrote: auto_round:auto_gptq, auto_round:auto_awq, or kinds of its own.
        method = str(facts.get("packing_format", "")).rpartition("auto_")[2]
        layout = "gptq"
    if method == "gptq" and layout in ("gptq", "gptq_v2"):
        return Packing("gptq", zeros_less_one=layout == "gptq")
    if method == "awq" and _plain(facts.get("version", "gemm")).lower() == "gemm":
        return Packing("awq")
    return None


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the same model with dense weights."""
    plain = copy.deepcopy(config)
    del plain.quantization_config
    return plain


@dataclass(frozen=True)
class PackedCheckpoint(Checkpoint):
    """A checkpoint whose packed weights are read as dense ones, under the name `weight`.

    `tensors` has the dense ones with the shape and the bytes that they have once they are read.
    """

    packing: Packing = field(default_factory=lambda: Packing("gptq"))
    parts: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """The tensor, or the dense matrix of a packed one, shape (out, in), in the dtype of its scales.

        Raises:
            ModelError: a column of a packed one is of a group that there is not.
        """
        layer = name.removesuffix(".weight")
        if layer not in self.parts:
            return super().read(name)
        stored = Checkpoint(self.files, {f"{layer}.{part}": at for part, at in self.parts[layer].items()})
        found = {part: stored.read(f"{layer}.{part}") for part in self.parts[layer]}
        groups, last = found.get("g_idx"), len(found["scales"]) - 1
        if groups is not None and not 0 <= int(groups.min()) <= int(groups.max()) <= last:
            raise ModelError(
                f"The packed weight of {layer} has columns of groups {int(groups.min())} to {int(groups.max())}",
                where=str(self.parts[layer]["g_idx"].file),
                expected=f"groups from 0 to {last}, as many as there are scales",
                fix="copy or download the model again",
            )
        return unpacked(self.packing, found["qweight"], found["qzeros"], found["scales"], found.get("g_idx"))


def open_packed(checkpoint: Checkpoint, packing: Packing, *, where: str) -> PackedCheckpoint:
    """A view of a checkpoint with dense weights in the place of packed ones.

    Raises:
        ModelError: a part of a packed weight is missing, or its shape is none that this packing has.
    """
    layers = {name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")}
    parts = {
        layer: {
            part: checkpoint.tensors[f"{layer}.{part}"]
            for part in _PARTS
            if f"{layer}.{part}" in checkpoint.tensors
        }
        for layer in layers
    }
    packed = {f"{layer}.{part}" for layer in layers for part in _PARTS}
    tensors = {name: stored for name, stored in checkpoint.tensors.items() if name not in packed}
    for layer, found in parts.items():
        missing = [part for part in _PARTS[:3] if part not in found]
        if missing:
            raise ModelError(
                f"The packed weight of {layer} lacks {', '.join(missing)}",
                where=where,
                fix="copy or download the model again",
            )
        tensors[f"{layer}.weight"] = _dense(layer, found, packing, where=where)
    return PackedCheckpoint(checkpoint.files, tensors, packing, parts)


def unpacked(
    packing: Packing, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None
) -> Tensor:
    """The dense matrix (out, in) of a packed one, in the dtype of its scales; see the module for shapes and formula."""
    bits = _bits(tuple(qzeros.shape), tuple(scales.shape))
    zeros = _numbers(qzeros, bits)  # (groups, out)
    if packing.method == "awq":
        numbers, zeros = _in_awq_order(_numbers(qweight, bits)), _in_awq_order(zeros)  # (in, out)
    else:
        numbers = _numbers(qweight.T.contiguous(), bits).T  # (in, out)
        if packing.zeros_less_one:
            zeros = (zeros + 1) & ((1 << bits) - 1)
    groups = scales.shape[0]
    if g_idx is None or packing.method == "awq":
        group = torch.arange(len(numbers)) // (len(numbers) // groups)
    else:
        group = g_idx.long()
    difference = (numbers - zeros[group]).to(torch.float32)
    return (difference * scales.float()[group]).to(scales.dtype).T.contiguous()


def _numbers(packed: Tensor, bits: int) -> Tensor:
    """The numbers of `bits` bits in the last dimension of an int32 tensor, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    apart = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return apart.reshape(*packed.shape[:-1], -1)


def _in_awq_order(numbers: Tensor) -> Tensor:
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8)
    return eights[..., torch.tensor(_AWQ_ORDER)].reshape(numbers.shape)


def _bits(zeros: tuple[int, ...], scales: tuple[int, ...]) -> int:
    return 32 * zeros[-1] // max(1, scales[-1])


def _dense(layer: str, found: Mapping[str, StoredTensor], packing: Packing, *, where: str) -> StoredTensor:
    """What the dense matrix will be, found out from the shapes of its parts."""
    weight, zeros, scales = (found[part] for part in _PARTS[:3])
    shapes = ", ".join(f"{part} {list(stored.shape)} {_name(stored.dtype)}" for part, stored in found.items())
    bits, rows = 0, 0
    if len(weight.shape) == len(zeros.shape) == len(scales.shape) == 2:
        bits, rows = _bits(zeros.shape, scales.shape), scales.shape[1]
    along = bits * weight.shape[0]
    columns = weight.shape[0] if packing.method == "awq" else along and 32 * weight.shape[0] // bits
    expected = (columns, rows * bits // 32) if packing.method == "awq" else (weight.shape[0], rows)
    groups = found.get("g_idx", StoredTensor(weight.file, torch.int32, (columns,), 0, 0))
    fits = (
        bits in _BITS[packing.method]
        and weight.dtype == zeros.dtype == torch.int32
        and not groups.dtype.is_floating_point
        and weight.shape == expected
        and zeros.shape[0] == scales.shape[0]
        and scales.dtype.is_floating_point
        and groups.shape == (columns,)
        and columns % scales.shape[0] == 0
    )
    if not fits:
        raise ModelError(
            f"The packed weight of {layer} has the shapes {shapes}",
            where=where,
            expected=f"those of {packing.method} with {' or '.join(map(str, _BITS[packing.method]))} bits, in int32",
            fix="quantise it again, or name its 16-bit original",
        )
    size = columns * rows * scales.dtype.itemsize
    return StoredTensor(weight.file, scales.dtype, (rows, columns), weight.offset, size)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
