"""Records of every common schema become one kind of row.

A file has one schema. It is detected from the rows' content (the most frequent one among the first rows), and
every row is checked against it: a row of another kind, or with a column missing, is named with its line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phlora.data.advice import how_to_map, turned_by_hand
from phlora.data.columns import CATEGORIES, category_of, required_value
from phlora.data.contexts import says_more
from phlora.data.dialects import from_chatgpt, from_claude, from_gemini, from_xlam
from phlora.data.exports import export_of
from phlora.data.heeding import Findings, heed
from phlora.data.known_keys import LABELS, TEXTS, THOUGHTS
from phlora.data.messages import (
    exchange,
    messages_of,
    pair_of,
    parsed_list,
    text_of,
    tools_of,
    with_system,
    without_none,
)
from phlora.data.preferences import FIX, LEFT_OUT, chosen_side, preference_kind
from phlora.data.reasoning import has_reasoning, with_reasoning_as_text
from phlora.data.rows import BadRow, Message, Origin, Problem, Record, Row, kind_of, names_of, sentence
from phlora.data.spelling import is_empty
from phlora.errors import ConfigError, DataError, did_you_mean

NUM_ROWS_FOR_DETECTION = 64
ALIASES = {"chat": "messages", "openai": "messages", "anthropic": "messages", "bedrock": "messages"}
ALIASES |= {"sharegpt": "conversations"}


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
    example_line: int  # of a row that has the schema; 0: none of the first ones has
    group_by: str | None = None
    stratify_by: str | None = None
    keep_reasoning: bool = False
    fills_nulls: bool = False  # whether keys that a row lacks are null in it, as in Arrow's tables
    columns: Mapping[str, str] = field(default_factory=dict)  # that were renamed
    ignored: set[str] = field(default_factory=set)
    findings: Findings = field(default_factory=Findings)

    def problems(self) -> Iterator[Problem]:
        """What the rows said that is not done."""
        yield from self.findings.problems(Origin(self.name, self.example_line or 1))
        if self.ignored:
            names = names_of(sorted(self.ignored))
            message = f"Not used, since {self.schema.name} has no such column: {names}"
            yield Problem("ignored_columns", "note", message, (Origin(self.name, self.example_line or 1),))


def detect(
    records: Sequence[Record], format: str, name: str, columns: Mapping[str, str] | None = None
) -> tuple[Schema, int]:
    """The schema that most of the records have, and the line of the first that has it.

    Args:
        format: `auto`, or the name of the only schema to think of.
        columns: the names of columns that were given, for advice.

    Raises:
        DataError: none is known, or the records are an export that leaves a choice to the user.
        ConfigError: no schema has this name.
    """
    candidates = SCHEMATA if format == "auto" else _schemata_named(format)
    if format == "auto":
        _refuse_exports(records, name)
        _refuse_preferences(records, name)
        _refuse_whole_columns(records, name)
    found: Counter[str] = Counter()
    lines: dict[str, int] = {}
    for line, record in records:
        schema = _schema_of(record, candidates) if isinstance(record, Mapping) else None
        if schema:
            found[schema.columns] += 1
            lines.setdefault(schema.columns, line)
    if found:
        commonest = found.most_common(1)[0][0]
        return next(schema for schema in candidates if schema.columns == commonest), lines[commonest]
    if format != "auto":
        return candidates[0], 0  # each row says what it lacks
    raise _no_schema(records, name, columns)


def _refuse_exports(records: Sequence[Record], name: str) -> None:
    export = export_of(records[:NUM_ROWS_FOR_DETECTION])
    if export:
        raise DataError(f"This is {export.kind}", where=f"{name}:{records[0][0]}", fix=export.advice(name))


def _refuse_preferences(records: Sequence[Record], name: str) -> None:
    """Preference data is called by its name: supervised training would learn the rejected answers too."""
    for line, record in records:
        kind = preference_kind(record) if isinstance(record, Mapping) else None
        if kind:
            raise DataError(f"The rows are {kind}, not chats to learn from", where=f"{name}:{line}", fix=FIX)


def _refuse_whole_columns(records: Sequence[Record], name: str) -> None:
    line, record = records[0]
    if len(records) == 1 and isinstance(record, Mapping) and (fix := turned_by_hand(record)):
        raise DataError("The file is no list of rows", where=f"{name}:{line}", fix=fix)


def _no_schema(records: Sequence[Record], name: str, given: Mapping[str, str] | None = None) -> DataError:
    line, record = records[0]
    if isinstance(record, BadRow):
        return DataError(sentence(record.message), where=f"{name}:{line}", fix=record.expected)
    found = f"has the keys {names_of(record)}" if isinstance(record, Mapping) else f"is {kind_of(record)}"
    return DataError(
        f"The row {found}, which is no known schema",
        where=f"{name}:{line}",
        expected="; ".join(schema.columns for schema in SCHEMATA),
        fix=how_to_map(record, name=name, columns=given),
    )


def _schemata_named(format: str) -> tuple[Schema, ...]:
    wanted = ALIASES.get(format, format)
    known = (*SCHEMATA, *ASKED_FOR)
    found = tuple(schema for schema in known if schema.name == wanted)
    if found:
        return found
    names = {schema.name for schema in known} | ALIASES.keys()
    raise ConfigError(f"`{format}` is no data format", where="format", fix=did_you_mean(format, names))


def _schema_of(record: Mapping[str, Any], candidates: Sequence[Schema] = ()) -> Schema | None:
    return next((schema for schema in candidates or SCHEMATA if schema.required(record)), None)


def to_rows(shape: Shape, records: Iterable[Record]) -> Iterator[Row | Problem]:
    """The row that each record is, or what is wrong with it."""
    for line, record in records:
        origin = Origin(shape.name, line)
        try:
            yield _convert_record(record, shape, origin)
        except BadRow as bad:
            message = sentence(bad.message) + (f" (expected: {bad.expected})" if bad.expected else "")
            yield Problem(bad.kind, "note" if bad.kind == LEFT_OUT else "error", message, (origin,))


def _convert_record(record: Any, shape: Shape, origin: Origin) -> Row:
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, Mapping):
        raise BadRow("wrong_type", f"the row is {kind_of(record)}", "an object with named columns")
    if shape.fills_nulls:
        record = {key: without_none(value) for key, value in record.items()}
    schema = shape.schema
    heeded = heed(record, schema.name, shape.findings, origin)
    record = heeded.record
    used = schema.required(record)
    if used is None:
        raise _other_schema(record, shape)
    parts = schema.convert(record, used)
    messages = parts.messages
    tools = None
    if messages is not None:
        used = (*used, "tools", "system")
        if "tools" in record:
            tools = tools_of(record["tools"])
        if "system" in record:
            messages = with_system(messages, record["system"])
        if shape.keep_reasoning and has_reasoning(messages):
            messages = with_reasoning_as_text(messages)
    if unused := [
        key for key in record if key not in used and key not in heeded.known and key not in schema.optional
    ]:
        unused = _tell_lost(unused, record, parts, messages, shape, origin)
        # The split goes by these.
        shape.ignored.update(set(unused).difference(CATEGORIES, (shape.group_by, shape.stratify_by)))
    return Row(
        messages=None if messages is None else tuple(messages),
        prompt=parts.prompt,
        completion=parts.completion,
        text=parts.text,
        tools=tools,
        origin=origin,
        weight=shape.weight * heeded.weight,
        group=None if shape.group_by is None else required_value(record, shape.group_by, "data.group_by"),
        category=category_of(record, shape.stratify_by),
        untrained_by=heeded.untrained_by,
    )


def _tell_lost(
    unused: Sequence[str],
    record: Mapping[str, Any],
    parts: _Parts,
    messages: Sequence[Message] | None,
    shape: Shape,
    origin: Origin,
) -> list[str]:
    """Warn of texts that are used elsewhere, have no place in this row and do not stand in it; the other columns."""
    if TEXTS.isdisjoint(unused):
        return list(unused)
    if messages is None:
        said = [text for text in (parts.prompt, parts.completion, parts.text) if text]
        fix = "for a chat name its two sides: `--columns question=prompt,answer=completion`"
    else:
        said = [message["content"] for message in messages]
        said += [
            text for message in messages for key in THOUGHTS if isinstance(text := message.get(key), str)
        ]
        fix = "name what is used with `--columns`, or leave the column out"
    lost = [name for name in unused if name in TEXTS and says_more(record[name], said, name=name)]
    for name in lost:
        message = (
            f"`{name}` is not used: {shape.schema.columns} has no place for it beside what is used; {fix}"
        )
        shape.findings.add("unused_column", "warning", message, origin)
    return [name for name in unused if name not in lost]


def _other_schema(record: Mapping[str, Any], shape: Shape) -> BadRow:
    known = f"{shape.schema.columns}, as in line {shape.example_line}"
    if not shape.example_line:
        hint = how_to_map(record, name=shape.name, format=shape.schema.name, columns=shape.columns)
        known = f"{shape.schema.columns}; {hint}"
    other = _schema_of(record)
    if other and shape.example_line:
        return BadRow(
            "mixed_schemata", f"the row looks like {other.columns}, unlike the rest of the file", known
        )
    empty = [key for key, value in record.items() if value is None]
    nulls = f"; {names_of(empty)} is empty" if empty else ""
    return BadRow("missing_column", f"the row has the keys {names_of(record)}{nulls}", known)


def _needs(*columns: str) -> Callable[[Mapping[str, Any]], Sequence[str] | None]:
    """A null counts as missing: table formats fill absent columns with it."""

    def required(record: Mapping[str, Any]) -> Sequence[str] | None:
        return columns if all(record.get(column) is not None for column in columns) else None

    return required


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


def _list_in(*columns: str) -> Callable[[Mapping[str, Any]], Sequence[str] | None]:
    """The first of the columns that holds a list of turns."""

    def required(record: Mapping[str, Any]) -> Sequence[str] | None:
        for column in columns:
            if isinstance(record.get(column), list) and all(
                isinstance(item, dict) for item in record[column]
            ):
                return (column,)
        return None

    return required


def _from_messages(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    return _Parts(messages=messages_of(record[columns[0]], columns[0]))


def _from_alpaca(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    instruction, answer = (text_of(record, column) for column in columns)
    extra = [text_of(record, name) for name in ("context", "input") if record.get(name) is not None]
    question = "\n\n".join([instruction, *(text for text in extra if text)])
    return _Parts(messages=[*_history(record.get("history")), *_answered(record, question, answer)])


def _answered(record: Mapping[str, Any], question: str, answer: str) -> list[Message]:
    """A question and its answer, with what a column says was thought before it.

    Raises:
        BadRow: that is no text, or two columns differ about it.
    """
    asked, answered = exchange(question, answer)
    names = [key for key in THOUGHTS if not is_empty(record.get(key))]
    thoughts = {key: text for key in names if (text := text_of(record, key)).strip()}
    if len(set(thoughts.values())) > 1:
        raise BadRow("two_columns", f"the row has {names_of(thoughts)}, which differ", "one of them")
    return [asked, {**answered, "reasoning_content": next(iter(thoughts.values()))} if thoughts else answered]


def _history(value: Any) -> list[Message]:
    """LLaMA-Factory's earlier exchanges: [[question, answer], …], also as JSON in a table; or as messages."""
    if not value:
        return []
    if isinstance(value, str):
        value = parsed_list(value, "history") or []
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        return messages_of(value, "history") if value else []
    pairs = value if isinstance(value, list) else []
    if not pairs or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise BadRow(
            "wrong_type",
            f"`history` is {kind_of(value)}",
            "a list of [question, answer] pairs, or of messages",
        )
    return [message for question, answer in pairs for message in exchange(question, answer)]


