"""Reading and writing loralib's state dict; `convert` says how its tensors are laid out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from phlora.adapters.convert import (
    BLOCK_NAMES,
    AdaptedLayer,
    Adapter,
    BlockSizes,
    Layout,
    full_names,
    kernel_text,
    last_part,
)
from phlora.adapters.tensor_files import FIX_LORALIB, load_tensors, sort_tensors
from phlora.errors import ConfigError, ModelError, did_you_mean

_EMBEDDING_NAMES = ("wte", "wpe")


def read_loralib(
    file: str | Path,
    *,
    lora_alpha: float,
    enable: Sequence[str] = (),
    blocks: BlockSizes | None = None,
    kernels: Mapping[str, Sequence[int]] | None = None,
) -> Adapter:
    """Read what `torch.save(lora.lora_state_dict(model), file)` wrote.

    Args:
        lora_alpha: that of the layers; the file does not know it.
        enable: names of the adapted row blocks (`q` or `q_proj`); not needed where the shapes leave one possibility.
        blocks: last part of a layer's name -> its blocks' rows by name, in the order of the rows; without it blocks
            are equal, as in loralib.
        kernels: last part of a convolution's name -> its kernel, (3, 3) for one of 3 × 3.

    Raises:
        ModelError: the file cannot be read, holds code or anything but a LoRA state dict, or its shapes do not fit.
        ConfigError: the blocks or a kernel cannot be told, or are named wrongly.
    """
    state = load_tensors(Path(file))
    pairs, biases = sort_tensors(state, "{}.lora_A", "{}.lora_B", where=str(file), fix=FIX_LORALIB)
    enable, kernels = full_names(enable, pairs, blocks or {}), kernels or {}
    _require_kernels(kernels, pairs, biases)
    layers = []
    for name, (A, B) in pairs.items():
        if kernel := kernels.get(last_part(name)):
            layers.append(_stacked_convolution(name, A, B, lora_alpha=lora_alpha, kernel=tuple(kernel)))
        else:
            layers.append(
                _stacked_layer(name, A, B, lora_alpha=lora_alpha, enable=enable, blocks=blocks or {})
            )
    # loralib keeps a convolution inside of its layer.
    inner = {f"{layer.name}.conv.bias": f"{layer.name}.bias" for layer in layers if layer.kernel}
    biases = {inner.get(name, name): value for name, value in biases.items()}
    return Adapter(layers=tuple(layers), biases=biases)


def write_loralib(adapter: Adapter, file: str | Path) -> None:
    """Write a state dict for `load_state_dict(..., strict=False)`; `Adapter.describe` says for which layers."""
    state: dict[str, Tensor] = {}
    for layer in adapter.layers:
        state |= {f"{layer.name}.lora_A": layer.lora_A, f"{layer.name}.lora_B": layer.lora_B}
    inner = {f"{layer.name}.bias": f"{layer.name}.conv.bias" for layer in adapter.layers if layer.kernel}
    state |= {inner.get(name, name): value for name, value in adapter.biases.items()}
    # A view would drag the whole of its storage into the file.
    torch.save({name: value.clone() for name, value in state.items()}, file)


def _stacked_layer(
    name: str, A: Tensor, B: Tensor, *, lora_alpha: float, enable: Sequence[str], blocks: BlockSizes
) -> AdaptedLayer:
    num_blocks, rest = divmod(A.shape[0], max(1, B.shape[1]))
    if rest or not num_blocks:
        raise ModelError(
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not belong together",
            where=name,
            expected="lora_A (n·r, in_features) and lora_B (rows, r)",
        )
    layout, leaf = (
        _stacked_layout(name, num_blocks, B.shape[0], enable=enable, blocks=blocks),
        last_part(name),
    )
    return AdaptedLayer(
        name=name,
        lora_A=A,
        lora_B=B,
        r=B.shape[1],
        lora_alpha=lora_alpha,
        layout=layout,
        is_embedding="embed" in leaf or leaf in _EMBEDDING_NAMES,
    )


def _stacked_convolution(
    name: str, A: Tensor, B: Tensor, *, lora_alpha: float, kernel: tuple[int, ...]
) -> AdaptedLayer:
    *outer, last = kernel
    r, rest = divmod(A.shape[0], last)
    if rest or B.shape[1] != A.shape[0] or A.shape[1] % last or B.shape[0] % math.prod(outer):
        raise ModelError(
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not those of a kernel of {kernel_text(kernel)}",
            where=name,
            expected=f"lora_A (r·{last}, in·{last}) and lora_B (out·{math.prod(outer)}, r·{last})",
        )
    return AdaptedLayer(name=name, lora_A=A, lora_B=B, r=r, lora_alpha=lora_alpha, kernel=kernel)


def _require_kernels(
    kernels: Mapping[str, Sequence[int]], layers: Iterable[str], biases: Iterable[str]
) -> None:
    """Every named kernel is a layer's, and every convolution that can be told is named."""
    leaves = {last_part(name) for name in layers}
    for leaf in kernels:
        if leaf not in leaves:
            raise ConfigError(
                f"The adapter has no layer `{leaf}`", where="kernels", fix=did_you_mean(leaf, leaves)
            )
    for name in layers:
        if f"{name}.conv.bias" in biases and last_part(name) not in kernels:
            raise ConfigError(
                "The layer is a convolution, and the file does not know its kernel",
                where=name,
                fix=f"name it: kernels={{{last_part(name)!r}: (3, 3)}}",
            )


