"""Named row blocks of one fused weight: the layout that all of `phlora.lora` computes with.

A fused weight `W (N, K)` stacks several layers by rows: `q | k | v` of sizes (3072, 1024, 1024), `gate | up`.
Each adapted block `i` owns `A_i (R_i, K)` and `B_i (N_i, R_i)` and adds `scaling_i · B_i A_i` to its own rows
only. A plain linear layer is the one-block case. Blocks that are not adapted are not listed, and so cost
nothing.

Storage (that of loralib's `MergedLinear`): `lora_A (ΣR_i, K)` stacks the A_i, so that one product serves all
blocks; `lora_B (ΣN_i, R)` stacks the B_i when their ranks are equal. The functions take the B_i as a
sequence, which also holds unequal ranks.

Legend: `N` out, `K` in, `R` rank; the sums run over the adapted blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phlora.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """Rows `start:stop` of a fused weight, adapted with rank `r`: `W[start:stop] + scaling · B A`."""

    name: str
    start: int
    stop: int
    r: int
    scaling: float

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def row_blocks(
    sizes: Mapping[str, int],
    enabled: Collection[str],
    *,
    r: int | Mapping[str, int],
    scaling: float | Mapping[str, float],
) -> tuple[RowBlock, ...]:
    """Lays out the adapted blocks of a fused weight.

    Args:
        sizes: rows of every block, in the order in which the weight stacks them.
        enabled: the names of the adapted blocks.
        r: rank of all adapted blocks, or of each by name.
        scaling: the factor of all adapted blocks (`lora_alpha / r`), or of each by name.

    Raises:
        ConfigError: a name in `enabled` is no block.
    """
    for name in enabled:
        if name not in sizes:
            raise ConfigError(
                f"`{name}` is no row block of this weight",
                where="enabled",
                fix=did_you_mean(name, sizes),
            )
    blocks, start = [], 0
    for name, size in sizes.items():
        if name in enabled:
            rank = r if isinstance(r, int) else r[name]
            factor = scaling if isinstance(scaling, (int, float)) else scaling[name]
            blocks.append(RowBlock(name=name, start=start, stop=start + size, r=rank, scaling=factor))
        start += size
    return tuple(blocks)


def rank_slices(blocks: Sequence[RowBlock]) -> Iterator[slice]:
    """Where each block's rank lies: its rows of `lora_A (ΣR_i, K)`, its columns of `x lora_Aᵀ`."""
    start = 0
    for block in blocks:
        yield slice(start, start + block.r)
        start += block.r


def split_rows(lora_B: Tensor, blocks: Sequence[RowBlock]) -> tuple[Tensor, ...]:
    """The `B_i (N_i, R)` of a stacked `lora_B (ΣN_i, R)`, as views."""
    return torch.split(lora_B, [block.size for block in blocks])
