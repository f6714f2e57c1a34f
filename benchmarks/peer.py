"""Training steps of PEFT alone, TRL + PEFT or Unsloth, in a process of their own: `PYTHON benchmarks/peer.py`.

Nothing of Phlora is imported, so a peer whose pins differ from Phlora's runs in a Python of its own.
`common.PeerProcess` starts it and calls `Peer`'s methods: one JSON document a line, requests on standard input, results
on standard output. Base weights come from a folder, rows as lists of token ids, the adapter's values from a seed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from resident import end_first_when_memory_is_short, forget_peak, peak_bytes

Row = dict[str, list[int]]

RANK, ALPHA = 16, 32
LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
# How rows are laid out: collator, and rows per forward pass (0: all).
LAYOUTS = {
    "padded": ("padded", 8),
    "row by row": ("padded", 1),
    "padding-free": ("padding-free", 8),
    "one stream": ("padding-free", 0),
}
BETAS = (0.9, 0.999)


class Peer:
    """One peer, ready to step.

    Args:
        side: `peft`, `trl` or `unsloth`.
        folder: of the model with its tokenizer.
        dtype: of the weights and of the computation.
        quantization: `nf4`, or None.
        checkpointing: compute each layer again in backward.
        compile: Unsloth's option to compile each layer.
        start: B is zero, as training begins; else random, so that both factors have a gradient.
    """

    def __init__(
        self,
        side: str,
        folder: str,
        *,
        dtype: str = "float32",
        quantization: str | None = None,
        checkpointing: bool = False,
        compile: bool = False,
        start: bool = False,
    ) -> None:
        if side == "unsloth":
            os.environ["UNSLOTH_CPU_COMPILE"] = str(int(compile))
            import unsloth  # noqa: F401  # first of all: it changes the libraries below
        import torch
        from transformers import AutoTokenizer

        end_first_when_memory_is_short()
        started = time.perf_counter()
        kind = getattr(torch, dtype)
        make = unsloth_model if side == "unsloth" else _peft_model
        self.model = make(folder, kind, quantization, checkpointing)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.trainer = None
        if side != "peft":
            from trl import SFTTrainer

            self.trainer = make_trainer(
                SFTTrainer, self.model, self.tokenizer, gradient_checkpointing=checkpointing
            )
        if side == "trl" and checkpointing:
            self.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            self.model.get_base_model().enable_input_require_grads()
        set_adapter(self.model, start=start)
        self.model.train()
        self._loading = {"seconds": time.perf_counter() - started, "peak": peak_bytes()}

    def loading(self) -> dict[str, Any]:
        """Seconds that loading took, and its peak."""
        return self._loading

    def leaks(self, layout: str) -> bool:
        """Whether a row's loss moves when a row that lies beside it changes."""
        return leaks(lambda rows: self._step(self._batches(rows, layout), backward=False)[0])

    def step(self, rows: Sequence[Row], layout: str = "padded", *, trim: bool = False) -> dict[str, Any]:
        """Forward and backward of all rows, as one optimizer step has them; see `measured_step`."""
        return measured_step(self.model, lambda: self._step(self._batches(rows, layout)), trim=trim)

    def train(self, batches: Sequence[Sequence[Row]], layout: str, *, rate: float) -> dict[str, Any]:
        """One optimizer step for each batch; see `trained_steps`."""
        return trained_steps(
            self.model, [lambda rows=rows: self._step(self._batches(rows, layout)) for rows in batches], rate
        )

    def _batches(self, rows: Sequence[Row], layout: str) -> list[dict[str, Any]]:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        kind, size = LAYOUTS[layout]
        collate = DataCollatorForLanguageModeling(
            self.tokenizer.pad_token_id, padding_free=kind == "padding-free"
        )
        return [collate([dict(row) for row in part]) for part in parts(rows, size)]

    def _step(self, batches: list[dict[str, Any]], *, backward: bool = True) -> tuple[float, int]:
        import torch

        positions = sum(batch["input_ids"].numel() for batch in batches)
        if self.trainer is not None and backward:
            count = self.trainer._get_num_items_in_batch(batches, self.trainer.args.device)
            return float(sum(self.trainer.training_step(self.model, b, count) for b in batches)), positions
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            with torch.set_grad_enabled(backward):
                loss = self.model(**batch, num_items_in_batch=count, use_cache=False).loss
            if backward:
                loss.backward()
            total += float(loss.detach())
        return total, positions


