"""What a run will do, in numbers, known and shown before it starts."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from phlora.adapters.attach import AdapterSummary
from phlora.display import counted
from phlora.forecast.forecast import Forecast, as_json
from phlora.forecast.render import render
from phlora.markup import block, line, table
from phlora.models.prefix_sharing import Sharing, decide_sharing
from phlora.runs.facts import DataFacts
from phlora.train.arguments import Arguments
from phlora.train.prepare import PreparedData
from phlora.train.request import Objects

# A checkpoint is the adapter and AdamW's two moments of it.
_CHECKPOINT_COPIES = 3
# Room for tokenizer, configuration, events and report, which do not grow with the model.
_SMALL_FILES_BYTES = 50_000_000


@dataclass(frozen=True)
class Plan:
    """What a run will do, in numbers."""

    adapter: AdapterSummary
    data: DataFacts
    sequences_per_step: int
    num_optimizer_steps: int
    disk_bytes: int
    learning_rate: float
    sharing: Sharing
    loraplus_lr_ratio: float | None = None
    forecast: Forecast | None = None

    def to_json(self) -> dict[str, Any]:
        """The plan for programs: counts, and whether rows share their common starts."""
        data = self.data
        return {
            "train_rows": data.train_rows,
            "held_out_rows": data.held_out_rows,
            "tokens": data.tokens,
            "trained_tokens": data.trained_tokens,
            "packs": dataclasses.asdict(data.packs) if data.packs else None,
            "sequences_per_step": self.sequences_per_step,
            "num_optimizer_steps": self.num_optimizer_steps,
            "trainable_parameters": self.adapter.num_trainable,
            "disk_bytes": self.disk_bytes,
            "sharing": dataclasses.asdict(self.sharing),
        }

    def forecast_json(self) -> dict[str, Any] | None:
        """Memory and seconds for programs; None where they are not forecast. Seconds differ from run to run."""
        return None if self.forecast is None else as_json(self.forecast)

    def _repr_html_(self) -> str:
        """What a notebook shows: what trains, on what, and what it takes."""
        modules = [(name, f"{n:,} ×", f"{size:,}") for name, (n, size) in self.adapter.modules.items()]
        lines = [text.strip() for text in self.render().splitlines()[len(modules) :]]
        return block(
            table(("adapted", "", "parameters"), modules, numbers=(1, 2)),
            *(line(text, "lead" if number == 0 else "") for number, text in enumerate(lines)),
        )

    def render(self) -> str:
        """A few lines for the terminal, shown before anything is trained."""
        data = self.data
        share = data.trained_tokens / max(1, data.tokens)
        packs = data.packs
        packed = f" in {counted(packs.count, 'pack')} ({packs.filled:.0%} full)" if packs else ""
        # A step takes what there is where that is less.
        of_a_step = min(self.sequences_per_step, max(1, packs.count if packs else data.train_rows))
        ratio, rate = self.loraplus_lr_ratio, self.learning_rate
        loraplus = f"\n  LoRA+: learning rate {rate:g}, for lora_B {ratio * rate:g}" if ratio else ""
        return (
            f"{self.adapter.render()}\n"
            f"  {counted(data.train_rows, 'training row')}{packed}, {data.held_out_rows:,} held out; "
            f"{counted(data.tokens, 'token')} an epoch, {data.trained_tokens:,} of them trained ({share:.0%})\n"
            f"  {counted(self.num_optimizer_steps, 'optimizer step')} of "
            f"{counted(of_a_step, 'pack' if packs else 'row')}{loraplus}\n"
            f"  shared prefixes {self.sharing.describe()}"
            f"{chr(10) + render(self.forecast) if self.forecast else ''}"
        )


def make_plan(
    data: PreparedData,
    adapter: AdapterSummary,
    arguments: Arguments,
    model: Any,
    objects: Objects,
    *,
    device: torch.device | None = None,
) -> Plan:
    """Count the steps and the room that a run takes, and decide what its rows share.

    Args:
        model: with its adapters; only its configuration is looked at.
        device: where it will compute, if not where it is.
    """
    args = arguments.args
    batches = len(data.train) / args.per_device_train_batch_size
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    kept = (args.save_total_limit or 10) + 1
    return Plan(
        adapter=adapter,
        data=data.facts,
        sequences_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        num_optimizer_steps=steps,
        disk_bytes=(kept * _CHECKPOINT_COPIES + 2) * adapter.adapter_bytes + _SMALL_FILES_BYTES,
        learning_rate=args.learning_rate,
        sharing=Sharing(False, "compute_metrics needs the logits of whole rows")
        if objects.compute_metrics is not None
        else decide_sharing(
            model,
            data.train,
            speed=data.speed,
            batch_size=args.per_device_train_batch_size,
            args=args,
            held_out=data.held_out,
            device=device,
        ),
        loraplus_lr_ratio=arguments.loraplus_lr_ratio,
    )
