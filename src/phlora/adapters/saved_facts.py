"""phlora.json: what Phlora writes beside an adapter's tensors, checked before its values are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phlora.errors import ModelError
from phlora.files import (
    ADAPTER_FACTS,
    Expected,
    is_count,
    is_number,
    is_text,
    read_json,
    require_values,
)

_LARGEST_TOKEN_ID = 2**31 - 1


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(is_count(entry) and entry <= _LARGEST_TOKEN_ID for entry in value)


def _are_blocks(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_layout, value.values()))


def _is_layout(entry: Any) -> bool:
    """The rows of each block of one module, which of them are adapted, and their ranks and scalings."""
    if not isinstance(entry, Mapping):
        return False
    sizes, enabled = entry.get("sizes"), entry.get("enabled")
    if not isinstance(sizes, Mapping) or not isinstance(enabled, list) or not enabled:
        return False
    is_right = all(is_count(rows) and rows for rows in sizes.values())
    is_right = is_right and all(isinstance(name, str) and name in sizes for name in enabled)
    per_block = ((entry.get("r"), lambda r: is_count(r) and r), (entry.get("scaling"), is_number))
    return is_right and all(
        values is None
        or (isinstance(values, list) and len(values) == len(enabled) and all(map(fits, values)))
        for values, fits in per_block
    )


# Key -> what its value has to be; any of them may be left out or null.
_EXPECTED: Expected = {
    "base_model": (is_text, "the name of a model"),
    "base_fingerprint": (is_text, "a text"),
    "stop_token_ids": (_are_token_ids, "a list of token ids"),
    "blocks": (_are_blocks, '"blocks": {layer: {"sizes": {block: rows}, "enabled": [block]}}'),
    "step": (is_count, "a whole number from 0 on"),
    "held_out_loss": (is_number, "a finite number"),
}


def read_adapter_facts(folder: Path) -> Mapping[str, Any]:
    """What phlora.json in an adapter folder says; nothing where there is none.

    Raises:
        ModelError: it cannot be read, or a value is none that Phlora could have written.
    """
    file = folder / ADAPTER_FACTS
    if not file.is_file():
        return {}
    facts = read_json(file, ModelError)
    require_values(facts, _EXPECTED, ModelError, where=str(file))
    return facts
