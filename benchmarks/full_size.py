"""The whole flow with a Phi-3-mini at full size: seconds and peak memory of every part, beside PEFT, TRL and Unsloth.

    python benchmarks/full_size.py [--work FOLDER] [--model FOLDER] [--unsloth-python PYTHON]
    python benchmarks/full_size.py --only train --only steps --storage nf4      parts; the others keep what was measured
    python benchmarks/full_size.py --show                                       what was measured so far
    python benchmarks/full_size.py --size tiny                                  the same flow in minutes, for its tests

The model has random weights of Phi-3-mini's exact configuration (32 layers, 3.8 billion parameters in bf16), written
once as safetensors shards, and a Phi-3 tokenizer; `--model` takes any real folder. Rows are those of
examples/home_assistant: one prompt of 157 tokens, which all rows share, and tails of some 40. Every part runs in
processes of its own, mostly the commands that a user types, and for each way to store the frozen weights:

load      the model alone
plan      `phlora plan`, and what it forecasts of the run
train     `phlora train`, so many steps with a checkpoint on the way; seconds of a step from the run's own log
resume    the same run, killed by SIGKILL after that checkpoint and continued: the adapter must be the same, bit by bit
evaluate  `phlora evaluate` on a few held-out rows, base against tuned
chat      time to the first token and tokens a second, beside what reading all weights once for each token takes
merge     `phlora merge`, with its own proof
reload    the merged model loaded alone
steps     forward and backward of 8 rows, beside the floor: the products that no exact step can leave out, timed alone
          in the same process, with shared starts counted once
peft, trl, unsloth
          the same 8 rows, weights, adapter and loss, without checkpointing, at the faster of two layouts (row by row,
          padded), in bf16. Peers compute every row whole: `real tokens/s` counts each token of each row, `positions/s`
          what went through the layers
profile   where the seconds of such a step go, operation by operation
curve     the loss of 10 optimizer steps beside PEFT's, the same rows in the same order

Peaks are resident memory of the process, libraries included. The benchmark says which goals were reached and which were
missed. The last line is JSON; it also stands in the work folder.
"""

from __future__ import annotations

import argparse
import datetime
import filecmp
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import PeerProcess, Worker, add_unsloth_option, find_unsloth, median, print_table, quiet
from full_size_sides import demo_rows
from phi3_folder import LAYERS, model_folder
from phlora.files import cache_root
from phlora.runs.events import read_events
from phlora.runs.folder import RunFolder
from resident import end_first_when_memory_is_short, peak_of

DEMO = Path(__file__).parents[1] / "examples" / "home_assistant"
DEMO_STEPS = 113
MACHINE_BYTES = 24 * 2**30


@dataclass(frozen=True)
class Storage:
    """A way to keep the frozen weights: for `load_model`, for the command line, and for a peer."""

    text: str
    fields: dict[str, Any]
    options: tuple[str, ...]
    peer: dict[str, Any] = field(default_factory=dict)


def _stored(storage: str) -> tuple[str, str]:
    return ("--set", f"model.storage_dtype={storage}")


# Peers compute in the dtype in which their weights are.
STORAGES = {
    "auto": Storage("no option: what Phlora chooses here", {}, ()),
    "bf16": Storage(
        "bf16 as in the checkpoint, computed in what is fastest here",
        {"storage_dtype": "bfloat16"},
        _stored("bfloat16"),
        {"dtype": "bfloat16"},
    ),
    "recompute": Storage(
        "bf16, each layer computed again in backward",
        {"storage_dtype": "bfloat16"},
        (*_stored("bfloat16"), "--set", "training_config.activation_memory=recompute"),
    ),
    "nf4": Storage(
        "NF4, computed in what is fastest here",
        {"storage_dtype": "nf4"},
        _stored("nf4"),
        {"dtype": "bfloat16", "quantization": "nf4"},
    ),
    "bf16-fp32": Storage(
        "bf16, computed in fp32",
        {"storage_dtype": "bfloat16", "dtype": "float32"},
        (*_stored("bfloat16"), "--set", "model.dtype=float32"),
        {"dtype": "float32"},
    ),
    "fp32": Storage(
        "fp32, computed in fp32",
        {"storage_dtype": "float32", "dtype": "float32"},
        (*_stored("float32"), "--set", "model.dtype=float32"),
        {"dtype": "float32"},
    ),
}
PEERS = ("peft", "trl", "unsloth")
PEER_LAYOUTS = ("row by row", "padded")


