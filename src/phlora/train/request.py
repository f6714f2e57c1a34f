"""What was asked for: the arguments of `finetune`, or a `RunConfig`, as one configuration and the objects beside it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from phlora.config import RunConfig, build_config, default_output
from phlora.data.split_names import same_split
from phlora.errors import ConfigError, EnvironmentProblem, RunError
from phlora.evaluate.metrics import Metric, names_and_functions
from phlora.files import replaced_file
from phlora.runs.folder import EVAL_ROWS_FILE, ROWS_FILE
from phlora.train.arguments import train_on_of
from phlora.train.config_objects import lora_values, training_values

IN_MEMORY = "(in memory)"
# What an argument says that is no mapping of its section.
_KEY_OF = {"model": "model.name", "data": "data.files", "eval_data": "data.eval"}
_HELD_OUT_SPLITS = ("test", "validation", "eval", "dev")


@dataclass(frozen=True)
class Objects:
    """What was handed over as Python objects; None and empty where it is named or left out."""

    train: Any = None
    held_out: Any = None
    model: nn.Module | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    callbacks: tuple[TrainerCallback | type[TrainerCallback], ...] = ()
    compute_metrics: Callable[..., Any] | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One run as it was asked for."""

    config: RunConfig
    objects: Objects = Objects()
    notes: tuple[str, ...] = ()


