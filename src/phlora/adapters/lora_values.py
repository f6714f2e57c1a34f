"""Whether the values of `peft_config` are of the types that PEFT's `LoraConfig` declares for them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from peft import LoraConfig

from phlora.errors import ConfigError, shown

# No weight of any model is as wide.
LARGEST_RANK = 100_000
# A name that stands for many, such as pissa_niter_16, is PEFT's to check.
_OPEN = ("init_lora_weights", "target_modules", "exclude_modules")


def check_types(values: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: a value of another type, with the key and what it takes.
    """
    for key, value in values.items():
        hint = _hints().get(key)
        if hint is None or _fits(value, hint) or (key == "lora_alpha" and isinstance(value, float)):
            continue
        if key in _OPEN and isinstance(value, str):
            continue
        raise ConfigError(f"{shown(value)} was given", where=f"peft_config.{key}", expected=_words(hint))


def expected_type(key: str, value: Any) -> str | None:
    """What a key of an adapter_config.json has to hold, where its value, as JSON has it, is none of that.

    None where it is right, or PEFT's `LoraConfig` has no such key.
    """
    hint = _hints().get(key)
    if hint is None or _fits(value, hint) or (key in _OPEN and isinstance(value, str)):
        return None
    parts = typing.get_args(hint) or (hint,)
    # Objects are written as mappings.
    if isinstance(value, Mapping) and any(map(dataclasses.is_dataclass, parts)):
        return None
    return _words(hint)


@cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(LoraConfig)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is typing.Literal:
        return value in inner and type(value) in {type(choice) for choice in inner}
    if hint in (bool, str, int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return (
            number and (hint is float or isinstance(value, int))
            if hint in (int, float)
            else type(value) is hint
        )
    if origin in (list, tuple) or hint is list:
        return isinstance(value, list | tuple | set) and all(_fits(part, inner[0]) for part in value if inner)
    if origin is dict or hint is dict:
        pairs = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        return pairs and (not inner or all(_fits(part, inner[1]) for part in value.values()))
    if hint is type(None):
        return value is None
    return isinstance(value, hint) if isinstance(hint, type) else True


def _words(hint: Any) -> str:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return " or ".join(dict.fromkeys(filter(None, map(_word, parts))))


def _word(hint: Any) -> str:
    names: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "a mapping",
        type(None): "",
    }
    if hint in names:
        return names[hint]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is dict:
        return "a mapping"
    if origin in (list, tuple):
        kinds: dict[Any, str] = {int: "whole numbers", str: "names"}
        return f"a list of {kinds.get(inner[0], 'values') if inner else 'values'}"
    name = str(getattr(hint, "__name__", ""))
    return f"a peft {name} object" if dataclasses.is_dataclass(hint) else name
