"""What a run will take of this machine, known before a weight is read; whether it may start, and how it is made to fit.

The forecast itself is `phlora.forecast`; here a run's configuration becomes what that asks for, and a change that it
advises becomes configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig

from phlora.adapters.attach import AdapterSummary
from phlora.config import RunConfig, quantization_config
from phlora.display import Display
from phlora.errors import ConfigError, EnvironmentProblem, NoRoomError
from phlora.forecast.blueprint import Blueprint, draw_up
from phlora.forecast.forecast import (
    Circumstances,
    Evaluation,
    Forecast,
    forecast_run,
    gigabytes,
    with_seconds,
)
from phlora.forecast.memory import weight_bytes
from phlora.forecast.passes import Layout
from phlora.forecast.remedies import Remedy, remedies
from phlora.forecast.render import render_remedies
from phlora.measure import free_memory, resident_bytes
from phlora.models.device import choose_attention, choose_dtype
from phlora.models.families import widest_product
from phlora.models.lm_head import trunk_and_head, why_not_by_token
from phlora.models.load import stored_dtype
from phlora.models.prefix_sharing import Sharing
from phlora.models.storage import Storage, choose_storage, storage_settings
from phlora.models.stored_layers import compute_dtype
from phlora.models.tokenizer import LoadedTokenizer
from phlora.train.arguments import Arguments, training_arguments
from phlora.train.plan import Plan, make_plan
from phlora.train.prepare import PreparedData
from phlora.train.request import Objects, Request

_FIT = "--fit"
# What a run may be changed by to make it fit, without asking which: the rows that it trains on stay as they are.
_NEVER_APPLIED = ("training_config.max_length",)


@dataclass(frozen=True)
class Drawn:
    """A run's model before its weights: what of it trains, where and how it computes."""

    blueprint: Blueprint
    storage: Storage
    device: torch.device

    @property
    def summary(self) -> AdapterSummary:
        """What will be trained."""
        return self.blueprint.summary


@dataclass(frozen=True)
class Planned:
    """A run as it will be, with its plan.

    Attributes:
        config, arguments: with what was decided and changed.
        plan: None where the model cannot be made from its configuration alone.
        ahead: the forecast in it; None where there is none.
    """

    config: RunConfig
    arguments: Arguments
    plan: Plan | None = None
    ahead: Lookahead | None = None

    def render(self) -> str:
        """The plan for a terminal, with what makes it fit where it does not."""
        if self.plan is None:
            return "This model cannot be made from its configuration alone, which a plan takes"
        text = self.plan.render()
        if self.ahead is None or self.ahead.forecast.fits:
            return text
        return f"{text}\n  what makes it fit:\n{render_remedies(self.ahead.remedies)}"

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        if self.plan is None or self.ahead is None:
            plan = self.plan.to_json() if self.plan else None
            return {"plan": plan, "forecast": None, "remedies": []}
        changes = [
            {
                "settings": each.settings,
                "needed_bytes": each.forecast.needed,
                "slower": each.slower,
                "trains_the_same": each.exact,
                "note": each.note,
            }
            for each in self.ahead.remedies
        ]
        return {"plan": self.plan.to_json(), "forecast": self.plan.forecast_json(), "remedies": changes}

    def require_memory(self) -> None:
        """
        Raises:
            NoRoomError: the run takes more than is free.
        """
        if self.ahead is not None:
            require_memory(self.ahead)


@dataclass(frozen=True)
class Lookahead:
    """A forecast with all that it was made from; `remedies` only where it does not fit."""

    about: Circumstances
    forecast: Forecast
    remedies: tuple[Remedy, ...] = ()


def plan_ahead(
    request: Request,
    words: LoadedTokenizer,
    data: PreparedData,
    arguments: Arguments,
    lora: LoraConfig,
    display: Display,
    *,
    device: torch.device,
    fit_memory: bool = False,
) -> Planned:
    """The plan of a run, from its configuration and its rows: no weight is read.

    Args:
        fit_memory: whether the run is changed where it would not fit.

    Raises:
        NoRoomError: nothing makes it fit, with `fit_memory`.
    """
    config = request.config
    why_not = _not_forecast(arguments, request.objects)
    if why_not is None:
        display.stage("Forecasting memory and time")
        try:
            return _forecast(
                request, words, data, arguments, lora, display, device=device, fit_memory=fit_memory
            )
        except (ConfigError, EnvironmentProblem):
            raise
        except _NotForecastError as reason:
            why_not = str(reason)
        except Exception as error:
            # Code that comes with a model may need its weights; that is no reason not to train it.
            why_not = f"{type(error).__name__}: {error}".splitlines()[0]
    display.note(f"memory and time are not forecast: {why_not}")
    level = "keep" if arguments.activation_memory == "auto" else arguments.activation_memory
    arguments = arguments.with_activation_memory(level)
    try:
        drawn = draw(config, request.objects, words, lora, device=device)
        model = drawn.blueprint.model
        plan = make_plan(data, drawn.summary, arguments, model, request.objects, device=device)
    except (ConfigError, EnvironmentProblem):
        raise
    except Exception:
        plan = None
    return Planned(config, arguments, plan)


