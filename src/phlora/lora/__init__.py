"""LoRA layers with torch alone: a drop-in for loralib (`import phlora.lora as lora`).

Replace layers, freeze the rest, train, save the LoRA parameters:

    lora.replace(model, ["q_proj", "v_proj"], r=16, lora_alpha=32)    # or build with lora.Linear(...)
    lora.mark_only_lora_as_trainable(model)
    ...
    torch.save(lora.lora_state_dict(model), "adapter.pt")
"""

from phlora.lora import utils
from phlora.lora.base import LoRALayer
from phlora.lora.blocks import RowBlock, rank_slices, row_blocks, split_rows
from phlora.lora.layers import Conv1d, Conv2d, Conv3d, ConvLoRA, Embedding, Linear, MergedLinear
from phlora.lora.operands import DenseWeight, FrozenWeight
from phlora.lora.replacement import replace
from phlora.lora.state import (
    ParameterCounts,
    count_parameters,
    load_lora_state_dict,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge,
    merged_state_dict,
    unmerge,
)

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "DenseWeight",
    "Embedding",
    "FrozenWeight",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "ParameterCounts",
    "RowBlock",
    "count_parameters",
    "load_lora_state_dict",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "merged_state_dict",
    "rank_slices",
    "replace",
    "row_blocks",
    "split_rows",
    "unmerge",
    "utils",
]
