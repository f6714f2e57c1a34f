"""What to compute with on this machine: device, dtype and attention, each with the reason for it."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from phlora.errors import ConfigError, EnvironmentProblem, did_you_mean
from phlora.extras import is_installed, require
from phlora.lora.blocks import RowBlock
from phlora.lora.fused import lora_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")

# A whole step gains less than its widest product. On a CPU with units for bfloat16 that runs 5 times as fast with
# Phi-3-mini's shapes, where a step took less than half the time, and 2.1 times with those of a 135M model.
_WORTHWHILE_GAIN = 3.0
_MEASURING_SECONDS = 0.6
_TYPICAL_PRODUCT = (4096, 1024)
# Numbers of the weight, and multiply-adds of the product, that show how fast a larger one is.
_MOST_NUMBERS, _WORK = 1 << 24, 1 << 31

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Choice(Generic[Value]):
    """A value that was chosen, and the reason in words."""

    value: Value
    reason: str


def choose_device(requested: str = "auto") -> torch.device:
    """The device to compute on: a GPU where there is one.

    Raises:
        ConfigError: no device has this name.
        EnvironmentProblem: this machine has no such device.
    """
    if requested == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    known = ("auto", "cpu", "cuda", "mps")
    if requested.partition(":")[0] not in known[1:]:
        raise ConfigError(
            f"There is no device `{requested}`", where="device", fix=did_you_mean(requested, known)
        )
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ConfigError(f"There is no device `{requested}`", where="device", fix="cuda:0") from error
    present = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present[device.type]:
        raise EnvironmentProblem(
            f"This machine has no device `{requested}` that torch can use", where="device", fix="device: auto"
        )
    return device


def choose_dtype(
    requested: str = "auto", *, device: torch.device, product: tuple[int, int] = _TYPICAL_PRODUCT
) -> Choice[torch.dtype]:
    """The dtype that is computed with, and why.

    On a GPU: bfloat16 where the hardware has it. On a CPU: bfloat16 only where the model's own widest product, with
    what surrounds it, is measured to be so much faster than in float32 that it is worth the precision; a CPU without
    units for it is far slower.

    Args:
        product: rows and columns of the widest weight, see `families.widest_product`.

    Raises:
        ConfigError: no dtype has this name.
    """
    name = str(requested).removeprefix("torch.")
    if name in DTYPES:
        return Choice(value=DTYPES[name], reason=_asked_for(name, device, product))
    if name != "auto":
        raise ConfigError(
            f"There is no dtype `{requested}`", where="dtype", fix=did_you_mean(name, ["auto", *DTYPES])
        )
    if device.type == "cpu":
        return _fastest_on_cpu(product)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice(value=torch.bfloat16, reason="the GPU computes in bfloat16")
    if device.type == "cuda":
        return Choice(
            value=torch.float32, reason="the GPU has no bfloat16, and training overflows in float16 weights"
        )
    return Choice(value=torch.float32, reason=f"float32 is sound on every {device.type} device")


def _asked_for(name: str, device: torch.device, product: tuple[int, int]) -> str:
    if device.type != "cpu" or name == "float32":
        return "asked for"
    full, other = _cpu_seconds(DTYPES[name], product)
    return (
        f"asked for; {other / full:.1f} times slower than float32 on this CPU"
        if other > full
        else "asked for"
    )


def _fastest_on_cpu(product: tuple[int, int]) -> Choice[torch.dtype]:
    full, half = _cpu_seconds(torch.bfloat16, product)
    measured = (
        f"measured on this CPU: the model's widest product, {product[0]} x {product[1]}, with what surrounds it "
        f"in a LoRA step takes one thread {1e3 * full:.1f} ms in float32, {1e3 * half:.1f} in bfloat16"
    )
    gain = full / half
    if gain >= _WORTHWHILE_GAIN:
        return Choice(value=torch.bfloat16, reason=f"{gain:.1f} times as fast as float32; {measured}")
    verdict = f"{1 / gain:.1f} times slower" if gain < 1 else f"only {gain:.1f} times as fast"
    return Choice(value=torch.float32, reason=f"exact, and bfloat16 is {verdict}; {measured}")


@functools.cache
def _cpu_seconds(dtype: torch.dtype, product: tuple[int, int]) -> tuple[float, float]:
    """Processor seconds of an adapted half of a gated MLP, forward and backward, in float32 and in `dtype`.

    On one thread, and of a share of its rows where it is large.
    """
    width = product[1]
    rows = max(2, min(product[0], _MOST_NUMBERS // width)) // 2 * 2
    tokens = max(64, min(512, _WORK // (rows * width)))
    weights = {kind: torch.full((rows, width), 0.01, dtype=kind) for kind in (torch.float32, dtype)}
    seconds: dict[torch.dtype, list[float]] = {kind: [] for kind in weights}
    threads = torch.get_num_threads()
    try:
        # What one thread takes of its processor says the same on a busy machine; several would wait for one another.
        torch.set_num_threads(1)
        # The first round warms up, and kernels are chosen: it never stands alone.
        for number in range(8):
            for kind, weight in weights.items():
                x = torch.ones(tokens, width, dtype=kind, requires_grad=True)
                start = time.thread_time()
                _run_half_an_mlp(x, weight)
                seconds[kind].append(time.thread_time() - start)
            if number > 1 and sum(map(sum, seconds.values())) > _MEASURING_SECONDS:
                break
    finally:
        torch.set_num_threads(threads)
    return min(seconds[torch.float32]), min(seconds[dtype])


@torch.enable_grad()
def _run_half_an_mlp(x: Tensor, weight: Tensor) -> None:
    """The widest product of a layer with its adapter in float32, the norm before it and the gate behind it."""
    rank = 16
    down = torch.full((rank, weight.shape[1]), 0.01, requires_grad=True)
    up = torch.full((len(weight), rank), 0.01, requires_grad=True)
    block = RowBlock(name="", start=0, stop=len(weight), r=rank, scaling=1.0)
    normed = (x * x.float().square().mean(-1, keepdim=True).rsqrt()).to(x.dtype)
    gate, value = lora_blocks(normed, weight, down, [up], blocks=[block]).chunk(2, dim=-1)
    (F.silu(gate) * value).sum().backward()


def choose_attention(
    requested: str = "auto", *, device: torch.device, dtype: torch.dtype = torch.float32
) -> Choice[str]:
    """The attention implementation, and why: flash-attn is used where it is installed and never demanded.

    Raises:
        ConfigError: no implementation has this name, or flash attention is asked for with float32 weights.
        MissingExtraError: flash attention is asked for and not installed.
        EnvironmentProblem: flash attention is asked for without a CUDA device.
    """
    flash_installed = is_installed("flash_attn")
    half = dtype in (torch.float16, torch.bfloat16)
    if requested == "auto":
        if flash_installed and device.type == "cuda" and half:
            return Choice(value="flash_attention_2", reason="flash-attn is installed")
        return Choice(value="sdpa", reason="torch's own attention runs everywhere")
    if requested not in ATTENTIONS:
        raise ConfigError(
            f"There is no attention `{requested}`",
            where="attn_implementation",
            fix=did_you_mean(requested, ["auto", *ATTENTIONS]),
        )
    if requested == "flash_attention_2":
        _require_flash(device, half)
    return Choice(value=requested, reason="asked for")


def _require_flash(device: torch.device, half: bool) -> None:
    where = "attn_implementation"
    require({"flash_attn": "flash_attention_2"}, where=where, instead="use attn_implementation: sdpa")
    if device.type != "cuda":
        raise EnvironmentProblem(
            f"flash_attention_2 needs a CUDA device, this is {device.type}",
            where=where,
            fix="attn_implementation: sdpa",
        )
    if not half:
        raise ConfigError(
            "flash_attention_2 computes in bfloat16 or float16 only", where=where, fix="dtype: bfloat16"
        )