def _forecast(
    request: Request,
    words: LoadedTokenizer,
    data: PreparedData,
    arguments: Arguments,
    lora: LoraConfig,
    display: Display,
    *,
    device: torch.device,
    fit_memory: bool,
) -> Planned:
    config, objects = request.config, request.objects
    drawn = draw(config, objects, words, lora, device=device)
    _require_known_step(drawn.blueprint.model)
    planned = _planned(drawn, config, objects, words, data, arguments, device)
    assert planned.ahead is not None
    if not fit_memory or planned.ahead.forecast.fits:
        return planned
    config, words_of_change = made_to_fit(planned.ahead, config)
    display.note(f"--fit: {words_of_change}")
    arguments = training_arguments(
        config.training_config,
        output_dir=str(arguments.args.output_dir),
        device=device.type,
        loraplus_lr_ratio=arguments.loraplus_lr_ratio,
    )
    drawn = draw(config, objects, words, lora, device=device)
    return _planned(drawn, config, objects, words, data, arguments, device)


class _NotForecastError(Exception):
    """The step that is forecast is not the one that is taken."""


def _require_known_step(model: Any) -> None:
    reason = why_not_by_token(model)
    if reason is not None:
        raise _NotForecastError(f"the model {reason}: TRL's own loss is used")
    if not hasattr(trunk_and_head(model)[0], "layers"):
        raise _NotForecastError("where the model has its layers is not known")


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


def _planned(
    drawn: Drawn,
    config: RunConfig,
    objects: Objects,
    words: LoadedTokenizer,
    data: PreparedData,
    arguments: Arguments,
    device: torch.device,
) -> Planned:
    plan = make_plan(data, drawn.summary, arguments, drawn.blueprint.model, objects, device=device)
    pad = words.tokenizer.pad_token_id
    ahead = look_ahead(
        drawn,
        config,
        objects,
        data,
        arguments,
        plan.sharing,
        pad_token_id=pad,
        steps=plan.num_optimizer_steps,
    )
    plan = replace(plan, forecast=ahead.forecast)
    return Planned(config, arguments.with_activation_memory(ahead.forecast.level), plan, ahead)


def _not_forecast(arguments: Arguments, objects: Objects) -> str | None:
    """Why this trainer's own step, which is what is forecast, is not the one that is taken."""
    args = arguments.args
    if objects.compute_metrics is not None:
        return "compute_metrics needs all logits"
    if args.loss_type != "nll":
        return f"loss_type {args.loss_type} is TRL's own"
    return "torch_compile plans memory itself" if args.torch_compile else None


def draw(
    config: RunConfig, objects: Objects, words: LoadedTokenizer, lora: LoraConfig, *, device: torch.device
) -> Drawn:
    """The model that a run is about, from its configuration or from the object that was handed over.

    Raises:
        ConfigError: targets that the model does not have.
        ModelError: a kind of model that cannot be made from its configuration alone.
    """
    given: Any = objects.model
    if given is not None:
        blueprint = draw_up(
            given.config,
            lora,
            dtype=compute_dtype(given),
            attention=given.config._attn_implementation,
            stored=given.dtype,
        )
        return Drawn(blueprint, _storage_of(given), device)
    files = words.files
    assert files is not None
    model = storage_settings(config.model)
    dtype = choose_dtype(model.dtype, device=device, product=widest_product(files.config)).value
    attention = choose_attention(model.attn_implementation, device=device, dtype=dtype).value
    blueprint = draw_up(
        files.config,
        lora,
        dtype=dtype,
        attention=attention,
        runs_code=files.runs_code,
        stored=stored_dtype(files),
    )
    storage = choose_storage(model, blueprint.sizes, dtype=dtype, device=device).value
    return Drawn(blueprint, storage, device)