class Failed(Exception):
    """A part that did not come to its end, and what it said last."""


@dataclass
class Bench:
    """The parts, each of which returns what it measured."""

    options: argparse.Namespace
    folder: Path
    work: Path

    def run_of(self, storage: str) -> Path:
        return self.work / f"run-{storage}"

    # ------------------------------------------------------------------------------------------------ Phlora's parts

    def load(self, storage: str) -> dict[str, Any]:
        worker = Worker("full_size_sides", "Loading", str(self.folder), STORAGES[storage].fields)
        try:
            return worker.call("loading")
        finally:
            worker.close()

    def plan(self, storage: str) -> dict[str, Any]:
        result = self._command("plan", *self._training(storage, self.work / "planned"), "--json")
        forecast = json.loads((self.work / "plan.log").read_text(encoding="utf-8"))["forecast"]
        return result | {
            "forecast_peak": forecast["peak_bytes"],
            "forecast_step": (forecast["seconds"] or {}).get("step"),
        }

    def train(self, storage: str) -> dict[str, Any]:
        run = self.run_of(storage)
        result = self._command("train", *self._training(storage, run), "--overwrite")
        return result | self._steps_of(run)

    def resume(self, storage: str) -> dict[str, Any]:
        """Killed once the first checkpoint is complete, at whatever it does then, and continued."""
        killed, straight = self.work / f"killed-{storage}", self.run_of(storage)
        shutil.rmtree(killed, ignore_errors=True)
        command = ["train", *self._training(storage, killed)]
        complete = RunFolder(killed).checkpoints / f"checkpoint-{self.options.save_after}" / "complete.json"
        first = self._command(*command, kill_when=complete.exists)
        result = self._command(*command, "--resume")
        name = "adapter_model.safetensors"
        same = filecmp.cmp(
            RunFolder(killed).last_adapter / name, RunFolder(straight).last_adapter / name, shallow=False
        )
        return result | {"killed_after_seconds": first["seconds"], "same_bits": same}

    def evaluate(self, storage: str) -> dict[str, Any]:
        rows = self.work / "evaluated.jsonl"
        lines = self._data("heldout").read_text(encoding="utf-8").splitlines()
        rows.write_text("\n".join(lines[: self.options.held_out]) + "\n", encoding="utf-8")
        answers = ("--max-answers", "4", "--max-new-tokens", "16")
        result = self._command("evaluate", str(self.run_of(storage)), "--data", str(rows), *answers, "--json")
        return result | {"rows": self.options.held_out}

    def chat(self, storage: str) -> dict[str, Any]:
        worker = Worker("full_size_sides", "Chat", str(self.run_of(storage)), self.options.new_tokens)
        try:
            return worker.call("ask", "Dim the lights in the kitchen to forty percent.")
        finally:
            worker.close()

    def merge(self, storage: str) -> dict[str, Any]:
        merged = self.work / f"merged-{storage}"
        shutil.rmtree(merged, ignore_errors=True)
        options = ["--output", str(merged), "--max-rows", "2"]
        if self.options.size == "tiny":
            # So small a model is too sensitive for bf16: the merge would be refused.
            options += ["--dtype", "float32"]
        return self._command("merge", str(self.run_of(storage)), *options)

    def reload(self, storage: str) -> dict[str, Any]:
        merged = self.work / f"merged-{storage}"
        worker = Worker("full_size_sides", "Loading", str(merged), STORAGES["bf16"].fields)
        try:
            result = worker.call("loading")
        finally:
            worker.close()
        result["disk_bytes"] = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
        if not self.options.keep:
            shutil.rmtree(merged)
        return result

    def steps(self, storage: str) -> dict[str, Any]:
        rows = self._rows(self.options.rows)
        worker = Worker("full_size_sides", "Steps", str(self.folder), STORAGES[storage].fields)
        try:
            loading = worker.call("loading")
            worker.call("step", rows[:2])
            taken, floors = [], []
            for _ in range(self.options.rounds):
                floors.append(worker.call("floor", rows))
                taken.append(worker.call("step", rows))
        finally:
            worker.close()
        shares = [floor["seconds"] / step["seconds"] for floor, step in zip(floors, taken, strict=True)]
        return self._speed(taken, rows) | {
            "loading": loading,
            "floor_share": median(shares),
            "floor_seconds": median(floor["seconds"] for floor in floors),
            "product_gflops": median(floor["rate"] for floor in floors) / 1e9,
            "all_seconds": [step["seconds"] for step in taken],
        }

    def profile(self, storage: str) -> dict[str, Any]:
        worker = Worker("full_size_sides", "Steps", str(self.folder), STORAGES[storage].fields)
        try:
            return worker.call("profile", self._rows(self.options.rows))
        finally:
            worker.close()

    # ------------------------------------------------------------------------------------------------------- peers

    def peer(self, side: str, storage: str) -> dict[str, Any]:
        """Both layouts on all rows, after two rows that warm up; the faster one that fits counts."""
        rows = self._rows(self.options.rows)
        peer = self._start_peer(side, storage)
        taken: dict[str, dict[str, Any]] = {}
        try:
            loading = peer.call("loading")
            peer.call("step", rows[:2], PEER_LAYOUTS[0])
            for layout in PEER_LAYOUTS:
                taken[layout] = peer.call("step", rows, layout)
        except RuntimeError as error:
            if not taken:
                raise
            # The padded rows need more memory than the machine had; what went before stands.
            print(f"{side}, {storage}, {layout}: {error}", file=sys.stderr, flush=True)
        peer.close()
        layout = min(taken, key=lambda name: taken[name]["seconds"])
        others = {name: taken[name]["seconds"] if name in taken else None for name in PEER_LAYOUTS}
        return self._speed([taken[layout]], rows) | {"loading": loading, "layout": layout, "layouts": others}

    def curve(self, storage: str) -> dict[str, Any]:
        """The loss of the same optimizer steps by Phlora and by PEFT."""
        each, steps = self.options.curve_rows, self.options.curve_steps
        rows = self._rows(each * steps)
        batches = [rows[each * n : each * (n + 1)] for n in range(steps)]
        fields = STORAGES[storage].fields
        worker = Worker("full_size_sides", "Steps", str(self.folder), fields, True)
        own = worker.call("train", batches, "shared", rate=self.options.rate)
        worker.close()
        peer = self._start_peer("peft", storage, start=True)
        theirs = peer.call("train", batches, "row by row", rate=self.options.rate)
        peer.close()
        losses = list(zip(own["losses"], theirs["losses"], strict=True))
        return {
            "rows_of_a_step": each,
            "phlora": own,
            "peft": theirs,
            "largest_difference": max(abs(a / b - 1) for a, b in losses),
            "seconds": sum(own["seconds"]),
            "peak": own["peak"],
        }

    # ------------------------------------------------------------------------------------------------------- helpers

    def _rows(self, count: int) -> list[Any]:
        return demo_rows(str(self.folder), str(self._data("train")), count)

    def _data(self, name: str) -> Path:
        """The demo's rows; for the tiny model, whose tokens are bytes, with the first line of their prompt alone."""
        file = DEMO / f"{name}.jsonl"
        if self.options.size != "tiny":
            return file
        lines = []
        for line in file.read_text(encoding="utf-8").splitlines():
            chat = json.loads(line)
            chat["messages"][0]["content"] = chat["messages"][0]["content"].splitlines()[0]
            lines.append(json.dumps(chat))
        short = self.work / f"{name}.jsonl"
        short.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return short

    def _start_peer(self, side: str, storage: str, **options: Any) -> PeerProcess:
        python = self.options.unsloth_python if side == "unsloth" else sys.executable
        return PeerProcess(python, side, str(self.folder), **STORAGES[storage].peer, **options)

    def _training(self, storage: str, run: Path) -> list[str]:
        """The arguments of `phlora train`: the demo's rows, and a few steps with one checkpoint on the way."""
        settings = {
            "training_config.max_steps": self.options.steps,
            "training_config.save_steps": self.options.save_after,
            "training_config.per_device_train_batch_size": self.options.rows,
            "training_config.eval_strategy": "no",
            "training_config.logging_steps": 1,
            "training_config.learning_rate": self.options.rate,
            "evaluation.enabled": "false",
        }
        arguments = ["--model", str(self.folder), "--data", str(self._data("train")), "--output", str(run)]
        for key, value in settings.items():
            arguments += ["--set", f"{key}={value}"]
        return [*arguments, *STORAGES[storage].options]

    def _command(self, *arguments: str, kill_when: Callable[[], bool] | None = None) -> dict[str, Any]:
        """`phlora ARGUMENTS` on the clock: its seconds and its peak; what it prints goes to a file of its name.

        Args:
            kill_when: the process is killed as soon as this is true, and must not end before.
        """
        log, errors = (self.work / f"{arguments[0]}.{kind}" for kind in ("log", "err"))
        started = time.perf_counter()
        peak = 0
        with log.open("wb") as output, errors.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "phlora", *arguments], stdout=output, stderr=said
            )
            try:
                end_first_when_memory_is_short(process.pid)
                while process.poll() is None:
                    peak = max(peak, peak_of(process.pid))
                    if kill_when is not None and kill_when():
                        process.send_signal(signal.SIGKILL)
                        process.wait()
                    time.sleep(0.02)
            finally:
                # Nothing goes on computing when the benchmark itself is ended.
                process.kill()
        text = errors.read_text(encoding="utf-8", errors="replace").strip()
        wanted = -signal.SIGKILL if kill_when else 0
        if process.returncode != wanted:
            raise Failed(f"phlora {arguments[0]} ended with {process.returncode}: {text[-2000:]}")
        return {"seconds": time.perf_counter() - started, "peak": peak}

    def _steps_of(self, run: Path) -> dict[str, Any]:
        """Seconds of each optimizer step and its losses, by the run's own log."""
        events = [event for event in read_events(RunFolder(run).events) if event["event"] in ("start", "log")]
        steps = [event for event in events if event["event"] == "start" or "loss" in event]
        pairs = list(zip(steps, steps[1:], strict=False))
        seconds = [after["time"] - before["time"] for before, after in pairs]
        return {
            "step_seconds": seconds,
            "median_step": median(seconds),
            "losses": [event["loss"] for event in steps[1:]],
            "tokens": steps[-1].get("num_tokens"),
        }

    def _speed(self, taken: Sequence[dict[str, Any]], rows: Sequence[Any]) -> dict[str, Any]:
        seconds = median(step["seconds"] for step in taken)
        tokens = sum(len(row["input_ids"]) for row in rows)
        return {
            "seconds": seconds,
            "tokens": tokens,
            "positions": taken[0]["positions"],
            "tokens_per_second": tokens / seconds,
            "positions_per_second": taken[0]["positions"] / seconds,
            "loss": taken[0]["loss"],
            "gradient": taken[0]["gradient"],
            "peak": max(step["peak"] for step in taken),
        }


