"""`SFTConfig` and `TrainingArguments` for scripts of any age: TRL's and transformers' own, by old names as well."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import transformers
from trl.trainer.sft_config import SFTConfig as TrlConfig

from phlora.dropin.machine import fit_machine
from phlora.dropin.tell import warn
from phlora.errors import ConfigError
from phlora.names import ARGUMENTS, DATASET_KWARGS, SETTINGS, Today, by_todays_names, one_message

_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


class _OfAnyAge:
    """What a script's `@dataclass` subclass is made with: its generated `__init__` would go past the one here."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        for kind in cls.__mro__[: cls.__mro__.index(_OfAnyAge) - 1]:
            init = vars(kind).get("__init__")
            if inspect.isfunction(init) and _is_generated(kind, init):
                setattr(kind, "__init__", _by_any_name(kind, init))  # noqa: B010
        return super().__new__(cls)


class SFTConfig(_OfAnyAge, TrlConfig):
    """`trl.SFTConfig`, which takes the names of older versions as well.

    An old name that means the same is taken with a line in the log that says the new one; what cannot be done as it was
    meant is one error that lists all of it. Settings that this machine cannot have (16-bit precision, kernels and
    optimizers that need a GPU) are replaced, with a line, where nothing is lost by it.

    Raises:
        ConfigError: arguments that are not known, or gone for good.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _fill(self, super().__init__, settings_of(TrlConfig, args, kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _CHECKPOINTING and "given" in vars(self):
            # Set by the script on what was made: said as well, under both names, of which the library reads either.
            vars(self).update(dict.fromkeys(_CHECKPOINTING, value))
            vars(self)["given"] |= {name}


class TrainingArguments(_OfAnyAge, transformers.TrainingArguments):
    """`transformers.TrainingArguments`, which takes the names of older versions as well; see `SFTConfig`.

    Raises:
        ConfigError: arguments that are not known, or gone for good.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _fill(self, super().__init__, settings_of(transformers.TrainingArguments, args, kwargs))


def _fill(config: Any, init: Callable[..., None], values: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        if "gradient_checkpointing" not in values:
            # TRL says it of its own default.
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        init(**values)
    config.given = _written_down(config, values)


def _is_generated(kind: type, init: Any) -> bool:
    return "__dataclass_params__" in vars(kind) and init.__code__.co_filename == "<string>"


def _by_any_name(kind: type, init: Callable[..., None]) -> Callable[..., None]:
    """The `__init__` that `dataclass` has generated, taking arguments as the class does that it is derived from."""

    @functools.wraps(init)
    def filled(self: Any, *args: Any, **kwargs: Any) -> None:
        names = [field.name for field in dataclasses.fields(kind) if field.init]
        # Defaults of the script's own are written down too.
        own = {k: v for k, v in _own_defaults(kind).items() if k not in names[: len(args)]}
        _fill(self, functools.partial(init, self), settings_of(kind, args, {**own, **kwargs}))

    return filled


def _own_defaults(kind: type) -> dict[str, Any]:
    """The values that a script's subclass gives to settings of the library's."""
    position = kind.__mro__.index(_OfAnyAge)
    libraries = {field.name for field in dataclasses.fields(kind.__mro__[position + 1])}
    written = {
        name for each in kind.__mro__[: position - 1] for name in vars(each).get("__annotations__", ())
    }
    fields: list[Any] = [field for field in dataclasses.fields(kind) if field.name in libraries & written]
    values = {}
    for field in fields:
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return {field.name: values[field.name] for field in fields if field.init and field.name in values}


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
