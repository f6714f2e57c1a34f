"""The tensors of an adapter's file, safely opened and sorted by layer."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from phlora.adapters.convert import last_part
from phlora.errors import ModelError

FIX_LORALIB = "where it was made: torch.save(lora.lora_state_dict(model), FILE)"


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle without code."""
    try:
        if file.suffix == ".safetensors":
            return _require_finite(load_file(file), file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError("The file does not exist", where=str(file)) from None
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error).upper():
            raise ModelError(
                "The file holds Python objects, which could run code while they are loaded; it was not opened",
                where=str(file),
                expected="a file of tensors alone",
                fix=FIX_LORALIB,
            ) from None
        raise _unreadable(file, error) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _unreadable(file, error) from None
    return _require_finite(_require_flat(state, file), file)


def _unreadable(file: Path, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(
        f"The file cannot be read ({lines[0].rstrip('.')})",
        where=str(file),
        fix="it may be incomplete: copy it again",
    )


def _require_flat(state: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise ModelError(f"The file holds a {type(state).__name__}", where=str(file), expected="a state dict")
    other = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ModelError(
            f"{len(other)} of {len(state)} entries are no tensors, `{other[0]}` among them",
            where=str(file),
            expected="a LoRA state dict: names with tensors",
            fix=f"save the state dict inside alone, such as checkpoint[{other[0]!r}]",
        )
    return {str(name): value.detach() for name, value in state.items()}


def not_finite(name: str, where: str) -> ModelError:
    """What is said of a tensor that holds NaN or infinity."""
    return ModelError(
        f"The tensor {name} holds values that are no finite numbers",
        where=where,
        expected="finite numbers: with this one every answer is lost",
        fix="train again from a checkpoint before the loss became no number",
    )


def _require_finite(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise not_finite(name, str(file))
    return dict(tensors)


def sort_tensors(
    state: Mapping[str, Tensor], name_A: str, name_B: str, *, where: str, fix: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """The (A, B) of each layer, and the biases; every tensor is one of them."""
    ending = name_A.format("")
    names = [key.removesuffix(ending) for key in state if key.endswith(ending)]
    pairs = {
        name: (state[name_A.format(name)], state[name_B.format(name)])
        for name in names
        if name_B.format(name) in state
    }
    biases = {key: value for key, value in state.items() if last_part(key) == "bias" and ".lora_" not in key}
    used = {form.format(name) for name in pairs for form in (name_A, name_B)} | biases.keys()
    unused = [key for key in state if key not in used]
    if unused or not pairs:
        raise ModelError(
            f"{len(unused)} of {len(state)} tensors are not part of a lora_A with its lora_B"
            + (f", {unused[0]} among them" if unused else ""),
            where=where,
            expected="lora_A and lora_B of linear layers or embeddings, and biases",
            fix=fix,
        )
    for name, (A, B) in pairs.items():
        if A.ndim != B.ndim or A.ndim < 2 or (A.ndim > 2 and name_A.endswith("lora_A")):
            raise ModelError(
                f"lora_A has {A.ndim} dimensions and lora_B {B.ndim}", where=name, expected="two of each"
            )
    return pairs, biases
