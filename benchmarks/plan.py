"""Does a plan tell the truth? Memory and time as forecast against a run of the same configuration.

    python benchmarks/plan.py [--case shared-keep --case ...] [--size smollm2-135m --size phi3-layers] [--steps 4]

Each case is planned and then trained for a few steps in a process of its own; the peak is what the process has held at
most (on a GPU what was allocated), the time that of a step, the first one left out. The goals: memory within 10 %, time
within 25 %. The last line is JSON.

Sizes: `smollm2-135m` (the embedded model), `tiny`, `phi3-layers` (two layers of Phi-3-mini's shapes), or a folder.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY_GOAL, TIME_GOAL = 0.10, 0.25
_WORDS = (
    "river water stone garden window table letter morning winter music paper bridge market silver".split()
)


@dataclass(frozen=True)
class Case:
    """Rows of a kind, and how they are trained.

    Attributes:
        shared: words of a system prompt that all rows begin with.
        words: of the question and of the answer together, at least and at most.
    """

    shared: int
    words: tuple[int, int]
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    answers: int = 0


_KEEP, _MLP, _ALL = ({"activation_memory": level} for level in ("keep", "recompute_mlp", "recompute"))
_BF16, _NF4 = {"dtype": "bfloat16"}, {"quantization": "nf4"}
CASES = {
    "shared-keep": Case(100, (20, 40), _KEEP),
    "shared-mlp": Case(100, (20, 40), _MLP),
    "shared-recompute": Case(100, (20, 40), _ALL),
    "shared-nf4": Case(100, (20, 40), _KEEP, _NF4),
    "shared-bf16": Case(100, (20, 40), _KEEP, _BF16),
    "short-keep": Case(0, (20, 120), _KEEP),
    "short-accumulated": Case(
        0, (20, 120), _KEEP | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    ),
    "short-recompute": Case(0, (20, 120), _ALL),
    "long-keep": Case(0, (600, 800), _KEEP | {"per_device_train_batch_size": 2}),
    "long-recompute": Case(0, (600, 800), _ALL | {"per_device_train_batch_size": 2}),
    "answers": Case(100, (20, 40), _KEEP, answers=16),
}
SIZES = ("smollm2-135m", "phi3-layers", "tiny")


def write_rows(case: Case, path: Path, count: int = 64) -> None:
    """Chats of made-up words, the same on every machine."""
    draw = random.Random(0)

    def words(number: int) -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(number))

    system = [{"role": "system", "content": words(case.shared)}] if case.shared else []
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            length = draw.randint(*case.words)
            answer = max(4, length // 4)
            turns = [
                {"role": "user", "content": words(length - answer)},
                {"role": "assistant", "content": words(answer)},
            ]
            file.write(json.dumps({"messages": system + turns}) + "\n")


def model_of(size: str, work: Path) -> str:
    """The name of a model, or the folder in which one of random weights was written."""
    if size not in ("phi3-layers", "tiny"):
        return size
    folder = work / size
    if not folder.exists():
        import torch
        from transformers import Phi3ForCausalLM

        from phi3_folder import phi3_mini_config
        from phlora.models.tiny import tiny_phi3

        model, tokenizer = tiny_phi3()
        if size == "phi3-layers":
            config = phi3_mini_config(layers=2)
            for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                setattr(config, name, getattr(model.config, name))
            model = Phi3ForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def run_case(size: str, name: str, work: Path, steps: int) -> dict[str, Any]:
    """Plan a case, train it, and say both; in this process, which has done nothing else."""
    from transformers import TrainerCallback

    from phlora.config import build_config
    from phlora.display import Display
    from phlora.measure import peak_bytes
    from phlora.train.finetune import finetune

    case = CASES[name]
    rows = work / f"{name}.jsonl"
    write_rows(case, rows)
    settings = {"max_steps": steps, "save_strategy": "no", "eval_strategy": "no", **case.settings}
    config = build_config(
        {
            "model": {"name": model_of(size, work), "dtype": "float32", **case.model},
            "data": {"files": str(rows), "eval_size": 16},
            "training_config": settings,
            "evaluation": {"max_answers": case.answers, "max_new_tokens": 32, "enabled": bool(case.answers)},
            "output": str(work / f"{size}-{name}"),
        }
    )
    seconds: list[float] = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.perf_counter()

    run = finetune(config, overwrite=True, callbacks=[Timer()], display=Display(quiet=True))
    forecast = run.plan.forecast
    assert forecast is not None and forecast.seconds is not None and run.folder is not None
    timing = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))["timing"]
    return {
        "size": size,
        "case": name,
        "memory": forecast.memory.peak,
        "measured_memory": peak_bytes(),
        "step": forecast.seconds.step,
        "measured_step": statistics.median(seconds[1:]),
        "evaluation": forecast.seconds.evaluation,
        "measured_evaluation": timing.get("evaluation", 0.0),
        "parts": dict(forecast.memory.parts),
        "positions": forecast.passes.largest.positions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--size", action="append", help=f"{', '.join(SIZES)} or a folder; may be repeated")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where models and runs go; a temporary folder if left out")
    parser.add_argument("--one", action="store_true", help="in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_case(options.size[0], options.case[0], options.work, options.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found = []
        print("| model | rows | memory: forecast | measured | | a step: forecast | measured | |")
        print("|---|---|---|---|---|---|---|---|")
        for size in options.size or SIZES:
            for name in options.case or CASES:
                words = [
                    "--one",
                    "--size",
                    size,
                    "--case",
                    name,
                    "--work",
                    str(work),
                    "--steps",
                    str(options.steps),
                ]
                done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
                if done.returncode:
                    print(
                        f"| {size} | {name} | failed: {done.stderr.strip().splitlines()[-1][:200]} |",
                        flush=True,
                    )
                    continue
                found.append(json.loads(done.stdout.splitlines()[-1]))
                print(line_of(found[-1]), flush=True)
    met = [
        abs(each["memory"] / each["measured_memory"] - 1) <= MEMORY_GOAL
        and abs(each["step"] / each["measured_step"] - 1) <= TIME_GOAL
        for each in found
    ]
    print(json.dumps({"cases": found, "met": sum(met), "of": len(met)}))


def line_of(found: dict[str, Any]) -> str:
    memory, step = found["memory"] / found["measured_memory"], found["step"] / found["measured_step"]
    return (
        f"| {Path(found['size']).name} | {found['case']} | {found['memory'] / 1e9:.2f} GB "
        f"| {found['measured_memory'] / 1e9:.2f} GB | {memory - 1:+.0%} | {found['step']:.3f} s "
        f"| {found['measured_step']:.3f} s | {step - 1:+.0%} |"
    )


if __name__ == "__main__":
    main()
