"""How long a run will take, from steps of a model of two of its layers, on one of its own batches.

The layers have the shapes, the storage and the dtype of the run and random numbers. A step is taken with both layers
and with the last one alone; the difference is what each further layer adds. All that a step does is in it: forward,
head and loss, backward, clipping, the optimizer.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from phlora.adapters.attach import attach
from phlora.adapters.speed import at_speed
from phlora.config import Speed
from phlora.forecast.blueprint import Blueprint
from phlora.lora import matmul
from phlora.models.activation_memory import recomputing_mlps
from phlora.models.lm_head import trained_tokens
from phlora.models.quantization import quantize
from phlora.models.storage import Storage
from phlora.models.stored_layers import store

# A probe is over once it has taken so long; each kind of step is taken at least once.
_PROBE_SECONDS = 4.0
_MOST_ROUNDS = 4
# Products of a probed step, two for each weight and position forward and two backward: 5 to 7 seconds on two cores of a
# laptop, well under one on faster ones.
_PROBED_FLOPS, _LEAST_POSITIONS = 7e11, 256
PROBED_LAYERS = 2
# Numbers that are drawn for a weight.
_DRAWN = 1 << 20
# Seconds of a round beside which warming up is little.
_LONG_ROUND = 3.0
# What the trainer does in a step besides the model and the optimizer: batches, logs, callbacks. Measured with
# benchmarks/plan.py on the tiny model, whose own step takes less.
TRAINER_SECONDS = 0.012


@dataclass(frozen=True)
class Pace:
    """What a batch takes on this machine, in seconds, the whole model counted.

    Attributes:
        both_ways: forward and backward.
        update: clipping and optimizer, once for each step.
        forward: without gradients, as in evaluation.
        token: one more token of each of the answers that are generated together.
        prompt: forward over a position, for prompts.
        positions: of the batch.
    """

    both_ways: float
    update: float
    forward: float
    token: float
    positions: int

    @property
    def prompt(self) -> float:
        """Seconds for each position of a prompt."""
        return self.forward / max(1, self.positions)


def measure_pace(
    blueprint: Blueprint,
    storage: Storage,
    batch: Mapping[str, Any],
    *,
    device: torch.device,
    level: str = "keep",
    speed: Speed = "auto",
    decoded_rows: int = 8,
    max_grad_norm: float = 1.0,
    seconds: float = _PROBE_SECONDS,
) -> Pace:
    """Take steps of two of the model's layers on this batch, and reckon the whole model's time from them.

    Args:
        batch: as the trainer gets it.
        decoded_rows: answers that are generated together.
        seconds: about how long measuring may take.
    """
    layers = blueprint.num_layers
    both = min(PROBED_LAYERS, layers)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model = _built(blueprint, storage, both, device)
    inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
    # The first layer of a model computes no gradient of its input; the layers that it stands for do.
    model.enable_input_require_grads()
    _warm_up(device)
    with _libraries_left(), at_speed(model, speed), _level(model, level):
        stack: Any = model.get_base_model().get_decoder()  # type: ignore[operator]
        timed: dict[int, tuple[float, ...]] = {}
        for count in (1, both):
            whole = stack.layers
            stack.layers = nn.ModuleList(list(whole)[-count:])
            try:
                timed[count] = _timed(model, inputs, device, max_grad_norm, decoded_rows, seconds / 2)
            finally:
                stack.layers = whole
    one, two = timed[1], timed[both]
    found = [a + (layers - 1) * max(0.0, b - a) if both > 1 else a for a, b in zip(one, two, strict=True)]
    return Pace(*found, positions=inputs["input_ids"].numel())  # type: ignore[misc,arg-type]


@contextlib.contextmanager
def _libraries_left() -> Iterator[None]:
    """What multiplies is chosen for the whole process; the run chooses for itself."""
    before = matmul.libraries()
    try:
        yield
    finally:
        matmul.use_libraries(before)


def most_probed(blueprint: Blueprint) -> int:
    """Positions of a batch that is enough to measure on."""
    numbers = blueprint.sizes.linears * min(1.0, PROBED_LAYERS / blueprint.num_layers)
    return max(_LEAST_POSITIONS, int(_PROBED_FLOPS / (4 * max(1.0, numbers))))


def _timed(
    model: PeftModel,
    batch: Mapping[str, Any],
    device: torch.device,
    max_grad_norm: float,
    decoded_rows: int,
    seconds: float,
) -> tuple[float, ...]:
    """The shortest pass both ways, update, evaluation, and decoding of one token, among a few of each."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)

    def both_ways() -> None:
        model.train()
        tokens = trained_tokens(model, batch, entropy=True)
        assert tokens.loss is not None
        optimizer.zero_grad()
        tokens.loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()

    @torch.no_grad()
    def forward() -> None:
        model.eval()
        trained_tokens(model, batch, entropy=True)

    return (
        _shortest(both_ways, device, 0.5 * seconds),
        _shortest(update, device, 0.1 * seconds),
        _shortest(forward, device, 0.2 * seconds),
        _decoding(model, device, decoded_rows, 0.2 * seconds),
    )


