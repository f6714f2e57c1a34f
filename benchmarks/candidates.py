"""One training step by Phlora and by its peers: the same base weights, adapter, rows, order and loss."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import loralib
import torch
import trl
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import phlora
from common import Shapes, synchronize
from peer import (
    ALPHA,
    LAYOUTS,
    LINEARS,
    RANK,
    Row,
    leaks,
    lora_settings,
    make_trainer,
    measured_step,
    parts,
    set_adapter,
    unsloth_model,
)
from phlora.adapters.attach import attach
from phlora.adapters.speed import speed_up
from phlora.data.collate import Collator, SharedPrefixCollator
from phlora.models.load import load_model
from phlora.models.tiny import tiny_phi3, tiny_tokenizer
from phlora.models.tokenizer import load_tokenizer
from rowsets import make_rows


def build_base(size: str) -> nn.Module:
    """The model of a size, in fp32 on a CPU, and `phi3-mini` in bf16 on a GPU."""
    if size == "smollm2-135m":
        return load_model("smollm2-135m", dtype="float32", device="cpu").model
    if size == "tiny":
        return tiny_phi3()[0]
    # The default configuration has Phi-3-mini's shapes.
    config = Phi3Config(num_hidden_layers=32 if size == "phi3-mini" else 2, sliding_window=None)
    torch.manual_seed(0)
    if size == "phi3-layers":
        return Phi3ForCausalLM(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return Phi3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def save_base(size: str, folder: str) -> None:
    """The base with its tokenizer as a folder, for candidates that load models themselves."""
    build_base(size).save_pretrained(folder)
    build_tokenizer(size).save_pretrained(folder)


def build_tokenizer(size: str) -> Any:
    return tiny_tokenizer() if size == "tiny" else load_tokenizer("smollm2-135m").tokenizer


def with_phlora(base: nn.Module, lora: LoraConfig | None = None) -> nn.Module:
    """The adapted model with everything that Phlora does for speed."""
    model = attach(base, lora or lora_settings()).model
    speed_up(model)
    return model


def with_loralib(base: nn.Module) -> nn.Module:
    """loralib's `Linear` in the place of every linear of the layers, over the same weights."""
    for name, module in list(base.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in LINEARS:
            layer = loralib.Linear(
                module.in_features, module.out_features, r=RANK, lora_alpha=ALPHA, bias=False
            )
            layer.weight = module.weight
            setattr(base.get_submodule(parent), leaf, layer.to(module.weight.device))
    loralib.mark_only_lora_as_trainable(base)
    return base


class Candidate:
    """One side, ready to step. Lives in a process of its own.

    Args:
        side: a key of `SIDES` or `GPU_SIDES`.
        size: a key of `SIZES`.
    """

    def __init__(self, side: str, size: str) -> None:
        disable_progress_bar()
        self.tokenizer = build_tokenizer(size)
        base = None if side == "unsloth" else build_base(size)
        self.pad = self.tokenizer.pad_token_id
        if size in ("phi3-layers", "phi3-mini"):
            self.pad = 0
        on_gpu = torch.cuda.is_available()
        self.trainer = None
        if side.startswith("phlora"):
            self.model = with_phlora(base)
            self.trainer = make_trainer(phlora.SFTTrainer, self.model, self.tokenizer, on_gpu=on_gpu)
        elif side in ("trl-best", "trl-default", "liger", "unsloth"):
            if size == "phi3-mini" and side == "trl-best" and importlib.util.find_spec("flash_attn"):
                base.set_attn_implementation("flash_attention_2")
            self.model = _unsloth_model(size) if side == "unsloth" else get_peft_model(base, lora_settings())
            self.trainer = make_trainer(
                trl.SFTTrainer,
                self.model,
                self.tokenizer,
                on_gpu=on_gpu,
                # TRL's own default on a GPU is mixed precision.
                bf16=on_gpu,
                gradient_checkpointing=side == "trl-default",
                use_liger_kernel=side == "liger",
            )
            if side == "trl-default":
                self._checkpoint()
        elif side == "loralib":
            self.model = with_loralib(base)
        else:
            self.model = get_peft_model(base, lora_settings())
            if side == "peft-compile":
                self.model = torch.compile(self.model, dynamic=True)
        set_adapter(self.model)
        self.model.train()
        self.shared = side == "phlora-shared"

    def step(self, rows: Sequence[Row], layout: str = "padded", *, trim: bool = False) -> dict[str, Any]:
        """Forward and backward of all rows, as one optimizer step has them.

        Returns what `measured_step` does, with laying out the rows in its seconds; or `out_of_memory` on a GPU.
        """
        kind, size = LAYOUTS[layout]
        collate = self._collator(kind)

        def take() -> tuple[float, int]:
            taken = self._step([collate(part) for part in parts(rows, 0 if self.shared else size)])
            synchronize()
            return taken

        try:
            return measured_step(self.model, take, trim=trim)
        except torch.OutOfMemoryError:
            self.model.zero_grad(set_to_none=True)
            return {"out_of_memory": True}

    def shapes(self) -> Shapes:
        return Shapes.of(self.model.config)

    def rows(self, name: str, **options: Any) -> list[Row]:
        """The rows of a set for this model."""
        return make_rows(name, self.tokenizer, vocab=self.model.config.vocab_size, **options)

    def leaks(self, layout: str) -> bool:
        """Whether a row's loss moves when a row that lies beside it changes."""
        kind, _ = LAYOUTS[layout]

        def loss_of(rows: list[Row]) -> float:
            with torch.no_grad():
                return float(
                    self.trainer.compute_loss(self.model, self._on_device(self._collator(kind)(rows)))
                )

        return leaks(loss_of)

    def _collator(self, kind: str) -> Callable[[Sequence[Row]], dict[str, Any]]:
        if self.shared:
            return SharedPrefixCollator()
        if type(self.trainer) is trl.SFTTrainer:
            return DataCollatorForLanguageModeling(self.pad, padding_free=kind == "padding-free")
        return Collator(self.pad)

    def _step(self, batches: list[dict[str, Any]]) -> tuple[float, int]:
        positions = sum(batch["input_ids"].numel() for batch in batches)
        if self.trainer is not None:
            count = self.trainer._get_num_items_in_batch(batches, self.trainer.args.device)
            losses = [self.trainer.training_step(self.model, batch, count) for batch in batches]
            return float(sum(losses)), positions
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self.model(**self._on_device(batch), num_items_in_batch=count, use_cache=False).loss
            loss.backward()
            total += float(loss.detach())
        return total, positions

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}

    def _checkpoint(self) -> None:
        """What `train()` does first, and single steps would miss."""
        base = self.model.get_base_model()
        base.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=self.trainer.args.gradient_checkpointing_kwargs
        )
        base.enable_input_require_grads()


def _unsloth_model(size: str) -> Any:
    """The same random weights, through a folder: Unsloth loads models itself."""
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with tempfile.TemporaryDirectory() as folder:
        save_base(size, folder)
        return unsloth_model(folder, torch.bfloat16, None, False, longest=2048, targets=linears)
