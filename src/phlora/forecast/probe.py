"""How long a run will take, from steps of a model of two of its layers, on one of its own batches.

The layers have the shapes, the storage and the dtype of the run and random numbers. A step is taken with both layers
and with the last one alone; the difference is what each further layer adds. All that a step does is in it: forward,
head and loss, backward, clipping, the optimizer.

What else the machine does meanwhile is counted once for each layer that is added, so rounds of one and of two layers
take turns, none of them the first of its kind, until the fastest ones agree; how well they do is said with the result.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

# Measuring is over once it has taken so long, or as soon as the two fastest rounds differ by no more than this share.
_PROBE_SECONDS, _STEADY = 10.0, 0.02
# Rounds after the one that warms up.
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 8
# Products of a probed step, two for each weight and position forward and two backward: 5 to 7 seconds on two cores of a
# laptop, well under one on faster ones.
_PROBED_FLOPS, _LEAST_POSITIONS = 7e11, 256
PROBED_LAYERS = 2
# Numbers that are drawn for a weight.
_DRAWN = 1 << 20
# Where warming up alone took so many seconds one round after it has to do.
_LONG_ROUND = 6.0
# What the trainer does in a step besides the model and the optimizer: batches, logs, callbacks. Measured with
# benchmarks/plan.py on the tiny model, whose own step takes less.
TRAINER_SECONDS = 0.012


@dataclass(frozen=True)
class Pace:
    """What a batch takes on this machine, in seconds, the whole model counted.

    Attributes:
        both_ways: forward and backward.
        both_ways_range: the same at least and at most, as far as the rounds that measured it tell.
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
    both_ways_range: tuple[float, float]

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
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model = _built(blueprint, storage, min(PROBED_LAYERS, blueprint.num_layers), device)
    inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
    # The first layer of a model computes no gradient of its input; the layers that it stands for do.
    model.enable_input_require_grads()
    _warm_up(device)
    with _libraries_left(), at_speed(model, speed), _level(model, level):
        both_ways, update, forward, token = _rounds(
            model, inputs, device, max_grad_norm, decoded_rows, seconds
        )
    layers = blueprint.num_layers
    return Pace(
        both_ways=both_ways.of_layers(layers),
        update=update.of_layers(layers),
        forward=forward.of_layers(layers),
        token=token.of_layers(layers),
        positions=inputs["input_ids"].numel(),
        both_ways_range=both_ways.range_of_layers(layers),
    )


@dataclass(frozen=True)
class Rounds:
    """Seconds of rounds of the same work with one layer and with two, by the number of layers; not the first ones.

    Attributes:
        warming: those of the first ones.
    """

    seconds: Mapping[int, Sequence[float]]
    warming: Mapping[int, float]

    def fastest(self, count: int) -> tuple[float, float]:
        """The fastest round, and the second one: how sure the fastest is."""
        found = sorted(self.seconds[count])
        return found[0], found[1] if len(found) > 1 else max(found[0], self.warming[count])

    def of_layers(self, layers: int) -> float:
        """Seconds of the same work with so many layers."""
        return _extended({count: self.fastest(count)[0] for count in self.seconds}, layers)

    def range_of_layers(self, layers: int) -> tuple[float, float]:
        """The same at least and at most: with the second fastest round of one side in the place of the fastest."""
        (few, few_again), *more = (self.fastest(count) for count in sorted(self.seconds))
        if not more:
            return few, few_again
        ((many, many_again),) = more
        # One layer may have taken longer the second time than all that two take.
        least = _extended({1: few_again, 2: many}, layers)
        return min(least, self.of_layers(layers)), _extended({1: few, 2: many_again}, layers)

    @property
    def are_steady(self) -> bool:
        """Whether the two fastest rounds agree, so that the fastest was no stroke of luck."""
        pairs = [self.fastest(count) for count in self.seconds]
        return all(again <= (1 + _STEADY) * least for least, again in pairs)


def _extended(seconds: Mapping[int, float], layers: int) -> float:
    """What one layer takes, and what the second adds for each further one."""
    return seconds[1] + (layers - 1) * max(0.0, seconds.get(2, seconds[1]) - seconds[1])


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


def _rounds(
    model: PeftModel,
    batch: Mapping[str, Any],
    device: torch.device,
    max_grad_norm: float,
    decoded_rows: int,
    seconds: float,
) -> tuple[Rounds, ...]:
    """Passes both ways, updates, evaluations, and decodings of one token."""

    def prepare_both_ways() -> Callable[[], None]:
        def both_ways() -> None:
            model.train()
            tokens = trained_tokens(model, batch, entropy=True)
            assert tokens.loss is not None
            model.zero_grad()
            tokens.loss.backward()

        return both_ways

    def prepare_update() -> Callable[[], None]:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0)

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
            optimizer.step()

        return update

    def prepare_forward() -> Callable[[], None]:
        @torch.no_grad()
        def forward() -> None:
            model.eval()
            trained_tokens(model, batch, entropy=True)

        return forward

    @torch.no_grad()
    def prepare_token() -> Callable[[], None]:
        ids = torch.zeros(decoded_rows, 16, dtype=torch.long, device=device)
        lm: Any = model.eval()
        cache = lm(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

        @torch.no_grad()
        def token() -> None:
            lm(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)

        return token

    return (
        _taking_turns(model, prepare_both_ways, device, 0.6 * seconds),
        # With the gradients of the last pass.
        _taking_turns(model, prepare_update, device, 0.1 * seconds),
        _taking_turns(model, prepare_forward, device, 0.2 * seconds),
        # So short a round is soon disturbed.
        _taking_turns(model, prepare_token, device, 0.1 * seconds, most=2 * _MOST_ROUNDS),
    )


def _taking_turns(
    model: PeftModel,
    prepare: Callable[[], Callable[[], None]],
    device: torch.device,
    seconds: float,
    *,
    most: int = _MOST_ROUNDS,
) -> Rounds:
    """Rounds of the same work with the last layer alone and with all of them, in turns.

    Args:
        prepare: makes the work for the layers that the model has at the moment.
    """
    stack: Any = model.get_base_model().get_decoder()  # type: ignore[operator]
    whole = stack.layers
    layers = {count: nn.ModuleList(list(whole)[-count:]) for count in range(1, len(whole) + 1)}
    work: dict[int, Callable[[], None]] = {}
    warming: dict[int, float] = {}
    taken: dict[int, list[float]] = {count: [] for count in layers}
    found = Rounds(taken, warming)
    try:
        for count in layers:
            stack.layers = layers[count]
            work[count] = prepare()
            warming[count] = _seconds_of(work[count], device)
        least = _LEAST_ROUNDS if sum(warming.values()) < _LONG_ROUND else 1
        begun = time.perf_counter()
        for number in range(1, most + 1):
            for count in layers:
                stack.layers = layers[count]
                taken[count].append(_seconds_of(work[count], device))
            if number >= least and (found.are_steady or time.perf_counter() - begun > seconds):
                break
    finally:
        stack.layers = whole
    return found


def _seconds_of(work: Callable[[], None], device: torch.device) -> float:
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


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
