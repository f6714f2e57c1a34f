"""What the tests of DoRA, PiSSA and OLoRA on row blocks share: adapters, and a Llama, whose layers are not fused."""

from __future__ import annotations

from typing import Any

import peft_blocks
import torch
from peft import PeftModel
from peft_blocks import IDS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from phlora.adapters.attach import Attached, attach
from phlora.adapters.block_modules import BlockUp
from phlora.adapters.peft_layer import fuse_lora

SIZES = {
    "self_attn.qkv_proj": {"q_proj": 64, "k_proj": 32, "v_proj": 32},
    "mlp.gate_up_proj": {"gate_proj": 112, "up_proj": 112},
}
UNEQUAL = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"up_proj": 3}}


def fused(model: Any, lora: dict[str, Any]) -> Attached:
    """A fresh adapter whose layers are Phlora's."""
    attached = attach(model, lora)
    fuse_lora(attached.model)
    return attached


def randomize(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            if "lora_magnitude_vector" in name and parameter.requires_grad:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model


def qkv(model: Any) -> Any:
    return model.get_submodule("base_model.model.model.layers.0.self_attn.qkv_proj")


def loss_of(model: nn.Module) -> Tensor:
    ids = IDS.to(next(model.parameters()).device)
    return model(input_ids=ids, labels=ids).loss


def train(model: nn.Module) -> None:
    peft_blocks.train(model)
    model.eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


def llama(phi3: nn.Module) -> LlamaForCausalLM:
    """The same weights in a Llama, where q, k, v, gate and up are linear layers of their own."""
    ours = phi3.config
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "max_position_embeddings", "rope_parameters", "rms_norm_eps")
    config = LlamaConfig(
        **{name: getattr(ours, name) for name in (*shared, *more)},
        **{f"{name}_token_id": getattr(ours, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    tensors = {}
    for name, tensor in phi3.state_dict().items():
        fused = next((fused for fused in SIZES if fused in name), None)
        if fused is None:
            tensors[name] = tensor
            continue
        for block, rows in zip(SIZES[fused], tensor.split(list(SIZES[fused].values())), strict=True):
            tensors[name.replace(fused, f"{fused.partition('.')[0]}.{block}")] = rows
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(tensors)
    return model


def by_block(model: PeftModel, *, of: Any) -> dict[str, Tensor]:
    """A value of every trained parameter, row blocks apart, under the names of the unfused layers."""
    values = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module, _, kind = name.partition(".lora_")
        value, up = of(parameter), model.get_submodule(module).lora_B["default"]
        parent = module.rpartition(".")[0]
        if not isinstance(up, BlockUp):
            values[name] = value
        elif name.endswith(".weight"):
            for block, part in zip(up.blocks, value.split([b.r for b in up.blocks]), strict=True):
                values[f"{parent}.{block.name}.lora_{kind}"] = part
        else:
            kind, _, block_name = kind.partition(".weight_")
            values[f"{parent}.{block_name}.lora_{kind}.weight"] = value
    return values
