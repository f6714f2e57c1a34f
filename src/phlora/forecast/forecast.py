"""What a run will take of a machine, before it starts: memory by part, seconds, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from phlora.config import Speed
from phlora.data.table import TokenizedRow, TokenTable
from phlora.forecast.blueprint import Blueprint, models_own_code
from phlora.forecast.memory import Memory, Setup, answer_cache_bytes, forecast_memory
from phlora.forecast.passes import Layout, Passes, passes_of
from phlora.forecast.probe import PROBED_LAYERS, TRAINER_SECONDS, Pace, measure_pace, most_probed
from phlora.measure import FreeMemory
from phlora.models.activation_memory import LEVELS
from phlora.models.lean_layers import LeanMLP
from phlora.models.storage import Storage

# `auto` keeps what it may only where so much more than the forecast is free: a forecast is right to within a tenth.
_CAREFUL = 1.1
# As `models.generate` decodes: rows together, and the bytes of their keys and values.
_ANSWER_ROWS, _ANSWER_BYTES = 64, 1 << 30


@dataclass(frozen=True)
class Evaluation:
    """What a run evaluates.

    Attributes:
        during: evaluations of the held-out loss while it trains.
        enabled: whether base and tuned model are compared afterwards.
        answers: held-out rows that are answered by each of them.
        max_new_tokens: of an answer.
    """

    during: int = 0
    enabled: bool = True
    answers: int = 0
    max_new_tokens: int = 128


@dataclass(frozen=True)
class Circumstances:
    """A run as far as it decides memory and time.

    Attributes:
        level: of `activation_memory`, `auto` included.
        sequences: rows or packs, at least one.
        steps: of the optimizer.
        optimizer: as `training_config.optim` names it.
        free: on the device that computes.
        resident: what the process holds already, no weight among it.
    """

    blueprint: Blueprint
    storage: Storage
    device: torch.device
    sequences: Sequence[Sequence[TokenizedRow]]
    held_out: TokenTable
    layout: Layout
    steps: int
    free: FreeMemory
    resident: int
    level: str = "auto"
    speed: Speed = "auto"
    optimizer: str = "adamw_torch"
    max_grad_norm: float = 1.0
    evaluation: Evaluation = field(default_factory=Evaluation)


@dataclass(frozen=True)
class Seconds:
    """How long the parts of a run take.

    Attributes:
        step: an optimizer step.
        training: all steps.
        evaluation: held-out losses while training, and the comparison with answers at the end, at most.
        step_range: a step at least and at most, by how well the measured rounds agree.
    """

    step: float
    training: float
    evaluation: float
    step_range: tuple[float, float]


@dataclass(frozen=True)
class Forecast:
    """What a run will take, and whether that is there.

    Attributes:
        memory: the most that it holds.
        level: of `activation_memory`, as it was decided; `reason`: why.
        needed: what it takes besides what the process holds already.
        seconds: None where they were not asked for.
        passes: what was learned of the batches.
    """

    memory: Memory
    level: str
    reason: str
    needed: int
    free: FreeMemory
    passes: Passes
    seconds: Seconds | None = None

    @property
    def fits(self) -> bool:
        """Whether it is free; where that cannot be told, it counts as free."""
        return self.free.num_bytes is None or self.needed <= self.free.num_bytes


def forecast_run(about: Circumstances) -> Forecast:
    """The memory of a run, with `activation_memory: auto` decided: what is cheapest of what fits with room to spare."""
    passes = passes_of(
        about.sequences,
        about.layout,
        config=about.blueprint.config,
        device=about.device,
        most_typical=most_probed(about.blueprint),
    )
    levels = levels_of(about)
    found: list[Forecast] = []
    for level in levels:
        memory = forecast_memory(_setup(about, passes, level))
        needed = memory.peak - (about.resident if about.device.type == "cpu" else 0)
        found.append(Forecast(memory, level, "asked for", needed, about.free, passes))
        if about.free.num_bytes is None or _CAREFUL * needed <= about.free.num_bytes:
            break
    chosen = found[-1] if len(levels) > 1 else found[0]
    # With nothing to spare, rather what fits just so and costs less time.
    if len(found) == len(levels) and _CAREFUL * chosen.needed > (about.free.num_bytes or math.inf):
        chosen = next((each for each in found if each.fits), chosen)
    return replace(chosen, reason=_reason(about, found, chosen))


def levels_of(about: Circumstances) -> list[str]:
    """The levels of `activation_memory` that come into question, what costs least time first."""
    if about.level != "auto":
        return [about.level]
    return [level for level in LEVELS if level != "recompute_mlp" or has_lean_mlps(about)]


def has_lean_mlps(about: Circumstances) -> bool:
    """Whether the gated MLPs of this model can be told to compute again."""
    return about.speed == "auto" and any(_becomes_lean(module) for module in about.blueprint.model.modules())


def with_seconds(forecast: Forecast, about: Circumstances) -> Forecast:
    """The same with its seconds, measured; without where there is no memory for the layers that are measured."""
    if not _probe_fits(forecast, about):
        return forecast
    with models_own_code():
        pace = measure_pace(
            about.blueprint,
            about.storage,
            forecast.passes.typical,
            device=about.device,
            level=forecast.level,
            speed=about.speed,
            max_grad_norm=about.max_grad_norm,
            decoded_rows=max(1, _answer_rows(about)),
        )
    return replace(forecast, seconds=_seconds(pace, forecast.passes, about))


def _probe_fits(forecast: Forecast, about: Circumstances) -> bool:
    sizes, storage = about.blueprint.sizes, about.storage
    outside = (sizes.matrices - sizes.linears) * storage.dtype.itemsize
    layers = min(1.0, PROBED_LAYERS / about.blueprint.num_layers)
    needed = outside + layers * max(0, forecast.needed - outside)
    return about.free.num_bytes is None or needed <= about.free.num_bytes


def _seconds(pace: Pace, passes: Passes, about: Circumstances) -> Seconds:
    passes_of_a_step, once = (
        passes.positions / max(1, passes.typical_positions),
        pace.update + TRAINER_SECONDS,
    )
    step, least, most = (each * passes_of_a_step + once for each in (pace.both_ways, *pace.both_ways_range))
    held_out = int(about.held_out.lengths.sum()) if len(about.held_out) else 0
    # What rows share is computed once in evaluation too.
    positions = held_out * min(1.0, passes.positions / max(1.0, passes.tokens))
    during = about.evaluation.during * positions * pace.prompt
    after = _comparison(pace, positions, about) if about.evaluation.enabled and held_out else 0.0
    training = about.steps * step
    return Seconds(step, training, during + after, step_range=(least, most))


def _comparison(pace: Pace, positions: float, about: Circumstances) -> float:
    """Loss on all held-out rows and answers to some, twice; the base's answers as long as they may be, the tuned
    model's as long as the longest that is expected."""
    rows, wanted = _answer_rows(about), about.evaluation
    batches = math.ceil(wanted.answers / rows) if rows else 0
    share = wanted.answers / max(1, len(about.held_out))
    expected = max((row.num_trained_tokens for row in about.held_out), default=0)
    tokens = wanted.max_new_tokens + min(wanted.max_new_tokens, expected)
    return 2 * positions * pace.prompt * (1 + share) + batches * tokens * pace.token


