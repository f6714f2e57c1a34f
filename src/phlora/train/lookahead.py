"""What a run will take of this machine, known before a weight is read.

The forecast itself is `phlora.forecast`; here a run's configuration becomes what that asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig

from phlora.config import RunConfig
from phlora.data.packing import TokenSequences
from phlora.display import Display
from phlora.forecast.blueprint import NotForecastError
from phlora.forecast.forecast import Circumstances, Evaluation, forecast_run, with_seconds
from phlora.forecast.memory import weight_bytes
from phlora.forecast.passes import Layout
from phlora.forecast.remedies import remedies
from phlora.forecast.render import render_remedies
from phlora.measure import free_memory, resident_bytes
from phlora.models.lm_head import trunk_and_head, why_not_by_token
from phlora.models.tokenizer import LoadedTokenizer
from phlora.train.arguments import Arguments, training_arguments
from phlora.train.drawn import Drawn, draw
from phlora.train.field_values import word_of
from phlora.train.fitting import Lookahead, made_to_fit, require_memory
from phlora.train.plan import Plan, make_plan
from phlora.train.prepare import PreparedData
from phlora.train.request import Objects, Request

# Laying these out, and two layers' time on the longest row among them, takes tens of seconds.
_MANY_TOKENS = 200_000


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

    Where the run is not forecast, `display` is told why.

    Args:
        fit_memory: whether the run is changed where it would not fit.

    Raises:
        NoRoomError: nothing makes it fit, with `fit_memory`.
    """
    given = _Given(request.objects, words, data, lora, device)
    why_not = _not_forecast(arguments, request.objects)
    if why_not is None:
        display.stage("Forecasting memory and time")
    planned = Planned(request.config, arguments)
    try:
        drawn = given.drawn(request.config)
        planned = replace(planned, plan=given.plan(drawn, arguments))
        why_not = why_not or _unknown_step(drawn.blueprint.model)
        if why_not is None:
            return _forecast(planned, drawn, given, display, fit_memory=fit_memory)
    except NotForecastError as reason:
        why_not = f"{why_not}; {reason}" if why_not else str(reason)
    display.note(f"memory and time are not forecast: {why_not}")
    level = "keep" if arguments.activation_memory == "auto" else arguments.activation_memory
    return replace(planned, arguments=arguments.with_activation_memory(level))


@dataclass(frozen=True)
class _Given:
    """What of a run stays as it is, whatever is changed to make it fit."""

    objects: Objects
    words: LoadedTokenizer
    data: PreparedData
    lora: LoraConfig
    device: torch.device

    def drawn(self, config: RunConfig) -> Drawn:
        return draw(config, self.objects, self.words, self.lora, device=self.device)

    def plan(self, drawn: Drawn, arguments: Arguments) -> Plan:
        model = drawn.blueprint.model
        return make_plan(self.data, drawn.summary, arguments, model, self.objects, device=self.device)


def _forecast(
    planned: Planned, drawn: Drawn, given: _Given, display: Display, *, fit_memory: bool
) -> Planned:
    """The same with its forecast, and changed where it has to be."""
    num_tokens = _tokens_of_a_step(given.data.train, planned)
    if num_tokens > _MANY_TOKENS:
        display.note(f"a step has up to {num_tokens:,} tokens, so that reckoning with it may take minutes")
    found = _looked_ahead(planned, drawn, given)
    assert found.ahead is not None
    if not fit_memory or found.ahead.forecast.fits:
        return found
    config, words_of_change = made_to_fit(found.ahead, planned.config)
    display.note(f"--fit: {words_of_change}")
    arguments = training_arguments(
        config.training_config,
        output_dir=str(planned.arguments.args.output_dir),
        device=given.device.type,
        loraplus_lr_ratio=planned.arguments.loraplus_lr_ratio,
    )
    drawn = given.drawn(config)
    return _looked_ahead(Planned(config, arguments, given.plan(drawn, arguments)), drawn, given)


def _tokens_of_a_step(sequences: TokenSequences, planned: Planned) -> int:
    """At most."""
    assert planned.plan is not None
    lengths = sequences.lengths
    return min(sum(lengths), max(lengths, default=0) * planned.plan.sequences_per_step)


def _looked_ahead(planned: Planned, drawn: Drawn, given: _Given) -> Planned:
    about = _circumstances(planned, drawn, given)
    forecast = with_seconds(forecast_run(about), about)
    ahead = Lookahead(about, forecast, () if forecast.fits else tuple(remedies(about, forecast)))
    assert planned.plan is not None
    return replace(
        planned,
        arguments=planned.arguments.with_activation_memory(forecast.level),
        plan=replace(planned.plan, forecast=forecast),
        ahead=ahead,
    )


def _not_forecast(arguments: Arguments, objects: Objects) -> str | None:
    """Why this trainer's own step, which is what is forecast, is not the one that is taken."""
    args = arguments.args
    if objects.compute_metrics is not None:
        return "compute_metrics needs all logits"
    if args.loss_type != "nll":
        return f"loss_type {args.loss_type} is TRL's own"
    return "torch_compile plans memory itself" if args.torch_compile else None


def _unknown_step(model: Any) -> str | None:
    """Why the step of this model is not the one that is forecast, as far as the model decides it."""
    reason = why_not_by_token(model)
    if reason is not None:
        return f"the model {reason}: TRL's own loss is used"
    trunk = trunk_and_head(model)[0]
    if not hasattr(trunk, "layers"):
        return "where the model has its layers is not known"
    heads = [getattr(trunk.config, f"num_{kind}_heads", None) for kind in ("attention", "key_value")]
    if not isinstance(heads[0], int) or not isinstance(heads[1], int | None):
        return "how large its keys and values are is not known"
    return None


def _circumstances(planned: Planned, drawn: Drawn, given: _Given) -> Circumstances:
    plan, args, wanted = planned.plan, planned.arguments.args, planned.config.evaluation
    assert plan is not None
    # The weights of a model that was handed over are there, and are taken from nothing that is free.
    held = weight_bytes(drawn.blueprint, drawn.storage) if given.objects.model is not None else 0
    return Circumstances(
        blueprint=drawn.blueprint,
        storage=drawn.storage,
        device=drawn.device,
        sequences=given.data.train,
        held_out=given.data.held_out,
        layout=Layout(
            batch_size=args.per_device_train_batch_size,
            accumulated=args.gradient_accumulation_steps,
            shared=plan.sharing.on,
            packed=bool(args.packing),
            pad_token_id=given.words.tokenizer.pad_token_id,
            seed=args.seed,
        ),
        steps=plan.num_optimizer_steps,
        free=free_memory(drawn.device).plus(held),
        resident=max(0, resident_bytes() - held),
        level=planned.arguments.activation_memory,
        speed=given.data.speed,
        optimizer=word_of(args.optim),
        max_grad_norm=args.max_grad_norm or math.inf,
        evaluation=Evaluation(
            during=_evaluations(args, plan.num_optimizer_steps) if len(given.data.held_out) else 0,
            enabled=wanted.enabled,
            answers=min(wanted.max_answers, len(given.data.held_out)),
            max_new_tokens=wanted.max_new_tokens,
        ),
    )


def _evaluations(args: Any, steps: int) -> int:
    """Evaluations of the held-out loss while a run trains."""
    strategy = word_of(args.eval_strategy)
    if strategy == "epoch":
        return math.ceil(args.num_train_epochs) if args.max_steps <= 0 else 1
    if strategy == "steps":
        every = args.eval_steps or args.logging_steps or 1
        return int(steps // (every if every >= 1 else max(1, math.ceil(every * steps))))
    return 0