PARTS = (
    "load",
    "plan",
    "train",
    "resume",
    "evaluate",
    "chat",
    "merge",
    "reload",
    "steps",
    "profile",
    *PEERS,
    "curve",
)
# A part that stands on the run, or on the merged model, of another.
NEEDS = {"resume": "train", "evaluate": "train", "chat": "train", "merge": "train", "reload": "merge"}
ONLY_TRAINED = ("recompute", "auto")


def measure(bench: Bench, part: str, storage: str) -> dict[str, Any]:
    """A part, or why there is no figure of it."""
    found: dict[str, Any] = {"at": datetime.datetime.now().isoformat(timespec="minutes"), "commit": _commit()}
    try:
        return found | (bench.peer(part, storage) if part in PEERS else getattr(bench, part)(storage))
    except (Failed, RuntimeError) as error:
        print(f"{part}, {storage}: {error}", file=sys.stderr, flush=True)
        return found | {"failed": str(error)[:500]}


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


# ---------------------------------------------------------------------------------------------------------- goals


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 in hardware, as far as the system says."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def goals_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with what was measured; `value` is None where nothing was."""

    def figure(part: str, storage: str, key: str) -> Any:
        return results.get(f"{part}/{storage}", {}).get(key)

    goals: list[dict[str, Any]] = []

    def add(goal: str, value: float | bool | None, reached: bool | None) -> None:
        goals.append({"goal": goal, "value": value, "reached": reached})

    def at_most(goal: str, value: float | None, bound: float) -> None:
        add(f"{goal} <= {bound:g}", value, None if value is None else value <= bound)

    share = figure("steps", "bf16", "floor_share")
    add(
        "share of the product floor on the demo's rows >= 0.75",
        share,
        None if share is None else share >= 0.75,
    )
    peers = [
        results[f"{side}/{storage}"]
        for side in PEERS
        for storage in STORAGES
        if "seconds" in results.get(f"{side}/{storage}", {})
    ]
    fitting = [peer["seconds"] for peer in peers if peer["peak"] <= MACHINE_BYTES]
    own = figure("steps", "bf16", "seconds")
    ratio = min(fitting) / own if fitting and own else None
    add(
        "times as fast as the fastest peer that fits in 24 GiB >= 4",
        ratio,
        None if ratio is None else ratio >= 4,
    )
    at_most(
        "bf16: losses of 10 steps, largest relative difference from PEFT",
        figure("curve", "bf16", "largest_difference"),
        1e-3,
    )
    exact = figure("curve", "bf16-fp32", "largest_difference")
    at_most("stored in bf16, computed in fp32: the same", exact, 1e-5)
    units = has_bf16_units()
    step = figure("train", "bf16", "median_step")
    minutes = None if step is None else step * DEMO_STEPS / 60
    at_most(
        f"minutes of the demo's {DEMO_STEPS} steps by the median step, {'with' if units else 'no'} bf16 units",
        minutes,
        20 if units else 100,
    )
    for storage, bound in (("bf16", 10.5), ("recompute", 9.0), ("nf4", 5.0)):
        for part in ("load", "train"):
            peak = figure(part, storage, "peak")
            if storage != "recompute" or part == "train":
                at_most(f"peak GB of {part}, {storage}", None if peak is None else peak / 1e9, bound)
    for storage in ("bf16", "nf4"):
        same = figure("resume", storage, "same_bits")
        add(f"killed and resumed, {storage}: the same bits", same, same)
    return goals


