"""An adapter apart from any file: plain A and B of each layer, and the forms in which other programs take them.

    W + s · B A        A (R, K), B (N, R), s = lora_alpha / R

Row blocks of a fused weight are the block-diagonal B of `blockform`, with their names beside it. What programs want
otherwise is computed here, from tensors alone:

    folded      s = 1, the scaling multiplied into B: for programs that know one alpha, or none
    uniform     folded, and A and B padded with zeros to one rank: for programs that know one rank too
    split       qkv_proj -> q_proj, k_proj, v_proj; gate_up_proj -> gate_proj, up_proj: for a base in Llama layout
    fused       the way back

`split` and `fused` copy numbers, so there and back is bit-equal. `folded` rounds once where a scaling is no power of
two.

Legend: `N` out, `K` in, `R` rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from phlora.adapters.blockform import from_block_diagonal, plain_alpha, to_block_diagonal
from phlora.adapters.convert import Adapter, BlockSizes, last_part, plain_form
from phlora.errors import ModelError
from phlora.lora.blocks import RowBlock, rank_slices, row_blocks
from phlora.models.families import FUSED, fused_row_blocks, projection_rows

_FUSED_OF = {part: fused for fused, parts in FUSED.items() for part in parts}
_AS_MERGED = "take the whole model: phlora export --for merged, or phlora merge"


@dataclass(frozen=True, kw_only=True)
class PlainLayer:
    """What is added to the weight of one layer.

    Attributes:
        name: of the layer in the base model.
        lora_A: (R, K); of a convolution with its kernel behind, of an embedding (R, V).
        lora_B: (N, R); block-diagonal where there are `blocks`.
        lora_alpha: `s · R`.
        sizes: rows of every block of a fused weight, by name; empty for a weight that is adapted whole.
        blocks: those that are adapted, with their own ranks and scalings.
        is_embedding: the layer looks rows up; `lora_A` has a column for each of them.
    """

    name: str
    lora_A: Tensor
    lora_B: Tensor
    lora_alpha: float
    sizes: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[RowBlock, ...] = ()
    is_embedding: bool = False

    @property
    def r(self) -> int:
        """The rank of the plain form."""
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r


@dataclass(frozen=True, kw_only=True)
class PortableAdapter:
    """The layers of an adapter, and what it has besides.

    Attributes:
        biases: trained biases, by their names in the base model.
        others: what it has that is no A and B, in words with the names that PEFT has for it: `use_dora`.
    """

    layers: tuple[PlainLayer, ...]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def largest_rank(self) -> int:
        return max(layer.r for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        tensors = [part for layer in self.layers for part in (layer.lora_A, layer.lora_B)]
        return sum(tensor.nbytes for tensor in [*tensors, *self.biases.values()])


def portable(adapter: Adapter) -> PortableAdapter:
    """An adapter as loralib stores it, in the plain form."""
    layers = []
    for layer in adapter.layers:
        A, B, alpha = plain_form(layer)
        blocks = layer.layout.blocks(layer.r, layer.lora_alpha) if layer.layout else ()
        layers.append(
            PlainLayer(
                name=layer.name,
                lora_A=A,
                lora_B=B,
                lora_alpha=alpha,
                sizes=layer.layout.sizes if layer.layout else {},
                blocks=blocks,
                is_embedding=layer.is_embedding,
            )
        )
    return PortableAdapter(layers=tuple(layers), biases=adapter.biases)


def more_than_plain(adapter: PortableAdapter) -> str:
    """What an adapter has besides A and B of linear layers, in words; empty: nothing."""
    kinds = list(adapter.others)
    if adapter.biases:
        kinds.append(f"bias ({next(iter(adapter.biases))})")
    kinds += [f"an embedding ({layer.name})" for layer in adapter.layers if layer.is_embedding][:1]
    kinds += [f"a convolution ({layer.name})" for layer in adapter.layers if layer.lora_A.ndim > 2][:1]
    return " and ".join(kinds)


def require_plain(adapter: PortableAdapter, *, target: str, where: str = "", fix: str = _AS_MERGED) -> None:
    """Refuse an adapter that has more than A and B of linear layers, for a program that takes nothing else.

    Raises:
        ModelError: it has; the message names it.
    """
    if more := more_than_plain(adapter):
        raise ModelError(
            f"The adapter has {more}, which {target} does not take in an adapter", where=where, fix=fix
        )


def folded(adapter: PortableAdapter) -> PortableAdapter:
    """The same adapter with every scaling multiplied into its B, so that `lora_alpha = R`.

    The product is formed in float64 and rounded once to float32, or kept in B's own dtype where that is exact.
    """
    return replace(adapter, layers=tuple(_folded(layer) for layer in adapter.layers))


def uniform(adapter: PortableAdapter) -> PortableAdapter:
    """The same adapter, folded, with one rank for all layers: A and B end in zeros."""
    rank = adapter.largest_rank
    return replace(adapter, layers=tuple(_padded(_folded(layer), rank) for layer in adapter.layers))


def _folded(layer: PlainLayer) -> PlainLayer:
    product = layer.lora_B.double() * layer.scaling
    B = product.to(layer.lora_B.dtype)
    if not torch.equal(B.double(), product):
        B = product.float()
    if B.dtype == torch.float64:
        B = B.float()
    return replace(layer, lora_B=B, lora_alpha=layer.r, sizes={}, blocks=())


def _padded(layer: PlainLayer, rank: int) -> PlainLayer:
    missing = rank - layer.r
    A = torch.cat([layer.lora_A, layer.lora_A.new_zeros(missing, *layer.lora_A.shape[1:])])
    B = torch.cat([layer.lora_B, layer.lora_B.new_zeros(layer.lora_B.shape[0], missing)], dim=1)
    return replace(layer, lora_A=A, lora_B=B, lora_alpha=rank)


# ------------------------------------------------------------------------------------- fused and split weights


def is_of_other_layout(layers: Iterable[str], config: Any) -> bool:
    """Whether layers, by their names, are fused where those of such a base are not, or the other way."""
    has_fused = bool(fused_row_blocks(config))
    leaves = {last_part(name) for name in layers}
    return (
        bool(leaves & _FUSED_OF.keys())
        if has_fused
        else bool(projection_rows(config) and leaves & FUSED.keys())
    )


def fitted(adapter: PortableAdapter, config: Any) -> PortableAdapter:
    """The same adapter for a base of this configuration: `fused` for Phi-3's layout, `split` for Llama's.

    Raises:
        ModelError: as these two.
    """
    if not is_of_other_layout((layer.name for layer in adapter.layers), config):
        return adapter
    sizes = projection_rows(config)
    return fused(adapter, sizes) if fused_row_blocks(config) else split(adapter, sizes)


def split(adapter: PortableAdapter, sizes: BlockSizes) -> PortableAdapter:
    """The same adapter for a base in Llama layout, whose q, k, v, gate and up are layers of their own.

    A weight that was adapted whole gives each part its rows of B, and the same A; a block-diagonal one gives each part
    its own A and B. A part that nothing is added to is left out.

    Args:
        sizes: last part of a fused layer's name -> rows of its parts by name, as `fused_row_blocks` has them.

    Raises:
        ModelError: a fused layer has other rows than its parts.
    """
    layers: list[PlainLayer] = []
    for layer in adapter.layers:
        own = sizes.get(last_part(layer.name))
        layers += [layer] if own is None else _parts(layer, own)
    return replace(adapter, layers=tuple(layers))


def fused(adapter: PortableAdapter, sizes: BlockSizes) -> PortableAdapter:
    """The same adapter for a base with fused weights; the other way of `split`.

    Parts with one A and one scaling become a whole weight again. Others become the blocks of a block-diagonal B.

    Raises:
        ModelError: a part has other rows or columns than its place in the fused weight.
    """
    groups: dict[str, dict[str, PlainLayer]] = {}
    for layer in adapter.layers:
        leaf = last_part(layer.name)
        whole = _FUSED_OF.get(leaf)
        if whole not in sizes:
            groups[layer.name] = {"": layer}
        else:
            groups.setdefault(layer.name.removesuffix(leaf) + str(whole), {})[leaf] = layer
    layers = [
        parts[""] if "" in parts else _whole(name, parts, sizes[last_part(name)])
        for name, parts in groups.items()
    ]
    return replace(adapter, layers=tuple(layers))


def _parts(layer: PlainLayer, sizes: Mapping[str, int]) -> list[PlainLayer]:
    if layer.lora_B.shape[0] != sum(sizes.values()):
        raise ModelError(
            f"lora_B has {layer.lora_B.shape[0]} rows",
            where=layer.name,
            expected=f"the {sum(sizes.values())} of {', '.join(f'{n} {s}' for n, s in sizes.items())}",
        )
    parent = layer.name.removesuffix(last_part(layer.name))
    if layer.blocks:
        own = from_block_diagonal(layer.lora_B, layer.blocks)
        return [
            PlainLayer(
                name=parent + block.name,
                lora_A=layer.lora_A[columns],
                lora_B=B,
                lora_alpha=as_whole(block.scaling * block.r),
            )
            for block, columns, B in zip(layer.blocks, rank_slices(layer.blocks), own, strict=True)
        ]
    found, blocks = [], row_blocks(sizes, list(sizes), r=layer.r, scaling=layer.scaling)
    used = [layer.lora_B[block.rows].any(0) for block in blocks]
    if int(torch.stack(used).sum(0).max()) > 1:
        # Parts share columns, so it was adapted whole: all of them belong to every part.
        used = [own.any().expand(layer.r) for own in used]
    for block, columns in zip(blocks, used, strict=True):
        if columns.any():
            found.append(
                PlainLayer(
                    name=parent + block.name,
                    lora_A=layer.lora_A[columns],
                    lora_B=layer.lora_B[block.rows][:, columns],
                    lora_alpha=as_whole(layer.scaling * int(columns.sum())),
                )
            )
    return found


def _whole(name: str, parts: Mapping[str, PlainLayer], sizes: Mapping[str, int]) -> PlainLayer:
    own = [parts[part] for part in sizes if part in parts]
    for layer in own:
        if layer.lora_B.shape[0] != sizes[last_part(layer.name)]:
            raise ModelError(
                f"lora_B has {layer.lora_B.shape[0]} rows",
                where=layer.name,
                expected=f"{sizes[last_part(layer.name)]}, those of its place in {last_part(name)}",
                fix="name the base that the adapter is for: --model BASE",
            )
    if len({layer.lora_A.shape[1] for layer in own}) > 1:
        raise ModelError("The parts of one fused weight have inputs of unequal width", where=name)
    if len(own) > 1 and _share_one_A(own):
        rows = [
            parts[part].lora_B if part in parts else own[0].lora_B.new_zeros(size, own[0].r)
            for part, size in sizes.items()
        ]
        return PlainLayer(
            name=name, lora_A=own[0].lora_A, lora_B=torch.cat(rows), lora_alpha=own[0].lora_alpha
        )
    blocks = row_blocks(
        sizes,
        list(parts),
        r={part: layer.r for part, layer in parts.items()},
        scaling={part: layer.scaling for part, layer in parts.items()},
    )
    B = to_block_diagonal([layer.lora_B for layer in own], blocks, out_features=sum(sizes.values()))
    return PlainLayer(
        name=name,
        lora_A=torch.cat([layer.lora_A for layer in own]),
        lora_B=B,
        lora_alpha=plain_alpha(blocks),
        sizes=sizes,
        blocks=blocks,
    )


def _share_one_A(layers: Sequence[PlainLayer]) -> bool:
    first = layers[0]
    return all(
        layer.scaling == first.scaling and torch.equal(layer.lora_A, first.lora_A) for layer in layers[1:]
    )


def as_whole(alpha: float) -> float:
    """An int where it is one, as PEFT writes it."""
    return int(alpha) if alpha == int(alpha) else alpha
