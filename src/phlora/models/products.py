"""Which library multiplies for a model: each kind of product timed on the model's own shapes, once per machine.

A timed choice can fall either way between two processes, and another library gives other last bits. So the first choice
is kept in the cache folder, by CPU, threads, torch and shapes, and every later process on the machine makes the same; a
run records its own, and continues with that.

Legend: `M` rows, `K` in, `N` out, `R` rank.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phlora.errors import RunError
from phlora.files import cache_root, read_json, write_json
from phlora.lora import matmul
from phlora.lora.matmul import Kind, Library

CHOICES_FILE = "products.json"
# Part of every key: raise it when what is timed changes.
_VERSION = 2
# Weights below this size are multiplied in no time by either library.
_SMALLEST_WEIGHT = 1 << 17
# Rows of a timed product, fewer for large weights and heads, so that all of them take a moment.
_ROWS, _ROWS_OF_LARGE, _ROWS_OF_HEAD, _LARGE_WEIGHT = 256, 128, 64, 8 << 20
# Turns of both libraries at one product: the best of many, on a machine that does other things too.
_LEAST_TURNS, _MOST_TURNS, _SECONDS_FOR_TURNS = 3, 12, 0.03
# A library is left only for one that is faster by more than this share: less is noise.
_LEAST_GAIN = 0.02


@dataclass(frozen=True)
class Shapes:
    """What of a model decides how long its products take.

    Attributes:
        linears: (K, N) of its largest and its smallest frozen linear layer.
        head: (K, N) of its language-model head; None: it has none.
        rank: of most of its adapters; 0: none.
        layers: how often each product is repeated in a pass, for what a library prepares once for a shape.
    """

    linears: tuple[tuple[int, int], ...]
    head: tuple[int, int] | None
    rank: int
    layers: int

    @classmethod
    def of(cls, model: Any) -> Shapes:
        """Those of a model of transformers, plain or with its adapters in place."""
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        sizes: Counter[tuple[int, int]] = Counter()
        ranks: Counter[int] = Counter()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head:
                if ".lora_A." in name:
                    ranks[module.out_features] += 1
                elif ".lora_" not in name and not module.weight.requires_grad:
                    sizes[module.in_features, module.out_features] += 1
        by_size = sorted(sizes, key=lambda size: (size[0] * size[1], size))
        return cls(
            linears=tuple(dict.fromkeys([by_size[-1], by_size[0]])) if by_size else (),
            head=(head.in_features, head.out_features) if isinstance(head, nn.Linear) else None,
            rank=ranks.most_common(1)[0][0] if ranks else 0,
            layers=max(sizes.values(), default=1),
        )


def choose_libraries(model: nn.Module) -> None:
    """Let each kind of product be multiplied by the library that is faster for this model on this machine.

    Timed where no process has done so before, in half a second for the 135M model, about one for 4 billion parameters.
    For the whole process; models off the CPU change nothing, small ones
    are multiplied by oneDNN.
    """
    if not matmul.can_choose(next(model.parameters()).device):
        return
    shapes = Shapes.of(model)
    if not shapes.linears or shapes.linears[0][0] * shapes.linears[0][1] < _SMALLEST_WEIGHT:
        # Not what a larger model before it in this process was best with: a run gives the same bits wherever it runs.
        matmul.use_libraries(dict.fromkeys(Kind, Library.ONEDNN))
        return
    file, key = cache_root() / CHOICES_FILE, _key(shapes)
    found = _kept(file).get(key)
    if not isinstance(found, dict):
        found = time_libraries(shapes)
        # Another process may have been first; then its choice counts.
        found = _keep(file, key, found)
    matmul.use_libraries(found)


def time_libraries(shapes: Shapes) -> dict[str, str]:
    """The faster library for each kind of product, by name."""
    chosen = {}
    with torch.no_grad():
        for kind, products in _products(shapes):
            seconds = {library: 0.0 for library in Library}
            for product in products:
                for library, taken in _race(kind, product, shapes.layers).items():
                    seconds[library] += taken
            onednn, blas = seconds[Library.ONEDNN], seconds[Library.BLAS]
            chosen[kind.value] = (Library.BLAS if blas < (1 - _LEAST_GAIN) * onednn else Library.ONEDNN).value
    return chosen


def _race(kind: Kind, product: Callable[[], Tensor], layers: int) -> dict[Library, float]:
    """Seconds of a product by each library: the best of some turns, and a layer's share of what the first took more."""
    before = matmul.libraries()
    seconds: dict[Library, list[float]] = {library: [] for library in Library}
    try:
        began = time.perf_counter()
        for turn in range(_MOST_TURNS):
            if turn >= _LEAST_TURNS and time.perf_counter() - began > _SECONDS_FOR_TURNS:
                break
            for library in Library:
                matmul.use_libraries({kind: library})
                started = time.perf_counter()
                product()
                seconds[library].append(time.perf_counter() - started)
    finally:
        matmul.use_libraries(before)
    return {
        library: min(turns) + max(0.0, turns[0] - min(turns)) / layers for library, turns in seconds.items()
    }