# --------------------------------------------------------------------------------------------------------- showing


def show(results: dict[str, Any]) -> None:
    print("\nThe whole flow (peak: resident memory of the process)")
    rows = []
    for key, found in results.items():
        part, _, storage = key.partition("/")
        if part in PEERS or part in ("steps", "profile", "curve"):
            continue
        if "failed" in found:
            rows.append([part, storage, "failed", "", found["failed"][:60].replace("\n", " ")])
            continue
        rows.append(
            [
                part,
                storage,
                f"{found['seconds']:.1f}" if "seconds" in found else f"{found['loading_seconds']:.1f}",
                f"{found['peak'] / 1e9:.2f}",
                _remark(part, found),
            ]
        )
    print_table(("part", "storage", "s", "peak GB", ""), rows)
    print("\nForward and backward of the same rows")
    rows = []
    for key, found in results.items():
        part, _, storage = key.partition("/")
        if part not in (*PEERS, "steps"):
            continue
        if "failed" in found:
            rows.append([part, storage, *["failed"] * 8])
            continue
        reference = results.get(f"peft/{storage}", {}).get("loss")
        rows.append(
            [
                "phlora" if part == "steps" else part,
                storage,
                found.get("layout", "shared"),
                f"{found['seconds']:.2f}",
                f"{found['tokens_per_second']:.1f}",
                f"{found['positions_per_second']:.1f}",
                f"{found['positions']:,}",
                f"{found['floor_share']:.0%}" if "floor_share" in found else "",
                f"{found['peak'] / 1e9:.2f}",
                f"{abs(found['loss'] / reference - 1):.1e}" if reference else "",
            ]
        )
    print_table(
        (
            "",
            "storage",
            "layout",
            "s",
            "real tokens/s",
            "positions/s",
            "positions",
            "floor",
            "peak GB",
            "loss",
        ),
        rows,
    )
    for key, found in results.items():
        if key.startswith("profile/") and "failed" not in found:
            print(f"\nWhere the {found['seconds']:.2f} s of a step go, {key.partition('/')[2]}")
            print_table(
                ("operation", "s", "share", "calls"),
                [
                    (
                        operation["name"],
                        f"{operation['seconds']:.3f}",
                        f"{operation['seconds'] / found['seconds']:.1%}",
                        operation["calls"],
                    )
                    for operation in found["operations"]
                ],
            )
        if key.startswith("curve/") and "failed" not in found:
            print(f"\nLoss of each step, {key.partition('/')[2]}, {found['rows_of_a_step']} rows a step")
            numbers = [str(n + 1) for n in range(len(found["phlora"]["losses"]))]
            print_table(
                ("step", *numbers),
                [[side, *(f"{loss:.5f}" for loss in found[side]["losses"])] for side in ("phlora", "peft")],
            )


