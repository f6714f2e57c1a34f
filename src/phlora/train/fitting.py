"""Whether a run may start, and how it is made to fit: a change that its forecast advises becomes configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from phlora.config import RunConfig
from phlora.errors import NoRoomError
from phlora.forecast.forecast import Circumstances, Forecast, forecast_run, gigabytes
from phlora.forecast.remedies import Remedy, remedies
from phlora.forecast.render import render_remedies
from phlora.train.arguments import ACTIVATION_MEMORY, CHECKPOINTING

_FIT = "--fit"
# What a run may be changed by to make it fit, without asking which: the rows that it trains on stay as they are.
_NEVER_APPLIED = ("training_config.max_length",)


@dataclass(frozen=True)
class Lookahead:
    """A forecast with all that it was made from; `remedies` only where it does not fit."""

    about: Circumstances
    forecast: Forecast
    remedies: tuple[Remedy, ...] = ()


def require_memory(ahead: Lookahead) -> None:
    """
    Raises:
        NoRoomError: the run takes more than is free, with the changes that would make it fit.
    """
    if not ahead.forecast.fits:
        raise _no_room(ahead)


def made_to_fit(ahead: Lookahead, config: RunConfig) -> tuple[RunConfig, str]:
    """The configuration with the change that costs least, or with several where none alone is enough; and in words.

    Raises:
        NoRoomError: nothing makes it fit.
    """
    usable = _usable(ahead.remedies)
    settings = usable[0].settings if usable else _joined(ahead)
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    return _with_settings(config, settings), words


def fitted_before(config: RunConfig, facts: Mapping[str, Any]) -> RunConfig:
    """The configuration of a run that is continued, with what `--fit` changed when it began.

    Args:
        facts: of run.json.
    """
    settings = {}
    for name in (name for name, origin in facts.get("origins", {}).items() if origin == _FIT):
        section, _, key = name.partition(".")
        settings[name] = facts["config"][section][key]
    return _with_settings(config, settings)


def _no_room(ahead: Lookahead) -> NoRoomError:
    forecast = ahead.forecast
    assert forecast.free.num_bytes is not None
    changes = render_remedies(ahead.remedies)
    fix = (
        f"change one of these\n{changes}\nor let --fit choose"
        if ahead.remedies
        else f"{changes}; --fit joins several"
    )
    return NoRoomError(
        f"The run will hold {gigabytes(forecast.memory.peak)} at most, {gigabytes(forecast.needed)} of them new, and "
        f"{gigabytes(forecast.free.num_bytes)} are free ({forecast.free.limit})",
        where=forecast.memory.device,
        fix=f"{fix}; --overcommit starts it all the same",
    )


def _joined(ahead: Lookahead) -> Mapping[str, Any]:
    """Rows one by one, then layers computed again, then the base in 4 bits, as much of it as is needed."""
    about = ahead.about
    settings: dict[str, Any] = {}
    layout = about.layout
    rows = layout.batch_size * layout.accumulated
    if layout.batch_size > 1:
        settings |= {
            "training_config.per_device_train_batch_size": 1,
            "training_config.gradient_accumulation_steps": rows,
        }
        about = replace(about, layout=replace(layout, batch_size=1, accumulated=rows))
    if about.level != "auto":
        settings |= {"training_config.activation_memory": "recompute"}
        about = replace(about, level="recompute")
    forecast = forecast_run(about)
    if forecast.fits:
        return settings
    usable = _usable(remedies(about, forecast, timed=False))
    if not usable:
        raise _no_room(replace(ahead, remedies=()))
    return settings | usable[0].settings


def _usable(found: Iterable[Remedy]) -> list[Remedy]:
    return [each for each in found if not set(each.settings) & set(_NEVER_APPLIED)]


def _with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    training, model, evaluation = dict(config.training_config), config.model, config.evaluation
    origins = {**config.origins, **dict.fromkeys(settings, _FIT)}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        if section == "training_config":
            training[key] = value
            if key == ACTIVATION_MEMORY:
                # Other names of the same, which would contradict it.
                training = {k: v for k, v in training.items() if k not in CHECKPOINTING}
        elif section == "evaluation":
            evaluation = replace(evaluation, **{key: value})
        else:
            model = replace(model, **{key: value})
    return replace(config, training_config=training, model=model, evaluation=evaluation, origins=origins)
