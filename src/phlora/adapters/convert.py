"""One adapter in two formats: loralib's state dict, and PEFT's folder.

For a layer `X` with weight (N, K) and `s = lora_alpha / r`:

    loralib   X.lora_A (r, K), X.lora_B (N, r)                        Linear
              X.lora_A (n·r, K), X.lora_B (ΣN_i, r)                   MergedLinear, n of its row blocks enabled
    PEFT      base_model.model.X.lora_A.weight, ….lora_B.weight       always of the shapes of Linear

PEFT knows no row blocks, so a MergedLinear becomes the block-diagonal form: A as it is, B (N, n·r) with `B_i` at the
rows of block i and its own r columns, zero elsewhere, and alpha times n, which leaves `s` as it was. Both ways only
copy numbers, so there and back is bit-equal.

A loralib file knows neither `lora_alpha`, nor how large the blocks are, nor which are enabled; a Phlora adapter has
the blocks written down beside it. An embedding is told from a linear layer by its name, since loralib's shapes are
the same, and a convolution by the kernel that the caller names. For a kernel (k_1, ..., k_d) with `n = k_1···k_(d-1)`:

    loralib   X.lora_A (r·k_d, in·k_d), X.lora_B (out·n, r·k_d)       ΔW = (B A) in the shape (out, in, k_1, ..., k_d)
    PEFT      ….lora_A.weight (R, in, k_1, ..., k_d), ….lora_B.weight (out, R, 1, ..., 1)

In loralib n rows of B, one after the other, make one output channel, each with the same A. So PEFT's A is n copies of A
on a diagonal, its B the n rows side by side, R = n·r·k_d, and alpha grows by as much. This too only copies numbers. The
way back takes no other A than such a one; groups are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phlora.adapters.blockform import from_block_diagonal, to_block_diagonal
from phlora.errors import ConfigError, ModelError, did_you_mean
from phlora.lora.blocks import RowBlock, row_blocks, split_rows
from phlora.models.families import FUSED

# Row blocks by the last part of a layer's name: Phi-3's, and GPT-2's, on which loralib is used most.
BLOCK_NAMES = {**FUSED, "c_attn": FUSED["qkv_proj"]}

BlockSizes = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The row blocks of one fused weight: their sizes in the order of the rows, and which are adapted."""

    sizes: dict[str, int]
    enabled: tuple[str, ...]

    def blocks(self, r: int, lora_alpha: float) -> tuple[RowBlock, ...]:
        """The adapted blocks, each of rank `r`."""
        return row_blocks(self.sizes, self.enabled, r=r, scaling=lora_alpha / r)


