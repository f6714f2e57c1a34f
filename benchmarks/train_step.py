"""Forward and backward of a step: Phlora's trainer, plain and with shared starts, against TRL with PEFT.

    python benchmarks/train_step.py [--steps 3] [--rows 8]

The embedded model, the rows of the demo (a long shared system prompt, a short answer), the same weights and order. All
trainers are built once; in each round each takes one step, in turn. TRL runs at its best for this machine: fp32, no
gradient checkpointing. Peak memory is that of one step in a process of its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("phlora", "phlora-shared", "trl")


def trainer_of(side: str, num_rows: int) -> Any:
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    import phlora
    from phlora.data.collate import SharedPrefixCollator
    from phlora.data.formats import load_rows
    from phlora.data.tokenize import tokenize_rows
    from phlora.models.load import load_model

    logging.disable(logging.WARNING)
    loaded = load_model("smollm2-135m", dtype="float32")
    rows = load_rows(Path(__file__).parents[1] / "examples/home_assistant/train.jsonl").rows[:num_rows]
    tokens = tokenize_rows(rows, loaded.tokenizer.tokenizer)
    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in tokens.rows])
    arguments = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=num_rows,
        max_length=None,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    trainer_class = trl.SFTTrainer if side == "trl" else phlora.SFTTrainer
    return trainer_class(
        data_collator=SharedPrefixCollator() if side == "phlora-shared" else None,
        model=loaded.model,
        args=arguments,
        train_dataset=data,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        processing_class=loaded.tokenizer.tokenizer,
    )


def seconds_of_step(trainer: Any) -> tuple[float, float]:
    """Forward and backward of one batch of all rows; the loss goes along to see that both do the same."""
    batch = next(iter(trainer.get_train_dataloader()))
    num_items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    started = time.perf_counter()
    loss = trainer.training_step(trainer.model, batch, num_items)
    seconds = time.perf_counter() - started
    trainer.model.zero_grad()
    return seconds, float(loss)


def peak_gb(side: str, num_rows: int) -> float:
    command = [sys.executable, __file__, "--peak-of", side, "--rows", str(num_rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        seconds_of_step(trainer_of(options.peak_of, options.rows))
        from phlora.train.callbacks import peak_bytes

        print(peak_bytes() / 1e9)
        return
    trainers = {side: trainer_of(side, options.rows) for side in SIDES}
    num_tokens = sum(len(row["input_ids"]) for row in trainers["phlora"].train_dataset)
    for trainer in trainers.values():
        seconds_of_step(trainer)
    measured: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(options.steps):
        for side, trainer in trainers.items():
            measured[side].append(seconds_of_step(trainer))
    del trainers
    seconds = {side: statistics.median(s for s, _ in values) for side, values in measured.items()}
    faster = {
        side: round(
            statistics.median(t[0] / p[0] for t, p in zip(measured["trl"], measured[side], strict=True)), 3
        )
        for side in SIDES
    }
    result = {
        "benchmark": "train_step",
        "rows": options.rows,
        "tokens": num_tokens,
        "loss": {side: values[0][1] for side, values in measured.items()},
        "tokens_per_second": {side: round(num_tokens / value, 1) for side, value in seconds.items()},
        "faster_than_trl": faster,
        "peak_gb": {side: round(peak_gb(side, options.rows), 2) for side in SIDES},
    }
    print(f"{options.rows} rows, {num_tokens} tokens, forward and backward, median of {options.steps}")
    for side in SIDES:
        print(
            f"{side:<14}{result['tokens_per_second'][side]:>8} tokens/s   peak {result['peak_gb'][side]:>5} GB   "
            f"{faster[side]:>6}× TRL   loss {result['loss'][side]:.6f}"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
