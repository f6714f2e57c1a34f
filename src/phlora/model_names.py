"""Settings of `model` under the names that transformers, bitsandbytes and other tools have for them.

A name that means the same as one of Phlora's own is taken for it, with a note. What has no equivalent is an error that
says what to do, and so are two names that contradict each other. The tables are the one place where these names stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from phlora.errors import ConfigError, masked, shown

# Another tool's name -> Phlora's, where a value of the one says the whole value of the other.
RENAMED = {
    "torch_dtype": "dtype",
    "device_map": "device",
    "pretrained_model_name_or_path": "name",
    "model_name_or_path": "name",
    "model_name": "name",
    "model_id": "name",
    "local_files_only": "offline",
    "_attn_implementation": "attn_implementation",
    "use_flash_attention_2": "attn_implementation",
}

# What bitsandbytes is told through transformers: together they are Phlora's `quantization`.
_BITS = ("load_in_4bit", "load_in_8bit")
_OF_4BIT = {
    "bnb_4bit_quant_type": "type",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
}
# Values that change nothing, of settings that Phlora has no other value for, and why.
_HARMLESS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "bnb_4bit_quant_storage": (("uint8", "torch.uint8"), "4-bit weights are kept as bytes"),
    "llm_int8_threshold": (
        (6.0, 0.0),
        "leave it out: int8 rounds the weights alone, so there are no outliers",
    ),
    "llm_int8_skip_modules": (
        ([], ["lm_head"]),
        "leave it out: the linear layers of the blocks are quantised",
    ),
    "llm_int8_enable_fp32_cpu_offload": ((False,), "leave it out: a model is on one device here"),
    "llm_int8_has_fp16_weight": ((False,), "leave it out: quantised weights do not train"),
}
_QUANTIZATION = ("quantization_config", *_BITS, *_OF_4BIT, *_HARMLESS)

# Accepted and left out, with what to say about it.
_NO_EFFECT = {
    "low_cpu_mem_usage": "weights are read one tensor at a time",
    "use_safetensors": "safetensors are read where there are some",
    "use_fast": "the fast tokenizer is taken where there is one",
    "use_fast_tokenizer": "the fast tokenizer is taken where there is one",
}
# Nothing here is equivalent: what to do in its place.
_INSTEAD = {
    "token": "log in with `hf auth login`, or set HF_TOKEN",
    "use_auth_token": "log in with `hf auth login`, or set HF_TOKEN",
    "cache_dir": "set HF_HOME",
    "max_memory": "leave it out: a model is on one device here; `phlora plan` says what it takes",
    "offload_folder": "leave it out: a model is on one device here; `phlora plan` says what it takes",
    "subfolder": "download the model, and name that folder as model.name",
    "variant": "download the model, and name its folder as model.name",
    "gguf_file": "name the .gguf file itself as model.name",
    "max_seq_length": "say it as training_config.max_length",
    "model_max_length": "say it as training_config.max_length",
    "use_gradient_checkpointing": "say it as training_config.gradient_checkpointing",
    "rope_scaling": "set it in the model's own config.json",
    "tokenizer_name_or_path": "save that tokenizer into the model's folder",
    "full_finetuning": "leave it out: Phlora trains LoRA adapters",
}

_DTYPE_WORDS = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}


@dataclass(frozen=True)
class OwnWords:
    """A section in Phlora's names.

    Attributes:
        values: the section.
        notes: what was renamed or left out, one sentence each.
        renamed: Phlora's name -> the name that was used.
    """

    values: dict[str, Any]
    notes: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)


def in_own_words(section: Mapping[str, Any], *, where: str = "model") -> OwnWords:
    """The same settings of a model under Phlora's names.

    Args:
        section: `model` of a configuration, or the fields that a model is loaded with.
        where: what a message calls it.

    Raises:
        ConfigError: a setting that nothing here is equivalent to, or two that contradict each other.
    """
    values = {key: value for key, value in section.items() if value is not None or not _is_foreign(key)}
    notes: list[str] = []
    renamed: dict[str, str] = {}
    for key in [key for key in values if key in _INSTEAD]:
        raise ConfigError(
            f"There is no such setting here ({shown(masked(values[key], key))} was given)",
            where=f"{where}.{key}",
            fix=_INSTEAD[key],
        )
    for key in [key for key in values if key in _NO_EFFECT]:
        del values[key]
        notes.append(f"{where}.{key} has no effect: {_NO_EFFECT[key]}")
    if "dtype" in values:
        values["dtype"] = _dtype(values["dtype"])
    for key in [key for key in values if key in RENAMED]:
        _rename(values, key, where, notes, renamed)
    _quantization(values, where, notes, renamed)
    return OwnWords(values, tuple(notes), renamed)


def other_spellings(key: str) -> frozenset[str]:
    """The names under which the same thing may have been said as under `key`; a later source replaces them all."""
    own = RENAMED.get(key, key)
    if key in _QUANTIZATION:
        return frozenset({"quantization"})
    if key == "quantization":
        return frozenset(_QUANTIZATION)
    return frozenset({own, *(name for name, meant in RENAMED.items() if meant == own)} - {key})


def _is_foreign(key: Any) -> bool:
    return key in RENAMED or key in _QUANTIZATION or key in _NO_EFFECT or key in _INSTEAD


# ------------------------------------------------------------------------------------ one name, one value


def _rename(values: dict[str, Any], key: str, where: str, notes: list[str], renamed: dict[str, str]) -> None:
    own, given = RENAMED[key], values.pop(key)
    if key == "use_flash_attention_2":
        value = "flash_attention_2" if given is True else None
    elif own == "dtype":
        value = _dtype(given)
    elif own == "device":
        value = _device(given, f"{where}.{key}")
    else:
        value = given
    if value is None:
        notes.append(f"{where}.{key} has no effect: {shown(given)} asks for nothing")
        return
    if values.get(own) is not None and values[own] != value:
        raise ConfigError(
            f"`{renamed.get(own, own)}: {values[own]}` and `{key}: {given}` contradict each other",
            where=where,
            fix=f"leave out `{key}`",
        )
    values[own], renamed[own] = value, key
    notes.append(f"{where}.{key} is called {where}.{own} here: {value}")


def _dtype(value: Any) -> Any:
    """A dtype of torch or one of its words, as its name; anything else as it is, for whoever reads it next."""
    name = str(value).removeprefix("torch.")
    is_dtype = isinstance(value, str) or type(value).__module__ == "torch"
    return _DTYPE_WORDS.get(name, name) if is_dtype else value


def _device(value: Any, where: str) -> str:
    """The one device that a `device_map` of transformers names."""
    places = (
        {str(_place(place)) for place in value.values()} if isinstance(value, Mapping) else {_place(value)}
    )
    if len(places) != 1 or places & {"balanced", "balanced_low_0", "sequential", "disk"}:
        raise ConfigError(
            f"{shown(value)} was given, and a model is on one device here",
            where=where,
            expected="auto, cpu, cuda, cuda:N or mps",
            fix="device: auto; `phlora plan` says whether it fits",
        )
    return str(places.pop())


def _place(place: Any) -> str:
    return f"cuda:{place}" if isinstance(place, int) and not isinstance(place, bool) else str(place)


# ------------------------------------------------------------------------------------------ bitsandbytes


def _quantization(values: dict[str, Any], where: str, notes: list[str], renamed: dict[str, str]) -> None:
    """What bitsandbytes is told, taken out of the section and put in as `quantization`."""
    said = {key: values.pop(key) for key in _QUANTIZATION if key in values}
    if not said:
        return
    names = ", ".join(said)
    said = _flat(said, where)
    own = _as_mapping(values.get("quantization"))
    if own is None:
        return  # whoever reads it next says what is wrong with it
    kind = _kind(said, own, where)
    if kind is None:
        notes.append(f"{where}: {names} quantise nothing" + (" further" if own else ""))
        return
    settings: dict[str, Any] = {"type": kind}
    if kind == "nf4":
        settings |= _of_nf4(said, where, notes)
        if not own:
            # What transformers takes where nobody says it; Phlora's own default is true.
            settings.setdefault("double_quant", False)
    for key, value in own.items():
        if settings.get(key, value) != value:
            raise _contradicts_quantization(own, names, where)
    values["quantization"] = {**settings, **own}
    renamed["quantization"] = next(iter(said))
    written = ", ".join(f"{key}: {_word(value)}" for key, value in values["quantization"].items())
    notes.append(f"{where}: {names} is {where}.quantization here: {{{written}}}")


def _as_mapping(quantization: Any) -> Mapping[str, Any] | None:
    """Phlora's own `quantization` as it stands beside them; empty where there is none, None where it is no such."""
    if is_dataclass(quantization) and not isinstance(quantization, type):
        return asdict(quantization)
    if isinstance(quantization, str):
        return {"type": quantization}
    if quantization is None or isinstance(quantization, Mapping):
        return quantization or {}
    return None