def _products(shapes: Shapes) -> Iterator[tuple[Kind, list[Callable[[], Tensor]]]]:
    """Each kind with its products; the numbers do not matter, so they are all ones."""
    forward: list[Callable[[], Tensor]] = []
    backward: list[Callable[[], Tensor]] = []
    onto: list[Callable[[], Tensor]] = []
    gradients: list[Callable[[], Tensor]] = []
    for inputs, outputs in shapes.linears:
        rows = _ROWS_OF_LARGE if inputs * outputs > _LARGE_WEIGHT else _ROWS
        x, dy, weight = torch.ones(rows, inputs), torch.ones(rows, outputs), torch.ones(outputs, inputs)
        forward.append(functools.partial(matmul.linear, x, weight))
        backward.append(functools.partial(matmul.matmul, dy, weight))
        if shapes.rank:
            u = torch.ones(rows, shapes.rank)
            onto.append(functools.partial(matmul.linear, x, torch.ones(shapes.rank, inputs)))
            onto.append(functools.partial(matmul.matmul, dy, torch.ones(outputs, shapes.rank)))
            gradients += [functools.partial(matmul.matmul, u.t(), wide) for wide in (x, dy)]
    yield Kind.FORWARD, forward
    yield Kind.BACKWARD, backward
    if shapes.rank:
        yield Kind.ONTO_RANK, onto
        yield Kind.FACTOR_GRADIENTS, gradients
    if shapes.head is not None:
        inputs, outputs = shapes.head
        head = torch.ones(outputs, inputs)
        yield Kind.HEAD_FORWARD, [functools.partial(matmul.linear, torch.ones(_ROWS_OF_HEAD, inputs), head)]
        yield Kind.HEAD_BACKWARD, [functools.partial(matmul.matmul, torch.ones(_ROWS_OF_HEAD, outputs), head)]


def _key(shapes: Shapes) -> str:
    facts = [
        _VERSION,
        _cpu(),
        torch.__version__,
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        [*shapes.linears, shapes.head, shapes.rank, shapes.layers],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@functools.cache
def _cpu() -> str:
    """What the CPU calls itself, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _kept(file: Path) -> dict[str, Any]:
    """Every choice of this machine; none where the file is missing or is no such file."""
    if not file.is_file():
        return {}
    try:
        return read_json(file, RunError)
    except RunError:
        return {}


def _keep(file: Path, key: str, chosen: dict[str, str]) -> dict[str, str]:
    """Keep a choice beside the others, unless there is one already; returns the one that counts."""
    kept = _kept(file)
    there = kept.get(key)
    if isinstance(there, dict):
        return there
    # A cache that cannot be written costs a moment in the next process.
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**kept, key: chosen})
    return chosen
