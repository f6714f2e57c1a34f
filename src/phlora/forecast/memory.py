"""The most memory that a run will hold, by what holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from phlora.config import Speed
from phlora.forecast.blueprint import Blueprint, models_own_code
from phlora.forecast.trace import PassShape, StepBytes, step_bytes
from phlora.models.storage import Storage

# Measured, with benchmarks/plan.py: what the process takes once, over what it holds when a plan is made, for code that
# is loaded and prepared with the first step (the trainer, kernels, threads and their arenas).
LATER_LIBRARIES = 80 << 20
# Measured, with benchmarks/plan.py: what glibc's heap takes of a step over what is alive in it. Tensors of many sizes
# leave gaps, a share of all that lives; and to passes of other lengths what was freed has the wrong sizes, a few layers
# of it, a few times what backward needs on the way where layers are computed again, up to what the C library keeps
# (`models.allocator`).
HEAP_GAPS, HEAP_LAYERS, HEAP_BACKWARD, MOST_KEPT = 0.08, 3, 6, 512 << 20
# A CUDA context with its kernels, which torch does not count as allocated; the caching allocator's rounding.
CUDA_CONTEXT, CUDA_GAPS = 500 << 20, 0.05
# Numbers of a weight that are widened at a time (`lora.operands`).
_WIDENED_NUMBERS = 1 << 26
# Bytes of optimizer state for each number that trains: AdamW's two moments in fp32, where nothing else is said.
_STATE_BYTES = {"sgd": 0, "adafactor": 0.1, "lion": 4, "adagrad": 4, "rmsprop": 4, "8bit": 2, "4bit": 1}
_ADAMW_BYTES = 8


@dataclass(frozen=True)
class Setup:
    """All that decides what memory a run holds.

    Attributes:
        shape: of its largest forward pass.
        passes: most forward passes of an optimizer step.
        level: of `models.activation_memory`, never `auto`.
        optimizer: as `training_config.optim` names it.
        cache_bytes: keys and values, with what copying them takes, while answers are generated.
        resident: what the process holds already, no weight among it.
    """

    blueprint: Blueprint
    storage: Storage
    device: torch.device
    shape: PassShape
    passes: int = 1
    level: str = "keep"
    speed: Speed = "auto"
    optimizer: str = "adamw_torch"
    cache_bytes: int = 0
    resident: int = 0


@dataclass(frozen=True)
class Memory:
    """The most that a run will hold, in bytes.

    Attributes:
        device: where it computes.
        parts: what holds it there, at the moment of the peak; in the order in which they are shown.
        host: the same on the machine, where the device is another one.
        detail: shares of `activations`.
        computed, stored: the dtype of the computation, and what the frozen weights are stored as.
    """

    device: str
    parts: Mapping[str, int]
    host: Mapping[str, int]
    detail: Mapping[str, int]
    computed: str
    stored: str

    @property
    def peak(self) -> int:
        """On the device that computes."""
        return sum(self.parts.values())

    def by_device(self) -> dict[str, dict[str, int]]:
        """Device -> part -> bytes."""
        found = {self.device: dict(self.parts)}
        return found if not self.host else {"cpu": dict(self.host), **found}


def forecast_memory(setup: Setup) -> Memory:
    """The parts of the peak: the fixed ones, and the larger of a training step and of generating answers.

    Raises:
        NotForecastError: the model's code does not run over tensors without numbers.
    """
    with models_own_code():
        step = step_bytes(
            setup.blueprint,
            setup.shape,
            device=setup.device,
            level=setup.level,
            speed=setup.speed,
            accumulates=setup.passes > 1,
        )
    trained = setup.blueprint.trained()
    fixed = {
        "weights": weight_bytes(setup.blueprint, setup.storage),
        "adapter": sum(p.nbytes for p in trained),
        "optimizer": optimizer_bytes(setup.optimizer, sum(p.numel() for p in trained)),
    }
    training = _of_the_step(step)
    training["buffers"] += _dense_buffer(setup)
    if sum(training.values()) < setup.cache_bytes:
        training = {"gradients": step.gradients, "keys and values of answers": setup.cache_bytes}
    on_cpu = setup.device.type == "cpu"
    moving = sum(size for name, size in training.items())
    gaps = int(CUDA_GAPS * moving)
    if on_cpu:
        layers = setup.blueprint.num_layers
        # The last layer keeps little.
        layer = step.kept // max(1, layers - 1)
        freed = max(HEAP_LAYERS * layer, min(HEAP_BACKWARD, layers) * step.backward)
        gaps = max(int(HEAP_GAPS * moving), min(MOST_KEPT, freed))
    libraries = {"libraries": setup.resident + LATER_LIBRARIES}
    parts = {**fixed, **training, "allocator": gaps}
    parts |= libraries if on_cpu else {"libraries": CUDA_CONTEXT}
    detail = {"attention": step.kept_by_attention, "MLPs": step.kept_by_mlp} if "buffers" in training else {}
    return Memory(
        device=str(setup.device),
        parts={name: size for name, size in parts.items() if size},
        host={} if on_cpu else libraries,
        detail={name: size for name, size in detail.items() if size},
        computed=str(setup.blueprint.dtype).removeprefix("torch."),
        stored=str(setup.storage),
    )


def _of_the_step(step: StepBytes) -> dict[str, int]:
    """A step's peak by part; what is alive besides are the buffers of what computes then."""
    kept = min(step.kept, step.peak)
    head = min(step.head, step.peak - kept)
    # Where the peak is before backward, of a step of one pass, there are none yet.
    gradients = min(step.gradients, step.peak - kept - head)
    return {
        "gradients": gradients,
        "activations": kept,
        "logits and loss": head,
        "buffers": step.peak - kept - head - gradients,
    }


def weight_bytes(blueprint: Blueprint, storage: Storage) -> int:
    """Of the frozen weights as they are stored."""
    return blueprint.sizes.bytes_as(storage, blueprint.dtype)


def optimizer_bytes(name: str, numbers: int) -> int:
    """Of the state that an optimizer of transformers keeps for so many numbers."""
    found = next((size for part, size in _STATE_BYTES.items() if part in name), _ADAMW_BYTES)
    if "lion" in name and "8bit" in name:
        found = 1
    return math.ceil(found * numbers)


def _dense_buffer(setup: Setup) -> int:
    """The dense matrix, or the part of it, that a stored weight becomes for the time of a product."""
    sizes, dtype = setup.blueprint.sizes, setup.blueprint.dtype
    if setup.storage.quantization is not None:
        return sizes.largest * dtype.itemsize
    narrow = setup.storage.dtype.itemsize < dtype.itemsize
    return min(sizes.largest, _WIDENED_NUMBERS) * dtype.itemsize if narrow else 0


def answer_cache_bytes(blueprint: Blueprint, *, rows: int, tokens: int) -> int:
    """Keys and values of so many rows of so many tokens, and the copy of one layer's that appending to them makes."""
    config = blueprint.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layer = 2 * kv_heads * head_dim * tokens * rows * blueprint.dtype.itemsize
    return int(layer * (blueprint.num_layers + 1))
