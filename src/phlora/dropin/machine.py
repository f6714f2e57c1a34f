"""Settings that this machine cannot have, replaced where nothing that is trained is lost by it, each with one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from phlora.extras import is_installed
from phlora.models.device import choose_device
from phlora.names import FROM_PRETRAINED, by_todays_names
from phlora.train.backends import check_trackers
from phlora.train.field_values import word_of

# Optimizers of bitsandbytes -> torch's with the same rule, whose states are float32.
_WITHOUT_BITSANDBYTES = {
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw_8bit": "adamw_torch",
    "adamw_8bit": "adamw_torch",
    "adamw_bnb_8bit": "adamw_torch",
}
# Optimizers whose states move between a GPU and main memory -> the same without that.
UNPAGED = {
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw_8bit": "adamw_8bit",
    "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix_8bit",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
}
_FLASH = ("flash_attention_2", "flash_attention_3")


def fit_machine(values: Mapping[str, Any], notes: list[str], *, is_sft: bool = True) -> dict[str, Any]:
    """The settings of a configuration as this machine can have them.

    Args:
        is_sft: whether `bf16` is on where nothing is said of it, as in TRL's configurations.

    Raises:
        MissingExtraError: a tracker whose package is not installed.
    """
    fitting = dict(values)
    check_trackers(fitting.get("report_to"))
    device = "cpu" if fitting.get("use_cpu") else choose_device().type
    if device == "cpu":
        fitting.setdefault("dataloader_pin_memory", False)
    if device != "cuda":
        _without_cuda(fitting, notes, device, is_sft=is_sft)
    optim = word_of(fitting.get("optim", ""))
    if device == "cpu" and optim in UNPAGED:
        fitting["optim"] = UNPAGED[optim]
        notes.append(
            f"optim: {optim} pages the memory of a GPU: {fitting['optim']} takes the same steps here"
        )
        optim = fitting["optim"]
    if optim in _WITHOUT_BITSANDBYTES and not is_installed("bitsandbytes"):
        fitting["optim"] = _WITHOUT_BITSANDBYTES[optim]
        notes.append(
            f"optim: {optim} needs bitsandbytes, which is not installed: {fitting['optim']} takes the same steps, "
            "with its states in float32"
        )
    if isinstance(fitting.get("model_init_kwargs"), Mapping):
        fitting["model_init_kwargs"] = loading_arguments(fitting["model_init_kwargs"], notes, device=device)
    return fitting


def _without_cuda(fitting: dict[str, Any], notes: list[str], device: str, *, is_sft: bool) -> None:
    instead = f"has no effect on this {device} device: the model's own dtype is computed with"
    if fitting.get("fp16") and device == "cpu":
        fitting["fp16"] = False
        fitting.setdefault("bf16", False)
        notes.append(f"fp16 {instead}")
    # transformers takes bf16 on a CPU where use_cpu is said as well.
    if device == "cpu" and not fitting.get("use_cpu"):
        asked = fitting.get("bf16")
        if asked or (asked is None and is_sft):
            fitting["bf16"] = False
            if asked:
                notes.append(f"bf16 {instead}")
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if (
            device == "cpu"
            and fitting.get(name)
            and not (name == "bf16_full_eval" and fitting.get("use_cpu"))
        ):
            fitting[name] = False
            notes.append(f"{name} {instead}")
    for name, why in {
        "tf32": "float32 is computed as it is",
        "use_liger_kernel": "its kernels need CUDA",
        "activation_offloading": "activations are in the memory of the CPU already",
    }.items():
        if fitting.get(name) and not (name == "activation_offloading" and device != "cpu"):
            fitting[name] = None if name == "tf32" else False
            notes.append(f"{name} has no effect on this {device} device: {why}")


def loading_arguments(
    given: Mapping[str, Any], notes: list[str], *, device: str | None = None
) -> dict[str, Any]:
    """The arguments of `from_pretrained` by today's names, as this machine can have them."""
    device = device or choose_device().type
    today = by_todays_names(FROM_PRETRAINED, given, known=None)
    notes += today.notes
    values = today.values
    for moved in today.elsewhere.values():
        if any(moved.values()):
            values.setdefault("quantization_config", BitsAndBytesConfig(**moved))
    attention = values.get("attn_implementation")
    if attention in _FLASH and (device != "cuda" or not is_installed("flash_attn")):
        values["attn_implementation"] = "sdpa"
        why = f"this is a {device} device" if device != "cuda" else "flash-attn is not installed"
        notes.append(
            f"attn_implementation: {attention} needs CUDA and flash-attn, and {why}: sdpa computes the same"
        )
    if _asks_for_cuda(values.get("device_map")) and not torch.cuda.is_available():
        notes.append(f"device_map: {values.pop('device_map')} has no effect: the model stays on the {device}")
    return values


def _asks_for_cuda(device_map: Any) -> bool:
    if isinstance(device_map, Mapping):
        return any(_asks_for_cuda(device) for device in device_map.values())
    if isinstance(device_map, int):
        return not isinstance(device_map, bool)
    return str(device_map).startswith("cuda")
