"""A script with its import changed against `phlora train`, and against TRL: optimizer steps on the same rows.

    python benchmarks/script.py [--set demo --set alpaca --set turns] [--steps 4] [--dtype float32] [--trl] [--explicit]

Each side trains the same base, with the same adapter, on the same token rows in the same order: `train` with the
trainer, the collator and the speed pass of a run, `script` with `phlora.SFTTrainer` over an `SFTConfig` as a script
has it, `trl` with TRL's own trainer and that configuration. An optimizer step counts from its first micro-batch to the
next one's; the first of each side is left out. Sides live in processes of their own, and take turns.

demo, alpaca and turns are 8 rows a step: of the home assistant, of unlike lengths that share nothing, and chats of four
turns; `accumulated` takes the demo's rows two at a time. `--explicit`: `gradient_checkpointing` is written down as off.

script/train  seconds of a step with the import changed, as a multiple of those of `phlora train`; the goal is 1.05
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Worker, median, print_table, quiet
from peer import lora_settings

ROOT = Path(__file__).parents[1]
SETS = ("demo", "alpaca", "turns", "accumulated")
ROWS_PER_STEP = 8
SEED = 7


class Side:
    """One side on one set. Lives in a process of its own.

    Args:
        side: `train`, `script` or `trl`.
        explicit: whether gradient checkpointing is turned off in words.
    """

    def __init__(self, side: str, name: str, dtype: str, size: str, explicit: bool) -> None:
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
        quiet()
        self.side, self.explicit = side, explicit
        self.base, self.tokenizer = _model(size, dtype)
        self.accumulated = 4 if name == "accumulated" else 1
        self.rows = _rows(name, self.tokenizer, self.base.config.vocab_size)
        self.trainer: Any = None

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of each of `count` steps, and the loss of the last one."""
        from transformers import PrinterCallback, set_seed

        watch = _watch()
        if self.trainer is None:
            # The same start for the adapter of each side.
            set_seed(SEED)
            self.trainer = (self._run if self.side == "train" else self._script)()
        trainer = self.trainer
        trainer.remove_callback(PrinterCallback)
        trainer.args.max_steps = count + 1
        trainer.add_callback(watch)
        # What `fit` does around the trainer; a script's trainer does so itself.
        with self._at_speed():
            trainer.train()
        trainer.remove_callback(watch)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {"seconds": watch.seconds[1:], "loss": losses[-1], "told": self._told()}

    def _settings(self) -> dict[str, Any]:
        return dict(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=ROWS_PER_STEP // self.accumulated,
            gradient_accumulation_steps=self.accumulated,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        )

    def _script(self) -> Any:
        import trl
        from datasets import Dataset

        import phlora

        configuration, trainer = (
            (phlora.SFTConfig, phlora.SFTTrainer)
            if self.side == "script"
            else (trl.SFTConfig, trl.SFTTrainer)
        )
        settings = {**self._settings(), "max_length": None}
        if self.side == "trl":
            settings |= {"use_cpu": True, "bf16": False}
        if self.explicit:
            settings["gradient_checkpointing"] = False
        return trainer(
            model=self.base,
            args=configuration(**settings),
            train_dataset=Dataset.from_list(self.rows),
            processing_class=self.tokenizer,
            peft_config=lora_settings(),
        )

    def _run(self) -> Any:
        from phlora.adapters.attach import attach
        from phlora.data.packing import TokenSequences
        from phlora.data.rows import Origin
        from phlora.data.table import TableBuilder
        from phlora.models.families import longrope_limit
        from phlora.models.prefix_sharing import decide_sharing
        from phlora.train.arguments import training_arguments
        from phlora.train.batches import RunTrainer, SequenceCollator, number_sequences

        settings = self._settings()
        folder = settings.pop("output_dir")
        settings = {
            k: v for k, v in settings.items() if k not in ("disable_tqdm", "report_to", "save_strategy")
        }
        args = training_arguments(settings, output_dir=folder, device="cpu").args
        args.max_length, args.save_strategy = None, type(args.save_strategy)("no")
        args.eval_strategy = type(args.eval_strategy)("no")
        args.dataset_kwargs, args.remove_unused_columns = {"skip_prepare_dataset": True}, False
        args.gradient_checkpointing = False
        builder, empty = TableBuilder(), TableBuilder()
        for row in self.rows:
            trained = bytes(label != -100 for label in row["labels"])
            builder.add(row["input_ids"], trained, None, Origin("rows", 0))
        self.model = attach(self.base, lora_settings()).model
        sequences, none = TokenSequences(builder.table()), TokenSequences(empty.table())
        sharing = decide_sharing(
            self.model, sequences, speed="auto", batch_size=args.per_device_train_batch_size, args=args
        )
        self.sharing = sharing.describe()
        return RunTrainer(
            model=self.model,
            args=args,
            train_dataset=number_sequences(sequences.lengths),
            processing_class=self.tokenizer,
            data_collator=SequenceCollator(
                sequences,
                none,
                self.tokenizer.pad_token_id,
                packed=False,
                shared=sharing.on,
                rope_limit=longrope_limit(self.model.config),
            ),
        )

    def _at_speed(self) -> Any:
        import contextlib

        from phlora.adapters.speed import at_speed

        return at_speed(self.model, "auto") if self.side == "train" else contextlib.nullcontext()

    def _told(self) -> str:
        return str(getattr(self, "sharing", getattr(self.trainer, "_told", "")))


