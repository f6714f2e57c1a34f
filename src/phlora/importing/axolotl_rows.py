"""The data sets of an Axolotl configuration.

Source: its page on data set formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phlora.importing import shared
from phlora.importing.settings import Settings, flattened, said

_TRAINS_END = "the end of every answer is trained, with the answer"


def map_rows(settings: Settings) -> None:
    sets, held_out = settings.take("datasets"), settings.take("test_datasets")
    if not isinstance(sets, list) or not sets:
        raise settings.error("datasets", sets, "a list of data sets, each with a path and a type")
    files = [
        file
        for number, entry in enumerate(sets)
        for file in _data_set(settings, f"datasets[{number}]", entry)
    ]
    settings.put("data.files", files, "datasets")
    size = settings.number("val_set_size")
    if held_out is not None and not isinstance(held_out, list):
        raise settings.error("test_datasets", held_out, "a list of data sets, each with a path and a type")
    if held_out:
        found = [
            file
            for number, entry in enumerate(held_out)
            for file in _data_set(settings, f"test_datasets[{number}]", entry)
        ]
        settings.put("data.eval", found, "test_datasets")
        if size:
            settings.leave_value("val_set_size", size, "test_datasets names the held-out rows")
    else:
        shared.held_out(settings, "val_set_size", size)


def _data_set(settings: Settings, key: str, entry: Any) -> list[dict[str, Any]]:
    """One data set as the files that it consists of."""
    if not isinstance(entry, Mapping) or not entry.get("path"):
        raise settings.error(key, entry, "a mapping with a path and a type")
    one = Settings(settings.tool, f"{settings.file}: {key}", {**said(entry)})
    kind = one.take("type")
    if isinstance(kind, Mapping):
        format, columns = _own_type(one, kind)
    else:
        format, columns = _known_type(one, kind)
    path, data_files = one.text("path"), one.names("data_files")
    split, limit = shared.split_of(one, "split")
    loaded = path in ("json", "csv", "parquet", "text", "arrow")
    if data_files and not loaded:
        one.miss("data_files", data_files, "files of a data set on the hub: download them, and name them")
    paths = data_files if loaded and data_files else [str(path)]
    one.leave_all(
        {
            **dict.fromkeys(("ds_type", "trust_remote_code", "preprocess_shards"), "found out"),
            **dict.fromkeys(("chat_template", "conversation"), shared.TEMPLATE),
            "message_field_training": "`train` in a message is followed",
            "message_field_training_detail": "`train` in a message is followed for whole turns",
        }
    )
    for end in ("train_on_eos", "train_on_eot"):
        if one.values.get(end) in ("turn", "all", True):
            one.leave(end, _TRAINS_END)
        one.look_at(end, _TRAINS_END)
    one.look_at("chat_template_jinja", shared.TEMPLATE)
    one.look_at("drop_system_message", "leave it out of the rows")
    for part in ("name", "shards", "revision"):
        if (value := one.take(part)) is not None:
            one.miss(part, value, "a part of a data set cannot be named: download it, and name its files")
    roles = one.take("roles_to_train")
    if roles is not None and roles != ["assistant"] and roles != ["gpt"]:
        one.miss("roles_to_train", roles, "data.train_on: assistant trains the answers")
    one.leave_unknown()
    settings.adopt(one, key)
    return [
        shared.data_file(
            shared.located(settings, key, file),
            format=format,
            columns=columns,
            split=split,
            limit=limit,
        )
        for file in paths
    ]


def _known_type(one: Settings, kind: Any) -> tuple[str | None, dict[str, str]]:
    """Format and columns for a type by its name, such as `alpaca_chat.load_qa`."""
    if kind is None:
        raise one.refuse(
            "type", "none", "means rows that are tokens already, and Phlora reads texts", "name the texts"
        )
    word = str(kind).partition(":")[0]
    base = word.partition(".")[0]
    if base in ("chat_template", "sharegpt", "sharegpt_simple"):
        return _messages(one, base)
    if base == "completion":
        return "text", shared.columns_of({"text": one.text("field")})
    if word in ("alpaca_chat.load_qa", "alpaca_chat.load_camel_ai"):
        return "qa", {}
    if base in ("alpaca", "alpaca_chat", "alpaca_w_system", "gpteacher", "explainchoice", "concisechoice"):
        one.leave_value("type", kind, shared.TEMPLATE)
        return "alpaca", {}
    one.leave_value("type", kind, "rows are read as what they look like: look at `phlora data check`")
    return None, {}


def _messages(one: Settings, base: str) -> tuple[str, dict[str, str]]:
    column = one.text("field_messages") or ("messages" if base == "chat_template" else "conversations")
    names = one.pairs("message_property_mappings")
    role = one.text("message_field_role") or names.get("role", "role")
    content = one.text("message_field_content") or names.get("content", "content")
    for key, name, known in (("role", role, ("role", "from")), ("content", content, ("content", "value"))):
        if name not in known:
            raise one.refuse(
                f"message_property_mappings.{key}",
                name,
                "is a name that Phlora does not know in a message",
                f"rename it in the file to {known[0]}",
            )
    roles = one.take("roles")
    if roles is not None and not isinstance(roles, Mapping):
        raise one.error("roles", roles, "a mapping of roles to the names that they have")
    if roles is not None:
        others = sorted(
            str(name)
            for role, given in roles.items()
            for name in (given if isinstance(given, list) else [given])
            if name not in _ROLES.get(str(role), ())
        )
        if others:
            one.leave_value(
                "roles", roles, f"{', '.join(others)}: `phlora data check` says whether it is known"
            )
    field_system = one.text("field_system")
    field_tools = one.text("field_tools")
    named = "messages" if column == "messages" else "conversations"
    return named, shared.columns_of({named: column, "system": field_system, "tools": field_tools})


_ROLES = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model"),
    "system": ("system",),
    "tool": ("tool", "observation", "ipython"),
}


def _own_type(one: Settings, kind: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """Format and columns of a type that the file describes itself."""
    fields = {str(name): value for name, value in flattened(kind).items()}
    pairs = {
        "instruction": fields.pop("field_instruction", None),
        "input": fields.pop("field_input", None),
        "output": fields.pop("field_output", None),
        "system": fields.pop("field_system", None),
    }
    for name, value in fields.items():
        one.miss(f"type.{name}", value, shared.TEMPLATE)
    return "alpaca", shared.columns_of(pairs)
