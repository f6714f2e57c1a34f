"""Rows with common starts, a small LoRA model in double precision, and a short training run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

from phlora import SFTTrainer
from phlora.models.lm_head import LossTerms, token_losses, trained_weight
from phlora.testing import quiet_config, tiny_phi3

PAD = 3
Row = dict[str, Any]


def chat(ids: list[int], trained: list[tuple[int, int]], weight: float | None = None) -> Row:
    """A row that trains the tokens of some stretches."""
    labels = [-100] * len(ids)
    for first, stop in trained:
        labels[first:stop] = ids[first:stop]
    row: Row = {"input_ids": ids, "labels": labels}
    return row if weight is None else {**row, "weights": [weight * (label != -100) for label in labels]}


def some_ids(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(4, 250) for _ in range(count)]


START = some_ids(40, 0)
TAILS = [some_ids(n, n) for n in (9, 4, 17, 6, 12)]
ROWS: dict[str, list[Row]] = {
    "answers": [chat(START + tail, [(43, 99)]) for tail in TAILS],
    "everything": [chat(START + tail, [(0, 99)]) for tail in TAILS],
    "several turns, some of them shared": [
        chat(START + tail, [(10, 20), (35, 42), (44, 60)]) for tail in TAILS
    ],
    "turns that only some rows train": [
        chat(START + tail, [(10 + 5 * n, 35), (42, 60)]) for n, tail in enumerate(TAILS)
    ],
    "weights": [chat(START + tail, [(20, 60)], 0.25 * (1 + n)) for n, tail in enumerate(TAILS)],
    "two starts and rows alone": [chat(START + tail, [(30, 99)]) for tail in TAILS[:3]]
    + [chat(START[::-1] + tail, [(30, 99)]) for tail in TAILS]
    + [chat(some_ids(n, 90 + n), [(1, 99)]) for n in (3, 25)],
    "starts within starts": [chat(START + TAILS[2] + tail, [(25, 50), (57, 99)]) for tail in TAILS]
    + [chat(START + TAILS[2] + some_ids(20, 7) + tail, [(3 * n, 99)]) for n, tail in enumerate(TAILS)]
    + [chat(START + tail, [(30, 99)], 0.5) for tail in TAILS[:2]],
    "one row for each turn": [
        chat((START + some_ids(60, 8))[: 20 * n], [(20 * n - 9, 20 * n)]) for n in range(1, 6)
    ],
    "nothing in common": [chat(some_ids(n, n), [(2, 99)]) for n in (5, 30, 11)],
    "one row": [chat(START, [(5, 99)])],
    "twins and a row that begins others": [
        chat(START, [(20, 99)]),
        chat(START, [(20, 99)]),
        chat(START + TAILS[0], [(20, 99)]),
    ],
}


def lora_model(device: str = "cpu", **settings: Any) -> peft.PeftModel:
    """Double precision, and a B that is not zero, so that A has a gradient."""
    model = peft.get_peft_model(tiny_phi3(**settings)[0], LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Phi3RMSNorm):
                setattr(module, name, _double_norm(child))
    return model.double().to(device).train()


def _double_norm(norm: Phi3RMSNorm) -> torch.nn.RMSNorm:
    """transformers' norm rounds to float32 whatever the model's dtype, and would hide 1e-12."""
    double = torch.nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon)
    double.weight = norm.weight
    return double


def loss_and_gradients(
    model: peft.PeftModel, *batches: dict[str, Any], terms: LossTerms | None = None
) -> dict[str, torch.Tensor]:
    """Of one optimizer step with these micro-batches."""
    divisor = sum(trained_weight(batch) for batch in batches)
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch in batches:
        losses, _, weights = token_losses(model, on_device(model, batch), terms=terms or LossTerms())
        loss = (losses * weights).sum() / divisor.to(model.device)
        loss.backward()
        total += loss.detach()
    return {"loss": total, **{n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}}


def on_device(model: peft.PeftModel, batch: dict[str, Any]) -> dict[str, Any]:
    return {n: x.to(model.device) if isinstance(x, torch.Tensor) else x for n, x in batch.items()}


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    """Relative to the length of each tensor."""
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        assert (ours[name] - value).norm() <= bound * value.norm(), name


def trained(
    folder: Path,
    rows: list[Row],
    collator: Any,
    *,
    device: str,
    resume: Path | None = None,
    trainer: type[trl.SFTTrainer] = SFTTrainer,
    **settings: Any,
) -> Any:
    """A trainer after its training."""
    model, tokenizer = tiny_phi3()
    torch.manual_seed(0)
    args = quiet_config(
        folder, use_cpu=device == "cpu", remove_unused_columns=False, max_length=None, **settings
    )
    fitted = trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:7]),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        processing_class=tokenizer,
        data_collator=collator,
    )
    fitted.train(resume_from_checkpoint=str(resume) if resume else None)
    return fitted


def many_rows(*, weighted: bool = False) -> list[Row]:
    generator = random.Random(3)
    starts = [START, START[:25] + some_ids(15, 7)]
    return [
        chat(
            generator.choice(starts) + some_ids(generator.randrange(3, 20), n),
            [(12, 22), (41, 99)],
            0.5 * (1 + n % 3) if weighted else None,
        )
        for n in range(32)
    ]
