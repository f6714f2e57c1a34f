"""Writes what any of the readers reads as plain JSONL: one chat a line, `{"messages": [...]}`, in UTF-8."""

from __future__ import annotations

import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phlora.config import DataFile
from phlora.data.dataset import read_all
from phlora.data.dialects import Export
from phlora.data.exports import DEFAULT_GAP_HOURS, Chat, chats_of, export_of, slack_names
from phlora.data.inspection import oddities
from phlora.data.known_keys import KEEPING_OUT
from phlora.data.problems import merge_problems, problems_json, render_problem, shown_formats
from phlora.data.readers import Opened, open_path
from phlora.data.readers.files import BINARY_KINDS, COMPRESSIONS, TEXT_KINDS
from phlora.data.rows import Origin, Problem, Record, Row
from phlora.data.values import checked
from phlora.display import counted
from phlora.errors import DataError, InputError
from phlora.files import replaced_file

NUM_RECORDS_LOOKED_AT = 64
SLACK_USERS = Export("Slack's list of people", needs_assistant=False)
SLACK_CHANNELS = Export("Slack's list of channels", needs_assistant=False)
_NAMES_A_GROUP = re.compile(
    r"id|source|group|((chat|conversation|dialog|dialogue|thread|session|user|customer|document|group)(_?id)?|prompt_?id)",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written.

    Attributes:
        num_rows: lines of the file.
        problems: what was noted, and the rows that could not be used and are not in the file.
        formats: the schema of each source, or the export that it is.
    """

    output: str
    num_rows: int
    problems: tuple[Problem, ...]
    formats: dict[str, str]

    @property
    def num_left_out(self) -> int:
        """Rows that could not be used."""
        return sum(problem.count for problem in self.problems if problem.severity == "error")

    def to_json(self) -> dict[str, Any]:
        """The same as plain values; origins as `file:line`."""
        return {
            "output": self.output,
            "num_rows": self.num_rows,
            "num_left_out": self.num_left_out,
            "formats": self.formats,
            "problems": problems_json(merge_problems(self.problems)),
        }

    def render(self) -> str:
        """A few lines for the terminal."""
        lines = [*shown_formats(self.formats), f"{counted(self.num_rows, 'row')} written to {self.output}"]
        if self.num_left_out:
            lines.append(f"{counted(self.num_left_out, 'row')} left out")
        return "\n".join([*lines, *map(render_problem, merge_problems(self.problems))])


def convert(
    sources: Sequence[str | DataFile],
    output: str | Path,
    *,
    format: str = "auto",
    assistant: str | None = None,
    gap_hours: float | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Converted:
    """Write the rows of all sources to one JSONL file, which appears whole or not at all.

    Chats become `{"messages": [...]}` with their `tools`; plain texts and prompts stay what they are. What a row said
    of its weight stands in it as `weight` (0: it is not trained), what the split goes by as `category`. Rows that
    cannot be used are left out and named in the result.

    Args:
        assistant, gap_hours: for logs of several people, see `exports.chats_of`; refused elsewhere.
        overwrite: replace a file that is there.
        progress: called with the number of rows written since.

    Raises:
        DataError: a source cannot be read, or holds nothing that can be written.
        InputError: the output is a source, or is there already.
    """
    path = Path(output).expanduser()
    files = [source if isinstance(source, DataFile) else DataFile(path=source) for source in sources]
    _check_output(path, files, overwrite)
    formats: dict[str, str] = {}
    problems: list[Problem] = []
    num_rows = 0
    with replaced_file(path) as part, part.open("w", encoding="utf-8", newline="\n") as out:
        for record in _records(files, format, assistant, gap_hours, formats, problems):
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            num_rows += 1
            if progress:
                progress(1)
        if not num_rows:
            raise _nothing(problems, files[0].path)
    return Converted(output=str(path), num_rows=num_rows, problems=tuple(problems), formats=formats)


def _check_output(path: Path, files: Sequence[DataFile], overwrite: bool) -> None:
    if any(Path(file.path).exists() and path.exists() and path.samefile(file.path) for file in files):
        raise InputError("The output is one of the inputs", where=str(path), fix="choose another name")
    if path.is_dir():
        raise InputError("The output is a folder", where=str(path), fix="name a file, such as chats.jsonl")
    if path.exists() and not overwrite:
        raise InputError(
            "The output exists already", where=str(path), fix="choose another name, or add --overwrite"
        )
    if path.suffix not in (".jsonl", ".ndjson"):
        raise InputError("The output is plain JSONL", where=str(path), fix=f"name it {_plain_name(path)}")
    if not path.parent.is_dir():
        raise InputError("The folder of the output does not exist", where=str(path), fix="make it first")


def _plain_name(path: Path) -> str:
    stem = path.name
    while Path(stem).suffix.lower() in (*COMPRESSIONS, *TEXT_KINDS, *BINARY_KINDS, ".zip"):
        stem = Path(stem).stem
    return f"{stem}.jsonl"


def _nothing(problems: Sequence[Problem], source: str) -> DataError:
    first = next((problem for problem in problems if problem.severity == "error"), None)
    if first is None:
        return DataError("The sources hold no chat", where=source)
    where = str(first.origins[0]) if first.origins else source
    return DataError(f"No row can be used; the first one: {first.message}", where=where)


def _records(
    files: Sequence[DataFile],
    format: str,
    assistant: str | None,
    gap_hours: float | None,
    formats: dict[str, str],
    problems: list[Problem],
) -> Iterator[dict[str, Any]]:
    for file in files:
        exports = list(_exports(file)) if format == "auto" and file.format is None else []
        last: deque[Any] = deque(maxlen=1)
        for chat in _chats(exports, assistant, gap_hours, formats, problems):
            yield {"messages": chat.messages}
        option = "--assistant" if assistant is not None else "--gap-hours" if gap_hours is not None else ""
        if option and not any(export.needs_assistant for _, export in exports):
            raise DataError(
                f"This is not recognised as a log of several people, and `{option}` means nothing in it",
                where=file.path,
                expected="a WhatsApp chat, or an export of Telegram or Slack",
                fix=f"leave `{option}` out, or export the chat again with dates such as 31/12/2024, 21:04",
            )
        if not exports:
            for item in read_all([file], format, formats, seen=last.append):
                if isinstance(item, Problem):
                    problems.append(item)
                else:
                    # What is not trained is written down, and is left out only where the file is read.
                    problems += [odd for odd in oddities(item, "all") if odd.kind != "weight_zero"]
                    yield _plain(item) | _names_beside(last[-1])


def _chats(
    exports: Sequence[tuple[Opened, Any]],
    assistant: str | None,
    gap_hours: float | None,
    formats: dict[str, str],
    problems: list[Problem],
) -> Iterator[Chat]:
    """The chats of the exports of one source; the assistant need not have written in each file."""
    names: dict[str, str] = {}
    absent: DataError | None = None
    num_chats = 0
    logs = []
    for opened, export in exports:
        if export is SLACK_USERS:
            names |= slack_names(opened.records)
        elif export is not SLACK_CHANNELS:
            logs.append((opened, export))
    for opened, export in logs:
        formats[opened.name] = export.kind
        records = _sound(checked(opened.records, {}, is_sound=opened.is_sound), opened.name, problems)
        chats = chats_of(
            export,
            records,
            assistant=assistant,
            where=opened.name,
            gap_hours=DEFAULT_GAP_HOURS if gap_hours is None else gap_hours,
            names=names,
        )
        try:
            for chat in chats:
                num_chats += 1
                yield chat
        except DataError as error:
            if assistant is None or len(logs) == 1 or not export.needs_assistant:
                raise
            absent = absent or error
        problems += opened.problems
    if absent and not num_chats:
        raise absent


def _names_beside(record: Any) -> dict[str, Any]:
    """What a split could go by: columns that name a chat, a person, a source or a side of the split."""
    if not isinstance(record, Mapping):
        return {}
    return {
        name: value
        for name, value in record.items()
        if (_NAMES_A_GROUP.fullmatch(name) or name in KEEPING_OUT)
        and isinstance(value, str | int | float)
        and value != ""
    }


def _exports(file: DataFile) -> Iterator[tuple[Opened, Any]]:
    """The files of a source that are exports; none where the first one is no export."""
    for opened in open_path(file.path, split=file.split, encoding=file.encoding):
        first = list(itertools.islice(opened.records, NUM_RECORDS_LOOKED_AT))
        export = export_of(first) or _slack_list(first)
        if export is None:
            return
        yield replace(opened, records=itertools.chain(first, opened.records)), export


def _slack_list(first: Sequence[Record]) -> Export | None:
    """Slack's lists of people and channels, which stand beside the channels' folders."""
    if first and slack_names(first):
        return SLACK_USERS
    of_channels = first and all(
        isinstance(record, Mapping) and {"id", "created", "members"} <= record.keys() for _, record in first
    )
    return SLACK_CHANNELS if of_channels else None


def _sound(records: Iterable[Record], name: str, problems: list[Problem]) -> Iterator[Record]:
    for line, record in records:
        if isinstance(record, Exception):
            problems.append(Problem("bad_row", "error", str(record), (Origin(name, line),)))
        else:
            yield line, record


def _plain(row: Row) -> dict[str, Any]:
    """The record that is read as this row again: its text, its weight, and its category for the split."""
    beside = {
        "tools": row.tools or None,
        "weight": None if row.weight == 1.0 else row.weight,
        "category": row.category,
    }
    texts = {"prompt": row.prompt, "completion": row.completion, "text": row.text}
    said = texts if row.messages is None else {"messages": list(row.messages)}
    return {name: value for name, value in (said | beside).items() if value is not None}