def _peft_model(folder: str, dtype: Any, quantization: str | None, checkpointing: bool) -> Any:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype}
    if quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = AutoModelForCausalLM.from_pretrained(folder, **options)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    return get_peft_model(base, lora_settings())


def unsloth_model(
    folder: str,
    dtype: Any,
    quantization: str | None,
    checkpointing: bool,
    *,
    longest: int = 4096,
    targets: Sequence[str] = LINEARS,
) -> Any:
    """A model that Unsloth loads, with its adapter."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=longest, dtype=dtype, load_in_4bit=bool(quantization)
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        target_modules=list(targets),
        use_gradient_checkpointing=checkpointing,
    )


# ---------------------------------------------------------------------- what Phlora's own side does in the same way


def lora_settings(rank: int = RANK, targets: Sequence[str] = LINEARS) -> Any:
    """PEFT's `LoraConfig` of every side."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=ALPHA * rank // RANK, target_modules=list(targets), task_type="CAUSAL_LM"
    )


def make_trainer(
    trainer_class: Any, model: Any, tokenizer: Any, *, on_gpu: bool = False, **settings: Any
) -> Any:
    """A trainer for single steps on tokenised rows, which are neither cut nor changed.

    Args:
        settings: of `SFTConfig`; without mixed precision or checkpointing unless they say so.
    """
    import trl
    from datasets import Dataset

    arguments = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not on_gpu,
        max_length=None,
        dataloader_pin_memory=on_gpu,
        report_to="none",
        disable_tqdm=True,
        **{"bf16": False, "gradient_checkpointing": False, **settings},
    )
    # Of tokens that are text in every tokenizer here: control tokens alone would be refused.
    first = Dataset.from_list([{"input_ids": [105, 106, 107], "labels": [-100, 106, 107]}])
    return trainer_class(model=model, args=arguments, train_dataset=first, processing_class=tokenizer)


def set_adapter(model: Any, *, start: bool = False) -> None:
    """Give every LoRA parameter the values of one seed, the same whatever package made it.

    Args:
        start: B is zero, as training begins; else random, so that both factors have a gradient.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                bound = parameter.shape[1] ** -0.5
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
            elif "lora_B" in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.01
                parameter.copy_(torch.zeros_like(values) if start else values)


def leaks(loss_of: Callable[[list[Row]], float]) -> bool:
    """Whether the loss of one row moves when a row that lies beside it changes; that one is not trained."""
    watched = {"input_ids": list(range(20, 40)), "labels": list(range(20, 40))}
    losses = [
        loss_of([{"input_ids": list(range(first, first + 30)), "labels": [-100] * 30}, watched])
        for first in (7, 90)
    ]
    return abs(losses[0] - losses[1]) > 1e-4 * abs(losses[0])


def parts(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """Rows of one forward pass each; 0: all of them in one."""
    size = size or len(rows)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def measured_step(model: Any, take: Callable[[], tuple[float, int]], *, trim: bool = False) -> dict[str, Any]:
    """Take a step, forward and backward, and leave no gradient behind.

    Returns `seconds`, `loss`, `gradient` (the norm over all LoRA parameters), `positions` that went through the
    layers, `peak` and `step_bytes`, what the step added to the memory that was held before.
    """
    held = forget_peak(trim=trim)
    started = time.perf_counter()
    loss, positions = take()
    seconds, peak = time.perf_counter() - started, peak_bytes()
    gradient = gradient_norm(model)
    model.zero_grad(set_to_none=True)
    return {
        "seconds": seconds,
        "loss": loss,
        "gradient": gradient,
        "positions": positions,
        "peak": peak,
        "step_bytes": peak - held,
    }


def trained_steps(
    model: Any, steps: Sequence[Callable[[], tuple[float, int]]], rate: float
) -> dict[str, Any]:
    """Optimizer steps of AdamW at one rate, without decay or clipping: `losses` and `seconds` of each, and `peak`."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=0.0)
    losses, seconds = [], []
    forget_peak(trim=False)
    for take in steps:
        started = time.perf_counter()
        losses.append(take()[0])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "seconds": seconds, "peak": peak_bytes()}


def gradient_norm(model: Any) -> float:
    import torch

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


# ------------------------------------------------------------------------------------------------------- the process


def main() -> None:
    """Answer one request after the other until standard input ends."""
    # Whatever libraries print goes to standard error; standard output is for results alone.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    peer: Peer | None = None
    for line in sys.stdin:
        method, values, options = json.loads(line)
        if peer is None:
            peer, answer = Peer(*values, **options), None
        else:
            answer = getattr(peer, method)(*values, **options)
        results.write(json.dumps(answer) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