def look_ahead(
    drawn: Drawn,
    config: RunConfig,
    objects: Objects,
    data: PreparedData,
    arguments: Arguments,
    sharing: Sharing,
    *,
    pad_token_id: int,
    steps: int,
    timed: bool = True,
) -> Lookahead:
    """The forecast of a run; where it does not fit, with the single changes that would make it fit.

    Args:
        steps: of the optimizer.
        timed: whether seconds are measured too.
    """
    args = arguments.args
    held = weight_bytes(drawn.blueprint, drawn.storage) if objects.model is not None else 0
    about = Circumstances(
        blueprint=drawn.blueprint,
        storage=drawn.storage,
        device=drawn.device,
        sequences=data.train,
        held_out=data.held_out,
        layout=Layout(
            batch_size=args.per_device_train_batch_size,
            accumulated=args.gradient_accumulation_steps,
            shared=sharing.on,
            packed=bool(args.packing),
            pad_token_id=pad_token_id,
            seed=args.seed,
        ),
        steps=steps,
        free=free_memory(drawn.device),
        resident=max(0, resident_bytes() - held),
        level=arguments.activation_memory,
        speed=data.speed,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        max_grad_norm=args.max_grad_norm or math.inf,
        evaluation=Evaluation(
            during=_evaluations(args, steps) if len(data.held_out) else 0,
            enabled=config.evaluation.enabled,
            answers=min(config.evaluation.max_answers, len(data.held_out)),
            max_new_tokens=config.evaluation.max_new_tokens,
        ),
    )
    forecast = forecast_run(about)
    if timed:
        forecast = with_seconds(forecast, about)
    found = () if forecast.fits else tuple(remedies(about, forecast, timed=timed))
    return Lookahead(about, forecast, found)


def require_memory(ahead: Lookahead) -> None:
    """
    Raises:
        NoRoomError: the run takes more than is free, with the changes that would make it fit.
    """
    forecast = ahead.forecast
    if forecast.fits:
        return
    assert forecast.free.num_bytes is not None
    changes = render_remedies(ahead.remedies)
    fix = (
        f"change one of these\n{changes}\nor let --fit choose"
        if ahead.remedies
        else f"{changes}; --fit joins several"
    )
    raise NoRoomError(
        f"The run will hold {gigabytes(forecast.memory.peak)} at most, {gigabytes(forecast.needed)} of them new, and "
        f"{gigabytes(forecast.free.num_bytes)} are free ({forecast.free.limit})",
        where=forecast.memory.device,
        fix=f"{fix}; --overcommit starts it all the same",
    )


def made_to_fit(ahead: Lookahead, config: RunConfig) -> tuple[RunConfig, str]:
    """The configuration with the change that costs least, or with several where none alone is enough; and in words.

    Raises:
        NoRoomError: nothing makes it fit.
    """
    usable = [each for each in ahead.remedies if not set(each.settings) & set(_NEVER_APPLIED)]
    settings = usable[0].settings if usable else _joined(ahead)
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    return _with_settings(config, settings), words


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
    if forecast_run(about).fits:
        return settings
    for change in remedies(about, forecast_run(about), timed=False):
        if not set(change.settings) & set(_NEVER_APPLIED):
            return settings | change.settings
    require_memory(replace(ahead, remedies=()))
    raise AssertionError


def _with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    training, model, evaluation = dict(config.training_config), config.model, config.evaluation
    origins = {**config.origins, **dict.fromkeys(settings, _FIT)}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        if section == "training_config":
            training[key] = value
            if key == "activation_memory":
                training = {
                    k: v
                    for k, v in training.items()
                    if k not in ("gradient_checkpointing", "activation_checkpointing")
                }
        elif section == "evaluation":
            evaluation = replace(evaluation, **{key: value})
        elif key == "quantization":
            model = replace(model, quantization=quantization_config(value))
        else:
            model = replace(model, **{key: value})
    return replace(config, training_config=training, model=model, evaluation=evaluation, origins=origins)


def _storage_of(model: Any) -> Storage:
    kinds = {type(module).__name__ for module in model.modules()}
    if "Linear4bit" in kinds:
        return Storage(dtype=model.dtype, quantization=quantization_config("nf4"))
    int8 = kinds & {"Linear8bitLt", "Linear8bit"}
    return Storage(dtype=model.dtype, quantization=quantization_config("int8") if int8 else None)


def _evaluations(args: Any, steps: int) -> int:
    """Evaluations of the held-out loss while a run trains."""
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "epoch":
        return math.ceil(args.num_train_epochs) if args.max_steps <= 0 else 1
    if strategy == "steps":
        every = args.eval_steps or args.logging_steps or 1
        return int(steps // (every if every >= 1 else max(1, math.ceil(every * steps))))
    return 0
