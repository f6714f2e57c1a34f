"""The values of a configuration before they are checked: from files and `--set`, and where each came from."""

from __future__ import annotations

import codecs
import contextlib
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from phlora.errors import ConfigError, did_you_mean, shown
from phlora.model_names import other_spellings
from phlora.parameters import require_path

Origins = dict[str, str]
# Values in a configuration, their characters and levels: far more than one has, and far fewer than a trap.
_MOST_VALUES, _MOST_CHARACTERS, _DEEPEST = 100_000, 20_000_000, 100
# What a value that is no mapping means where a section belongs.
_SHORT_KEYS = {"model": "model.name", "data": "data.files", "model.quantization": "model.quantization.type"}


def read_config(path: str | Path) -> tuple[dict[str, Any], Origins]:
    """The values in a configuration file, shorthands written out, and the origin of each."""
    values = written_out(read_mapping(path))
    return values, dict.fromkeys(_leaves(values), str(path))


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file: UTF-8, or with the byte order mark of UTF-16.

    Raises:
        ConfigError: there is no such file, it is neither, or it is made to be larger than it looks.
    """
    require_path(path, where="configuration", expected="a YAML or JSON file")
    path = Path(path)
    try:
        values = _parsed(_text_of(path.read_bytes()))
        _require_reasonable(values, str(path))
    except (FileNotFoundError, NotADirectoryError):
        siblings = (
            [str(path.with_name(p.name)) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        )
        raise ConfigError(
            "The configuration file does not exist",
            where=str(path),
            fix=did_you_mean(str(path), siblings) if siblings else "check the path",
        ) from None
    except IsADirectoryError:
        raise ConfigError("A folder was given where a configuration file belongs", where=str(path)) from None
    except OSError as error:
        raise ConfigError(f"The file cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The file is not {error.encoding.upper()} text (byte {error.start})",
            where=str(path),
            fix="save it as UTF-8",
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"The file is no valid YAML: {reason}", where=f"{path}{line}") from None
    except (ValueError, RecursionError) as error:  # a date that is none, thousands of digits or of brackets
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"The file is no valid YAML: {reason}", where=str(path)) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"The file holds {kind_of(values)}",
            where=str(path),
            expected="a mapping with keys such as `model`, `data`, `training_config`, `peft_config`",
        )
    return values


def _text_of(content: bytes) -> str:
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if marked else "utf-8").removeprefix("\ufeff")


def _parsed(text: str) -> Any:
    # YAML takes JSON but for tabs between its values.
    if text.lstrip().startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(text, object_pairs_hook=_unique)
    return _loaded(text)


def _loaded(text: str) -> Any:
    # Safe: _Loader is a SafeLoader.
    return yaml.load(text, Loader=_Loader)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key `{key}` stands here a second time")
        found[key] = value
    return found


def _require_reasonable(values: Any, where: str) -> None:
    """Anchors of YAML can refer to themselves, or to one another until nothing has room for what they stand for."""
    left, room = _MOST_VALUES, _MOST_CHARACTERS
    waiting: list[tuple[Any, int]] = [(values, 0)]
    while waiting:
        value, depth = waiting.pop()
        left -= 1
        room -= len(value) if isinstance(value, str) else 0
        if left < 0 or room < 0 or depth > _DEEPEST:
            raise ConfigError(
                "The file is too large for a configuration: its anchors refer to one another again and again"
                if left < 0 or room < 0
                else "The file is nested too deeply, or an anchor of it refers to itself",
                where=where,
                fix="write it without anchors",
            )
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | set) else ()
        waiting += [(entry, depth + 1) for entry in inner]


def apply_overrides(
    values: Mapping[str, Any],
    overrides: Sequence[str],
    origins: Mapping[str, str] | None = None,
    *,
    origin: str = "--set",
) -> tuple[dict[str, Any], Origins]:
    """Lay `section.key=value` strings over a mapping; values are read as YAML. Returns new objects."""
    result, sources = dict(values), dict(origins or {})
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"`{override}` is no assignment",
                where=origin,
                expected="section.key=value, for example training_config.learning_rate=3e-4",
            )
        try:
            value = _loaded(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = getattr(error, "problem", None) if isinstance(error, _GuardError) else None
            raise ConfigError(
                f"The value of `{override}` is no valid YAML" + (f": {reason}" if reason else ""),
                where=origin,
                fix="put the value into quotes",
            ) from None
        _require_reasonable(value, origin)
        result, sources = set_value(result, key.strip(), value, sources, origin=origin)
    return result, sources


def set_value(
    values: Mapping[str, Any], key: str, value: Any, origins: Mapping[str, str], *, origin: str
) -> tuple[dict[str, Any], Origins]:
    """Set one dotted key and its origin. Returns new objects.

    What an earlier source said of the same thing under another name gives way.
    """
    result = copy.deepcopy(written_out(values))
    if key.startswith("model.") and isinstance(result.get("model"), dict):
        for other in other_spellings(key.split(".")[1]) & result["model"].keys():
            said = {place for place in origins if f"{place}.".startswith(f"model.{other}.")}
            if any(origins[place] != origin for place in said):
                del result["model"][other]
                origins = {place: source for place, source in origins.items() if place not in said}
    _assign(result, key.split("."), value, where=origin)
    if not isinstance(value, Mapping):
        key = _SHORT_KEYS.get(key, key)
    return result, {**origins, key: origin}


def written_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """`model: NAME`, `data: FILE` and `quantization: TYPE` mean the sections with just that name, file or type."""
    values = dict(values)
    model = {"name": values["model"]} if isinstance(values.get("model"), str) else values.get("model")
    if isinstance(model, Mapping):
        values["model"] = dict(model)
        # YAML reads an unquoted `no` as false.
        if model.get("quantization") is False or model.get("quantization") in ("none", "no"):
            values["model"]["quantization"] = None
        elif isinstance(model.get("quantization"), str):
            values["model"]["quantization"] = {"type": model["quantization"]}
    data = values.get("data")
    if isinstance(data, str | list | tuple):
        data = {"files": data}
    if isinstance(data, Mapping):
        values["data"] = {
            key: _data_files(value) if key in ("files", "eval") else value for key, value in data.items()
        }
    return values


def kind_of(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {dict: "a mapping", list: "a list", tuple: "a list", bool: "true or false"}
    return names.get(type(value)) or shown(value)


class _GuardError(yaml.constructor.ConstructorError):
    """What YAML reads without a word, and otherwise than the person meant who wrote it."""


class _Loader(yaml.SafeLoader):
    """YAML without what it does silently: it drops the first value of a key that stands twice, and counts in odd bases.

    Every value of a configuration is read by it, in a file or on the command line.
    """

    _merged = 0

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number as a person reads it: `010` would be 8, and `1:30` 90."""
        text = node.value.replace("_", "").lstrip("+-")
        is_whole = node.tag.endswith(":int")
        base = 60 if ":" in text else 8 if is_whole and text[:1] == "0" and text.isdigit() else 10
        value: int | float = self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)
        if base != 10 and value != 0:
            raise _GuardError(
                None,
                None,
                f"`{node.value}` would be {value:g}, as YAML reads it in base {base}: write the number in base 10, or "
                "put the text into quotes",
                node.start_mark,
            )
        return value

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what `<<` merges into a mapping; mappings merged into one another again and again are a trap."""
        super().flatten_mapping(node)
        self._merged += len(node.value)
        if self._merged > _MOST_VALUES:
            raise _GuardError(
                None, None, "its anchors are merged into one another again and again", node.start_mark
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise _GuardError(
                    None, None, f"the key `{key.value}` stands here a second time", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def _data_files(value: Any) -> Any:
    entries = [value] if isinstance(value, str | Mapping) else value
    if not isinstance(entries, list | tuple):
        return value
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


def _assign(values: dict[str, Any], path: list[str], value: Any, *, where: str) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"`{key}` is no section", where=where, expected="section.key=value")
    values[path[-1]] = value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, Mapping) else [name]
    return found
