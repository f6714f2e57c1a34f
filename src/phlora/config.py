"""What a run is made of: a few frozen dataclasses, read from YAML, JSON, arguments or the command line.

`training_config` and `peft_config` stay plain dictionaries here: their keys are the fields of TRL's
`SFTConfig` and PEFT's `LoraConfig`, checked where those libraries are imported. Everything else is checked in
this module, before anything heavy is loaded. `None` means "derive"; what was derived, and from where, is
saved beside the run.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from phlora.config_values import apply_overrides, kind_of, read_config, written_out
from phlora.errors import ConfigError, did_you_mean, shown
from phlora.model_names import OwnWords, in_own_words

# Set to 1 it lets code run that comes with the base model of a run, where the run was trained with it.
TRUST_VARIABLE = "PHLORA_TRUST_REMOTE_CODE"
_MOST_TOKENS = 1_000_000
# Of `RunConfig`, and nothing that a configuration says.
_NOT_SET = ("origins", "notes")
TrainOn = Literal["assistant", "last", "all"]
TooLong = Literal["truncate_history", "drop", "error"]
Speed = Literal["auto", "reference"]
QuantizationType = Literal["nf4", "int8"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
# The base that an adapter of a quantised one is merged into.
MergeBase = Literal["auto", "full", "dequantized"]


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One data file, or several under one name, and what is to be known about it; `path` alone mostly does."""

    path: str = field(
        metadata={
            "help": "a file, a zip archive, a folder, a pattern such as chats/*.jsonl, or a hub data set"
        }
    )
    weight: float = field(default=1.0, metadata={"help": "loss weight of each of its trained tokens"})
    format: str | None = field(default=None, metadata={"help": "in place of data.format, for this file"})
    columns: Mapping[str, str] = field(
        default_factory=dict,
        metadata={"help": "new name: name in the file, such as {question: Frage, answer: meta.reply}"},
    )
    split: str | None = field(default=None, metadata={"help": "of a folder or data set; sheet of a workbook"})
    limit: int | None = field(default=None, metadata={"help": "read only the first so many rows"})
    encoding: str | None = field(default=None, metadata={"help": "of a text file; none: UTF-8, or guessed"})


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the base model's linear layers are stored while an adapter trains on them; `nf4` alone means its type."""

    type: QuantizationType = field(metadata={"help": "nf4 (4 bits) or int8"})
    double_quant: bool = field(default=True, metadata={"help": "nf4: store the scales in 8 bits too"})
    compute_dtype: ComputeDtype = field(
        default="auto", metadata={"help": "of the products; auto: that of the activations"}
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to tune and how it is loaded."""

    name: str = field(metadata={"help": "hub id, local folder, .gguf file or embedded name (smollm2-135m)"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub model"})
    dtype: str = field(
        default="auto", metadata={"help": "what is computed with: auto, float32, bfloat16 or float16"}
    )
    attn_implementation: str = field(
        default="auto", metadata={"help": "auto, sdpa, eager or flash_attention_2"}
    )
    use_cache: bool = field(default=False, metadata={"help": "key/value cache while training; never needed"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:N or mps"})
    storage_dtype: str = field(
        default="auto",
        metadata={"help": "what frozen weights are stored as: auto, float32, bfloat16, float16, nf4 or int8"},
    )
    quantization: QuantizationConfig | None = field(
        default=None,
        metadata={"help": "nf4 or int8: the base in 4 or 8 bits (QLoRA), as storage_dtype; none: as it is"},
    )
    offline: bool = field(default=False, metadata={"help": "never ask a hub; use what is on this machine"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code shipped with a model"})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The chats, the held-out rows, and which of their tokens are trained."""

    files: tuple[DataFile, ...] = field(metadata={"help": "training rows"})
    eval: tuple[DataFile, ...] = field(default=(), metadata={"help": "held-out rows; none: split off"})
    eval_size: float = field(
        default=0.1,
        metadata={"help": "split off for evaluation when `eval` is not given: a share below 1, or rows"},
    )
    group_by: str | None = field(
        default=None,
        metadata={"help": "column or key whose rows stay on one side of the split, such as a chat's id"},
    )
    stratify_by: str | None = field(
        default=None, metadata={"help": "column or key of which each value has its share of held-out rows"}
    )
    format: str = field(default="auto", metadata={"help": "auto, or the format when detection is wrong"})
    train_on: TrainOn = field(default="assistant", metadata={"help": "assistant turns, the last one, or all"})
    too_long: TooLong = field(
        default="truncate_history",
        metadata={"help": "for rows over max_length: drop the oldest turns, the row, or stop"},
    )
    reasoning: Literal["drop", "keep"] = field(
        default="drop",
        metadata={
            "help": "what was thought before answers, where the template has no place: drop it, or keep as text"
        },
    )
    strict: bool = field(
        default=False, metadata={"help": "do not train when there are warnings about the data"}
    )
    cache: bool = field(
        default=True, metadata={"help": "keep tokenised rows in the cache folder for the next start"}
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the base and the tuned model are compared on the held-out rows."""

    metrics: tuple[str, ...] = field(
        default=("auto",),
        metadata={
            "help": "auto (what fits the expected answers), exact_match, json_valid, json_equal, rouge1, rouge2, "
            "rougeL, rougeLsum, contains:TEXT, regex:PATTERN"
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "longest generated answer, in tokens"})
    max_answers: int = field(
        default=100, metadata={"help": "held-out rows answered by generation; 0: loss only"}
    )
    enabled: bool = field(default=True, metadata={"help": "compare base and tuned model after training"})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One fine-tuning run.

    `origins` maps every dotted key that was set to where: a file, `--set`, an option or an argument; `notes` say what
    was given under another tool's name.
    """

    model: ModelConfig
    data: DataConfig
    training_config: Mapping[str, Any] = field(default_factory=dict)
    peft_config: Mapping[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: str = "runs/run"
    speed: Speed = field(
        default="auto",
        metadata={"help": "auto: the fastest exact way for the data; reference: plain padded rows or packs"},
    )
    origins: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML or JSON configuration file and apply `section.key=value` overrides.

    Raises:
        ConfigError: the file is missing, is no mapping, or holds an unknown key or a value of the wrong type.
    """
    values, origins = read_config(path)
    return build_config(*apply_overrides(values, overrides, origins))


def build_config(values: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> RunConfig:
    """Check a mapping and freeze it.

    Raises:
        ConfigError: an unknown key, a missing one, or a value of the wrong type, with the nearest valid name.
    """
    values = {key: value for key, value in written_out(values).items() if value is not None}
    for key in _NOT_SET:
        if key in values:
            raise ConfigError(f"Unknown key `{key}`", where="configuration")
    for key in ("model", "data"):
        if key not in values:
            raise ConfigError(
                f"`{key}` is missing",
                expected=f"`{key}:` in the configuration, or --{key} on the command line",
            )
    notes: tuple[str, ...] = ()
    if isinstance(values["model"], Mapping):
        own = in_own_words(values["model"])
        values["model"], notes = own.values, own.notes
        origins = _renamed(origins or {}, own)
    config: RunConfig = _build(RunConfig, {**values, "origins": dict(origins or {})}, where="")
    config = replace(config, notes=notes)
    _check_ranges(config)
    return config


def quantization_config(
    value: str | Mapping[str, Any] | QuantizationConfig | None,
) -> QuantizationConfig | None:
    """`nf4`, or a mapping of `QuantizationConfig` fields, checked; one that is typed already stays as it is.

    Raises:
        ConfigError: an unknown type or key, with the nearest valid name.
    """
    if value is None or isinstance(value, QuantizationConfig):
        return value
    values = {"type": value} if isinstance(value, str) else value
    config: QuantizationConfig = _convert(values, QuantizationConfig, where="model.quantization")
    return config


def parse_columns(assignments: Sequence[str]) -> dict[str, str]:
    """The `columns` of a `DataFile` as a command line says them: `question=Frage,answer=Antwort`.

    Raises:
        ConfigError: an assignment without a name on each side, or the same name twice.
    """
    columns: dict[str, str] = {}
    for assignment in (part for text in assignments for part in text.split(",")):
        new, equals, old = (part.strip() for part in assignment.partition("="))
        if not equals or not new or not old:
            raise ConfigError(
                f"`{assignment}` names no column",
                where="--columns",
                expected="NEW=OLD, for example question=Frage,answer=Antwort",
            )
        if new in columns:
            raise ConfigError(f"`{new}` is named twice", where="--columns", fix="name each column once")
        if old in columns.values():
            raise ConfigError(
                f"The column `{old}` is taken twice", where="--columns", fix="name each column once"
            )
        columns[new] = old
    return columns


def default_output(data: str) -> str:
    """The run folder of data: `runs/chats` for chats.jsonl, chats.jsonl.gz and the hub data set owner/chats."""
    name = re.sub(r"\.(gz|zst|bz2|xz)$", "", Path(data).name, flags=re.IGNORECASE)
    name = Path(name).stem
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    return f"runs/{name or 'run'}"


def resolved(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain values, without where they came from and without what opens a door (`hub_token`):
    what is written down is meant to be handed on."""
    values = {name: value for name, value in _plain(config).items() if name not in _NOT_SET}
    settings = values["training_config"]
    values["training_config"] = {name: settings[name] for name in settings if not str(name).endswith("token")}
    return values


def _renamed(origins: Mapping[str, str], own: OwnWords) -> dict[str, str]:
    """Where each value of `model` came from, under the name that it has now."""
    sources = dict(origins)
    for name, used in own.renamed.items():
        if found := sources.get(f"model.{used}"):
            sources.setdefault(f"model.{name}", found)
    kept = {f"model.{name}" for name in own.values}
    return {
        key: source
        for key, source in sources.items()
        if not key.startswith("model.") or ".".join(key.split(".")[:2]) in kept
    }


def _check_ranges(config: RunConfig) -> None:
    checks = [
        (bool(config.model.name.strip()), "model.name", "the name of a model"),
        (bool(config.data.files), "data.files", "at least one file"),
        (bool(config.output.strip()), "output", "the name of a folder"),
        (_can_be_a_path(config.output), "output", "a name that a folder can have"),
        (_can_be_a_path(config.model.name), "model.name", "a name that a model can have"),
        (
            0 <= config.data.eval_size < math.inf,
            "data.eval_size",
            "0 or more: a share below 1, or a number of rows",
        ),
        (
            1 <= config.evaluation.max_new_tokens <= _MOST_TOKENS,
            "evaluation.max_new_tokens",
            "1 or more, and 1,000,000 at most",
        ),
        (config.evaluation.max_answers >= 0, "evaluation.max_answers", "0 or more"),
        (all(0 < f.weight < math.inf for f in config.data.files), "data.files.weight", "a number above 0"),
        (all(f.limit is None or f.limit > 0 for f in config.data.files), "data.files.limit", "1 or more"),
    ]
    for holds, where, expected in checks:
        if not holds:
            raise ConfigError("The value is out of range", where=where, expected=expected)


def _can_be_a_path(text: str) -> bool:
    """Whether a file system takes this name: no null byte, no half of a character, no part of over 255 bytes."""
    try:
        parts = [len(part.encode()) for part in text.replace("\\", "/").split("/")]
    except UnicodeEncodeError:
        return False
    return "\0" not in text and max(parts) <= 255 and sum(parts) <= 3000


def _build(cls: type[Any], values: Mapping[str, Any], *, where: str) -> Any:
    known = {f.name: f for f in fields(cls)}
    settable = [name for name in known if name not in _NOT_SET]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"Unknown key `{key}`", where=where or "configuration", fix=did_you_mean(str(key), settable)
            )
    hints = typing.get_type_hints(cls)
    values = {key: value for key, value in values.items() if value is not None}
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"`{name}` is missing", where=where, expected=f.metadata.get("help", ""))
    return cls(**{k: _convert(v, hints[k], where=f"{where}.{k}" if where else k) for k, v in values.items()})


def _convert(value: Any, hint: Any, *, where: str) -> Any:
    """`value` as the type that the field declares, or a ConfigError that names both."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise _wrong_type(value, "a mapping", where)
        return _build(hint, value, where=where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            value = [value]
        return tuple(_convert(entry, arguments[0], where=where) for entry in value)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(value, arguments[0], where=where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(
                f"{shown(value)} is not known", where=where, fix=did_you_mean(str(value), arguments)
            )
        return value
    if origin is not None:  # Mapping[str, Any] or Mapping[str, str]
        if not isinstance(value, Mapping):
            raise _wrong_type(value, "a mapping", where)
        if arguments[1] is str:
            return {str(key): _convert(item, str, where=f"{where}.{key}") for key, item in value.items()}
        return dict(value)
    return _scalar(value, hint, where=where)


def _scalar(value: Any, kind: type[Any], *, where: str) -> Any:
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
        raise _wrong_type(value, "true or false" if kind is bool else _NAMES[kind], where)
    if kind is str:
        if isinstance(value, str | Path):
            return str(value)
        raise _wrong_type(value, "text", where)
    try:
        # YAML 1.1 reads 2e-4 as text, so numbers in quotes are numbers here.
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _wrong_type(value, _NAMES[kind], where) from None
    if kind is int:
        if not number.is_integer():  # infinite and NaN neither
            raise _wrong_type(value, _NAMES[int], where)
        return int(number)
    return number


_NAMES: dict[type[Any], str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _wrong_type(value: Any, expected: str, where: str) -> ConfigError:
    return ConfigError(f"{kind_of(value)} was given", where=where, expected=expected)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
