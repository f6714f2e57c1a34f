"""How an adapter on row blocks of one weight gets into PEFT's LoRA layer: fresh, or as it was loaded.

Legend: `N` out, `K` in, `R` rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_lora
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from phlora.adapters.block_modules import BlockMagnitude, BlockUp, StartedDown, StartedUp
from phlora.errors import ConfigError
from phlora.lora.blocks import RowBlock

# PEFT's initialisations for row blocks. PiSSA and OLoRA take what they start with out of the base weight, which PEFT
# rebuilds at every load, for a whole weight only; see `changes_base`.
BLOCK_INITS = (True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora")


def changes_base(init: Any) -> bool:
    """Whether an initialisation `init_lora_weights` takes `s·B⁰A⁰` out of the base weight: PiSSA and OLoRA.

    On row blocks the base stays as it is, and the adapter is `s · (BA - B⁰A⁰)`, a plain one of twice the rank, of which
    the half `B⁰, A⁰` is not trained: `W + s·(BA - B⁰A⁰) = (W - s·B⁰A⁰) + s·BA`.
    """
    return isinstance(init, str) and (
        init.lower() == "olora" or init == "pissa" or init.startswith("pissa_niter_")
    )


def start_blocks(layer: Any, adapter_name: str, blocks: Sequence[RowBlock], *, config: LoraConfig) -> None:
    """Replace a fresh adapter by one on row blocks, each initialised as PEFT would a layer of its size.

    Args:
        layer: PEFT's `lora.Linear`, whose parts have no types.

    Raises:
        ConfigError: PEFT cannot initialise a block.
    """
    pairs = [_initial_pair(layer, adapter_name, block, config) for block in blocks]
    lora_A, down = torch.cat([A for A, _ in pairs]), layer.lora_A[adapter_name]
    started = changes_base(config.init_lora_weights)
    if started:
        like = down.weight
        down = StartedDown(lora_A, blocks).to(like.device, like.dtype).requires_grad_(like.requires_grad)
        layer.lora_A[adapter_name] = down.train(layer.training)
    else:
        down.weight.data.copy_(lora_A)
    put_blocks(layer, adapter_name, [B for _, B in pairs], blocks, kind=StartedUp if started else BlockUp)
    if adapter_name in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector[adapter_name].start(_row_lengths(layer, adapter_name))


def put_blocks(
    layer: Any,
    adapter_name: str,
    lora_B: Iterable[Tensor],
    blocks: Sequence[RowBlock],
    *,
    kind: type[BlockUp] = BlockUp,
) -> None:
    """Put the B_i (N_i, R_i) in the place of an adapter's `lora_B`, and split DoRA's lengths where there are any; the
    stacked A is `lora_A` as it is."""
    before = layer.lora_B[adapter_name].weight
    up = kind(lora_B, blocks, out_features=layer.out_features)
    up.to(before.device, before.dtype).requires_grad_(before.requires_grad)
    layer.lora_B[adapter_name] = up.train(layer.training)
    if adapter_name in layer.lora_magnitude_vector:
        whole = layer.lora_magnitude_vector[adapter_name].weight
        lengths = BlockMagnitude(whole, blocks).requires_grad_(whole.requires_grad)
        layer.lora_magnitude_vector[adapter_name] = lengths.train(layer.training)


def _row_lengths(layer: Any, adapter_name: str) -> Tensor:
    """`‖W + s·BA‖ (N,)`. PEFT rounds it to the 16 bits of W and computes with 32 then, which would move each row."""
    dtype = torch.promote_types(layer.lora_A[adapter_name].weight.dtype, torch.float32)
    with torch.no_grad():
        weight = dequantize_module_weight(layer.get_base_layer()).to(dtype)
        delta = layer.get_delta_weight(adapter_name).to(dtype)
        lengths: Tensor = torch.linalg.norm(weight + delta, dim=1)
        return lengths


def _initial_pair(
    layer: Any, adapter_name: str, block: RowBlock, config: LoraConfig
) -> tuple[Tensor, Tensor]:
    """A_i (R_i, K) and B_i (N_i, R_i) as PEFT starts them, on the device of the adapter.

    Of an initialisation that changes the base, the values and then what takes them away again, of half the rank each.
    """
    like, started = layer.lora_A[adapter_name].weight, changes_base(config.init_lora_weights)
    r = block.r // 2 if started else block.r
    with torch.device("meta"):
        base = nn.Linear(like.shape[1], block.size, bias=False)
    # The other initialisations do not read the base weight; one number stands for all of it. DoRA's lengths do.
    weight = _rows(layer, block) if started else like.new_zeros(()).expand(block.size, like.shape[1])
    base.weight = nn.Parameter(weight, requires_grad=False)
    config = dataclasses.replace(config, use_dora=False, use_rslora=False)
    try:
        alpha: Any = block.scaling * r
        fresh: Any = peft_lora.Linear(base, adapter_name, config=config, r=r, lora_alpha=alpha)
        A, B = (side[adapter_name].weight.detach() for side in (fresh.lora_A, fresh.lora_B))
        if (len(A), B.shape[1]) != (r, r):
            raise ValueError(f"rank {r} is more than a weight ({block.size}, {like.shape[1]}) has")
    except ValueError as error:
        raise ConfigError(f"{block.name}: {error}", where="peft_config.init_lora_weights") from None
    return (torch.cat([A, A]), torch.cat([B, -B], 1)) if started else (A, B)


def _rows(layer: Any, block: RowBlock) -> Tensor:
    """The block's rows of the base weight, in fp32, a copy."""
    weight: Tensor = dequantize_module_weight(layer.get_base_layer()).detach()
    return weight[block.rows].to(torch.float32, copy=True)
