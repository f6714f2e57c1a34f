"""Reads chat files of every common schema into one kind of row, and keeps the line each row came from.

A file has one schema. It is detected from the rows' content (the most frequent one among the first rows), and
every row is checked against it: a row of another kind, or with a column missing, is named with its line.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from phlora.config import DataFile
from phlora.data.sources import BadRow, Record, kind_of, open_path, pick_split
from phlora.errors import ConfigError, DataError, did_you_mean

Message: TypeAlias = dict[str, Any]
Severity = Literal["error", "warning", "note"]
Source: TypeAlias = str | Path | DataFile | Mapping[str, Any] | Iterable[Mapping[str, Any]]

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
DIGEST_BYTES = 16
_CONTENT = json.JSONEncoder(sort_keys=True, default=str)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands: the file and its line (JSONL, CSV) or its row number, counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: a chat (`messages`), a plain `prompt` and `completion`, or a plain `text`.

    A message holds `role` (system, user, assistant or tool) and `content`, and optionally `tool_calls`,
    `name`, `train` (bool), `weight` (loss weight of its tokens) and whatever else its chat template reads.
    `weight` is the loss weight of each trained token of the row: the weight of its file.
    """

    messages: tuple[Message, ...] | None
    prompt: str | None
    completion: str | None
    text: str | None
    tools: list[Any] | None
    origin: Origin
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Something found in the data: an `error` makes a row unusable, a `warning` deserves a look."""

    kind: str
    severity: Severity
    message: str
    origins: tuple[Origin, ...] = ()
    count: int = 1


@dataclass(frozen=True)
class Loaded:
    """The rows of all sources in order, what was wrong with others, and the schema of each source."""

    rows: list[Row]
    problems: list[Problem]
    formats: dict[str, str]


@dataclass(frozen=True)
class Survey:
    """What one reading of all sources found. The rows are not kept: they are read again when they are needed.

    Attributes:
        sources, format: what was read, and as which schema.
        keys: `row_key` of each row, as bytes.
        digests: `row_digest` of each row, one after the other.
        lines, file_numbers: where each row stands; `files` are the names that the numbers count.
        problems: what was wrong with other rows.
        formats: the schema of each source.
    """

    sources: list[Source]
    format: str
    keys: list[bytes]
    digests: bytearray
    lines: array[int]
    file_numbers: array[int]
    files: tuple[str, ...]
    problems: list[Problem]
    formats: dict[str, str]

    def __len__(self) -> int:
        return len(self.lines)

    def origin(self, number: int) -> Origin:
        """Where a row stands."""
        return Origin(self.files[self.file_numbers[number]], self.lines[number])

    def digest(self, number: int) -> bytes:
        """`row_digest` of a row."""
        return bytes(self.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES])

    def all(self) -> Selection:
        """All rows."""
        return Selection(self, range(len(self)))


@dataclass(frozen=True)
class Selection:
    """Some rows of a survey, in its order; each iteration reads the sources anew.

    Raises:
        DataError: from an iteration, when the sources no longer hold the rows that were surveyed.
    """

    survey: Survey
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Row]:
        wanted = iter(self.numbers)
        number = next(wanted, None)
        for found, row in enumerate(_rows_of(self.survey.sources, self.survey.format)):
            if number is None:
                return
            if found == number:
                if row_digest(row) != self.survey.digest(number):
                    break
                yield row
                number = next(wanted, None)
        if number is not None:
            raise DataError("The data changed while it was read", where=str(self.survey.origin(number)))

    def digests(self) -> Iterator[bytes]:
        """`row_digest` of each row."""
        return map(self.survey.digest, self.numbers)

    def origins(self) -> Iterator[Origin]:
        """Where each row stands."""
        return map(self.survey.origin, self.numbers)


@dataclass
class _Shape:
    """What is known about one source while it is read."""

    name: str
    weight: float
    schema: _Schema
    example_line: int
    ignored: set[str] = field(default_factory=set)


# ------------------------------------------------------------------------------------------------ public


def read_rows(source: Source, *, format: str = "auto", weight: float = 1.0) -> Iterator[Row]:
    """The rows of one source, read as they are needed.

    Raises:
        DataError: the source cannot be read, or at the first row that cannot be used.
        NetworkError: a hub data set cannot be reached.
    """
    for item in _convert(*_open_source(source, format, weight)):
        if isinstance(item, Problem):
            raise _error([item])
        yield item


def load_rows(
    sources: Source | Sequence[Source], *, format: str = "auto", on_bad: Literal["raise", "collect"] = "raise"
) -> Loaded:
    """Read all rows of one or several sources.

    A source is a path (.jsonl, .json, .csv, .tsv, .parquet, .jsonl.gz, a folder saved by `datasets`), a hub
    name (`owner/name`, or `owner/name:split`), a `DataFile` with a weight, a `datasets` object, or a list
    of dicts. The weight multiplies the loss of every trained token of the source's rows.

    Args:
        format: `auto`, or one of `messages, conversations, alpaca, qa, prompt_completion, text`.
        on_bad: `raise` reads to the end, then raises about the rows that cannot be used; `collect` returns
            them in `problems`.

    Raises:
        DataError: a source that cannot be read or holds no rows, or (`on_bad="raise"`) rows that cannot be
            used.
        ConfigError: an unknown `format`.
        NetworkError: a hub data set cannot be reached.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    formats: dict[str, str] = {}
    for item in _read_all(_as_list(sources), format, formats):
        (rows if isinstance(item, Row) else problems).append(item)  # type: ignore[arg-type]
    _raise_for(problems, on_bad)
    return Loaded(rows, problems, formats)


