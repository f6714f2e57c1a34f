"""A configuration as YAML, with where each value comes from, and what was left out, as comments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from phlora.display import printable
from phlora.errors import shown
from phlora.importing.settings import LeftOut, Mapped

_SECTIONS = ("model", "data", "training_config", "peft_config", "evaluation")
_WIDTH = 46


def as_yaml(title: str, mapped: Mapping[str, Mapped], left: Iterable[LeftOut], notes: Iterable[str]) -> str:
    """The text of a configuration file."""
    lines = [f"# {_plain(title)}", "# Look at it with `phlora plan`, then `phlora train`."]
    for section in _SECTIONS:
        values = {key.partition(".")[2]: one for key, one in mapped.items() if key.startswith(f"{section}.")}
        if values:
            lines += ["", f"{section}:"]
        for key, one in values.items():
            if key in ("files", "eval"):
                lines += _commented(f"  {key}:", one)
                lines += [f"    - {_flow(entry)}" for entry in one.value]
            else:
                lines += _commented(f"  {key}: {_flow(one.value)}", one)
    if "output" in mapped:
        lines += ["", *_commented(f"output: {_flow(mapped['output'].value)}", mapped["output"])]
    told = list(notes)
    if told:
        lines += ["", "# To look at:", *(f"# - {_plain(note)}" for note in told)]
    gone = list(left)
    if gone:
        lines += ["", "# Left out:"]
        lines += [
            f"# - {_plain(one.source)}: {_plain(shown(one.value))[1:-1]}: {_plain(one.why)}" for one in gone
        ]
    return "\n".join(lines) + "\n"


def as_values(mapped: Mapping[str, Mapped]) -> dict[str, Any]:
    """The same configuration as nested mappings."""
    values: dict[str, Any] = {}
    for target, one in mapped.items():
        section, dot, key = target.partition(".")
        if dot:
            values.setdefault(section, {})[key] = one.value
        else:
            values[section] = one.value
    return values


def _commented(line: str, one: Mapped) -> list[str]:
    said = "; ".join(part for part in (one.source, one.remark) if part)
    return [f"{line:<{_WIDTH}}  # {_plain(said)}" if said else line]


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").removesuffix("\n")


def _plain(text: str) -> str:
    """On one line, so that nothing from a file can leave its comment."""
    return printable(" ".join(str(text).split()))
