"""The configuration beside an adapter's tensors, checked before PEFT takes its values as they stand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phlora.errors import ModelError
from phlora.files import read_json


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_names(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _maps_to(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(is_right, value.values())))


# Key -> what its value has to be; PEFT's own names. Keys that are left out have PEFT's defaults.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number from 1 on"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_number, "a number"),
    "rank_pattern": (_maps_to(_is_rank), "layers with whole numbers from 1 on"),
    "alpha_pattern": (_maps_to(_is_number), "layers with numbers"),
    "target_modules": (_are_names, "names of layers"),
    "modules_to_save": (_are_names, "names of layers"),
    "base_model_name_or_path": (_is_text, "the name of a model"),
    "revision": (_is_text, "a revision"),
}


def read_adapter_config(file: Path) -> Mapping[str, Any]:
    """The contents of an adapter_config.json of a LoRA adapter.

    Raises:
        ModelError: it cannot be read, is of another kind, or a value is none that PEFT could have written.
    """
    facts = read_json(file, ModelError)
    if facts.get("peft_type") != "LORA":
        raise ModelError(
            f"The adapter is of the kind {facts.get('peft_type')}", where=str(file), expected="a LoRA adapter"
        )
    for key, (is_right, expected) in _EXPECTED.items():
        if key in facts and not is_right(facts[key]):
            raise ModelError(f"`{key}` is {facts[key]!r:.60}", where=str(file), expected=expected)
    return facts
