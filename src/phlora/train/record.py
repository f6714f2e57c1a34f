"""What is written down about a run: run.json and config.yaml."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from phlora.adapters.attach import DEFAULTS, Attached
from phlora.config import RunConfig, resolved
from phlora.display import Display
from phlora.files import write_text
from phlora.models.load import LoadedModel
from phlora.models.locate import ModelSource
from phlora.runs.facts import AdapterFacts, ModelFacts, RunFacts
from phlora.runs.folder import (
    CONFIG_FILE,
    EVAL_ROWS_FILE,
    HELD_OUT_FILE,
    ROWS_FILE,
    TRAINED_KEYS_FILE,
    RunFolder,
    begin_run,
    continue_run,
    digest,
    environment,
)
from phlora.runs.trained_rows import write_trained_keys
from phlora.train.arguments import ACTIVATION_MEMORY, CHECKPOINTING, Arguments
from phlora.train.config_objects import lora_fields, plain_setting
from phlora.train.fields import MAPPED, REFUSED
from phlora.train.optimizer import LORAPLUS
from phlora.train.plan import Plan
from phlora.train.prepare import PreparedData, write_rows
from phlora.train.request import (
    IN_MEMORY,
    Objects,
    write_records,
)

# What changes nothing about the result may differ between a run and its continuation.
_NOT_IDENTITY = (
    *("output_dir", "logging_steps", "logging_strategy", "logging_first_step", "save_steps", "save_strategy"),
    *(
        "save_total_limit",
        "report_to",
        "run_name",
        "disable_tqdm",
        "eval_steps",
        "eval_strategy",
        "log_level",
    ),
    *("dataloader_num_workers", "dataloader_pin_memory", "per_device_eval_batch_size", "dataset_num_proc"),
    # The same to the bit with and without.
    *CHECKPOINTING,
    *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)


def tell_choices(
    display: Display,
    loaded: LoadedModel,
    arguments: Arguments,
    attached: Attached,
    notes: Sequence[str] = (),
) -> None:
    """Say what was chosen for this machine and why, and what was understood from the configuration."""
    name = str(loaded.dtype.value).removeprefix("torch.")
    display.note(f"{loaded.device.type}, {name}: {loaded.dtype.reason}")
    display.note(f"weights stored in {loaded.storage.value}: {loaded.storage.reason}")
    display.note(f"attention {loaded.attention.value}: {loaded.attention.reason}")
    for note in (*loaded.notes, *notes, *arguments.notes, *attached.notes):
        display.note(note)


def run_facts(
    config: RunConfig,
    data: PreparedData,
    loaded: LoadedModel,
    arguments: Arguments,
    lora: LoraConfig,
    plan: Plan,
) -> RunFacts:
    """The contents of run.json at the start of a run."""
    return RunFacts(
        config=resolved(config),
        origins=config.origins,
        lora=plain_lora(lora),
        identity=_identity(config, data, loaded, arguments, lora),
        max_length=arguments.args.max_length,
        seed=arguments.args.seed,
        environment=environment(),
        model=ModelFacts(
            name=config.model.name,
            location=_place(loaded.source),
            kind=loaded.source.kind,
            family=loaded.tokenizer.family.name,
            fingerprint=loaded.fingerprint,
            device=str(loaded.device),
            dtype=str(loaded.dtype.value).removeprefix("torch."),
            dtype_reason=loaded.dtype.reason,
            storage=loaded.storage.value,
            storage_reason=loaded.storage.reason,
            attention=loaded.attention.value,
        ),
        data=data.facts,
        system_prompts=data.system_prompts,
        adapter=AdapterFacts(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            trainable_parameters=plan.adapter.num_trainable,
            all_parameters=plan.adapter.num_total,
            modules={name: count for name, (count, _) in plan.adapter.modules.items()},
        ),
        num_optimizer_steps=plan.num_optimizer_steps,
    )


def _identity(
    config: RunConfig, data: PreparedData, loaded: LoadedModel, arguments: Arguments, lora: LoraConfig
) -> dict[str, Any]:
    """What has to be the same for a run to be continued."""
    trained = {name: value for name, value in _plain(arguments.args).items() if name not in _NOT_IDENTITY}
    template = loaded.tokenizer.tokenizer.chat_template
    return {
        "base model": loaded.fingerprint,
        "data": data.fingerprint[:16],
        "tokenizer and chat template": digest([template, len(loaded.tokenizer.tokenizer)]),
        "peft_config": digest({k: v for k, v in _plain(lora).items() if k != "base_model_name_or_path"}),
        f"peft_config.{LORAPLUS}": arguments.loraplus_lr_ratio,
        "training_config.z_loss": arguments.z_loss,
        "train_on": config.data.train_on,
        "too_long": config.data.too_long,
        **{f"training_config.{name}": trained[name] for name in sorted(arguments.origins) if name in trained},
    }


def _place(source: ModelSource) -> str | None:
    """Where a base lies that was named from the working folder; from another one it is found by this."""
    path = Path(source.location)
    named = source.kind in ("folder", "gguf") and path.exists() and not path.is_absolute()
    return str(path.absolute()) if named else None


def open_run(
    folder: RunFolder,
    facts: RunFacts,
    config_text: str,
    data: PreparedData,
    objects: Objects,
    *,
    resume: bool,
    display: Display,
) -> Path | None:
    """Begin the run's folder, or check that it may be continued; returns the checkpoint to continue from."""
    files: dict[str, Callable[[Path], None]] = {
        CONFIG_FILE: lambda path: write_text(path, config_text),
        HELD_OUT_FILE: lambda path: write_rows(data.held_out_rows, path),
        TRAINED_KEYS_FILE: lambda path: write_trained_keys(data.trained_keys, path),
    }
    if objects.train is not None:
        files[ROWS_FILE] = lambda path: write_records(objects.train, path)
    if objects.held_out is not None:
        files[EVAL_ROWS_FILE] = lambda path: write_records(objects.held_out, path)
    if resume and folder.has_facts:
        ignored = {*MAPPED, *REFUSED, *_NOT_IDENTITY}
        return continue_run(folder, facts.to_json(), files, ignored=ignored, warn=display.warn)
    begin_run(folder, facts.to_json(), files)
    return None


