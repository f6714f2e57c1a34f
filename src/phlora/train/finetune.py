"""From a chat file to a proven LoRA adapter: the whole story of Phlora, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.training_args import trainer_log_levels

from phlora.adapters.attach import Attached, attach, lora_settings
from phlora.config import RunConfig
from phlora.data.readers.tables import needed_by_tables
from phlora.display import Display, counted
from phlora.errors import RunError
from phlora.evaluate import run as evaluation_run
from phlora.evaluate.metrics import resolve_metrics
from phlora.evaluate.report import Report
from phlora.extras import require
from phlora.files import require_room
from phlora.measure import Clock
from phlora.models.checkpoint import is_here
from phlora.models.requirements import needed_by_model
from phlora.models.tokenizer import LoadedTokenizer
from phlora.others import libraries_logged
from phlora.plots import plot_loss
from phlora.runs.events import curve, lasting_events, read_events, trained_seconds
from phlora.runs.facts import SplitBy, split_of
from phlora.runs.folder import RunFolder, claim_folder, claimed, recorded_status
from phlora.train import record
from phlora.train.arguments import Arguments, training_arguments
from phlora.train.backends import needed_by_trackers
from phlora.train.base import as_before, device_of, model_of, require_no_adapted_head, tokenizer_of
from phlora.train.fitting import fitted_before
from phlora.train.handed_over import handed_over
from phlora.train.lookahead import Planned, plan_ahead
from phlora.train.loop import Training, fit
from phlora.train.optimizer import LORAPLUS, take_loraplus
from phlora.train.plan import Plan, make_plan
from phlora.train.prepare import PreparedData, prepare_data
from phlora.train.request import Request, collect_request, require_one_process, require_rows_outside
from phlora.train.upload import require_sender, send

Rows: TypeAlias = str | Path | Sequence[Any] | Mapping[str, Any] | Dataset | DatasetDict | IterableDataset


@dataclass(frozen=True)
class Run:
    """What a fine-tuning run leaves behind.

    Attributes:
        folder: the run folder; None for a dry run.
        report: base against tuned model; None for a dry run and with `evaluation.enabled: false`.
        model: the PEFT model; its adapter is the best one. Of a dry run with a model object that object, as it was.
        tokenizer: its tokenizer.
        config_text: the resolved configuration as YAML, each value with where it came from.
        plan: the numbers of the run.
    """

    folder: Path | None
    report: Report | None
    model: Any
    tokenizer: Any
    config_text: str
    plan: Plan

    def _repr_html_(self) -> str:
        """What a notebook shows: the report, or the plan where nothing was compared."""
        return (self.report or self.plan)._repr_html_()

    def plot_loss(self, ax: Any = None) -> Any:
        """Training and held-out loss over optimizer steps, as a plot of matplotlib; returns its `Axes`.

        Args:
            ax: where to draw; None makes a figure.

        Raises:
            RunError: a dry run, which has no losses.
            MissingExtraError: matplotlib is not installed.
        """
        if self.folder is None:
            raise RunError("A dry run has no losses", fix="leave dry_run out")
        events = lasting_events(read_events(self.folder / "events.jsonl"))
        return plot_loss(curve(events, "loss"), curve(events, "eval_loss"), ax=ax)


def finetune(
    config: RunConfig | None = None,
    *,
    model: str | Path | Mapping[str, Any] | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Rows | None = None,
    eval_data: Rows | None = None,
    training_config: Mapping[str, Any] | TrainingArguments | None = None,
    peft_config: Mapping[str, Any] | LoraConfig | None = None,
    evaluation: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
    compute_metrics: Callable[..., Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    fit_memory: bool = False,
    overcommit: bool = False,
    display: Display | None = None,
) -> Run:
    """Fine-tune a chat model with LoRA and compare it with its base on held-out chats.

    Args:
        config: the whole configuration, in the place of `model`, `data`, `eval_data`, `training_config`,
            `peft_config`, `evaluation` and `output`.
        model: hub id, local folder, .gguf file or embedded name, a mapping of `ModelConfig` fields, or a model of
            transformers, also a quantised one. Such an object is trained as it is and carries the adapter
            afterwards; nothing else of it changes, and nothing at all where the run fails, is stopped or is dry.
        tokenizer: in the place of the model's own.
        data: file(s), a list of rows, a data set of the `datasets` library (of a dictionary of them `train`, and
            `test` or `validation` as held-out rows), or a mapping of `DataConfig` fields. Rows in memory are
            written into the run folder.
        eval_data: held-out rows in the same forms; by default a tenth is split off.
        training_config: fields of TRL's `SFTConfig`, or such an object, or `TrainingArguments`. An object counts
            whole, its library's defaults too; Phlora's defaults are for what a dictionary leaves out.
        peft_config: fields of PEFT's `LoraConfig`, and `loraplus_lr_ratio`; or a `LoraConfig`, which counts whole;
            where it names no `target_modules`, all linear layers are adapted.
        evaluation: fields of `EvaluationConfig`; among `metrics`, functions of (answer, reference) too.
        output: the run folder; by default `runs/` and the name of the data file.
        callbacks: of transformers' trainer, beside Phlora's own.
        compute_metrics: as for `trl.SFTTrainer`: called with the logits of the held-out rows at each evaluation.
        resume: continue the run in `output` from its last complete checkpoint.
        overwrite: replace the run in `output`.
        dry_run: stop after the plan has been shown; nothing is written.
        fit_memory: where the forecast is over the memory that is free, change what costs least to make it fit:
            smaller micro-batches of the same steps, layers computed again, the base in 4 bits.
        overcommit: start although the forecast is over the memory that is free.
        display: where progress goes; standard error by default.

    Raises:
        PhloraError: a mistake in the input, or something that this machine lacks; nothing is half-written.
    """
    display, clock = display or Display(), Clock()
    require_one_process()
    request = collect_request(
        config,
        model=model,
        tokenizer=tokenizer,
        data=data,
        eval_data=eval_data,
        training_config=training_config,
        peft_config=peft_config,
        evaluation=evaluation,
        output=output,
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )
    require(_needed_by(request.config))
    require_rows_outside(request.config, request.objects, overwrite=overwrite)
    folder = claim_folder(request.config.output, resume=resume, overwrite=overwrite)
    if resume and folder.has_facts:
        request = _as_it_began(request, folder, fit_memory=fit_memory)
    config, objects = request.config, request.objects
    device = device_of(config.model, objects)
    arguments, lora = _settings(config, folder, device=device.type)
    if not dry_run:
        require_sender(arguments.upload)

    with logged_as_asked(arguments, display), handed_over(objects.model) as given:
        split_by = _split_of(folder, resume=resume)
        words, data = _read(request, arguments, display, split_by=split_by)
        clock.lap("data")

        planned = plan_ahead(
            request, words, data, arguments, lora, display, device=device, fit_memory=fit_memory
        )
        config, arguments = planned.config, planned.arguments
        if not (overcommit or dry_run):
            planned.require_memory()
        display.stage(f"Loading {config.model.name}")
        loaded = model_of(config.model, objects, words, device=device, display=display)
        # The adapter's first weights are drawn here, before the trainer seeds itself.
        set_seed(arguments.args.seed)
        attached = attach(loaded.model, lora)
        given.adapted = attached.model
        require_no_adapted_head(attached.model)
        plan = planned.plan or make_plan(data, attached.summary, arguments, attached.model, objects)
        record.tell_choices(display, loaded, arguments, attached, request.notes)
        display.show(plan.render())
        clock.lap("loading")
        config_text = record.config_text(config, arguments, lora)
        if dry_run:
            return Run(None, None, objects.model or attached.model, words.tokenizer, config_text, plan)

        _require_room(folder, plan)
        with claimed(folder, resume=resume, overwrite=overwrite), ExitStack() as opened:
            facts = record.run_facts(config, data, loaded, arguments, lora, plan)
            checkpoint = record.open_run(
                folder, facts, config_text, data, objects, resume=resume, display=display
            )
            opened.enter_context(display.logged(folder.log))
            start = f", from {checkpoint.name}" if checkpoint else ""
            display.stage(f"Training {counted(plan.num_optimizer_steps, 'step')}{start}")
            task = Training(attached.model, loaded, data, arguments, objects, shared=plan.sharing.on)
            # Of the processes that this one continues.
            earlier_seconds = trained_seconds(read_events(folder.events))
            with recorded_status(folder):
                fit(task, folder, checkpoint=checkpoint, display=display)
            clock.lap("training", also=earlier_seconds)
            report = _proof(request, attached, words, data, arguments, folder, clock, display)
            folder.update_facts(status="finished", timing=clock.seconds)
        given.is_trained = True
    if arguments.upload is not None:
        send(folder.best_adapter, arguments.upload, run=folder.path, display=display)
    return Run(folder.path, report, attached.model, words.tokenizer, config_text, plan)


def plan_run(config: RunConfig, *, fit_memory: bool = False, display: Display | None = None) -> Planned:
    """What a run of this configuration will take of this machine; no weight is read and nothing is written.

    Args:
        fit_memory: plan the run as `finetune` would change it where it does not fit.

    Raises:
        PhloraError: a mistake in the input, or something that this machine lacks.
    """
    display = display or Display()
    request = collect_request(config)
    config = request.config
    require(_needed_by(config))
    folder = RunFolder(Path(config.output))
    device = device_of(config.model, request.objects)
    arguments, lora = _settings(config, folder, device=device.type)
    words, data = _read(request, arguments, display, split_by="conversations", needs_weights=False)
    if words.files is not None and not is_here(words.files.location):
        display.note(
            "The weights are not on this machine: the plan goes by what the configuration says of them"
        )
    return plan_ahead(request, words, data, arguments, lora, display, device=device, fit_memory=fit_memory)


def _as_it_began(request: Request, folder: RunFolder, *, fit_memory: bool) -> Request:
    """A run that is continued with what this machine had chosen, or changed to fit, when it began."""
    config, facts = request.config, folder.facts()
    if fit_memory:
        config = fitted_before(config, facts)
    return replace(request, config=replace(config, model=as_before(config.model, facts)))


def _read(
    request: Request, arguments: Arguments, display: Display, *, split_by: SplitBy, needs_weights: bool = True
) -> tuple[LoadedTokenizer, PreparedData]:
    config, objects = request.config, request.objects
    display.stage(f"Reading {', '.join(file.path for file in config.data.files)}")
    words = tokenizer_of(config.model, objects, needs_weights=needs_weights)
    return words, prepare_data(config, objects, words, arguments, display, split_by=split_by)


def _needed_by(config: RunConfig) -> dict[str, str]:
    """The optional packages that the run takes; see `extras.require`."""
    files = (*config.data.files, *config.data.eval)
    return {
        **needed_by_model(config.model),
        **needed_by_trackers(config.training_config.get("report_to")),
        **needed_by_tables(file.path for file in files),
    }


def _settings(config: RunConfig, folder: RunFolder, *, device: str) -> tuple[Arguments, LoraConfig]:
    """What trainer, adapter and proof are made of, all checked before anything is read."""
    adapter, loraplus_lr_ratio = take_loraplus(config.peft_config)
    arguments = training_arguments(
        config.training_config,
        output_dir=folder.checkpoints,
        device=device,
        loraplus_lr_ratio=loraplus_lr_ratio,
    )
    resolve_metrics(config.evaluation.metrics)
    return arguments, lora_settings(adapter, also_known=(LORAPLUS,))


def logged_as_asked(arguments: Arguments, display: Display) -> AbstractContextManager[None]:
    """Within it the libraries log as `log_level` says, where the user says it."""
    level = trainer_log_levels[arguments.args.log_level]
    return libraries_logged(display, level=None if level < 0 else level)


def _split_of(folder: RunFolder, *, resume: bool) -> SplitBy:
    """What the rows are dealt out by: as it was, in a run that is continued."""
    return split_of(folder.facts()) if resume and folder.has_facts else "conversations"


def _require_room(folder: RunFolder, plan: Plan) -> None:
    require_room(
        folder.path,
        plan.disk_bytes,
        what="The run with its checkpoints",
        fix="make room, name an --output on another disk, or set training_config.save_total_limit lower",
    )


def _proof(
    request: Request,
    attached: Attached,
    tokenizer: LoadedTokenizer,
    data: PreparedData,
    arguments: Arguments,
    folder: RunFolder,
    clock: Clock,
    display: Display,
) -> Report | None:
    """Base against tuned model on the held-out rows, written into the run folder."""
    config = request.config
    if not config.evaluation.enabled or not data.held_out:
        return None
    display.stage(f"Comparing base and tuned model on {len(data.held_out)} held-out rows")
    comparison = evaluation_run.compare_on(
        attached.model,
        tokenizer,
        data.held_out_rows,
        data.held_out,
        config.evaluation,
        display=display,
        # What training had the memory for.
        batch_size=min(evaluation_run.BATCH_ROWS, arguments.args.per_device_eval_batch_size),
        speed=config.speed,
        own_metrics=request.objects.metrics,
    )
    clock.lap("evaluation")
    report = evaluation_run.make_report(folder, comparison, config, clock)
    report.write(folder.path)
    return replace(report, folder=folder.path)