def survey_rows(
    sources: Source | Sequence[Source],
    *,
    format: str = "auto",
    on_bad: Literal["raise", "collect"] = "raise",
    inspect: Callable[[Row], None] | None = None,
) -> Survey:
    """Read all rows once, for what is to be known about them before they are used.

    A data set of any size is read in the same memory, but for some 150 bytes a row.

    Args:
        inspect: called with each row as it is read.

    The other arguments and what is raised are those of `load_rows`.
    """
    # What can be read only once is kept.
    kept = [list(source) if isinstance(source, Iterator) else source for source in _as_list(sources)]
    survey = Survey(kept, format, [], bytearray(), array("q"), array("i"), (), [], {})
    files: dict[str, int] = {}
    for item in _read_all(kept, format, survey.formats):
        if isinstance(item, Problem):
            survey.problems.append(item)
            continue
        survey.keys.append(bytes.fromhex(row_key(item)))
        survey.digests.extend(row_digest(item))
        survey.lines.append(item.origin.line)
        survey.file_numbers.append(files.setdefault(item.origin.file, len(files)))
        if inspect:
            inspect(item)
    _raise_for(survey.problems, on_bad)
    return replace(survey, files=tuple(files))


def _rows_of(sources: Sequence[Source], format: str) -> Iterator[Row]:
    return (item for item in _read_all(sources, format, {}) if isinstance(item, Row))


def _read_all(sources: Sequence[Source], format: str, formats: dict[str, str]) -> Iterator[Row | Problem]:
    """The rows and problems of all sources; their schemata go into `formats`."""
    for source in sources:
        shape, records = _open_source(source, format, 1.0)
        formats[shape.name] = shape.schema.name
        yield from _convert(shape, records)
        if shape.ignored:
            yield _ignored_columns(shape)


def _raise_for(problems: Sequence[Problem], on_bad: Literal["raise", "collect"]) -> None:
    errors = [problem for problem in problems if problem.severity == "error"]
    if on_bad == "raise" and errors:
        raise _error(errors)


