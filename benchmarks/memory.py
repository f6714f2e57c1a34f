"""Whether the memory of a run stays flat: many real training steps, no two of the same shape.

    python benchmarks/memory.py [--steps 1000] [--model smollm2-135m] [--dtype auto] [--rows 4] [--longest 60]

A run of `phlora.finetune` without evaluation or checkpoints, on chats of random words whose lengths are drawn anew for
each row, so that nearly every step has a shape that none before it had. Resident memory is read after each step.
Goal: at the end at most 1.05 times what it was at step 100, when everything that stays has been made.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import phlora
from common import quiet
from phlora.display import Display
from phlora.models.tiny import tiny_phi3
from resident import peak_bytes, resident_bytes

SETTLED, GOAL = 100, 1.05
SHOWN = (1, 10, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
_WORDS = (
    "river stone garden window table letter morning winter music paper bridge market silver kitchen".split()
)


class Watch(TrainerCallback):
    """Reads resident memory after each optimizer step."""

    def __init__(self) -> None:
        self.resident: list[int] = []
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        self.resident.append(resident_bytes())
        # At once, so that a run which is stopped has said something.
        if len(self.resident) in SHOWN:
            print(f"step {len(self.resident):>5}  {self.resident[-1] / 1e9:.3f} GB", flush=True)


def chats(count: int, *, longest: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chats of one question and one answer, each of a random number of words, about half of them the answer's."""
    generator = random.Random(seed)

    def text() -> str:
        return " ".join(generator.choices(_WORDS, k=generator.randint(2, max(2, longest // 2))))

    return [
        {"messages": [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]}
        for _ in range(count)
    ]


def measure(model: str, *, steps: int, rows: int, longest: int, dtype: str, display: Any) -> Watch:
    """Train and watch."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        if model == "tiny":
            model = str(Path(folder) / "model")
            for part in tiny_phi3():
                part.save_pretrained(model)
        phlora.finetune(
            model={"name": model, "dtype": dtype},
            data=chats(min(rows * steps, 2000), longest=longest),
            training_config={
                "max_steps": steps,
                "per_device_train_batch_size": rows,
                "save_strategy": "no",
                "eval_strategy": "no",
                "logging_steps": 100,
            },
            evaluation={"enabled": False},
            output=Path(folder) / "run",
            callbacks=[watch],
            display=display,
        )
    return watch


def growth(resident: Sequence[int]) -> float:
    """The end against step 100, or against half of a shorter run; means of ten steps, since single ones swing."""
    at = SETTLED if len(resident) > 2 * SETTLED else max(1, len(resident) // 2)

    def near(step: int) -> float:
        window = resident[max(0, step - 10) : step]
        return sum(window) / len(window)

    return near(len(resident)) / near(at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--model", default="smollm2-135m", help="embedded name, folder, or `tiny`")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--longest", type=int, default=60, help="words of the longest row")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    quiet()
    watch = measure(
        options.model,
        steps=options.steps,
        rows=options.rows,
        longest=options.longest,
        dtype=options.dtype,
        display=Display(quiet=True),
    )
    found = growth(watch.resident)
    print(
        f"goal: at the end at most {GOAL} times step {SETTLED}: {found:.3f}, "
        f"{'reached' if found <= GOAL else 'missed'}"
        + ("" if options.steps > 2 * SETTLED else f"; too few steps: against step {options.steps // 2}")
    )
    document = json.dumps(
        {
            "benchmark": "memory",
            "model": options.model,
            "steps": len(watch.resident),
            "resident_gb": [round(value / 1e9, 4) for value in watch.resident],
            "seconds": round(sum(watch.seconds), 2),
            "peak_gb": round(peak_bytes() / 1e9, 3),
            "growth": round(found, 4),
            "goal": GOAL,
            "reached": found <= GOAL,
        }
    )
    if options.out:
        options.out.write_text(document + "\n", encoding="utf-8")
    print(document)


if __name__ == "__main__":
    main()
