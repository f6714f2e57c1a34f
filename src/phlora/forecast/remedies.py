"""Which single changes make a run fit that does not, and what each costs in time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from phlora.config import quantization_config
from phlora.data.packing import TokenSequences
from phlora.extras import is_installed
from phlora.forecast.forecast import Circumstances, Forecast, forecast_run, has_lean_mlps, with_seconds
from phlora.models.storage import Storage

# Lengths that are tried, as shares of the longest row.
_LENGTHS = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Remedy:
    """One change to a run.

    Attributes:
        settings: what is set, by dotted name.
        forecast: of the run with it.
        slower: seconds of a step as a multiple of those without it; None where they were not measured.
        exact: whether the same is trained: same rows, same tokens, same weights up to rounding.
        note: what else is to be known.
    """

    settings: dict[str, Any]
    forecast: Forecast
    slower: float | None
    exact: bool
    note: str = ""

    def describe(self) -> str:
        """`training_config.activation_memory=recompute`."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items())


@dataclass(frozen=True)
class _Change:
    settings: dict[str, Any]
    about: Circumstances
    exact: bool = True
    note: str = ""


def remedies(
    about: Circumstances,
    without: Forecast,
    *,
    timed: bool = True,
) -> list[Remedy]:
    """The single changes that make it fit, those that change nothing of what is trained first, then the fastest.

    Args:
        without: the forecast of the run as it stands, with seconds where times are to be compared.
        timed: whether the time of each is measured.
    """
    found = []
    for kind in _kinds_of_change(about):
        forecasts = ((change, forecast_run(change.about)) for change in kind)
        fitting = next(((change, forecast) for change, forecast in forecasts if forecast.fits), None)
        if fitting is None:
            continue
        change, forecast = fitting
        slower = None
        if timed and without.seconds:
            forecast = with_seconds(forecast, change.about)
            assert forecast.seconds is not None
            slower = forecast.seconds.step / without.seconds.step
        found.append(Remedy(change.settings, forecast, slower, change.exact, change.note))
    return sorted(found, key=lambda each: (not each.exact, each.slower or 0.0))


def _kinds_of_change(about: Circumstances) -> Iterator[Iterable[_Change]]:
    """Of each kind the first change counts that makes it fit."""
    yield from ([change] for change in _recomputing(about))
    yield _smaller_batches(about)
    yield _fewer_answers(about)
    yield from ([change] for change in _narrower(about))
    yield _shorter(about)


def _recomputing(about: Circumstances) -> Iterator[_Change]:
    later = {"keep": ("recompute_mlp", "recompute"), "recompute_mlp": ("recompute",)}.get(about.level, ())
    for level in later:
        if level == "recompute" or has_lean_mlps(about):
            yield _Change({"training_config.activation_memory": level}, replace(about, level=level))


def _smaller_batches(about: Circumstances) -> Iterator[_Change]:
    """Smaller micro-batches, the largest first, with as many rows to a step."""
    layout = about.layout
    for size in _divisors_below(layout.batch_size):
        smaller = replace(layout, batch_size=size, accumulated=layout.accumulated * layout.batch_size // size)
        yield _Change(
            {
                "training_config.per_device_train_batch_size": size,
                "training_config.gradient_accumulation_steps": smaller.accumulated,
            },
            replace(about, layout=smaller),
        )


def _fewer_answers(about: Circumstances) -> Iterator[_Change]:
    """Where not training holds most, but the keys and values of the answers that are compared afterwards."""
    wanted = about.evaluation
    for answers in (wanted.answers // 2, wanted.answers // 8, 0) if wanted.enabled and wanted.answers else ():
        yield _Change(
            {"evaluation.max_answers": answers},
            replace(about, evaluation=replace(wanted, answers=answers)),
            note="fewer answers are compared afterwards",
        )


def _narrower(about: Circumstances) -> Iterator[_Change]:
    """Weights as the files have them, or in 16 bits, or in 4."""
    if about.storage.quantization is not None:
        return
    compute, stored = about.blueprint.dtype, about.blueprint.sizes.stored
    half = torch.bfloat16 if compute == torch.float32 else compute
    if about.storage.dtype.itemsize > half.itemsize:
        exact = stored == half
        yield _Change(
            {"model.storage_dtype": "bfloat16"},
            replace(about, storage=Storage(dtype=half)),
            exact=exact,
            note="the weights as the files have them" if exact else "the weights rounded to 16 bits",
        )
    if is_installed("bitsandbytes"):
        yield _Change(
            {"model.storage_dtype": "nf4"},
            replace(about, storage=Storage(dtype=half, quantization=quantization_config("nf4"))),
            exact=False,
            note="the base in 4 bits: other weights",
        )


def _shorter(about: Circumstances) -> Iterator[_Change]:
    if not isinstance(about.sequences, TokenSequences) or about.layout.packed:
        return
    longest = int(about.sequences.rows.lengths.max())
    for share in _LENGTHS:
        length = max(1, int(longest * share))
        kept = [rows for rows in about.sequences if sum(len(row.input_ids) for row in rows) <= length]
        if not kept:
            return
        yield _Change(
            {"training_config.max_length": length},
            replace(about, sequences=kept),
            exact=False,
            note=f"{len(about.sequences) - len(kept):,} of {len(about.sequences):,} rows would be cut or dropped",
        )


def _divisors_below(number: int) -> list[int]:
    """The divisors of a number but itself, largest first."""
    return [size for size in range(number - 1, 0, -1) if number % size == 0]
