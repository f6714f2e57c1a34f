"""What to compute with on this machine: device, dtype and attention, each with the reason for it."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn
from transformers import Phi3Config, Phi3Model

from phlora.errors import ConfigError, EnvironmentProblem, did_you_mean
from phlora.extras import is_installed, require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")

# A whole training step gains less than the layer: where that ran 1.5 times as fast, a 135M step ran 1.15.
_WORTHWHILE_GAIN = 2.0
_MEASURING_SECONDS = 0.3

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


def choose_dtype(requested: str = "auto", *, device: torch.device) -> Choice[torch.dtype]:
    """The dtype of the weights, and why.

    On a GPU: bfloat16 where the hardware has it. On a CPU: bfloat16 only when a layer is measured to be at
    least twice as fast as in float32: it costs precision, and a CPU without units for it is far slower.

    Raises:
        ConfigError: no dtype has this name.
    """
    name = str(requested).removeprefix("torch.")
    if name in DTYPES:
        return Choice(value=DTYPES[name], reason=_asked_for(name, device))
    if name != "auto":
        raise ConfigError(
            f"There is no dtype `{requested}`", where="dtype", fix=did_you_mean(name, ["auto", *DTYPES])
        )
    if device.type == "cpu":
        return _fastest_on_cpu()
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice(value=torch.bfloat16, reason="the GPU computes in bfloat16")
    if device.type == "cuda":
        return Choice(
            value=torch.float32, reason="the GPU has no bfloat16, and training overflows in float16 weights"
        )
    return Choice(value=torch.float32, reason=f"float32 is sound on every {device.type} device")


def _asked_for(name: str, device: torch.device) -> str:
    if device.type != "cpu" or name == "float32":
        return "asked for"
    full, other = _cpu_layer_seconds(DTYPES[name])
    return (
        f"asked for; {other / full:.1f} times slower than float32 on this CPU"
        if other > full
        else "asked for"
    )


def _fastest_on_cpu() -> Choice[torch.dtype]:
    full, half = _cpu_layer_seconds(torch.bfloat16)
    measured = (
        f"measured on this CPU: a layer takes {1e3 * full:.1f} ms in float32, {1e3 * half:.1f} in bfloat16"
    )
    gain = full / half
    if gain >= _WORTHWHILE_GAIN:
        return Choice(value=torch.bfloat16, reason=f"{gain:.1f} times as fast as float32; {measured}")
    verdict = f"{1 / gain:.1f} times slower" if gain < 1 else f"only {gain:.1f} times as fast"
    return Choice(value=torch.float32, reason=f"exact, and bfloat16 is {verdict}; {measured}")


@functools.cache
def _cpu_layer_seconds(dtype: torch.dtype) -> tuple[float, float]:
    """Seconds for forward and backward of one small frozen Phi-3 layer, in float32 and in `dtype`."""
    config = Phi3Config(
        vocab_size=32,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        layers = {kind: _frozen(Phi3Model(config), kind) for kind in (torch.float32, dtype)}
    seconds: dict[torch.dtype, list[float]] = {kind: [] for kind in layers}
    # The first round warms up, threads start and kernels are chosen: it never stands alone.
    for number in range(5):
        for kind, layer in layers.items():
            x = torch.ones(1, 64, config.hidden_size, dtype=kind, requires_grad=True)
            start = time.perf_counter()
            layer(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
            seconds[kind].append(time.perf_counter() - start)
        if number and sum(map(sum, seconds.values())) > _MEASURING_SECONDS:
            break
    return min(seconds[torch.float32]), min(seconds[dtype])


def _frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model.requires_grad_(False).to(dtype)


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