def config_text(config: RunConfig, arguments: Arguments, lora: LoraConfig) -> str:
    """The resolved configuration as YAML that can be run again; each line says where its value came from."""
    values, origins = resolved(config), dict(config.origins)
    chosen = _plain(arguments.args)
    values["training_config"] = {
        name: value
        for name, value in sorted(chosen.items())
        if name in arguments.origins and name not in ("output_dir", "hub_token", "use_cpu")
    }
    if arguments.z_loss:
        values["training_config"]["z_loss"] = arguments.z_loss
    if arguments.upload is not None:
        values["training_config"] |= arguments.upload.settings()
    _tell_activation_memory(values["training_config"], origins, config, arguments)
    for name, origin in arguments.origins.items():
        if origin == "phlora":
            origins[f"training_config.{name}"] = "Phlora's default"
    values["peft_config"] = plain_lora(lora)
    for name in values["peft_config"]:
        if name not in config.peft_config:
            origins[f"peft_config.{name}"] = _lora_origin(name)
    if arguments.loraplus_lr_ratio is not None:
        values["peft_config"][LORAPLUS] = arguments.loraplus_lr_ratio
    lines = ["# Written by Phlora. Run again with: phlora train THIS_FILE --output NEW_FOLDER"]
    if config.model.name == IN_MEMORY:
        lines.append("# The model was an object in memory: name one in its place.")
    for section, value in values.items():
        if isinstance(value, Mapping) and value:
            lines.append(f"{section}:")
            lines += [f"  {_line(name, entry, origins, section)}" for name, entry in value.items()]
        else:
            lines.append(_line(section, value, origins))
    return "\n".join(lines) + "\n"


def _tell_activation_memory(
    values: dict[str, Any], origins: dict[str, str], config: RunConfig, arguments: Arguments
) -> None:
    """In one word what was asked for; `auto` is decided anew on the machine where the file is run."""
    given = config.training_config
    named = [name for name in CHECKPOINTING if values.pop(name, None) is not None and name in given]
    if given.get(ACTIVATION_MEMORY):
        values[ACTIVATION_MEMORY] = given[ACTIVATION_MEMORY]
        return
    values[ACTIVATION_MEMORY] = arguments.activation_memory if named else "auto"
    origins[f"training_config.{ACTIVATION_MEMORY}"] = named[0] if named else "Phlora's default"


def plain_lora(lora: LoraConfig) -> dict[str, Any]:
    """Every value of the adapter's configuration that is in force, as `peft_config` takes it."""
    values = {name: plain_setting(getattr(lora, name)) for name in lora_fields()}
    return {name: value for name, value in values.items() if value is not None}


def _plain(settings: TrainingArguments | LoraConfig) -> dict[str, Any]:
    values: dict[str, Any] = settings.to_dict()  # type: ignore[no-untyped-call]
    return values


def _lora_origin(name: str) -> str:
    if name == "lora_alpha":
        return "twice r"
    return "Phlora's default" if name in DEFAULTS else "PEFT's default"


def _line(name: str, value: Any, origins: Mapping[str, str], section: str = "") -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip()
    key = f"{section}.{name}" if section else name
    origin = origins.get(key) or origins.get(section)
    return f"{name}: {text.removesuffix('...').strip()}" + (f"  # {origin}" if origin else "")