def _setup(about: Circumstances, passes: Passes, level: str) -> Setup:
    rows = _answer_rows(about)
    return Setup(
        blueprint=about.blueprint,
        storage=about.storage,
        device=about.device,
        shape=passes.largest,
        passes=passes.most_of_a_step,
        level=level,
        speed=about.speed,
        optimizer=about.optimizer,
        cache_bytes=answer_cache_bytes(about.blueprint, rows=rows, tokens=_answer_tokens(about))
        if rows
        else 0,
        resident=about.resident,
    )


def _answer_tokens(about: Circumstances) -> int:
    lengths = about.held_out.lengths
    return (int(lengths.max()) if len(lengths) else 0) + about.evaluation.max_new_tokens


def _answer_rows(about: Circumstances) -> int:
    """Answers that are generated together."""
    wanted = about.evaluation
    if not (wanted.enabled and wanted.answers and len(about.held_out)):
        return 0
    one = answer_cache_bytes(about.blueprint, rows=1, tokens=_answer_tokens(about))
    return max(1, min(wanted.answers, len(about.held_out), _ANSWER_ROWS, _ANSWER_BYTES // max(1, one)))


def _becomes_lean(module: nn.Module) -> bool:
    return any(type(module) is kind for kind in LeanMLP.__mro__[1:2]) and LeanMLP.fits(module)


def _reason(about: Circumstances, found: Sequence[Forecast], chosen: Forecast) -> str:
    if about.level != "auto":
        return "asked for"
    free = about.free.num_bytes
    if free is None:
        return "what is free cannot be told here"
    if chosen is found[0] and chosen.fits:
        return f"it fits: {gigabytes(chosen.needed)} of {gigabytes(free)} that are free"
    before = found[0]
    taken = f"keeping everything takes {gigabytes(before.needed)} of {gigabytes(free)} that are free"
    return (
        taken if chosen.fits else f"{taken}, and even computing the layers again {gigabytes(chosen.needed)}"
    )


def gigabytes(number: float) -> str:
    """`7.9 GB`, `312 MB`."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def as_json(forecast: Forecast) -> dict[str, Any]:
    """The forecast for programs."""
    memory, seconds = forecast.memory, forecast.seconds
    return {
        "memory": {device: dict(parts) for device, parts in memory.by_device().items()},
        "activations": dict(memory.detail),
        "compute_dtype": memory.computed,
        "storage": memory.stored,
        "peak_bytes": memory.peak,
        "needed_bytes": forecast.needed,
        "free_bytes": forecast.free.num_bytes,
        "free_limit": forecast.free.limit,
        "fits": forecast.fits,
        "activation_memory": {"level": forecast.level, "reason": forecast.reason},
        "largest_pass": {
            "rows": forecast.passes.largest.rows,
            "positions": forecast.passes.largest.positions,
        },
        "seconds": None
        if seconds is None
        else {
            "step": seconds.step,
            "step_range": list(seconds.step_range),
            "training": seconds.training,
            "evaluation": seconds.evaluation,
        },
    }