def _from_pair(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    question, answer = (text_of(record, column) for column in columns)
    if record.get("instruction"):
        question = f"{text_of(record, 'instruction')}\n\n{question}"
    return _Parts(messages=[*_history(record.get("history")), *_answered(record, question, answer)])


def _from_plain(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    return _Parts(prompt=text_of(record, "prompt"), completion=text_of(record, "completion"))


def _from_chat_prompt(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    prompt = [{**message, "train": False} for message in messages_of(record["prompt"], "prompt")]
    return _Parts(messages=prompt + messages_of(record["completion"], "completion"))


def _from_text(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    text = text_of(record, "text")
    if not text.strip():
        raise BadRow("empty", "`text` is empty")
    return _Parts(text=text)


def _from_preference(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    return _Parts(messages=messages_of(chosen_side(record), "the chosen side"))


def _labelled(record: Mapping[str, Any]) -> Sequence[str] | None:
    """A text and its label, the name of the label rather than its number."""
    texts = ("text", "sentence", "content", "review")
    text = next((name for name in texts if isinstance(record.get(name), str)), None)
    labels = [name for name in LABELS if record.get(name) is not None and record[name] != ""]
    named = [name for name in labels if isinstance(record[name], str)]
    named.sort(key=lambda name: "_" not in name)
    return (text, (named or labels)[0]) if text and labels else None


def _from_labelled(record: Mapping[str, Any], columns: Sequence[str]) -> _Parts:
    text, label = (record[column] for column in columns)
    if isinstance(label, Mapping | list):
        raise BadRow("wrong_type", f"`{columns[1]}` is {kind_of(label)}", "one label")
    return _Parts(messages=exchange(text, str(label)))


def _chat(convert: Callable[[Mapping[str, Any]], list[Message]]) -> Callable[..., _Parts]:
    """A converter of whole records to messages, as a schema has it."""
    return lambda record, columns: _Parts(messages=convert(record))


_ALPACA = frozenset({"input", "context", "history", *THOUGHTS})
_GEMINI = frozenset({"systemInstruction", "system_instruction"})
# In the order in which a record is held against them.
SCHEMATA = (
    Schema("messages", "`messages`", _from_messages, _needs("messages"), frozenset({"schemaVersion"})),
    Schema("conversations", "`conversations`", _from_messages, _needs("conversations")),
    Schema(
        "conversations",
        "`conversation`, a list of turns",
        _from_messages,
        _list_in("conversation", "dialog", "dialogue", "chat", "turns"),
    ),
    Schema("gemini", "`contents`, Gemini's turns", _chat(from_gemini), _list_in("contents"), _GEMINI),
    Schema(
        "chatgpt",
        "`mapping`, a chat exported from ChatGPT",
        _chat(from_chatgpt),
        _needs("mapping"),
        frozenset({"current_node"}),
    ),
    Schema("claude", "`chat_messages`, exported from Claude", _chat(from_claude), _list_in("chat_messages")),
    Schema("xlam", "`query`, `tools` and `answers`", _chat(from_xlam), _needs("query", "tools", "answers")),
    Schema("prompt_completion", "`prompt` and `completion` as text", _from_plain, _prompt_is(str)),
    Schema("prompt_completion", "`prompt` and `completion` as messages", _from_chat_prompt, _prompt_is(list)),
    Schema("alpaca", "`instruction`, `output` and optionally `input`", _from_alpaca, _instruction, _ALPACA),
    Schema(
        "qa",
        "a pair such as `question` and `answer`",
        _from_pair,
        pair_of,
        frozenset({"history", "instruction", *THOUGHTS}),
    ),
    Schema("text", "`text`", _from_text, _needs("text")),
)
# Never found by themselves: training on one side, or on labels, is a choice.
ASKED_FOR = (
    Schema(
        "preference_chosen", "preference data of any kind", _from_preference, lambda record: tuple(record)
    ),
    Schema("classification", "`text` and `label`", _from_labelled, _labelled, frozenset(LABELS)),
)
