"""The guide's samples as they stand, and with TRL's own trainer in the place of Phlora's: seconds of an optimizer step.

    python benchmarks/samples.py [--sample train_sharegpt.py --sample lora_python.ipynb ...] [--steps 3]

Each sample of `examples/guide` runs from its first line to the first `trainer.train()`, which takes a few steps more
than are counted, and ends there; each side in a process of its own. TRL's side gets the same model, rows, settings and
adapter, but for names of parts of fused weights (`q_proj`), which it cannot adapt: it adapts the whole fused layer.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import median, print_table

GUIDE = Path(__file__).parents[1] / "examples" / "guide"
SAMPLES = (
    "train_sharegpt.py",
    "sample_finetune.py",
    "lora_python.ipynb",
    "inference_and_finetuning.ipynb",
    "qlora_python.ipynb",
)
SIDES = ("phlora", "trl")
FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


class _Measured(Exception):
    """Ends a sample once its first training is over."""


def measure(sample: str, side: str, steps: int) -> dict[str, Any]:
    """Seconds of each step of a sample, the first one left out, and what was trained; in this process."""
    import transformers
    import trl

    import phlora

    seconds: list[float] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.perf_counter()

    base: Any = phlora.SFTTrainer if side == "phlora" else trl.SFTTrainer
    found: dict[str, Any] = {}

    class Timed(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if side == "trl":
                _without_parts(kwargs.get("peft_config"))
            super().__init__(*args, **kwargs)
            self.args.max_steps, self.args.logging_steps = steps + 1, 1
            self.args.save_strategy = self.args.eval_strategy = "no"
            self.add_callback(Watch())

        def train(self, *args: Any, **kwargs: Any) -> Any:
            super().train(*args, **kwargs)
            losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            found.update(
                losses=losses, trained=sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            )
            raise _Measured

    phlora.SFTTrainer = Timed  # type: ignore[misc]
    try:
        _run(GUIDE / sample)
    except _Measured:
        return {"seconds": median(seconds[1:]), "all": seconds, **found}
    raise RuntimeError(f"{sample} trains nothing by SFTTrainer")


def _without_parts(adapter: Any) -> None:
    """Whole fused layers where parts of them are named."""
    if adapter is not None and not isinstance(adapter.target_modules, str):
        adapter.target_modules = {FUSED.get(name, name) for name in adapter.target_modules}


def _run(file: Path) -> None:
    """A script, or the cells of a notebook one after the other, in a folder of its own."""
    folder = tempfile.mkdtemp()
    sys.argv = [str(file)]
    if file.suffix == ".py":
        os.chdir(folder)
        runpy.run_path(str(file), run_name="__main__")
        return
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    # Notebooks find their data beside themselves.
    os.chdir(file.parent)
    os.environ["MPLBACKEND"] = "agg"
    exec(compile(source, str(file), "exec"), {"__name__": "__main__"})  # noqa: S102


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", action="append", choices=SAMPLES, help="default: all")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.sample[0], options.side, options.steps)))
        return
    results: dict[str, dict[str, Any]] = {}
    for sample in options.sample or SAMPLES:
        results[sample] = {side: _in_a_process(sample, side, options.steps) for side in SIDES}
        print(
            sample, {side: found.get("seconds", found) for side, found in results[sample].items()}, flush=True
        )
    rows = [
        [sample, *(f"{sides[side]['seconds']:.2f} s" for side in SIDES), _ratio(sides)]
        for sample, sides in results.items()
        if all("seconds" in sides[side] for side in SIDES)
    ]
    print_table(["sample", *SIDES, "times as fast"], rows)
    print(json.dumps({"benchmark": "samples", "results": results}))


def _ratio(sides: dict[str, Any]) -> str:
    return f"{sides['trl']['seconds'] / sides['phlora']['seconds']:.2f}x"


def _in_a_process(sample: str, side: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--sample", sample, "--side", side, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