@torch.no_grad()
def _decoding(model: PeftModel, device: torch.device, rows: int, seconds: float) -> float:
    ids = torch.zeros(rows, 16, dtype=torch.long, device=device)
    lm: Any = model.eval()
    cache = lm(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def token() -> None:
        lm(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)

    # So short a round is soon disturbed, and counts once for every layer.
    return _shortest(token, device, seconds, most=4 * _MOST_ROUNDS)


def _shortest(
    work: Callable[[], None], device: torch.device, seconds: float, *, most: int = _MOST_ROUNDS
) -> float:
    """Seconds of the fastest round; the first warms up, and counts only where it alone takes long."""
    begun, rounds = time.perf_counter(), []
    for _ in range(most):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds.append(time.perf_counter() - start)
        if rounds[0] > _LONG_ROUND or (len(rounds) > 1 and time.perf_counter() - begun > seconds):
            break
    return min(rounds[1:] or rounds)


def _warm_up(device: torch.device) -> None:
    """What a process does once, at its first optimizer step: reading code takes seconds."""
    weight = nn.Parameter(torch.zeros(1, device=device))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.step()


@contextlib.contextmanager
def _level(model: PeftModel, level: str) -> Iterator[None]:
    if level == "recompute":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with recomputing_mlps(model) if level == "recompute_mlp" else contextlib.nullcontext():
        yield


def _built(blueprint: Blueprint, storage: Storage, layers: int, device: torch.device) -> PeftModel:
    """A model of a few layers with numbers in it, stored as the run stores it."""
    base = blueprint.base_with_layers(layers)
    _fill(base, device)
    if storage.quantization is not None:
        quantize(base, storage.quantization, device=device)
    store(base, storage.dtype)
    return attach(base, copy.deepcopy(blueprint.lora)).model


def _fill(model: nn.Module, device: torch.device) -> None:
    """Numbers for a model on the meta device: small ones of both signs, whose products are no denormal ones."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        buffers = module._buffers
        for name, tensor in list(module._parameters.items()):
            if tensor is None:
                continue
            if id(tensor) not in made:
                values = _numbers(tensor.shape, tensor.dtype)
                made[id(tensor)] = nn.Parameter(values.to(device), tensor.requires_grad)
            module._parameters[name] = made[id(tensor)]  # type: ignore[assignment]
        if any(buffer is not None and buffer.is_meta for buffer in buffers.values()):
            _make_buffers(module, device)


def _numbers(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Ones for norms; else some numbers over and over, since drawing hundreds of millions takes seconds."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    few = torch.empty(min(shape.numel(), _DRAWN), dtype=dtype).uniform_(-0.02, 0.02)
    return few.repeat(-(-shape.numel() // len(few)))[: shape.numel()].view(shape)


def _make_buffers(module: nn.Module, device: torch.device) -> None:
    """Rotary factors and their kind: the module made again, off the meta device."""
    again = type(module)(module.config)
    for name, buffer in again._buffers.items():
        module._buffers[name] = None if buffer is None else buffer.to(device)
