"""Chat messages of every provider's dialect become one kind: `role`, `content` as text, `tool_calls`.

Read are OpenAI's and ShareGPT's messages, blocks of Anthropic and Bedrock, Gemini's parts, the turns of LLaMA-Factory
and swift that hold a call as text, and pairs such as `{"human": …, "assistant": …}`. What is no text (images, sounds)
is an error.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from phlora.data.blocks import part_text, text_of_parts
from phlora.data.json_text import inner_json, parse_json
from phlora.data.rows import BadRow, Message, kind_of, names_of
from phlora.data.values import as_sound, require_plain
from phlora.errors import did_you_mean

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
    "tool_response": "tool",
    "tool_result": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
# Turns of the assistant whose text is a call, or a list of calls, in JSON.
CALL_ROLES = frozenset({"function_call", "tool_call", "tool_calls", "function-call"})
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
_ROLE_KEYS = ("role", "from", "sender")
_CONTENT_KEYS = ("content", "value", "parts", "text")
_SPOKEN = re.compile(r"""["'](role|from)["']\s*:""")
_MAX_LITERAL = 1 << 20
_MAX_LAYERS = 5


def exchange(question: str, answer: str) -> list[Message]:
    """A question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def messages_of(value: Any, column: str) -> list[Message]:
    """The messages in a column.

    Raises:
        BadRow: it is no list of messages, or one of them cannot be used.
    """
    if isinstance(value, str):
        value = parsed_list(value, column)
    if not isinstance(value, list | tuple):
        raise BadRow("wrong_type", f"`{column}` is {kind_of(value)}", "a list of messages")
    if not value:
        raise BadRow("empty_chat", f"`{column}` is an empty list", "at least one message")
    found: list[Message] = []
    was_call = False
    for turn, item in enumerate(value, 1):
        if plain := _plain_turn(item):
            found.append(plain)
            was_call = False
            continue
        is_call = isinstance(item, Mapping) and _role_name(item) in CALL_ROLES
        new = _turn(item, turn)
        if is_call and was_call:
            found[-1]["tool_calls"] += new[0]["tool_calls"]  # calls made at once, a turn each
        else:
            found += new
        was_call = is_call
    return found


def parsed_list(text: str, column: str) -> Any:
    """A list that a table holds as text: as JSON, or as pandas writes Python's lists.

    Raises:
        BadRow: it is neither.
    """
    if not text.lstrip().startswith(("[", "{")):
        raise BadRow("wrong_type", f"`{column}` is a text, not a list", "a list of messages, or one as JSON")
    found = parse_json(text)
    if not isinstance(found, BadRow):
        return found
    try:
        if len(text) > _MAX_LITERAL or found.kind != "broken_json":
            raise ValueError
        literal = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise BadRow(found.kind, f"`{column}` holds {found.message}", "a list of messages") from None
    return as_sound(literal)


def with_system(messages: list[Message], system: Any, column: str = "system") -> list[Message]:
    """A `system` column beside the chat is its system message.

    Raises:
        BadRow: it is no text, or the chat has another system message.
    """
    if system is None or system == "" or system == []:
        return messages
    text = system if isinstance(system, str) else _joined(system, column)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    if messages[0]["content"] != text:
        raise BadRow(
            "two_systems", f"the row has a `{column}` column and another system message in its chat", "one"
        )
    return messages


def _joined(parts: Any, column: str) -> str:
    """The text of a list of blocks, as Anthropic, Bedrock and Gemini hold a system prompt."""
    if isinstance(parts, Mapping):
        parts = parts.get("parts", [parts])
    if not isinstance(parts, list):
        raise BadRow("wrong_type", f"`{column}` is {kind_of(parts)}", "text")
    texts = [part if isinstance(part, str) else part_text(part) for part in parts]
    known = [text for text in texts if text is not None]
    if len(known) != len(parts):
        raise BadRow("wrong_type", f"`{column}` holds something that is no text", "text")
    return "\n".join(known)


# ------------------------------------------------------------------------------------------------ one turn


def _role_name(item: Mapping[str, Any]) -> str:
    value = next((item[key] for key in _ROLE_KEYS if item.get(key) is not None), None)
    return value.strip().lower() if isinstance(value, str) else ""


def _plain_turn(item: Any) -> Message | None:
    """A turn of a known role and a text, as nearly all are; None for `_turn` to look at."""
    if type(item) is not dict or len(item) != 2:
        return None
    role, content = item.get("role"), item.get("content")
    if role is None:
        role, content = item.get("from"), item.get("value")
    known = ROLES.get(role) if type(role) is str else None
    return {"role": known, "content": content} if known and type(content) is str else None


def _turn(item: Any, turn: int) -> list[Message]:
    """The messages that one turn holds: several where a pair or the results of tools stand in it."""
    if not isinstance(item, Mapping):
        raise BadRow("wrong_type", f"turn {turn} is {kind_of(item)}", "an object with `role` and `content`")
    require_plain(item, f"turn {turn}")
    message = {key: value for key, value in item.items() if value is not None}
    role_key = next((key for key in _ROLE_KEYS if key in message), None)
    if role_key is None:
        return _pair_turn(message, turn)
    name = _role_name(message)
    role = "assistant" if name in CALL_ROLES else _role(message.pop(role_key), turn)
    message.pop(role_key, None)
    content_key = _content_key(message, role_key)
    content = message.pop(content_key, None)
    # The other name of the same thing would be dropped.
    for key in ("content", "value"):
        if isinstance(message.get(key), str) and message[key] and message[key] != content:
            raise BadRow(
                "two_columns", f"turn {turn} has `{content_key}` and `{key}`, which differ", "one of them"
            )
    if name in CALL_ROLES:
        message["tool_calls"] = _calls_in_text(content, turn)
        content = ""
    elif isinstance(message.get("function_call"), Mapping) and not message.get("tool_calls"):
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    return _finished(role, content, content_key, message, turn)


def _content_key(message: Mapping[str, Any], role_key: str) -> str:
    usual = "value" if role_key == "from" else "content"
    order = (usual, *(key for key in _CONTENT_KEYS if key != usual))
    return next((key for key in order if key in message), usual)


def _pair_turn(message: Mapping[str, Any], turn: int) -> list[Message]:
    names = {key.lower(): key for key in message}
    for question, answer in PAIRS:
        if question in names and answer in names:
            texts = [message[names[key]] for key in (question, answer)]
            if all(isinstance(text, str) for text in texts):
                system = message.get("system")
                pair = exchange(texts[0], texts[1])
                return with_system(pair, system) if turn == 1 else pair
    raise BadRow(
        "missing_role",
        f"turn {turn} has the keys {names_of(message)} and no role",
        "`role` (or `from`) in each message",
    )


def _finished(role: str, content: Any, key: str, message: Message, turn: int) -> list[Message]:
    results: list[Message] = []
    if isinstance(content, list):
        content, results = text_of_parts(content, key, message, turn)
    if message.get("tool_calls"):
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise BadRow("wrong_type", f"turn {turn} has {kind_of(calls)} as `tool_calls`", "a list of calls")
        message["tool_calls"] = [_tool_call(call, turn) for call in calls]
    else:
        message.pop("tool_calls", None)
    _check_loss_keys(message, turn)
    if results and not content and "tool_calls" not in message:
        return results
    return [*results, {"role": role, "content": _content(content, key, turn, message), **message}]


def _role(value: Any, turn: int) -> str:
    role = ROLES.get(value.strip().lower()) if isinstance(value, str) else None
    if role is None:
        hint = did_you_mean(value[:40], [*ROLES, *CALL_ROLES]) if isinstance(value, str) else "a text"
        raise BadRow("unknown_role", f"turn {turn} has the unknown role `{str(value)[:40]}`", hint)
    return role


def _content(value: Any, key: str, turn: int, message: Message) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        if "tool_calls" in message:
            return ""
        raise BadRow("missing_content", f"turn {turn} has no `{key}`", "text")
    raise BadRow("wrong_type", f"turn {turn} has {kind_of(value)} as `{key}`", "text")


# ------------------------------------------------------------------------------------------------ calls


def _calls_in_text(value: Any, turn: int) -> list[Any]:
    """The calls that a turn of the role `function_call` or `tool_call` spells out in JSON."""
    if isinstance(value, str):
        value = inner_json(value, f"turn {turn} has a call that is no JSON", "name and arguments")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise BadRow("wrong_type", f"turn {turn} has no call", "name and arguments")
    return [
        {"type": "function", "function": call}
        if isinstance(call, Mapping) and "function" not in call
        else call
        for call in calls
    ]


def _tool_call(call: Any, turn: int) -> Any:
    if not isinstance(call, Mapping):
        raise BadRow("wrong_type", f"turn {turn} has {kind_of(call)} among its `tool_calls`", "an object")
    # What is null beside the arguments says nothing; a null among them is a value.
    call = _without_null(call)
    if isinstance(call.get("function"), Mapping):
        call["function"] = _without_null(call["function"])
    target = call["function"] if isinstance(call.get("function"), dict) else call
    if not isinstance(target.get("name"), str) or not target["name"].strip():
        found = kind_of(target.get("name"))
        raise BadRow("wrong_type", f"turn {turn} has a tool call whose name is {found}", "the tool's name")
    if "arguments" in target:
        target["arguments"] = _arguments(target["arguments"], turn)
    return call


def _arguments(value: Any, turn: int) -> Any:
    """The arguments of a call as an object, out of as many layers of JSON as they were put into.

    Chat templates write them with `tojson`, which would quote a JSON string once more.
    """
    for _ in range(_MAX_LAYERS):
        if not isinstance(value, str):
            break
        if not value.strip():
            return {}
        value = inner_json(value, f"turn {turn} has tool call arguments that are no JSON")
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRow(
            "wrong_type", f"turn {turn} has tool call arguments that are {kind_of(value)[:60]}", "an object"
        )
    return value


def _without_null(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


def tools_of(value: Any) -> list[Any] | None:
    """The descriptions of tools in a column: a list, or one as JSON.

    Raises:
        BadRow: they are no such list, or one has no name.
    """
    if isinstance(value, str) and value.strip():
        value = inner_json(value, "`tools` is no JSON")
    if not value or value == "":
        return None
    if isinstance(value, Mapping):
        value = value.get("tools", [value])
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow("wrong_type", f"`tools` is {kind_of(value)}", "a list of tool descriptions")
    for tool in value:
        inner = tool.get("function", tool)
        name = inner.get("name") if isinstance(inner, Mapping) else inner
        if name is not None and not isinstance(name, str):
            raise BadRow("wrong_type", f"the name of a tool is {kind_of(name)}", "text")
    require_plain(value, "`tools`")
    return list(value)


def same_tools(one: Any, other: Any) -> bool:
    """Whether two columns describe the same tools, each as it likes.

    Raises:
        BadRow: one of them cannot be read.
    """
    first, second = ([tool.get("function", tool) for tool in tools_of(value) or []] for value in (one, other))
    return first == second


def without_none(value: Any) -> Any:
    """Arrow fills every key that any row of the column has."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def _check_loss_keys(message: Message, turn: int) -> None:
    if not isinstance(message.get("train", True), bool):
        raise BadRow("wrong_type", f"turn {turn} has `train: {_shown(message['train'])}`", "true or false")
    weight = message.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise BadRow("wrong_type", f"turn {turn} has `weight: {_shown(weight)}`", "a number, at least 0")


def _shown(value: Any) -> str:
    return repr(value)[:40]


def text_of(record: Mapping[str, Any], column: str) -> str:
    """A column that has to be text."""
    value = record[column]
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"`{column}` is {kind_of(value)}", "text")
    if column in ("prompt", "completion") and _spells_turns(value):
        raise BadRow(
            "wrong_type",
            f"`{column}` is a text that spells out a list of messages",
            "the list itself, as JSONL or Parquet hold it, or all of the chat as `messages`",
        )
    return value


def _spells_turns(text: str) -> bool:
    """Whether a text is a list of messages as JSON, or as Python writes it."""
    if not text.lstrip().startswith("[") or not _SPOKEN.search(text):
        return False
    try:
        turns = parsed_list(text, "")
    except BadRow:
        return False
    return isinstance(turns, list) and all(isinstance(t, Mapping) and _role_name(t) in ROLES for t in turns)


def pair_of(record: Mapping[str, Any], pairs: Iterable[tuple[str, str]] = PAIRS) -> tuple[str, str] | None:
    """The columns of a question and its answer, whatever their case."""
    names = {key.lower(): key for key, value in record.items() if value is not None}
    for question, answer in pairs:
        if question in names and answer in names:
            return names[question], names[answer]
    return None
