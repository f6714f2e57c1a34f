"""A value as a field of TRL's `SFTConfig` takes it: its type, its words and its range."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from trl.trainer.sft_config import SFTConfig

from phlora.errors import ConfigError, did_you_mean, shown

WHERE = "training_config"

# Field -> smallest and largest value. What is larger is a slip of the keyboard, and a run that never ends.
_RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, 1_000_000),
    "per_device_eval_batch_size": (1, 1_000_000),
    "gradient_accumulation_steps": (1, 1_000_000),
    "max_length": (1, 10_000_000),
    "num_train_epochs": (0, 1_000_000),
    "save_total_limit": (1, 1_000_000),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, 1),
    "weight_decay": (0, 1000),
    "max_grad_norm": (0, 1e12),
    "warmup_steps": (0, 100_000_000),
    "label_smoothing_factor": (0, 1),
    "eval_delay": (0, 1e12),
    "learning_rate": (0, 1000),
    "logging_steps": (0, 1e12),
    "eval_steps": (0, 1e12),
    "save_steps": (0, 1e12),
    "neftune_noise_alpha": (0, 1e6),
    "torch_empty_cache_steps": (1, 1e9),
    "eval_accumulation_steps": (1, 1e9),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, 1024),
}
_ABOVE_ZERO = ("learning_rate", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")
_BELOW_MOST = ("adam_beta1", "adam_beta2")
_MOST_STEPS = 100_000_000
# What YAML 1.1 makes of the unquoted words.
_WORDS = {False: ("no", "none", "off"), True: ("yes", "on")}


def typed_value(key: str, value: Any, notes: list[str]) -> Any:
    """The value as the field wants it; YAML reads 2e-4 as text and an unquoted `no` as false."""
    kinds, words = kinds_of(key), _choices(key)
    if value is None:
        return "none" if key == "report_to" else None
    if isinstance(value, bool):
        return value if bool in kinds else _word(key, value, words)
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, Path):
        value = str(value)
    if kinds & {int, float} and not isinstance(value, dict | list | tuple):
        return number_of(key, value, whole=float not in kinds, text=str in kinds, notes=notes)
    if isinstance(value, str) and dict in kinds:
        value = _json_object(key, value)
    if isinstance(value, str) and words and value not in words:
        raise ConfigError(
            f"{shown(value)} is not known", where=f"{WHERE}.{key}", fix=did_you_mean(value, words)
        )
    fits = isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))
    if not fits and not (list in kinds and isinstance(value, tuple | set)):
        raise ConfigError(
            f"{shown(value)} was given", where=f"{WHERE}.{key}", expected=_expected(kinds, words)
        )
    return sorted(value) if isinstance(value, set) else list(value) if isinstance(value, tuple) else value


def number_of(key: str, value: Any, *, whole: bool, text: bool, notes: list[str]) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        if text and isinstance(value, str):
            return value
        expected = "a whole number" if whole else "a number"
        raise ConfigError(f"{shown(value)} was given", where=f"{WHERE}.{key}", expected=expected) from None
    if not math.isfinite(number) or (whole and number != int(number)):
        expected = "a whole number" if whole else "a finite number"
        raise ConfigError(f"{shown(value)} was given", where=f"{WHERE}.{key}", expected=expected)
    if isinstance(value, str):
        notes.append(f"{WHERE}.{key}: the text {value!r} was read as the number {number:g}")
    return int(number) if whole or isinstance(value, int) else number


def check_ranges(values: Mapping[str, Any]) -> None:
    for key, (least, most) in _RANGES.items():
        value = values.get(key)
        if not isinstance(value, int | float):
            continue
        above, below = key in _ABOVE_ZERO, key in _BELOW_MOST
        fits = (least < value if above else least <= value) and (value < most if below else value <= most)
        if not fits:
            low = "above 0" if above else f"{least:,}"
            high = f"below {most:,}" if below else f"{most:,}"
            raise ConfigError(
                f"{shown(value)} was given", where=f"{WHERE}.{key}", expected=f"a number from {low} to {high}"
            )
    steps = values.get("max_steps", -1)
    if not (1 <= steps <= _MOST_STEPS or steps == -1):
        raise ConfigError(
            f"`{steps}` was given",
            where=f"{WHERE}.max_steps",
            expected=f"1 to {_MOST_STEPS:,}, or -1 to count epochs instead",
        )


def word_of(value: Any) -> str:
    """The word of a field that holds an enumeration's member, or the word itself."""
    return str(getattr(value, "value", value))


@cache
def field_types() -> dict[str, Any]:
    hints = typing.get_type_hints(SFTConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(SFTConfig) if field.init}


@cache
def field_of(key: str) -> Any:
    return next(field for field in dataclasses.fields(SFTConfig) if field.name == key)


@cache
def kinds_of(key: str) -> frozenset[Any]:
    """The types that a field takes, with None for `NoneType`; `dict[str, Any]` is dict."""
    hint = field_types()[key]
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    plain = [typing.get_origin(part) or part for part in parts]
    return frozenset(None if kind is type(None) else kind for kind in plain)


def _choices(key: str) -> list[str]:
    """The words that a field takes; empty where it takes any text."""
    kinds = [kind for kind in kinds_of(key) if isinstance(kind, type) and issubclass(kind, Enum)]
    words = [str(member.value) for kind in kinds for member in kind]
    return words or list(field_of(key).metadata.get("choices", ()))


def _word(key: str, value: bool, words: list[str]) -> str:
    """The word that YAML read as a truth value."""
    known = [*words, "none"] if key == "report_to" else words
    for word in _WORDS[value]:
        if word in known:
            return word
    shown = str(value).lower()
    raise ConfigError(
        f"`{shown}` was given",
        where=f"{WHERE}.{key}",
        expected=_expected(kinds_of(key), words)
        + ("; YAML reads an unquoted yes, no, on or off as a truth value" if str in kinds_of(key) else ""),
    )


def _json_object(key: str, text: str) -> dict[str, Any]:
    """A mapping as the command lines of other tools take it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{shown(text)} was given", where=f"{WHERE}.{key}", expected="a mapping")
    return value


def _expected(kinds: frozenset[Any], words: list[str]) -> str:
    if words:
        return "one of " + ", ".join(words)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
    names[list] = "a list"
    if float in kinds:
        kinds -= {int}
    return " or ".join(name for kind, name in names.items() if kind in kinds) or "another value"