def require_one_process() -> None:
    """A run folder has one writer.

    Raises:
        EnvironmentProblem: a launcher started several processes.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes.isdigit() and int(processes) > 1:
        raise EnvironmentProblem(
            f"A launcher started {processes} processes; a Phlora run is one process",
            fix="start it without the launcher, or use phlora.SFTTrainer in a script of your own, as in "
            "examples/guide/sample_finetune.py, which accelerate can launch",
        )


def collect_request(
    config: RunConfig | None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    eval_data: Any = None,
    training_config: Any = None,
    peft_config: Any = None,
    evaluation: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    callbacks: Sequence[Any] | None = None,
    compute_metrics: Callable[..., Any] | None = None,
) -> Request:
    """One request from either a `RunConfig` or the arguments of `finetune`, which are its own.

    Raises:
        ConfigError: both were given, neither says what to train on, or an object of a kind that is not known.
    """
    sections = dict(model=model, data=data, eval_data=eval_data, training_config=training_config)
    sections |= dict(peft_config=peft_config, evaluation=evaluation, output=output)
    given = [name for name, value in sections.items() if value is not None]
    notes: list[str] = []
    beside = dict(callbacks=tuple(callbacks or ()), compute_metrics=compute_metrics, tokenizer=tokenizer)
    if config is not None:
        if given:
            raise ConfigError(
                f"Both `config` and {', '.join(f'`{n}`' for n in given)} were given", fix="give one"
            )
        derived = _derived(config, notes)
        return Request(derived, Objects(**beside), (*config.notes, *notes))
    origins: dict[str, str] = {}
    for name in given:
        value = sections[name]
        keys = [f"{name}.{key}" for key in value] if isinstance(value, Mapping) else [_KEY_OF.get(name, name)]
        origins |= dict.fromkeys(keys, "argument")
    training, training_origins = training_values(training_config, notes)
    lora, lora_origins = lora_values(peft_config, notes)
    names, metrics = _metrics(evaluation)
    train, held_out = _rows(data, eval_data, notes)
    section: dict[str, Any] = _data_section(data, eval_data, train, held_out)
    values: dict[str, Any] = {
        "model": _model_section(model, notes),
        "data": section,
        "training_config": training,
        "peft_config": lora,
        "evaluation": names,
        "output": None if output is None else str(output),
    }
    values = {name: value for name, value in values.items() if value is not None}
    built = _derived(build_config(values, {**origins, **training_origins, **lora_origins}), notes)
    if output is None and built.output == RunConfig.output:
        named = "run" if train is not None else built.data.files[0].path
        built = dataclasses.replace(built, output=default_output(named))
    built = _naming_rows(built, train is not None, held_out is not None)
    objects = Objects(
        train, held_out, model if isinstance(model, nn.Module) else None, metrics=metrics, **beside
    )
    return Request(built, objects, (*built.notes, *notes))


def require_rows_outside(config: RunConfig, objects: Objects, *, overwrite: bool) -> None:
    """The rows that a run was made of are not replaced by a run on them.

    Raises:
        RunError: a data file lies in the folder that `overwrite` would empty.
    """
    folder = Path(config.output).absolute()
    read = [*([] if objects.train is not None else config.data.files)]
    read += [] if objects.held_out is not None else config.data.eval
    inside = [file.path for file in read if folder in Path(file.path).absolute().parents]
    if overwrite and inside:
        raise RunError(
            f"The rows in {inside[0]} lie in the run folder that would be replaced",
            where=config.output,
            fix="name another --output",
        )


def write_records(records: Any, path: Path) -> None:
    """Write rows that were handed over as objects as JSONL, which is read back to the same rows."""
    with replaced_file(path) as part, part.open("w", encoding="utf-8") as file:
        for record in _records(records):
            file.write(json.dumps(record, ensure_ascii=False, default=_plain_value) + "\n")


def _derived(config: RunConfig, notes: list[str]) -> RunConfig:
    """What the names that scripts have for it say about the run: its folder, and what trains."""
    settings = dict(config.training_config)
    named = settings.pop("output_dir", None)
    if named and config.output == RunConfig.output:
        config = dataclasses.replace(config, output=str(named))
    elif named and str(named) != config.output:
        notes.append(f"training_config.output_dir ({named}) gives way to output ({config.output})")
    config = dataclasses.replace(config, training_config=settings)
    train_on = train_on_of(settings)
    if train_on is None or config.data.train_on == train_on:
        return config
    key = "assistant_only_loss" if settings.get("assistant_only_loss") is not None else "completion_only_loss"
    if "data.train_on" in config.origins and not (train_on == "assistant" and config.data.train_on == "last"):
        raise ConfigError(
            f"training_config.{key}: {str(settings[key]).lower()} and data.train_on: {config.data.train_on} contradict "
            "each other",
            fix=f"leave out {key}",
        )
    if train_on == "assistant" and config.data.train_on == "last":
        return config
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train_on=train_on),
        origins={**config.origins, "data.train_on": f"training_config.{key}"},
    )


def _naming_rows(config: RunConfig, train: bool, held_out: bool) -> RunConfig:
    """Rows in memory are named after the file that they are written to."""
    data, folder = config.data, Path(config.output)
    if train:
        data = dataclasses.replace(
            data, files=(dataclasses.replace(data.files[0], path=str(folder / ROWS_FILE)),)
        )
    if held_out:
        data = dataclasses.replace(
            data, eval=(dataclasses.replace(data.eval[0], path=str(folder / EVAL_ROWS_FILE)),)
        )
    return dataclasses.replace(config, data=data)


# ------------------------------------------------------------------------------------------ rows


def _rows(data: Any, eval_data: Any, notes: list[str]) -> tuple[Any, Any]:
    """The training and the held-out rows that were handed over as objects."""
    if isinstance(data, DatasetDict | IterableDatasetDict) or _is_dict_of_sets(data):
        data, beside = _split_of(data)
        if eval_data is None and beside is not None:
            eval_data = data_of(beside, notes)
    if isinstance(eval_data, DatasetDict | IterableDatasetDict) or _is_dict_of_sets(eval_data):
        raise ConfigError(
            f"`eval_data` is a dictionary of data sets ({', '.join(map(str, eval_data))})",
            expected="one set of held-out rows",
            fix="give one of them, or join them with datasets.concatenate_datasets",
        )
    return (data_of(data, notes) if _is_rows(data) else None), (
        data_of(eval_data, notes) if _is_rows(eval_data) else None
    )


def _is_dict_of_sets(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(entry, Dataset | IterableDataset) for entry in value.values())
    )


def _split_of(sets: Mapping[str, Any]) -> tuple[Any, Any]:
    """The training rows of a dictionary of data sets, and the held-out ones where it has some."""
    names = [str(name) for name in sets]
    train = "train" if "train" in names else names[0] if len(names) == 1 else None
    if train is None:
        raise ConfigError(
            f"`data` has the splits {', '.join(names)}, and none of them is `train`",
            fix="give the one to train on, as data=sets[NAME]",
        )
    # Those names first, then others of the same splits, such as `val` and `heldout`.
    wanted = (*_HELD_OUT_SPLITS, *(name for name in names if same_split(name) in _HELD_OUT_SPLITS))
    held_out = next((name for name in wanted if name in names and name != train), None)
    return sets[train], sets[held_out] if held_out else None


def data_of(rows: Any, notes: list[str]) -> Any:
    """Rows that can be read more than once.

    Raises:
        ConfigError: neither rows nor sets of them.
    """
    first = rows[0] if isinstance(rows, list | tuple) else rows
    if not isinstance(first, Iterable) or isinstance(first, bytes):
        raise ConfigError(
            f"Rows of the type `{type(first).__name__}` were given",
            expected="file(s), a `datasets.Dataset` or a list of rows",
        )
    return list(rows) if isinstance(rows, IterableDataset | Iterator) else rows


def _data_section(data: Any, eval_data: Any, train: Any, held_out: Any) -> dict[str, Any]:
    is_section = isinstance(data, Mapping) and train is None
    section = dict(data) if is_section else {"files": [IN_MEMORY] if train is not None else data or None}
    if held_out is not None:
        section["eval"] = [IN_MEMORY]
    elif eval_data is not None:
        section["eval"] = eval_data
    if section.get("files") is None:
        raise ConfigError("`data` is missing", expected="file(s), a `datasets.Dataset` or a list of rows")
    return {key: _paths(value) for key, value in section.items()}


def _is_rows(value: Any) -> bool:
    """Whether rows themselves were given, rather than the name of a file or several."""
    if value is None or isinstance(value, str | Path | Mapping):
        return False
    if isinstance(value, list | tuple):
        return bool(value) and not (
            isinstance(value[0], str | Path) or (isinstance(value[0], Mapping) and "path" in value[0])
        )
    return True


def _records(rows: Any) -> Iterator[Any]:
    if hasattr(rows, "to_dict") and not isinstance(rows, Dataset):  # a DataFrame
        rows = rows.to_dict("records")
    for entry in rows:
        if isinstance(entry, Mapping):
            yield entry
        else:
            yield from _records(entry)


def _plain_value(value: Any) -> Any:
    """A value of a row that JSON has no form for: an array as its numbers, all else as its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _paths(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_paths(entry) for entry in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------ objects of other libraries


def _model_section(model: Any, notes: list[str]) -> Any:
    if isinstance(model, nn.Module):
        name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or IN_MEMORY)
        notes.append(f"The model object ({name}) is trained as it is; afterwards it carries the adapter")
        return {"name": name}
    return str(model) if isinstance(model, Path) else model


def _metrics(evaluation: Any) -> tuple[Any, dict[str, Metric]]:
    """The `evaluation` section with the names of metrics, and the metrics that were given as functions."""
    if not isinstance(evaluation, Mapping):
        return evaluation, {}
    named = evaluation.get("metrics")
    entries: Iterable[Any] = [named] if callable(named) or isinstance(named, str) else named or ()
    if not isinstance(entries, list | tuple | set):
        return dict(evaluation), {}
    names, own = names_and_functions(entries)
    return ({**evaluation, "metrics": names} if own else dict(evaluation)), own
