"""What `full_size.py` measures: each part of the flow, in processes of its own, for each way to store the weights."""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import PeerProcess, Worker, median
from full_size_sides import demo_rows
from phlora.runs.events import read_events
from phlora.runs.folder import RunFolder
from resident import end_first_when_memory_is_short, peak_of

DEMO = Path(__file__).parents[1] / "examples" / "home_assistant"


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