def _contradicts_quantization(own: Mapping[str, Any], names: str, where: str) -> ConfigError:
    written = ", ".join(f"{key}: {_word(value)}" for key, value in own.items())
    return ConfigError(
        f"`quantization: {{{written}}}` and {names} contradict each other",
        where=where,
        fix=f"leave out {names}",
    )


def _flat(said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`quantization_config` opened up beside the settings that stand outside of it."""
    config = said.get("quantization_config")
    flat = {key: value for key, value in said.items() if key != "quantization_config"}
    if config is None:
        return flat
    # Of an object what somebody set: its defaults are those of transformers.
    inner = config.to_diff_dict() if hasattr(config, "to_diff_dict") else config
    place = f"{where}.quantization_config"
    if not isinstance(inner, Mapping):
        raise ConfigError(
            f"{shown(config)} was given", where=place, expected="a mapping such as {load_in_4bit: true}"
        )
    method = inner.get("quant_method", "bitsandbytes")
    method = str(getattr(method, "value", method))
    if method != "bitsandbytes":
        raise ConfigError(
            f"A base is not quantised by `{method}` here",
            where=place,
            expected="quantization: nf4 or int8",
            fix=f"name a folder that {method} has quantised as model.name: it is loaded as it is",
        )
    for key, value in inner.items():
        key = str(key).removeprefix("_")
        if key in ("quant_method", "quantization_config") or value is None:
            continue
        if key not in _QUANTIZATION:
            raise ConfigError(f"Unknown key {shown(key)}", where=place, expected=", ".join(_QUANTIZATION[1:]))
        if flat.get(key, value) != value:
            raise ConfigError(
                f"`{key}: {value}` and `{key}: {flat[key]}` beside it contradict each other",
                where=place,
                fix="leave one of them out",
            )
        flat[key] = value
    return flat


def _kind(said: Mapping[str, Any], own: Mapping[str, Any], where: str) -> str | None:
    """nf4, int8, or None where nothing is to be quantised by these settings."""
    for key in said:
        if (
            key in _HARMLESS
            and said[key] not in _HARMLESS[key][0]
            and str(said[key]) not in _HARMLESS[key][0]
        ):
            raise ConfigError(f"{shown(said[key])} was given", where=f"{where}.{key}", fix=_HARMLESS[key][1])
        if key in _BITS and not isinstance(said[key], bool):
            raise ConfigError(
                f"{shown(said[key])} was given", where=f"{where}.{key}", expected="true or false"
            )
    wanted = [key for key in _BITS if said.get(key)]
    if len(wanted) == 2:
        raise ConfigError(
            "`load_in_4bit` and `load_in_8bit` contradict each other",
            where=where,
            fix="leave one of them out",
        )
    if wanted:
        return "nf4" if wanted == ["load_in_4bit"] else "int8"
    denied = {"nf4": "load_in_4bit", "int8": "load_in_8bit"}.get(str(own.get("type")))
    if denied in said:
        raise _contradicts_quantization(own, f"{denied}: false", where)
    return "nf4" if own.get("type") == "nf4" and said.keys() & _OF_4BIT.keys() else None


def _of_nf4(said: Mapping[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """The settings of 4-bit weights that were given."""
    settings: dict[str, Any] = {}
    kind = said.get("bnb_4bit_quant_type")
    if kind not in (None, "nf4"):
        raise ConfigError(
            f"{shown(kind)} was given",
            where=f"{where}.bnb_4bit_quant_type",
            expected="nf4: at the same size it rounds normally distributed weights less than fp4",
            fix="quantization: nf4",
        )
    if kind is None and "load_in_4bit" in said:
        notes.append(f"{where}.load_in_4bit means nf4 here; transformers' own default is fp4")
    if (double := said.get("bnb_4bit_use_double_quant")) is not None:
        settings["double_quant"] = double
    if (compute := said.get("bnb_4bit_compute_dtype")) is not None:
        settings["compute_dtype"] = _dtype(compute)
        if settings["compute_dtype"] == "float16":
            settings["compute_dtype"] = "float32"
            notes.append(
                f"{where}.bnb_4bit_compute_dtype: float32 in the place of float16, all of whose numbers it has"
            )
    return settings


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