def row_key(row: Row) -> str:
    """A digest of what the row says: equal for rows that differ in spacing or Unicode form only."""
    if row.messages is not None:
        parts: list[Any] = [
            [message["role"], _normal(message["content"]), message.get("tool_calls")]
            for message in row.messages
        ]
    else:
        parts = [_normal(part) for part in (row.prompt, row.completion, row.text) if part is not None]
    text = json.dumps([parts, row.tools], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def row_digest(row: Row) -> bytes:
    """A digest of the exact content of a row and its weight."""
    content = [row.messages, row.prompt, row.completion, row.text, row.tools, row.weight]
    return hashlib.blake2b(_CONTENT.encode(content).encode(), digest_size=DIGEST_BYTES).digest()


def fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 over the exact content of the rows, their weights and their order."""
    return fingerprint_of(map(row_digest, rows))


def fingerprint_of(digests: Iterable[bytes]) -> str:
    """The `fingerprint` of rows whose `row_digest` is known."""
    digest = hashlib.sha256()
    for part in digests:
        digest.update(part)
    return digest.hexdigest()


def split_rows(rows: Sequence[Row], *, eval_size: float | int, seed: int) -> tuple[list[Row], list[Row]]:
    """Split into training and held-out rows; the arguments are those of `split_keys`."""
    train, held_out = split_keys([row_key(row) for row in rows], eval_size=eval_size, seed=seed)
    return [rows[index] for index in train], [rows[index] for index in held_out]


def split_keys(
    keys: Sequence[str | bytes], *, eval_size: float | int, seed: int
) -> tuple[list[int], list[int]]:
    """Numbers of the training and of the held-out rows; rows of equal keys always stay on one side.

    Args:
        eval_size: a share of the rows when below 1, else a number of rows. The held-out side never gets more;
            groups of duplicates can make it smaller.

    Raises:
        DataError: there are not enough different rows to leave some on both sides.
    """
    wanted = _num_eval_rows(len(keys), eval_size)
    groups: dict[str | bytes, int] = {}
    group_of = array("q", (groups.setdefault(key, len(groups)) for key in keys))
    sizes = Counter(group_of)
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    held_out: set[int] = set()
    num_held_out = 0
    for group in order if wanted else ():
        if num_held_out + sizes[group] <= wanted:
            held_out.add(group)
            num_held_out += sizes[group]
    if wanted and num_held_out in (0, len(keys)):
        raise DataError(
            f"The {len(keys)} rows hold only {len(groups)} different ones, so no eval set can be split off",
            expected="duplicates stay on one side of the split",
            fix="remove the duplicates, add rows, or give an eval file",
        )
    sides: tuple[list[int], list[int]] = [], []
    for index, group in enumerate(group_of):
        sides[group in held_out].append(index)
    return sides


def _num_eval_rows(num_rows: int, eval_size: float | int) -> int:
    if eval_size < 0:
        raise DataError(f"eval_size is {eval_size}", expected="a share below 1, or a number of rows")
    wanted = max(1, round(num_rows * eval_size)) if 0 < eval_size < 1 else int(eval_size)
    if wanted >= num_rows and wanted > 0:
        raise DataError(
            f"The eval set would take {wanted} of {num_rows} rows and leave none to train on",
            expected=f"eval_size below {num_rows} rows, or a share such as 0.1",
            fix="lower eval_size or give more data",
        )
    return wanted


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _error(problems: Sequence[Problem]) -> DataError:
    first = problems[0]
    more = f" ({len(problems) - 1} more rows cannot be used either)" if len(problems) > 1 else ""
    return DataError(
        f"{first.message}{more}",
        where=str(first.origins[0]) if first.origins else "",
        fix="correct the rows; `phlora data check FILE` lists all of them",
    )


def _ignored_columns(shape: _Shape) -> Problem:
    names = ", ".join(f"`{name}`" for name in sorted(shape.ignored))
    return Problem(
        "ignored_columns",
        "note",
        f"{shape.name}: not used, since {shape.schema.name} has no such column: {names}",
    )


# ------------------------------------------------------------------------------------------------ sources


def _as_list(sources: Source | Sequence[Source]) -> list[Source]:
    """One source, or several; a list of dicts is one source."""
    if isinstance(sources, list | tuple) and not (sources and isinstance(sources[0], Mapping)):
        if not sources:
            raise DataError("No data was given", expected="at least one file or one row")
        return list(sources)
    return [sources]  # type: ignore[list-item]


def _open_source(source: Source, format: str, weight: float) -> tuple[_Shape, Iterator[Record]]:
    """Open a source and find its schema, reading as few rows as that takes."""
    if isinstance(source, DataFile):
        weight, source = source.weight, source.path
    if not (isinstance(weight, int | float) and math.isfinite(weight) and weight > 0):
        raise ConfigError(f"The weight {weight!r} of {source} is no positive number")
    name, records = open_path(str(source)) if isinstance(source, str | Path) else _open_object(source)
    first = list(itertools.islice(records, NUM_ROWS_FOR_DETECTION))
    if not first:
        raise DataError("The file is empty" if isinstance(source, str | Path) else "No rows", where=name)
    schema, example_line = _detect(first, format, name)
    return _Shape(name, weight, schema, example_line), itertools.chain(first, records)


def _open_object(source: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> tuple[str, Iterator[Record]]:
    """A DatasetDict, a Dataset or any other iterable of dicts."""
    name = "rows"
    if isinstance(source, Mapping):
        name = pick_split(source.keys(), None, where="the data set")
        source = source[name]
    return name, iter(enumerate(source, 1))


# ------------------------------------------------------------------------------------------------ schemata


@dataclass(frozen=True)
class _Parts:
    messages: list[Message] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class _Schema:
    name: str
    columns: str
    convert: Callable[[Mapping[str, Any], Sequence[str]], _Parts]
    required: Callable[[Mapping[str, Any]], Sequence[str] | None]
    optional: frozenset[str] = frozenset()


def _detect(records: Sequence[Record], format: str, name: str) -> tuple[_Schema, int]:
    """The schema that most of the records have, and the line of the first that has it."""
    if format != "auto":
        return _schema_named(format), records[0][0]
    found: Counter[str] = Counter()
    lines: dict[str, int] = {}
    schemata: dict[str, _Schema] = {}
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


def _schema_named(format: str) -> _Schema:
    aliases = {"chat": "messages", "sharegpt": "conversations", "openai": "messages"}
    wanted = aliases.get(format, format)
    for schema in SCHEMATA:
        if schema.name == wanted:
            return schema
    raise ConfigError(
        f"`{format}` is no data format", where="format", fix=did_you_mean(format, {s.name for s in SCHEMATA})
    )


def _schema_of(record: Mapping[str, Any]) -> _Schema | None:
    return next((schema for schema in SCHEMATA if schema.required(record)), None)


def _convert(shape: _Shape, records: Iterator[Record]) -> Iterator[Row | Problem]:
    for line, record in records:
        origin = Origin(shape.name, line)
        try:
            yield _convert_record(record, shape, origin)
        except BadRow as bad:
            message = _sentence(bad.message) + (f" (expected: {bad.expected})" if bad.expected else "")
            yield Problem(bad.kind, "error", message, (origin,))


def _convert_record(record: Any, shape: _Shape, origin: Origin) -> Row:
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
    )


def _other_schema(record: Mapping[str, Any], shape: _Shape) -> BadRow:
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
    _Schema("messages", "`messages`", _from_messages, _needs("messages")),
    _Schema("conversations", "`conversations`", _from_messages, _needs("conversations")),
    _Schema("prompt_completion", "`prompt` and `completion` as text", _from_plain, _prompt_is(str)),
    _Schema(
        "prompt_completion", "`prompt` and `completion` as messages", _from_chat_prompt, _prompt_is(list)
    ),
    _Schema(
        "alpaca",
        "`instruction`, `output` and optionally `input`",
        _from_alpaca,
        _instruction,
        frozenset({"input", "context"}),
    ),
    _Schema("qa", "a pair such as `question` and `answer`", _from_pair, _pair),
    _Schema("text", "`text`", _from_text, _needs("text")),
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
