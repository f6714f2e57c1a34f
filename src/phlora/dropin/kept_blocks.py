"""An adapter on row blocks that PEFT itself has opened: its blocks stay blocks while it trains on.

Saved, such an adapter is a plain one of PEFT (`adapters.blockform`): for q and v of a fused q|k|v a `lora_B` whose rows
of k are zeros, and zeros beside its diagonal. PEFT opens that as one LoRA on the whole weight, and the first step of
training fills the zeros: k is adapted from then on, and q's ranks serve v too. The zeros tell which blocks there are,
since training a LoRA on the whole weight leaves none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from phlora.adapters.block_start import put_blocks
from phlora.adapters.blockform import fitting_blocks, from_block_diagonal, plain_rank
from phlora.adapters.layout import with_blocks
from phlora.dropin.targets import active_adapters, base_of, lora_configs
from phlora.dropin.tell import tell, warn
from phlora.lora.blocks import RowBlock, row_blocks
from phlora.models.families import fused_row_blocks


def keep_blocks(model: nn.Module, *, has_optimizer: bool = False) -> None:
    """Turn adapters that train, where they were saved from row blocks, into row blocks again, in place.

    Their values stay the same bit for bit. Where zeros are left and blocks cannot be told, a line says what training
    will change.

    Args:
        has_optimizer: an optimizer of the script's holds the parameters already: nothing is turned, and a line says so.
    """
    configs = lora_configs(model)
    for adapter in active_adapters(model):
        if adapter in configs and not getattr(configs[adapter], "blocks", None):
            _keep(model, adapter, configs[adapter], has_optimizer=has_optimizer)


def _keep(model: Any, adapter: str, config: LoraConfig, *, has_optimizer: bool) -> None:
    recorded, parts = {}, {}
    for name, layer, sizes in _fused(model, adapter):
        leaf, B = name.rpartition(".")[2], layer.lora_B[adapter].weight.detach()
        enabled = _adapted(B, sizes)
        untouched = [part for part in sizes if part not in enabled]
        blocks = _blocks(B, sizes, enabled, scaling=layer.scaling[adapter])
        if blocks and not has_optimizer:
            put_blocks(layer, adapter, from_block_diagonal(B, blocks, dtype=B.dtype), blocks)
            recorded[name] = _entry(sizes, blocks)
            parts[leaf] = f"{', '.join(enabled)} of {leaf}"
        elif blocks or untouched:
            why = (
                "an optimizer was given, which holds its parameters"
                if blocks
                else "its ranks serve several parts"
            )
            changed = f"adapts {', '.join(untouched)} too" if untouched else "mixes the ranks of its parts"
            parts[leaf] = f"training {changed} in {leaf}: {why}"
    if recorded:
        model.peft_config[adapter] = with_blocks(config, recorded)
        tell(
            f"This adapter was saved from parts of fused weights, which train on as such: {'; '.join(parts.values())}"
        )
    elif parts:
        warn(
            f"This adapter adapts parts of fused weights alone, and {'; '.join(parts.values())}; leave the optimizer "
            "to the trainer (optim, learning_rate), or train a new adapter with target_modules that name the parts"
        )


def _fused(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any, Mapping[str, int]]]:
    """The fused weights with a plain LoRA that trains and has been trained before."""
    base = base_of(model)
    sizes = fused_row_blocks(getattr(base, "config", None))
    for name, layer in base.named_modules():
        parts = sizes.get(name.rpartition(".")[2])
        up = layer.lora_B[adapter] if parts and adapter in getattr(layer, "lora_B", ()) else None
        if parts and type(up) is nn.Linear and up.weight.requires_grad and bool(up.weight.any()):
            yield name, layer, parts


def _adapted(B: Tensor, sizes: Mapping[str, int]) -> list[str]:
    """The parts of a fused weight in whose rows something stands."""
    rows = dict(zip(sizes, B.split(list(sizes.values())), strict=True))
    return [name for name, part in rows.items() if bool(part.any())]


def _blocks(
    B: Tensor, sizes: Mapping[str, int], enabled: list[str], *, scaling: float
) -> tuple[RowBlock, ...] | None:
    """The row blocks on which a plain `lora_B (N, R)` is block-diagonal; None where it is not."""
    each = max(1, B.shape[1] // len(enabled))
    wanted = row_blocks(sizes, enabled, r=each, scaling=scaling)
    blocks = fitting_blocks(B, wanted)
    is_one_for_all = len(blocks) == 1 and blocks[0].stop - blocks[0].start == B.shape[0]
    return None if is_one_for_all or plain_rank(blocks) != B.shape[1] else blocks


def _entry(sizes: Mapping[str, int], blocks: tuple[RowBlock, ...]) -> dict[str, Any]:
    return {
        "sizes": dict(sizes),
        "enabled": [block.name for block in blocks],
        "r": [block.r for block in blocks],
        "scaling": [block.scaling for block in blocks],
    }
