"""The settings of another tool's file, taken out one by one, and what was decided about each.

A setting is mapped to one of Phlora's, left out with a reason, or refused with an error. What nobody took is left out
too, and said: nothing is dropped silently. Empty settings say nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from phlora.errors import ConfigError, masked, shown

Left = Mapping[str, str]
# Sections that become `data.files` or `data.eval` as a whole; their settings are accounted for one by one there.
_SECTIONS_OF_ROWS = ("dataset", "dataset_val")
_ONE_OR_MORE = (
    *("peft_config.r", "training_config.max_length"),
    *("training_config.per_device_train_batch_size", "training_config.per_device_eval_batch_size"),
    "training_config.gradient_accumulation_steps",
)
_ABOVE_ZERO = ("peft_config.lora_alpha", "training_config.num_train_epochs")
_BELOW_ONE = ("training_config.adam_beta1", "training_config.adam_beta2", "peft_config.lora_dropout")
# Where -1 means that there is none.
_ANY_NUMBER = ("training_config.max_steps", "training_config.save_total_limit")
ANYWAY = "nothing to do: that is so here anyway"
NOT_SHOWN = "(not shown)"
UNKNOWN = "nothing here has this meaning, or its name is not known"


@dataclass(frozen=True)
class Mapped:
    """A value of Phlora's configuration, and where it comes from.

    Attributes:
        target: dotted key of Phlora's configuration.
        source: key in the other tool's file; empty for a default of that tool.
        remark: what a person should know.
    """

    target: str
    value: Any
    source: str = ""
    remark: str = ""


@dataclass(frozen=True)
class LeftOut:
    """A setting that Phlora's configuration has no place for, and why."""

    source: str
    value: Any
    why: str


