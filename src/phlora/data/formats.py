"""Records of every common schema become one kind of row.

A file has one schema. It is detected from the rows' content (the most frequent one among the first rows), and
every row is checked against it: a row of another kind, or with a column missing, is named with its line.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phlora.data.columns import category_of, required_value
from phlora.data.readers import kind_of
from phlora.data.rows import BadRow, Message, Origin, Problem, Record, Row
from phlora.errors import ConfigError, DataError, did_you_mean

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
PAIRS = (
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("input", "output"),
    ("q", "a"),
    ("user", "assistant"),
    ("human", "assistant"),
)
NUM_ROWS_FOR_DETECTION = 64


@dataclass(frozen=True)
class _Parts:
    messages: list[Message] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Schema:
    """One kind of record: which columns it has, and how they become a chat or a text."""

    name: str
    columns: str
    convert: Callable[[Mapping[str, Any], Sequence[str]], _Parts]
    required: Callable[[Mapping[str, Any]], Sequence[str] | None]
    optional: frozenset[str] = frozenset()


@dataclass
class Shape:
    """What is known about one source while it is read."""

    name: str
    weight: float
    schema: Schema
    example_line: int
    group_by: str | None = None
    stratify_by: str | None = None
    ignored: set[str] = field(default_factory=set)


def detect(records: Sequence[Record], format: str, name: str) -> tuple[Schema, int]:
    """The schema that most of the records have, and the line of the first that has it."""
    if format != "auto":
        return _schema_named(format), records[0][0]
    found: Counter[str] = Counter()
    lines: dict[str, int] = {}
    schemata: dict[str, Schema] = {}
    for line, record in records:
        schema = _schema_of(record) if isinstance(record, Mapping) else None
        if schema:
            found[schema.columns] += 1
            lines.setdefault(schema.columns, line)
            schemata[schema.columns] = schema
    if not found:
        raise _no_schema(records, name)
    columns = found.most_common(1)[0][0]
    return schemata[columns], lines[columns]


def _no_schema(records: Sequence[Record], name: str) -> DataError:
    line, record = records[0]
    if isinstance(record, BadRow):
        return DataError(_sentence(record.message), where=f"{name}:{line}", fix=record.expected)
    found = f"has the keys {_names(record)}" if isinstance(record, Mapping) else f"is {kind_of(record)}"
    return DataError(
        f"The row {found}, which is no known schema",
        where=f"{name}:{line}",
        expected="; ".join(schema.columns for schema in SCHEMATA),
        fix="rename the columns, or say which schema it is with `format`",
    )


def _schema_named(format: str) -> Schema:
    aliases = {"chat": "messages", "sharegpt": "conversations", "openai": "messages"}
    wanted = aliases.get(format, format)
    for schema in SCHEMATA:
        if schema.name == wanted:
            return schema
    raise ConfigError(
        f"`{format}` is no data format", where="format", fix=did_you_mean(format, {s.name for s in SCHEMATA})
    )


def _schema_of(record: Mapping[str, Any]) -> Schema | None:
    return next((schema for schema in SCHEMATA if schema.required(record)), None)


def to_rows(shape: Shape, records: Iterable[Record]) -> Iterator[Row | Problem]:
    """The row that each record is, or what is wrong with it."""
    for line, record in records:
        origin = Origin(shape.name, line)
        try:
            yield _convert_record(record, shape, origin)
        except BadRow as bad:
            message = _sentence(bad.message) + (f" (expected: {bad.expected})" if bad.expected else "")
            yield Problem(bad.kind, "error", message, (origin,))


def _convert_record(record: Any, shape: Shape, origin: Origin) -> Row:
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, Mapping):
        raise BadRow("wrong_type", f"the row is {kind_of(record)}", "an object with named columns")
    schema = shape.schema
    used = schema.required(record)
    if used is None:
        raise _other_schema(record, shape)
    parts = schema.convert(record, used)
    messages = parts.messages
    tools = None
    if messages is not None:
        used = (*used, "tools", "system")
        tools = _tools(record.get("tools"))
        messages = _with_system(messages, record.get("system"))
    shape.ignored.update(record.keys() - schema.optional.union(used))
    return Row(
        messages=None if messages is None else tuple(messages),
        prompt=parts.prompt,
        completion=parts.completion,
        text=parts.text,
        tools=tools,
        origin=origin,
        weight=shape.weight,
        group=None if shape.group_by is None else required_value(record, shape.group_by, "data.group_by"),
        category=category_of(record, shape.stratify_by),
    )


def _other_schema(record: Mapping[str, Any], shape: Shape) -> BadRow:
    known = f"{shape.schema.columns}, as in line {shape.example_line}"
    other = _schema_of(record)
    if other:
        return BadRow(
            "mixed_schemata", f"the row looks like {other.columns}, unlike the rest of the file", known
        )
    empty = [key for key, value in record.items() if value is None]
    nulls = f"; {_names(empty)} is empty" if empty else ""
    return BadRow("missing_column", f"the row has the keys {_names(record)}{nulls}", known)


def _needs(*columns: str) -> Callable[[Mapping[str, Any]], Sequence[str] | None]:
    """A null counts as missing: table formats fill absent columns with it."""

    def required(record: Mapping[str, Any]) -> Sequence[str] | None:
        return columns if all(record.get(column) is not None for column in columns) else None

    return required


def _pair(record: Mapping[str, Any]) -> Sequence[str] | None:
    names = {key.lower(): key for key, value in record.items() if value is not None and isinstance(key, str)}
    for question, answer in PAIRS:
        if question in names and answer in names:
            return names[question], names[answer]
    return None


def _instruction(record: Mapping[str, Any]) -> Sequence[str] | None:
    for answer in ("output", "response"):
        if record.get("instruction") is not None and record.get(answer) is not None:
            return "instruction", answer
    return None


def _prompt_is(kind: type) -> Callable[[Mapping[str, Any]], Sequence[str] | None]:
    def required(record: Mapping[str, Any]) -> Sequence[str] | None:
        columns = _needs("prompt", "completion")(record)
        return columns if columns and isinstance(record["prompt"], list) == (kind is list) else None

    return required


def _from_messages(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    return _Parts(messages=_messages(record[columns[0]], columns[0]))


def _from_alpaca(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    instruction, answer = (_text(record, column) for column in columns)
    extra = next((column for column in ("input", "context") if record.get(column)), None)
    question = f"{instruction}\n\n{_text(record, extra)}" if extra else instruction
    return _Parts(messages=_exchange(question, answer))


def _from_pair(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    question, answer = (_text(record, column) for column in columns)
    return _Parts(messages=_exchange(question, answer))


def _from_plain(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    return _Parts(prompt=_text(record, "prompt"), completion=_text(record, "completion"))


def _from_chat_prompt(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    prompt = [{**message, "train": False} for message in _messages(record["prompt"], "prompt")]
    return _Parts(messages=prompt + _messages(record["completion"], "completion"))


def _from_text(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    text = _text(record, "text")
    if not text.strip():
        raise BadRow("empty", "`text` is empty")
    return _Parts(text=text)


SCHEMATA = (
    Schema("messages", "`messages`", _from_messages, _needs("messages")),
    Schema("conversations", "`conversations`", _from_messages, _needs("conversations")),
    Schema("prompt_completion", "`prompt` and `completion` as text", _from_plain, _prompt_is(str)),
    Schema("prompt_completion", "`prompt` and `completion` as messages", _from_chat_prompt, _prompt_is(list)),
    Schema(
        "alpaca",
        "`instruction`, `output` and optionally `input`",
        _from_alpaca,
        _instruction,
        frozenset({"input", "context"}),
    ),
    Schema("qa", "a pair such as `question` and `answer`", _from_pair, _pair),
    Schema("text", "`text`", _from_text, _needs("text")),
)


# ------------------------------------------------------------------------------------------------ messages


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    """A `system` column beside the chat is its system message, unless the chat has its own."""
    if not system or messages[0]["role"] == "system":
        return messages
    if not isinstance(system, str):
        raise BadRow("wrong_type", f"`system` is {kind_of(system)}", "text")
    return [{"role": "system", "content": system}, *messages]


def _messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):
        raise BadRow(
            "wrong_type",
            f"`{column}` is a text, not a list",
            "a list of messages; a JSON string has to be parsed",
        )
    if not isinstance(value, list | tuple):
        raise BadRow("wrong_type", f"`{column}` is {kind_of(value)}", "a list of messages")
    if not value:
        raise BadRow("empty_chat", f"`{column}` is an empty list", "at least one message")
    return [_message(message, turn) for turn, message in enumerate(value, 1)]


def _message(value: Any, turn: int) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow("wrong_type", f"turn {turn} is {kind_of(value)}", "an object with `role` and `content`")
    message = {key: item for key, item in value.items() if item is not None}
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    if role_key not in message:
        raise BadRow(
            "missing_role",
            f"turn {turn} has the keys {_names(value)} and no role",
            "`role` (or `from`) in each message",
        )
    role = _role(message.pop(role_key), turn)
    content = message.pop(content_key, None)
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call, turn) for call in message["tool_calls"]]
    else:
        message.pop("tool_calls", None)
    _check_loss_keys(message, turn)
    return {"role": role, "content": _content(content, content_key, turn, message), **message}


def _role(value: Any, turn: int) -> str:
    role = ROLES.get(value.strip().lower()) if isinstance(value, str) else None
    if role is None:
        hint = did_you_mean(value, ROLES) if isinstance(value, str) else "a text"
        raise BadRow("unknown_role", f"turn {turn} has the unknown role `{value}`", hint)
    return role


def _content(value: Any, key: str, turn: int, message: Message) -> str:
    if isinstance(value, str):
        return _encodable(value, f"turn {turn}")
    if value is None:
        if "tool_calls" in message:
            return ""
        raise BadRow("missing_content", f"turn {turn} has no `{key}`", "text")
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("text") for part in value):
        return "".join(part["text"] for part in value)
    hint = "text only: images and sounds cannot be trained" if isinstance(value, list) else "text"
    raise BadRow("wrong_type", f"turn {turn} has {kind_of(value)} as `{key}`", hint)


def _tool_call(call: Any, turn: int) -> Any:
    if not isinstance(call, Mapping):
        raise BadRow("wrong_type", f"turn {turn} has {kind_of(call)} among its `tool_calls`", "an object")
    call = _without_none(call)
    target = call["function"] if isinstance(call.get("function"), dict) else call
    if isinstance(target.get("arguments"), str):
        # Chat templates write the arguments with `tojson`, which would quote a JSON string a second time.
        try:
            target["arguments"] = json.loads(target["arguments"])
        except json.JSONDecodeError:
            raise BadRow("broken_json", f"turn {turn} has tool call arguments that are no JSON") from None
    return call


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow("broken_json", f"`tools` is broken JSON: {error.msg}") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow("wrong_type", f"`tools` is {kind_of(value)}", "a list of tool descriptions")
    tools = _without_none(value)
    return tools if isinstance(tools, list) else None


def _without_none(value: Any) -> Any:
    """Arrow fills every key that any row of the column has."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _check_loss_keys(message: Message, turn: int) -> None:
    if not isinstance(message.get("train", True), bool):
        raise BadRow("wrong_type", f"turn {turn} has `train: {message['train']!r}`", "true or false")
    weight = message.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise BadRow("wrong_type", f"turn {turn} has `weight: {weight!r}`", "a number, at least 0")


def _text(record: Mapping[str, Any], column: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"`{column}` is {kind_of(value)}", "text")
    return _encodable(value, f"`{column}`")


def _encodable(text: str, where: str) -> str:
    """JSON can spell half a surrogate pair (`\\ud83d` alone), which no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(
                "encoding",
                f"{where} holds half of a surrogate pair at character {error.start}",
                "whole characters",
            ) from None
    return text


def _names(keys: Iterable[Any]) -> str:
    return ", ".join(f"`{key}`" for key in keys) or "(none)"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