def _remark(part: str, found: dict[str, Any]) -> str:
    if part == "train":
        return f"{found['median_step']:.2f} s a step, median of {len(found['step_seconds'])}"
    if part == "resume":
        return "the same bits" if found["same_bits"] else "OTHER BITS"
    if part == "chat":
        return (
            f"first token {found['first_token']:.2f} s, then {found['tokens_per_second']:.2f} tokens/s, "
            f"{found['bandwidth_share']:.0%} of {found['read_bandwidth'] / 1e9:.1f} GB/s"
        )
    if part == "plan":
        step = found["forecast_step"]
        return f"forecast: {found['forecast_peak'] / 1e9:.2f} GB" + (f", {step:.1f} s a step" if step else "")
    if part == "evaluate":
        return f"{found['rows']} rows"
    return ""


def show_goals(goals: Sequence[dict[str, Any]]) -> None:
    print()
    for goal in goals:
        value = goal["value"]
        shown = "not measured" if value is None else value if isinstance(value, bool) else f"{value:.4g}"
        verdict = {None: "", True: ", reached", False: ", missed"}[goal["reached"]]
        print(f"goal: {goal['goal']}: {shown}{verdict}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the random model")
    parser.add_argument("--model", type=Path, help="a real folder, in the place of the random model")
    parser.add_argument(
        "--work", type=Path, help="folder of model, runs and results [default: the user's cache]"
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="may be given several times")
    parser.add_argument(
        "--storage", action="append", choices=sorted(STORAGES), help="[default: bf16 and nf4]"
    )
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--steps", type=int, default=10, help="of the training run")
    parser.add_argument("--save-after", type=int, default=5, help="steps before the checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="steps beside their floor")
    parser.add_argument("--curve-steps", type=int, default=10)
    parser.add_argument("--curve-rows", type=int, default=4, help="of a step of the loss curve")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--held-out", type=int, default=8, help="rows evaluated")
    parser.add_argument("--new-tokens", type=int, default=32, help="of the chat's reply")
    parser.add_argument("--keep", action="store_true", help="keep the merged model")
    parser.add_argument("--show", action="store_true", help="measure nothing; show what was measured")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    add_unsloth_option(parser)
    options = parser.parse_args(arguments)
    options.unsloth_python = find_unsloth(options.unsloth_python)
    if options.model and not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model}: no folder of a model, it has no config.json")
    if not 0 < options.save_after < options.steps:
        parser.error("--save-after must be less than --steps: the run is killed between the two")
    return options


