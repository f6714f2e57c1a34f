"""A cheap name for a base model's weights, by which an adapter knows its base again."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from phlora.models.device import DTYPES

# Where a quantised model keeps what it was before; on the module, so that it survives PEFT and deepcopy.
_KEPT = "unquantized_fingerprints"


def fingerprint(model: nn.Module, *, precision: str | None = None) -> str:
    """`<precision>:<hash>` over names, shapes and sampled values of a base model's weights.

    256 evenly spaced values of each tensor are rounded to `precision` before they are hashed, so that float32
    and bfloat16 loads of one checkpoint agree. A float16 load cannot be told in bfloat16 and says `float16:`.
    LoRA tensors are left out, so the base alone and under an adapter agree too.

    A quantised model keeps the fingerprint of the weights that were quantised, with the storage behind it:
    `bfloat16:<hash>+nf4`.

    Args:
        model: a transformers model, bare or under PEFT.
        precision: `bfloat16` or `float16`; by the model's own dtype when None.
    """
    kept = getattr(model, _KEPT, None)
    if kept is not None:
        found: str = kept[precision]
        return found
    parameters = [(_base_name(key), p) for key, p in model.named_parameters() if "lora_" not in key]
    if precision is None:
        precision = "float16" if any(p.dtype == torch.float16 for _, p in parameters) else "bfloat16"
    digest = hashlib.sha256()
    for key, parameter in sorted(parameters, key=lambda named: named[0]):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256].to(DTYPES[precision]).float().cpu()
        digest.update(f"{key} {tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return f"{precision}:{digest.hexdigest()[:16]}"


def keep_fingerprint(model: nn.Module, storage: str) -> None:
    """Remember the fingerprint of a model that is about to be stored as `storage`."""
    kept = {name: f"{fingerprint(model, precision=name)}+{storage}" for name in (None, *DTYPES)}
    setattr(model, _KEPT, kept)


def split_fingerprint(recorded: str) -> tuple[str, str]:
    """The fingerprint of the weights, and the storage that they were quantised to (empty: none)."""
    weights, _, storage = recorded.partition("+")
    return weights, storage


def _base_name(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")
