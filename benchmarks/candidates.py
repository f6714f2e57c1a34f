"""One training step by Phlora and by its peers: the same base weights, adapter, rows, order and loss."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import loralib
import torch
import trl
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import phlora
from common import ALPHA, LAYOUTS, LINEARS, RANK, Row, Shapes, forget_peak, synchronize
from phlora.adapters.attach import attach
from phlora.adapters.speed import speed_up
from phlora.data.collate import Collator, SharedPrefixCollator
from phlora.measure import peak_bytes
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


def build_tokenizer(size: str) -> Any:
    return tiny_tokenizer() if size == "tiny" else load_tokenizer("smollm2-135m").tokenizer


def set_adapter(model: nn.Module, *, start: bool = False) -> None:
    """Give every LoRA parameter the values of one seed, the same whatever package made it.

    Args:
        start: B is zero, as training begins; else random, so that both factors have a gradient.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                bound = parameter.shape[1] ** -0.5
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
            elif "lora_B" in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.01
                parameter.copy_(torch.zeros_like(values) if start else values)


def lora_settings(rank: int = RANK, targets: Sequence[str] = LINEARS) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=ALPHA * rank // RANK, target_modules=list(targets), task_type="CAUSAL_LM"
    )


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


def make_trainer(
    trainer_class: Any, model: nn.Module, rows: Sequence[Row], *, tokenizer: Any, **settings: Any
) -> Any:
    """A trainer over tokenised rows that are neither cut nor changed."""
    on_gpu = torch.cuda.is_available()
    # TRL's own default on a GPU is mixed precision.
    settings = {"bf16": on_gpu and trainer_class is trl.SFTTrainer, **settings}
    arguments = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not on_gpu,
        max_length=None,
        dataloader_pin_memory=on_gpu,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    data = Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
    return trainer_class(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)


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
        first = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
        self.trainer = None
        if side.startswith("phlora"):
            self.model = with_phlora(base)
            self.trainer = make_trainer(
                phlora.SFTTrainer,
                self.model,
                first,
                tokenizer=self.tokenizer,
                bf16=False,
                gradient_checkpointing=False,
            )
        elif side in ("trl-best", "trl-default", "liger", "unsloth"):
            if size == "phi3-mini" and side == "trl-best" and importlib.util.find_spec("flash_attn"):
                base.set_attn_implementation("flash_attention_2")
            self.model = _unsloth_model(size) if side == "unsloth" else get_peft_model(base, lora_settings())
            self.trainer = make_trainer(
                trl.SFTTrainer,
                self.model,
                first,
                tokenizer=self.tokenizer,
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

        Returns `seconds`, in which laying out the rows counts, `loss`, `gradient` (the norm over all LoRA parameters),
        `positions` that went through the layers, `peak` and `step_bytes`; or `out_of_memory` on a GPU.
        """
        kind, size = LAYOUTS[layout]
        held = forget_peak(trim=trim)
        collate = self._collator(kind)
        started = time.perf_counter()
        try:
            loss, positions = self._step([collate(part) for part in _parts(rows, 0 if self.shared else size)])
        except torch.OutOfMemoryError:
            return {"out_of_memory": True}
        finally:
            synchronize()
            seconds = time.perf_counter() - started
            peak = peak_bytes()
            gradient = self._gradient_norm()
            self.model.zero_grad(set_to_none=True)
        return {
            "seconds": seconds,
            "loss": loss,
            "gradient": gradient,
            "positions": positions,
            "peak": peak,
            "step_bytes": peak - held,
        }

    def shapes(self) -> Shapes:
        return Shapes.of(self.model.config)

    def rows(self, name: str, **options: Any) -> list[Row]:
        """The rows of a set for this model."""
        return make_rows(name, self.tokenizer, vocab=self.model.config.vocab_size, **options)

    def leaks(self, layout: str) -> bool:
        """Whether a row's loss moves when a row that lies beside it changes."""
        kind, _ = LAYOUTS[layout]
        watched = {"input_ids": list(range(20, 40)), "labels": list(range(20, 40))}
        losses = []
        for first in (7, 90):
            beside = {"input_ids": list(range(first, first + 30)), "labels": [-100] * 30}
            with torch.no_grad():
                batch = self._on_device(self._collator(kind)([beside, watched]))
                losses.append(float(self.trainer.compute_loss(self.model, batch)))
        return abs(losses[0] - losses[1]) > 1e-4 * abs(losses[0])

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

    def _gradient_norm(self) -> float:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0

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


def _parts(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    size = size or len(rows)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _unsloth_model(size: str) -> Any:
    """The same random weights, through a folder: Unsloth loads models itself."""
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        base = build_base(size)
        base.save_pretrained(folder)
        build_tokenizer(size).save_pretrained(folder)
        del base
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=False
        )
    return FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=False,
    )