@dataclass(frozen=True, kw_only=True)
class AdaptedLayer:
    """One layer's A and B as loralib stores them.

    Attributes:
        name: of the layer in the base model.
        r: of each block; of the layer where it has none.
        lora_alpha: `s · r`.
        layout: its row blocks; None for a layer without.
        kernel: of a convolution, one size for each dimension.
    """

    name: str
    lora_A: Tensor
    lora_B: Tensor
    r: int
    lora_alpha: float
    layout: Layout | None = None
    is_embedding: bool = False
    kernel: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter apart from any format: its layers, and the biases that were trained with them."""

    layers: tuple[AdaptedLayer, ...]
    biases: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """Every tensor, as loralib stores them."""
        return [
            *(part for layer in self.layers for part in (layer.lora_A, layer.lora_B)),
            *self.biases.values(),
        ]

    def describe(self) -> list[str]:
        """How the layers of each kind have to be built in loralib to load the file."""
        kinds: Counter[str] = Counter()
        for layer in self.layers:
            arguments = f"r={layer.r}, lora_alpha={layer.lora_alpha:g}"
            kind = "Embedding" if layer.is_embedding else "Linear"
            if layer.kernel:
                kind, arguments = (
                    f"Conv{len(layer.kernel)}d",
                    f"kernel_size={kernel_text(layer.kernel)}, {arguments}",
                )
            if layer.layout:
                enabled = [name in layer.layout.enabled for name in layer.layout.sizes]
                sizes = list(layer.layout.sizes.values())
                kind, arguments = "MergedLinear", f"{arguments}, enable_lora={enabled}"
                # loralib itself knows blocks of equal size only.
                arguments += "" if len(set(sizes)) == 1 else f", out_features_per_block={sizes}"
            kinds[f"{last_part(layer.name)}: {kind}({arguments})"] += 1
        return [f"{count} × {text}" for text, count in kinds.items()]


def plain_form(layer: AdaptedLayer) -> tuple[Tensor, Tensor, float]:
    """A, B and lora_alpha of a layer as PEFT has them."""
    if layer.kernel:
        A = _block_diagonal(*[layer.lora_A] * math.prod(layer.kernel[:-1]))
        B = layer.lora_B.reshape(-1, len(A), *[1] * len(layer.kernel))
        return A.view(len(A), -1, *layer.kernel), B, layer.lora_alpha * math.prod(layer.kernel)
    if layer.layout is None:
        return layer.lora_A, layer.lora_B, layer.lora_alpha
    blocks = layer.layout.blocks(layer.r, layer.lora_alpha)
    out_features = sum(layer.layout.sizes.values())
    B = to_block_diagonal(split_rows(layer.lora_B, blocks), blocks, out_features=out_features)
    return layer.lora_A, B, layer.lora_alpha * len(blocks)


def layer_of(name: str, A: Tensor, B: Tensor, lora_alpha: float, layout: Layout | None) -> AdaptedLayer:
    """A layer as loralib has it, from PEFT's A, B and lora_alpha."""
    if A.ndim > 2:
        return _convolution_of(name, A, B, lora_alpha)
    if layout is None:
        return AdaptedLayer(name=name, lora_A=A, lora_B=B, r=A.shape[0], lora_alpha=lora_alpha)
    count, rows = len(layout.enabled), sum(layout.sizes.values())
    r, rest = divmod(A.shape[0], count)
    if rest or B.shape != (rows, A.shape[0]):
        raise ModelError(
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not those of {count} blocks of {rows} rows",
            where=name,
        )
    alpha = lora_alpha / count
    try:
        own = from_block_diagonal(B, layout.blocks(r, alpha))
    except ModelError as error:
        raise ModelError(
            error.found,
            where=name,
            expected=error.expected,
            fix="convert it as one linear layer, without --enable; blocks in phlora.json have to be the tensors' own",
        ) from None
    return AdaptedLayer(name=name, lora_A=A, lora_B=torch.cat(own), r=r, lora_alpha=alpha, layout=layout)


def _convolution_of(name: str, A: Tensor, B: Tensor, lora_alpha: float) -> AdaptedLayer:
    """A convolution as loralib has it; see the module for which A it can have."""
    *outer, last = kernel = tuple(A.shape[2:])
    count, rank = math.prod(outer), A.shape[0]
    own, flat = A.flatten(1)[: rank // count, : A.shape[1] * last], A.flatten(1)
    grouped = B.shape[1:] != (rank, *[1] * len(kernel))
    if grouped or rank % math.prod(kernel) or not torch.equal(flat, _block_diagonal(*[own] * count)):
        raise ModelError(
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no convolution of loralib",
            where=name,
            expected=f"no groups, a rank that {math.prod(kernel)} divides, and an A of {count} equal diagonal blocks",
            fix="use it with PEFT",
        )
    return AdaptedLayer(
        name=name,
        lora_A=own,
        lora_B=B.reshape(-1, rank // count),
        r=rank // math.prod(kernel),
        lora_alpha=lora_alpha / math.prod(kernel),
        kernel=kernel,
    )


def _block_diagonal(*blocks: Tensor) -> Tensor:
    whole: Tensor = torch.block_diag(*blocks)
    return whole


def full_names(enable: Sequence[str], layers: Iterable[str], blocks: BlockSizes) -> list[str]:
    """`q` -> `q_proj`; every name has to be a block of some layer."""
    leaves = {last_part(name) for name in layers}
    known = {part for leaf in leaves for part in (blocks.get(leaf) or BLOCK_NAMES.get(leaf, ()))}
    full = []
    for name in enable:
        match = next((part for part in (name, f"{name}_proj") if part in known), None)
        if match is None:
            raise ConfigError(
                f"`{name}` is no row block of any layer in the adapter",
                where="--enable",
                fix=did_you_mean(name, known) if known else "leave it out",
            )
        full.append(match)
    return full


def kernel_text(kernel: Sequence[int]) -> str:
    """`3`, or `(3, 5)` where not all sizes are one."""
    return str(kernel[0]) if len(set(kernel)) == 1 else str(tuple(kernel))


def last_part(name: str) -> str:
    """`a.b.c` -> `c`."""
    return name.rpartition(".")[2]
