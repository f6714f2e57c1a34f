"""Training time until the demo's task is learned: Phlora against TRL + PEFT at its best settings.

    python benchmarks/end_to_end.py [--goal 0.9] [--max-minutes 10] [--side phlora --side trl]

Both sides train the embedded model on the rows of examples/quickstart.yaml with its learning rate, batch size, schedule
and order of rows, from the same adapter. Every few optimizer steps the clock stops and the model answers the held-out
requests (greedily, by phlora.models.generate for both sides). A side ends at the first evaluation that reaches the
goal, with its run, or after --max-minutes of training. TRL lays out its rows in the way that was fastest on the first
eight rows, without gradient checkpointing. Phlora shares what rows begin with.

The seconds are those of the training loop alone: neither start-up nor evaluation counts. Sides run one after the other,
each in a process of its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Worker, print_table, quiet
from peer import LAYOUTS, Row, lora_settings, set_adapter

ROOT = Path(__file__).parents[1]
SIDES = ("phlora", "trl")


@dataclass(frozen=True)
class Task:
    """The demo: its configuration, its rows as tokens, its held-out requests."""

    config: Any
    settings: Any
    tokenizer: Any
    rows: list[Row]
    prompts: list[Any]


def read_task(overrides: list[str]) -> Task:
    from phlora.config import load_config
    from phlora.data.dataset import load_rows
    from phlora.data.prompts import encode_prompt
    from phlora.models.tokenizer import load_tokenizer
    from phlora.train.arguments import training_arguments
    from rowsets import token_rows

    config = load_config(ROOT / "examples" / "quickstart.yaml", overrides)
    loaded = load_tokenizer(config.model.name)
    train, held_out = (
        load_rows([str(ROOT / file.path) for file in files]).rows
        for files in (config.data.files, config.data.eval)
    )
    settings = training_arguments(config.training_config, output_dir=tempfile.mkdtemp())
    return Task(
        config=config,
        settings=settings.args,
        tokenizer=loaded,
        rows=token_rows(train, loaded.tokenizer),
        prompts=[encode_prompt(row, loaded.tokenizer) for row in held_out],
    )


class Side:
    """One side's run. Lives in a process of its own.

    Args:
        side: `phlora` or `trl`.
        overrides: settings in the place of the demo's, as on the command line.
        layout: a key of `LAYOUTS`, for TRL.
    """

    def __init__(self, side: str, overrides: list[str], layout: str) -> None:
        from datasets.utils.logging import disable_progress_bar
        from peft import get_peft_model

        from candidates import with_phlora
        from phlora.models.load import load_model

        disable_progress_bar()
        self.side, self.kind, self.rows_per_pass = side, *LAYOUTS[layout]
        self.task = read_task(overrides)
        base = load_model(self.task.config.model.name, dtype="float32", device="cpu").model
        # The demo's adapter: r=16, lora_alpha=32 on all linears.
        self.model = (with_phlora if side == "phlora" else get_peft_model)(base, lora_settings())
        set_adapter(self.model, start=True)

    def run(self, *, goal: float, max_seconds: float, every: int, first: int, answers: int) -> dict[str, Any]:
        """Train until the goal, the time or the run's end, evaluating on the way."""
        trainer = self._trainer()
        watch = _watch(
            lambda: self.exact_match(answers), goal=goal, max_seconds=max_seconds, every=every, first=first
        )
        trainer.add_callback(watch)
        watch.start()
        trainer.train()
        return {
            "points": watch.points,
            "steps": trainer.state.global_step,
            "seconds": round(watch.seconds, 2),
            "reached": bool(watch.points) and watch.points[-1]["exact_match"] >= goal,
        }

    def _trainer(self) -> Any:
        import trl
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        import phlora
        from phlora.data.collate import SharedPrefixCollator

        args, tokenizer = copy.copy(self.task.settings), self.task.tokenizer.tokenizer
        args.max_length = None
        args.eval_strategy, args.save_strategy = (
            type(args.eval_strategy)("no"),
            type(args.save_strategy)("no"),
        )
        batch = args.per_device_train_batch_size
        if self.side == "phlora":
            trainer_class, collator = phlora.SFTTrainer, SharedPrefixCollator()
        else:
            padding_free = self.kind == "padding-free"
            trainer_class = trl.SFTTrainer
            collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=padding_free)
            args.per_device_train_batch_size = min(self.rows_per_pass or batch, batch)
            args.gradient_accumulation_steps = batch // args.per_device_train_batch_size
        trainer = trainer_class(
            model=self.model,
            args=args,
            train_dataset=Dataset.from_list(self.task.rows),
            data_collator=collator,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def exact_match(self, answers: int) -> float:
        """Share of the held-out requests that are answered word for word."""
        from phlora.evaluate.metrics import exact_match
        from phlora.models.generate import generate

        asked, loaded = self.task.prompts[:answers], self.task.tokenizer
        replies = generate(
            self.model,
            [item.prompt_ids for item in asked],
            max_new_tokens=self.task.config.evaluation.max_new_tokens,
            stop_token_ids=loaded.stop_token_ids,
            pad_token_id=loaded.tokenizer.pad_token_id,
        )
        texts = [loaded.tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]
        hits = [exact_match(text, item.reference) for text, item in zip(texts, asked, strict=True)]
        return sum(hits) / len(hits)


def _watch(evaluate: Any, *, goal: float, max_seconds: float, every: int, first: int) -> Any:
    """A callback whose clock runs while the trainer trains, and stands still while the model is evaluated."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.points: list[dict[str, Any]] = []
            self.seconds = 0.0

        def start(self) -> None:
            self.since = time.perf_counter()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds += time.perf_counter() - self.since
            step, over = state.global_step, self.seconds > max_seconds
            due = step >= first and (step - first) % every == 0
            if due or over or step == state.max_steps:
                share = evaluate()
                self.points.append(
                    {"step": step, "seconds": round(self.seconds, 2), "exact_match": round(share, 4)}
                )
                print(f"  step {step}: {self.seconds:.0f} s, exact match {share:.0%}", flush=True)
                control.should_training_stop |= over or share >= goal
            self.start()

    return Watch()


def fastest_layout(overrides: list[str]) -> str:
    """TRL's fastest layout that does not leak, on the first rows of the task."""
    side = Worker("end_to_end", "Probe", overrides)
    layout = side.call("layout")
    side.close()
    return layout


class Probe:
    """Tries TRL's layouts on the task's first rows. Lives in a process of its own."""

    def __init__(self, overrides: list[str]) -> None:
        from candidates import Candidate

        # First: settings that are made after a trainer take its accelerator away.
        task = read_task(overrides)
        self.rows = task.rows[: task.settings.per_device_train_batch_size]
        self.candidate = Candidate("trl-best", "smollm2-135m")

    def layout(self) -> str:
        seconds = {}
        for layout, (kind, size) in LAYOUTS.items():
            if size == 0 or (kind == "padding-free" and self.candidate.leaks(layout)):
                continue
            seconds[layout] = self.candidate.step(self.rows, layout)["seconds"]
        return min(seconds, key=seconds.__getitem__)


def verdict(side: str, result: dict[str, Any], goal: float, max_minutes: float) -> str:
    last = result["points"][-1]
    if result["reached"]:
        return (
            f"{side}: {goal:.0%} exact match after {last['seconds']:.0f} s of training, step {last['step']}"
        )
    if last["seconds"] > 60 * max_minutes:
        return f"{side}: not reached in {max_minutes:g} minutes, {last['exact_match']:.0%} at step {last['step']}"
    return f"{side}: not reached in its {last['step']} steps, {last['exact_match']:.0%} at the end"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goal", type=float, default=0.9, help="share of exact matches")
    parser.add_argument("--max-minutes", type=float, default=10, help="of training, for each side")
    parser.add_argument("--first", type=int, default=40, help="optimizer step of the first evaluation")
    parser.add_argument("--every", type=int, default=12, help="optimizer steps between evaluations")
    parser.add_argument("--answers", type=int, default=100, help="held-out requests that are answered")
    parser.add_argument("--side", action="append", choices=SIDES, help="may be given several times")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), help="of TRL's rows; by default the fastest")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="a setting of the demo"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    quiet()
    results = {}
    for side in options.side or SIDES:
        layout = "padded"
        if side == "trl":
            layout = options.layout or fastest_layout(options.override)
            print(f"TRL's rows: {layout}", flush=True)
        print(side, flush=True)
        worker = Worker("end_to_end", "Side", side, options.override, layout)
        results[side] = worker.call(
            "run",
            goal=options.goal,
            max_seconds=60 * options.max_minutes,
            every=options.every,
            first=options.first,
            answers=options.answers,
        ) | {"layout": layout if side == "trl" else "shared starts"}
        worker.close()
    print()
    print_table(
        ("", "step", "training s", "exact match"),
        [
            [side, point["step"], point["seconds"], f"{point['exact_match']:.0%}"]
            for side, result in results.items()
            for point in result["points"]
        ],
    )
    for side, result in results.items():
        print(verdict(side, result, options.goal, options.max_minutes))
    document: dict[str, Any] = {"benchmark": "end_to_end", "goal": options.goal, "sides": results}
    if all(results.get(side, {}).get("reached") for side in SIDES):
        ends = {side: results[side]["points"][-1]["seconds"] for side in SIDES}
        document["faster_than_trl"] = round(ends["trl"] / ends["phlora"], 3)
        print(f"Phlora is there {document['faster_than_trl']}× as fast")
    line = json.dumps(document)
    if options.out:
        options.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