def _watch() -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    return Watch()


def _model(size: str, dtype: str) -> tuple[Any, Any]:
    from phlora.models.load import load_model
    from phlora.models.tiny import tiny_phi3

    if size == "tiny":
        return tiny_phi3()
    loaded = load_model(size, dtype=dtype, device="cpu")
    return loaded.model, loaded.tokenizer.tokenizer


def _rows(name: str, tokenizer: Any, vocab: int) -> list[dict[str, Any]]:
    from phlora.data.dataset import load_rows
    from rowsets import make_rows, token_rows

    if name in ("demo", "accumulated"):
        file = ROOT / "examples" / "home_assistant" / "train.jsonl"
        return token_rows(load_rows([str(file)]).rows[:160], tokenizer)
    made = make_rows("multi_turn" if name == "turns" else name, tokenizer, vocab=vocab)
    return [{key: row[key] for key in ("input_ids", "labels")} for row in made] * (64 // len(made))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", choices=SETS, help="by default demo, alpaca and turns")
    parser.add_argument("--size", default="smollm2-135m", help="or tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trl", action="store_true", help="TRL's own trainer too")
    parser.add_argument(
        "--explicit", action="store_true", help="with gradient_checkpointing=False in the script"
    )
    options = parser.parse_args()
    quiet()
    logging.disable(logging.WARNING)
    sides = ["train", "script", *(["trl"] if options.trl else [])]
    document: dict[str, Any] = {"benchmark": "script", "dtype": options.dtype, "sets": {}}
    lines = []
    for name in options.set or SETS[:3]:
        workers = {
            side: Worker("script", "Side", side, name, options.dtype, options.size, options.explicit)
            for side in sides
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        results: dict[str, Any] = {}
        for number in range(options.rounds):
            for side in sides if number == 0 else sides[:2]:
                results[side] = workers[side].call("steps", 1 if side == "trl" else options.steps)
                seconds[side] += results[side]["seconds"]
        for worker in workers.values():
            worker.close()
        taken = {side: median(values) for side, values in seconds.items()}
        ratio = taken["script"] / taken["train"]
        lines.append([name, *(f"{taken[side]:.2f} s" for side in sides), f"{ratio:.3f}"])
        print(f"{name}: script/train {ratio:.3f}; {results['script']['told']}", flush=True)
        document["sets"][name] = {
            "seconds": taken,
            "all": seconds,
            "script_to_train": ratio,
            "loss": {side: result["loss"] for side, result in results.items()},
        }
    print_table(["set", *sides, "script/train"], lines)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