def _stacked_layout(
    name: str, num_blocks: int, num_rows: int, *, enable: Sequence[str], blocks: BlockSizes
) -> Layout | None:
    """The one layout that a stacked B of `num_rows` can have; None for a plain linear layer."""
    leaf = last_part(name)
    names = list(blocks.get(leaf) or BLOCK_NAMES.get(leaf, ()))
    wanted = [part for part in names if part in enable]
    if num_blocks == 1 and not wanted and (leaf not in blocks or sum(blocks[leaf].values()) == num_rows):
        return None
    sizes = dict(blocks[leaf]) if leaf in blocks else _equal_sizes(name, names, num_blocks, num_rows)
    possible = [
        chosen
        for chosen in itertools.combinations(names, num_blocks)
        if sum(sizes[part] for part in chosen) == num_rows and (not wanted or list(chosen) == wanted)
    ]
    if len(possible) == 1:
        return Layout(sizes=sizes, enabled=possible[0])
    shown = ", ".join(f"{part} {size}" for part, size in sizes.items())
    found = f"lora_B has {num_rows} rows of {num_blocks} blocks; the weight is {shown}"
    if possible:
        choices = " or ".join(f"--enable {','.join(chosen)}" for chosen in possible)
        raise ConfigError(f"{found}, and several choices fit", where=name, fix=f"say which: {choices}")
    raise ConfigError(
        f"{found}" + (f", and {', '.join(wanted)} do not fit" if wanted else ", and no choice fits"),
        where=name,
        fix="correct --enable, or give the rows of each block: --blocks qkv_proj=3072,1024,1024",
    )


def _equal_sizes(name: str, names: Sequence[str], num_blocks: int, num_rows: int) -> dict[str, int]:
    if not names:
        raise ConfigError(
            f"The layer is a MergedLinear of {num_blocks} enabled blocks, and what blocks it has is not known",
            where=name,
            fix=f"give the rows of each block, for example --blocks {last_part(name)}=768,768,768",
        )
    if num_rows % num_blocks:
        raise ConfigError(
            f"lora_B has {num_rows} rows, which are no {num_blocks} equal blocks",
            where=name,
            fix=f"name the base model (--model), or the rows of each block (--blocks {last_part(name)}=…)",
        )
    return dict.fromkeys(names, num_rows // num_blocks)
