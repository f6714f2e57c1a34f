"""`SFTConfig` and `TrainingArguments` for scripts of any age: TRL's and transformers' own, by old names as well."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import transformers
from trl.trainer.sft_config import SFTConfig as TrlConfig

from phlora.dropin.machine import fit_machine
from phlora.dropin.tell import warn
from phlora.errors import ConfigError
from phlora.names import ARGUMENTS, DATASET_KWARGS, SETTINGS, Today, by_todays_names, one_message


class SFTConfig(TrlConfig):
    """`trl.SFTConfig`, which takes the names of older versions as well.

    An old name that means the same is taken with a line in the log that says the new one; what cannot be done as it was
    meant is one error that lists all of it. Settings that this machine cannot have (16-bit precision, kernels and
    optimizers that need a GPU) are replaced, with a line, where nothing is lost by it.

    Raises:
        ConfigError: arguments that are not known, or gone for good.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        values = settings_of(TrlConfig, args, kwargs)
        with warnings.catch_warnings():
            if "gradient_checkpointing" not in values:
                # TRL says it of its own default.
                warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            super().__init__(**values)
        self.given = _written_down(self, values)


class TrainingArguments(transformers.TrainingArguments):
    """`transformers.TrainingArguments`, which takes the names of older versions as well; see `SFTConfig`.

    Raises:
        ConfigError: arguments that are not known, or gone for good.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        values = settings_of(transformers.TrainingArguments, args, kwargs)
        super().__init__(**values)
        self.given = _written_down(self, values)


def _written_down(config: transformers.TrainingArguments, values: dict[str, Any]) -> frozenset[str]:
    """The settings that somebody wrote down; parsers and copies give all of them, and so say nothing."""
    every = {field.name for field in dataclasses.fields(config) if field.init}
    return frozenset() if every <= values.keys() else frozenset(values)


def settings_of(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a configuration by today's names, as this machine can have them.

    Raises:
        ConfigError: all that is wrong with them.
    """
    fields = [field.name for field in dataclasses.fields(kind) if field.init]
    today = by_todays_names(
        SETTINGS, {**dict(zip(fields, args, strict=False)), **kwargs}, known=_known(kind, fields)
    )
    problems = [*today.problems, *_elsewhere(today), *_of_sft_alone(kind, fields, today)]
    if problems:
        raise ConfigError(one_message(problems), where=kind.__name__)
    values = fit_machine(today.values, today.notes, is_sft=issubclass(kind, TrlConfig))
    keywords = values.get("dataset_kwargs")
    for name in keywords if isinstance(keywords, dict) else ():
        if name in DATASET_KWARGS:
            today.notes.append(f"dataset_kwargs: {name} has no effect: {DATASET_KWARGS[name]}")
    for note in today.notes:
        warn(note)
    return values


def _known(kind: type, fields: list[str]) -> set[str]:
    """The names that are told apart from unknown ones; which of them this kind lacks is told by `_of_sft_alone`."""
    return {*fields, *(field.name for field in dataclasses.fields(TrlConfig) if field.init)}


def _elsewhere(today: Today) -> list[str]:
    """What belongs to another call is out of a configuration's reach."""
    return [
        f"{name} is an argument of {of}: {of}({name}=...)"
        for of, moved in today.elsewhere.items()
        for name in moved
    ]


def _of_sft_alone(kind: type, fields: list[str], today: Today) -> list[str]:
    return [
        f"{name} is a setting of SFTConfig: write SFTConfig in the place of {kind.__name__}"
        for name in today.values
        if name not in fields
    ]


def old_settings() -> list[str]:
    """The old names that `SFTConfig` and `TrainingArguments` take."""
    return [name for name, old in ARGUMENTS[SETTINGS].items() if old.fate in ("renamed", "idle")]