def main() -> None:
    options = parse()
    quiet()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    work = options.work or cache_root() / "full_size"
    work.mkdir(parents=True, exist_ok=True)
    folder = options.model or model_folder(work, options.size, options.layers)
    work = work / f"results-{folder.name}"
    work.mkdir(exist_ok=True)
    kept = work / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    bench = Bench(options, folder, work)
    for storage in [] if options.show else options.storage or ["bf16", "nf4"]:
        for part in options.only or PARTS:
            if skipped(part, storage, options, results):
                continue
            results[f"{part}/{storage}"] = measure(bench, part, storage)
            kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"{part}, {storage}: {_short(results[f'{part}/{storage}'])}", flush=True)
    results = {key: results[key] for key in sorted(results, key=_place)}
    show(results)
    is_whole = options.size == "full" and options.layers == LAYERS
    goals = goals_of(results) if is_whole else []
    show_goals(goals)
    facts = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, bf16 units: {has_bf16_units()}"}
    document = json.dumps(
        {"benchmark": "full_size", **facts, "model": folder.name, "results": results, "goals": goals}
    )
    if options.out:
        options.out.write_text(document + "\n", encoding="utf-8")
    print(document)
    own = {key: found for key, found in results.items() if key.partition("/")[0] not in PEERS}
    sys.exit(int(any("failed" in found for found in own.values())))


def skipped(part: str, storage: str, options: argparse.Namespace, results: dict[str, Any]) -> bool:
    """Parts that make no sense here: said where they were asked for by name."""
    why = None
    if part == "unsloth" and options.unsloth_python is None:
        why = "Unsloth is not installed; --unsloth-python names where it is"
    elif storage in ONLY_TRAINED and part not in ("plan", "train"):
        why = f"`{storage}` is trained only"
    elif part in NEEDS and "seconds" not in results.get(f"{NEEDS[part]}/{storage}", {}):
        why = f"it needs `{NEEDS[part]}` first"
    if why and options.only:
        print(f"{part}, {storage}: left out, {why}", flush=True)
    return why is not None


def _place(key: str) -> tuple[int, int]:
    part, _, storage = key.partition("/")
    return list(STORAGES).index(storage), PARTS.index(part)


def _short(found: dict[str, Any]) -> str:
    shown = {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}
    return json.dumps(shown | {key: found[key] for key in ("failed", "same_bits", "layout") if key in found})


if __name__ == "__main__":
    main()
