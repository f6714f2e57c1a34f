"""What the benchmarks share: sets and sides by name, the GEMM floor of a step, a process for each candidate, tables."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from peer import LINEARS, RANK, Row
from phlora.data.prefixes import Segments

# The rate at which the goals count the floor of a CPU step.
FIXED_RATE = 160e9

SIZES = {
    "smollm2-135m": "the embedded model, 135M parameters",
    "phi3-layers": "two layers of Phi-3-mini's width with its vocabulary, random weights",
    "phi3-mini": "the shape of Phi-3-mini in bf16, random weights, on a GPU",
    "tiny": "a random model for tests",
}
SETS = {
    "mixed": "8 chats of 40 to 600 tokens, answers trained",
    "shared": "32 chats of a 150-token system prompt and tails of 28 to 60 tokens, answers trained",
    "multi_turn": "4 chats of 4 turns and 250 to 550 tokens, all answers trained",
    "turns": "6 conversations of 4 turns behind one 150-token system prompt, a row for each turn, its answer trained",
    "long_row": "one chat of 2,048 tokens, its answer trained",
    "full_loss": "4 rows of 256 tokens, every token trained",
    "pack_4k": "chats of 100 to 2,048 tokens, 4,096 tokens in all, answers trained",
    "pack_16k": "the same, 16,384 tokens",
    "pack_64k": "the same, 65,536 tokens",
    "alpaca": "8 rows of random tokens as long as those of LLaMA-Factory's alpaca_en_demo: prompts of 4 to 169 tokens, "
    "half of them 11 to 22, answers of 1 to 594, half of them 25 to 259; answers trained",
}
# The rows of a sweep: what a step costs per token must not depend on how long its rows are.
SWEEP_LENGTHS = (64, 128, 256, 512, 1024, 2048)
SWEEP_TOKENS = 2048
SWEEP = {
    f"rows_of_{n}": f"{SWEEP_TOKENS // n} rows of {n:,} random tokens, the last quarter of each trained"
    for n in SWEEP_LENGTHS
}
SETS |= SWEEP
SIDES = {
    "phlora": "Phlora, padded rows",
    "phlora-shared": "Phlora, one stream with shared starts",
    "trl-best": "TRL + PEFT, its fastest exact settings",
    "trl-default": "TRL + PEFT, its defaults: padded rows, gradient checkpointing",
    "peft": "PEFT and transformers' own loss, padded rows, no checkpointing",
    "loralib": "loralib's layers, the rest as PEFT",
}
# Beside the others on a GPU, where their packages are installed.
GPU_SIDES = {
    "peft-compile": "PEFT through torch.compile",
    "liger": "TRL + PEFT with Liger's kernels",
    "unsloth": "Unsloth",
}
# Beside the others on a CPU, where Unsloth is installed: here, or in the Python that `--unsloth-python` names.
UNSLOTH_SIDES = {
    "unsloth": "Unsloth's CPU backend, its fastest exact settings: no checkpointing, the fastest layout",
    "unsloth-compile": "the same with its option UNSLOTH_CPU_COMPILE=1",
}


def available_sides(device: str, unsloth_python: str | None) -> dict[str, str]:
    """The candidates that this machine can run."""
    packages = {"peft-compile": "torch", "liger": "liger_kernel", "unsloth": "unsloth"}
    if device == "cuda":
        return SIDES | {side: text for side, text in GPU_SIDES.items() if find_spec(packages[side])}
    return SIDES | (UNSLOTH_SIDES if unsloth_python else {})


def find_unsloth(python: str | None) -> str | None:
    """The interpreter in which Unsloth is installed: the one that is named, this one, or None.

    Its pins (transformers, trl, datasets) are older than Phlora's, so it mostly has an environment of its own.
    """
    if python is None:
        return sys.executable if find_spec("unsloth") else None
    if not os.access(python, os.X_OK):
        sys.exit(f"--unsloth-python {python}: there is no such interpreter")
    return python


def add_unsloth_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--unsloth-python",
        default=os.environ.get("UNSLOTH_PYTHON"),
        help="interpreter in which Unsloth is installed, if not this one; or UNSLOTH_PYTHON in the environment",
    )


# ------------------------------------------------------------------------------------------------ the floor


@dataclass(frozen=True)
class Shapes:
    """The matrix shapes of a Phi-3 layout."""

    hidden: int
    intermediate: int
    query: int
    key_value: int
    layers: int
    vocab: int

    @classmethod
    def of(cls, config: Any) -> Shapes:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            query=width * config.num_attention_heads,
            key_value=width * config.num_key_value_heads,
            layers=config.num_hidden_layers,
            vocab=config.vocab_size,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linears of a layer, in the order of the forward pass."""
        return {
            "qkv_proj": (self.hidden, self.query + 2 * self.key_value),
            "o_proj": (self.query, self.hidden),
            "gate_up_proj": (self.hidden, 2 * self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


@dataclass(frozen=True)
class Work:
    """What a step has to compute: positions, pairs of positions that see each other, predictions that are trained."""

    positions: int
    pairs: int
    trained: int


def work_of_rows(rows: Sequence[Row]) -> Work:
    """Every row on its own, without padding."""
    lengths = [len(row["input_ids"]) for row in rows]
    return Work(sum(lengths), sum(n * (n + 1) // 2 for n in lengths), sum(map(num_trained, rows)))


def work_of_segments(segments: Segments, trained: int) -> Work:
    """Shared starts once: what stands behind them sees them and itself."""
    pairs = 0
    for group in segments.groups:
        before, own = group.num_shared - len(group.shared), len(group.shared)
        pairs += own * before + own * (own + 1) // 2
        pairs += sum(t * group.num_shared + t * (t + 1) // 2 for t in group.tail_lengths)
    return Work(segments.num_positions, pairs, trained)


def num_trained(row: Row) -> int:
    """Predictions of a row that are trained; nothing predicts its first token."""
    return sum(label != -100 for label in row["labels"][1:])


def step_flops(
    shapes: Shapes, work: Work, *, rank: int = RANK, targets: Sequence[str] = LINEARS
) -> dict[str, int]:
    """FLOPs that no exact LoRA step can leave out, forward and backward; a multiply-add is two.

    Linears: forward, and the input gradient except below the lowest adapted one. LoRA: six per parameter and position,
    with the same exception. What follows the last attention counts trained predictions only. Attention: two products
    forward and five backward over the causal pairs. Head: forward and input gradient of the trained predictions. No
    gradient of a frozen weight.
    """
    sizes = {name: rows * columns for name, (rows, columns) in shapes.linears.items()}
    lowest = min(LINEARS.index(name) for name in targets)
    forward = 2 * work.positions * sum(sizes.values()) * shapes.layers
    unneeded = 2 * work.positions * sum(sizes[name] for name in LINEARS[: lowest + 1])
    lora = shapes.layers * rank * sum(sum(shapes.linears[name]) for name in targets)
    attention = 2 * shapes.query * work.pairs
    backward_layers = shapes.layers if lowest == 0 else shapes.layers - 1
    unread, last = max(0, work.positions - work.trained), LINEARS[1:]
    unread_lora = rank * sum(sum(shapes.linears[name]) for name in targets if name in last)
    return {
        "linears": 2 * forward - unneeded - 4 * unread * sum(sizes[name] for name in last),
        "lora": (6 * lora - 2 * rank * shapes.linears[LINEARS[lowest]][0]) * work.positions
        - 6 * unread_lora * unread,
        "attention": attention * (2 * shapes.layers + 5 * backward_layers),
        "head": 4 * shapes.vocab * shapes.hidden * work.trained,
    }


def flops_of(shapes: Shapes, work: Work) -> int:
    """All of `step_flops`."""
    return sum(step_flops(shapes, work).values())


def gemm_rate(
    shapes: Shapes, rows: int, *, device: str = "cpu", dtype: torch.dtype | None = None, repeats: int = 3
) -> float:
    """FLOP/s of the model's own linears alone, forward and input gradient, the best of some repeats."""
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    best = {}
    for name, (inputs, outputs) in shapes.linears.items():
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        dy = torch.randn(rows, outputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        best[name] = min(timed(lambda x=x, dy=dy, w=weight: (x @ w.t(), dy @ w)) for _ in range(repeats))
    flops = sum(4 * rows * inputs * outputs for inputs, outputs in shapes.linears.values())
    return flops / sum(best.values())


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------- a process for each candidate


class Worker:
    """An object in a process of its own, whose methods are called from here, one at a time.

    Candidates stay loaded side by side while one of them works, and the peak memory of each is its own.

    Args:
        module, name: where its class is; imported there and not here.
        arguments: of the class.
    """

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._connection.send((module, name, arguments))

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """The result of the method there.

        Raises:
            RuntimeError: the process ended; its own message stands above.
        """
        self._connection.send((method, arguments, options))
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"a worker ended with {self._process.exitcode} in {method}; the reason stands above"
            ) from None

    def close(self) -> None:
        self._connection.close()
        self._process.join()


class PeerProcess:
    """A `peer.Peer` in a process of its own, in this Python or another one; it is called as a `Worker` is.

    Args:
        python: the interpreter in which the peer is installed.
        arguments, options: of `peer.Peer`.

    Raises:
        RuntimeError: the process ended; its own message stands above.
    """

    def __init__(self, python: str, *arguments: Any, **options: Any) -> None:
        script = Path(__file__).with_name("peer.py")
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.call("start", *arguments, **options)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """The result of the method there."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([method, arguments, options]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.close()
            raise RuntimeError(f"a peer ended with {code} in {method}; the reason stands above")
        return json.loads(line)

    def close(self) -> int:
        """End the process; returns its exit status."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        code = self._process.wait()
        self._process.stdout.close()
        return code


def _serve(connection: Any) -> None:
    quiet()
    module, name, arguments = connection.recv()
    served = getattr(importlib.import_module(module), name)(*arguments)
    while True:
        try:
            method, values, options = connection.recv()
        except EOFError:
            return
        connection.send(getattr(served, method)(*values, **options))


# --------------------------------------------------------------------------------------------------- printing


def quiet() -> None:
    """No advice from libraries between the lines of a table."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns as wide as their widest entry: the first to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells]), flush=True)
