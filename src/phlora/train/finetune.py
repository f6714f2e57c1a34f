"""From a chat file to a proven LoRA adapter: the whole story of Phlora, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from phlora.adapters.attach import attach, lora_settings
from phlora.config import RunConfig
from phlora.display import Display
from phlora.evaluate import run as evaluation_run
from phlora.evaluate.metrics import resolve_metrics
from phlora.evaluate.report import Report
from phlora.extras import require
from phlora.measure import Clock
from phlora.models.device import choose_device
from phlora.models.load import load_model
from phlora.models.requirements import needed_by_model
from phlora.models.tokenizer import load_tokenizer
from phlora.runs.folder import claim_folder, claimed, recorded_status, require_room
from phlora.train import record
from phlora.train.arguments import needed_by_trackers, training_arguments
from phlora.train.loop import fit
from phlora.train.plan import Plan, make_plan
from phlora.train.prepare import prepare_data
from phlora.train.request import collect_config, require_one_process


@dataclass(frozen=True)
class Run:
    """What a fine-tuning run leaves behind.

    Attributes:
        folder: the run folder; None for a dry run.
        report: base against tuned model; None for a dry run and with `evaluation.enabled: false`.
        model: the PEFT model; its adapter is the best one.
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


def finetune(
    config: RunConfig | None = None,
    *,
    model: str | Mapping[str, Any] | None = None,
    data: Any = None,
    eval_data: Any = None,
    training_config: Mapping[str, Any] | None = None,
    peft_config: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    display: Display | None = None,
) -> Run:
    """Fine-tune a chat model with LoRA and compare it with its base on held-out chats.

    Args:
        config: the whole configuration; the next seven arguments are then left out.
        model: hub id, local folder, .gguf file or embedded name, or a mapping of `ModelConfig` fields.
        data: file(s), a `datasets.Dataset`, a list of rows, or a mapping of `DataConfig` fields.
        eval_data: held-out rows in the same forms; by default a tenth is split off.
        training_config: fields of TRL's `SFTConfig`.
        peft_config: fields of PEFT's `LoraConfig`, and `loraplus_lr_ratio`.
        evaluation: fields of `EvaluationConfig`.
        output: the run folder; by default `runs/` and the name of the data file.
        resume: continue the run in `output` from its last complete checkpoint.
        overwrite: replace the run in `output`.
        dry_run: stop after the plan has been shown; nothing is written.
        display: where progress goes; standard error by default.

    Raises:
        PhloraError: a mistake in the input, or something that this machine lacks; nothing is half-written.
    """
    display = display or Display()
    require_one_process()
    clock = Clock()
    arguments = dict(model=model, data=data, eval_data=eval_data, training_config=training_config)
    arguments |= dict(peft_config=peft_config, evaluation=evaluation, output=output and str(output))
    config, objects = collect_config(config, arguments)
    require(needed_by_model(config.model) | needed_by_trackers(config.training_config.get("report_to")))

    folder = claim_folder(config.output, resume=resume, overwrite=overwrite)
    device = choose_device(config.model.device)
    arguments = training_arguments(
        config.training_config,
        output_dir=folder.checkpoints,
        device=device.type,
        peft_config=config.peft_config,
    )
    lora = lora_settings(config.peft_config)
    resolve_metrics(config.evaluation.metrics)

    display.stage(f"Reading {', '.join(file.path for file in config.data.files)}")
    tokenizer = load_tokenizer(config.model)
    begun = folder.facts() if resume and folder.has_facts else None
    prepared = prepare_data(config, objects, tokenizer, arguments, display, begun=begun)
    clock.lap("data")

    display.stage(f"Loading {config.model.name}")
    loaded = load_model(replace(config.model, device=str(device)), tokenizer=tokenizer)
    set_seed(
        arguments.args.seed
    )  # the adapter's first weights are drawn here, before the trainer seeds itself
    attached = attach(loaded.model, lora)
    plan = make_plan(prepared, attached.summary, arguments, attached.model)
    record.tell_choices(display, loaded, arguments, attached)
    display.show(plan.render())
    clock.lap("loading")
    config_text = record.config_text(config, arguments)
    if dry_run:
        return Run(None, None, attached.model, tokenizer.tokenizer, config_text, plan)

    require_room(folder.path, plan.disk_bytes)
    with claimed(folder, resume=resume, overwrite=overwrite):
        facts = record.run_facts(config, prepared, loaded, arguments, lora, plan)
        checkpoint = record.open_run(folder, facts, config_text, prepared, resume=resume)
        display.stage(
            f"Training {plan.num_optimizer_steps} steps" + (f", from {checkpoint.name}" if checkpoint else "")
        )
        with recorded_status(folder):
            fit(
                attached.model,
                loaded,
                prepared,
                arguments,
                folder,
                checkpoint=checkpoint,
                shared=plan.sharing.on,
                display=display,
            )
        clock.lap("training")

        report = None
        if config.evaluation.enabled and prepared.held_out:
            display.stage(f"Comparing base and tuned model on {len(prepared.held_out)} held-out rows")
            comparison = evaluation_run.compare_on(
                attached.model,
                tokenizer,
                prepared.held_out_rows,
                prepared.held_out,
                config.evaluation,
                display=display,
                # What training had the memory for.
                batch_size=min(evaluation_run.BATCH_ROWS, arguments.args.per_device_eval_batch_size),
                speed=config.speed,
            )
            clock.lap("evaluation")
            report = evaluation_run.make_report(folder, comparison, config, clock)
            report.write(folder.path)
        folder.update_facts(status="finished", timing=clock.seconds)
    return Run(folder.path, report, attached.model, tokenizer.tokenizer, config_text, plan)