@dataclass
class Settings:
    """One file on its way.

    Args:
        tool: as people call it.
        file: its name, for messages.
        values: dotted key -> value; keys without a value are gone.
    """

    tool: str
    file: str
    values: dict[str, Any]
    mapped: dict[str, Mapped] = field(default_factory=dict)
    left: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    taken: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------------------- taking

    def take(self, key: str) -> Any:
        """The value of a setting, or None; it counts as decided about from now on."""
        if key in self.values:
            self.taken[key] = self.values.pop(key)
            return self.taken[key]
        return None

    def flag(self, key: str) -> bool | None:
        value = self.take(key)
        if isinstance(value, str) and value.strip().lower() in _TRUTHS:
            value = _TRUTHS[value.strip().lower()]
        if value is None or isinstance(value, bool):
            return value
        raise self.error(key, value, "true or false")

    def number(self, key: str, *, whole: bool = False) -> int | float | None:
        """A number; YAML reads 2e-4 as text, which is one too."""
        value = self.take(key)
        if value is None:
            return None
        number = _number(value)
        if number is None or (whole and number != int(number)):
            raise self.error(key, value, "a whole number" if whole else "a number")
        return int(number) if whole else number

    def text(self, key: str) -> str | None:
        value = self.take(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise self.error(key, value, "text")

    def numbers_of(self, key: str, count: int) -> list[int | float] | None:
        """So many numbers in a list."""
        value = self.take(key)
        found = [_number(entry) for entry in value] if isinstance(value, list) else []
        if value is not None and (len(found) != count or None in found):
            raise self.error(key, value, f"{count} numbers in a list")
        return [number for number in found if number is not None] or None

    def names(self, key: str) -> list[str] | None:
        """Names in a list, or in a text with commas between them."""
        value = self.take(key)
        if isinstance(value, str):
            value = [name.strip() for name in value.split(",") if name.strip()]
        if value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return value
        raise self.error(key, value, "names, in a list or with commas between them")

    def pairs(self, key: str) -> dict[str, str]:
        """A mapping of names to names."""
        given = self.take(key)
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            raise self.error(key, given, "a mapping of names to names")
        for name, value in given.items():
            if value is not None and not isinstance(value, str):
                raise self.error(f"{key}.{name}", value, "a name, as text")
        return {str(name): value for name, value in given.items() if value is not None}

    # ----------------------------------------------------------------------------- deciding

    def put(self, target: str, value: Any, source: str = "", remark: str = "") -> None:
        """Map a setting; one without a value is left to Phlora.

        Raises:
            ConfigError: a number below what has a meaning.
        """
        if isinstance(value, int | float) and not isinstance(value, bool):
            bound = _bound(target)
            if value < bound or (value == 0 and target in _ABOVE_ZERO):
                raise self.error(
                    source, value, "above 0" if target in _ABOVE_ZERO else f"{bound:.0f} or more"
                )
            if value >= 1 and target in _BELOW_ONE:
                raise self.error(source, value, "below 1")
        if value is not None:
            given, value = value, self._cleaned(target, value)
            if value != given:
                looks_only = isinstance(given, str) and given.startswith("hf_")
                self.notes.append(
                    f"{source}: a password or token in it is not written down"
                    + ("; a folder that is called so is named as ./hf_…" if looks_only else "")
                )
            self.mapped[target] = Mapped(target, value, source, remark)

    def _cleaned(self, target: str, value: Any) -> Any:
        """A value as it may be written: what begins with `hf_` is a token, unless it names a place."""
        if target == "output" and isinstance(value, str):
            return value if masked(value) == value else cleaned(value)
        return cleaned(value, is_place=self.is_there)

    def is_there(self, name: str) -> bool:
        """Whether a file or folder is called so, from here or beside the file."""
        return any(exists(folder / name) for folder in (Path(), Path(self.file).parent))

    def put_default(self, target: str, value: Any) -> None:
        """What the tool does where its file says nothing and Phlora would do otherwise."""
        if target not in self.mapped:
            self.put(target, value, remark=f"{self.tool}'s default")

    def leave(self, key: str, why: str) -> None:
        """Leave a setting out, where it is given."""
        if key in self.values:
            self.left.append(LeftOut(key, hidden(self.values.pop(key), key), why))

    def leave_value(self, key: str, value: Any, why: str) -> None:
        """Leave out one that was taken already."""
        self.left.append(LeftOut(key, hidden(value, key), why))

    def miss(self, key: str, value: Any, why: str) -> None:
        """Leave out a value that changes what is trained: a person should look at it."""
        self.leave_value(key, value, why)
        self.notes.append(f"{key}: {shown(hidden(value, key))} is not done here: {why}")

    def look_at(self, key: str, why: str) -> None:
        """Leave out a setting that changes what is trained, where it is given and not turned off."""
        if self.values.get(key) is False:
            self.leave(key, ANYWAY)
        elif key in self.values:
            self.miss(key, self.values.pop(key), why)

    def look_at_all(self, left: Left) -> None:
        for key, why in left.items():
            self.look_at(key, why)

    def leave_all(self, left: Left) -> None:
        for key, why in left.items():
            self.leave(key, why)

    def leave_rest(self) -> None:
        """Account for whatever is not accounted for: it asks for what is so anyway, or it is not known."""
        told = {name.strip() for one in self.mapped.values() for name in one.source.split(",")}
        told |= {one.source for one in self.left}
        sections = {f"{name}." for name in told if name in _SECTIONS_OF_ROWS}
        for key, value in self.taken.items():
            if key not in told and not key.startswith(tuple(sections)):
                self.leave_value(key, value, ANYWAY)
        self.leave_unknown()

    def leave_unknown(self) -> None:
        """Whatever else there is may change the training: nobody here knows."""
        for key in list(self.values):
            self.miss(key, self.values.pop(key), UNKNOWN)

    def adopt(self, part: Settings, name: str) -> None:
        """What was left out of a part of the file, such as one data set."""
        self.left += [replace(out, source=f"{name}.{out.source}") for out in part.left]
        self.notes += [f"{name}.{note}" for note in part.notes]

    def refuse(self, key: str, value: Any, what: str, fix: str) -> ConfigError:
        """What would train something else."""
        return ConfigError(f"{shown(hidden(value, key))} {what}", where=f"{self.file}: {key}", fix=fix)

    def error(self, key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(
            f"{shown(hidden(value, key))} was given", where=f"{self.file}: {key}", expected=expected
        )

    def values_at(self, section: str) -> Iterable[str]:
        """The keys that are still there of a section."""
        return [key for key in self.values if key.startswith(f"{section}.")]


# `wandb_token` and the like, which only a configuration holds; `pad_token` and its kin are words of a model.
_SECRET = re.compile(
    r"(?:^|[._])(?:token|api_key|key|secret|password|passwd|pwd|auth|authorization|bearer|cookie|credentials?|sas_url)$"
)
_WORDS_OF_MODELS = re.compile(r"(?:pad|eos|bos|unk|cls|sep|mask)_token$")


def hidden(value: Any, key: str) -> Any:
    """A value as messages and files may show it: without what opens a door."""
    if isinstance(value, Mapping):
        return {name: hidden(entry, str(name)) for name, entry in value.items()}
    if _SECRET.search(key) and not _WORDS_OF_MODELS.search(key):
        return NOT_SHOWN
    return cleaned(masked(value, key.rpartition(".")[2]))


# What signs an address, beside what `masked` knows.
_SIGNED = re.compile(r"([?&](?:sig|signature|key|auth|pwd|x-amz-[\w-]+)=)[^&\s]+", re.IGNORECASE)


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or none at all
        return False


def cleaned(value: Any, *, is_place: Callable[[str], bool] = lambda name: False) -> Any:
    """A value without tokens, and without passwords of addresses, wherever they stand in it.

    Args:
        is_place: whether a text that looks like a token is the name of a file or folder.
    """
    if isinstance(value, Mapping):
        return {name: cleaned(entry, is_place=is_place) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(cleaned(entry, is_place=is_place) for entry in value)
    if not isinstance(value, str):
        return value
    if value.startswith("hf_") and is_place(value):
        return value
    return NOT_SHOWN if value.lstrip().startswith("hf_") else _SIGNED.sub(rf"\1{NOT_SHOWN}", masked(value))


def _bound(target: str) -> float:
    """The least number that has a meaning."""
    return -math.inf if target in _ANY_NUMBER else 1 if target in _ONE_OR_MORE else 0


def _number(value: Any) -> int | float | None:
    """The number that a value is, or None; whole ones to the last digit, which a float would round."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,40}\s*", value):
        return int(value)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def flattened(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys for mappings in mappings; lists stay as they are, and what is empty says nothing."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{name}.")
        elif value is not None and value != "" and value != []:
            flat[name] = value
    return flat


def said(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The settings of a flat file that say something."""
    return {str(key): value for key, value in values.items() if value not in (None, "", [], {})}
