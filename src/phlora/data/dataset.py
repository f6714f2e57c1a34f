"""All rows of several sources: loaded at once, or indexed in one reading and read again when they are needed."""

from __future__ import annotations

import itertools
import math
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from phlora.config import DataFile, TrainOn
from phlora.data.formats import NUM_ROWS_FOR_DETECTION, Shape, detect, to_rows
from phlora.data.readers import Opened, frame_records, open_path, pick_split
from phlora.data.rows import (
    DIGEST_BYTES,
    Origin,
    Problem,
    Record,
    Row,
    key_and_digest,
    key_mark,
    row_mark,
    why_untrained,
)
from phlora.data.similarity import row_keys
from phlora.data.values import checked
from phlora.errors import ConfigError, DataError
from phlora.parameters import require_choice

# Endings of files that hold rows as they were written, without the keys that only other rows have.
_WRITTEN = tuple(
    f".{kind}{packed}"
    for kind in ("jsonl", "ndjson", "json", "csv", "tsv", "txt")
    for packed in ("", ".gz", ".zst", ".bz2", ".xz")
)

Source: TypeAlias = str | Path | DataFile | Mapping[str, Any] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Loaded:
    """The rows of all sources in order, what was wrong with others, and the schema of each source."""

    rows: list[Row]
    problems: list[Problem]
    formats: dict[str, str]


@dataclass(frozen=True)
class RowIndex:
    """What one reading of all sources found. The rows are not kept: they are read again when they are needed.

    Attributes:
        sources, format, keep_reasoning: what was read, and how.
        keys: `row_key` of each row, as bytes; without digests `key_mark`.
        near, prompts, openings: the digests of `similarity.RowKeys`, one row after the other.
        exchanges, exchange_ends: its exchanges, one row after the other, and where those of each row end.
        heads, tails: of `similarity.RowKeys`, of each row.
        is_trained: a byte for each row, 0 where it says that nothing of it is trained.
        groups: what each row belongs to, where a column says so.
        categories: the category of each row, where a column says so.
        digests: `row_digest` of each row, one after the other.
        marks: `row_mark` of each row, by which a second reading knows it again.
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
    marks: array[int] = field(default_factory=lambda: array("q"))
    near: bytearray = field(default_factory=bytearray)
    prompts: bytearray = field(default_factory=bytearray)
    openings: bytearray = field(default_factory=bytearray)
    exchanges: array[int] = field(default_factory=lambda: array("q"))
    exchange_ends: array[int] = field(default_factory=lambda: array("q"))
    heads: array[int] = field(default_factory=lambda: array("q"))
    tails: array[int] = field(default_factory=lambda: array("q"))
    is_trained: bytearray = field(default_factory=bytearray)
    groups: list[bytes] | None = None
    categories: list[str | None] = field(default_factory=list)
    keep_reasoning: bool = False

    def __len__(self) -> int:
        return len(self.lines)

    def origin(self, number: int) -> Origin:
        """Where a row stands."""
        return Origin(self.files[self.file_numbers[number]], self.lines[number])

    def digest(self, number: int) -> bytes:
        """`row_digest` of a row."""
        return bytes(self.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES])

    def exchanges_of(self, number: int) -> array[int]:
        """`similarity.RowKeys.exchanges` of a row."""
        return self.exchanges[self.exchange_ends[number - 1] if number else 0 : self.exchange_ends[number]]

    def all(self) -> RowSubset:
        """All rows."""
        return RowSubset(self, range(len(self)))


@dataclass(frozen=True)
class RowSubset:
    """Some rows of a survey, in its order; each iteration reads the sources anew.

    Raises:
        DataError: from an iteration, when the sources no longer hold the rows that were surveyed.
    """

    survey: RowIndex
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Row]:
        wanted = iter(self.numbers)
        number = next(wanted, None)
        for found, row in enumerate(_rows_of(self.survey)):
            if number is None:
                return
            if found == number:
                if row_mark(row) != self.survey.marks[number]:
                    break
                yield row
                number = next(wanted, None)
        if number is not None:
            raise DataError("The data changed while it was read", where=str(self.survey.origin(number)))

    def keys(self) -> Iterator[bytes]:
        """`row_key` of each row, as bytes."""
        return (self.survey.keys[number] for number in self.numbers)

    def digests(self) -> Iterator[bytes]:
        """`row_digest` of each row."""
        return map(self.survey.digest, self.numbers)

    def origins(self) -> Iterator[Origin]:
        """Where each row stands."""
        return map(self.survey.origin, self.numbers)


def read_rows(
    source: Source, *, format: str = "auto", weight: float = 1.0, keep_reasoning: bool = False
) -> Iterator[Row]:
    """The rows of one source, read as they are needed.

    Raises:
        DataError: the source cannot be read, or at the first row that cannot be used.
        NetworkError: a hub data set cannot be reached.
    """
    for shape, opened in _open_source(source, format, weight):
        shape.keep_reasoning = keep_reasoning
        for item in to_rows(shape, opened.records):
            if isinstance(item, Row):
                yield item
            elif item.severity == "error":
                raise _error([item])


def load_rows(
    sources: Source | Sequence[Source],
    *,
    format: str = "auto",
    on_bad: Literal["raise", "collect"] = "raise",
    keep_reasoning: bool = False,
) -> Loaded:
    """Read all rows of one or several sources.

    A source is a path (a data file, a zip archive, a folder or a pattern), a hub name (`owner/name`, or
    `owner/name:split`), a `DataFile` with what is to be known about its path, a `datasets` object, a pandas or
    polars data frame, an Arrow table, or a list of dicts. The weight of a `DataFile` multiplies the loss of every
    trained token of its rows.

    Args:
        sources: one source or several.
        format: `auto`, or one of `messages, conversations, alpaca, qa, prompt_completion, text`.
        on_bad: `raise` reads to the end, then raises about the rows that cannot be used; `collect` returns
            them in `problems`.
        keep_reasoning: keep what was thought before answers as text, where templates have no place for it.

    Raises:
        DataError: a source that cannot be read or holds no rows, or (`on_bad="raise"`) rows that cannot be
            used.
        ConfigError: an unknown `format` or `on_bad`.
        NetworkError: a hub data set cannot be reached.
    """
    require_choice(on_bad, ("raise", "collect"), where="on_bad")
    rows: list[Row] = []
    problems: list[Problem] = []
    formats: dict[str, str] = {}
    for item in read_all(_as_list(sources), format, formats, keep_reasoning=keep_reasoning):
        (rows if isinstance(item, Row) else problems).append(item)  # type: ignore[arg-type]
    _raise_for(problems, on_bad)
    return Loaded(rows, problems, formats)


def index_rows(
    sources: Source | Sequence[Source],
    *,
    format: str = "auto",
    on_bad: Literal["raise", "collect"] = "raise",
    inspect: Callable[[Row], None] | None = None,
    group_by: str | None = None,
    stratify_by: str | None = None,
    keep_reasoning: bool = False,
    digests: bool = True,
    train_on: TrainOn = "assistant",
) -> RowIndex:
    """Read all rows once, for what is to be known about them before they are used.

    A data set of any size is read in the same memory, but for some 200 bytes a row.

    Args:
        inspect: called with each row as it is read.
        group_by, stratify_by: columns that the split goes by.
        keep_reasoning: put what was thought before an answer into its content; see `reasoning`.
        train_on: what of a row is trained where it says nothing itself.
        digests: whether what is done with the rows is told by `row_digest`, as in training.

    The other arguments and what is raised are those of `load_rows`.
    """
    # What can be read only once is kept.
    kept = [list(source) if isinstance(source, Iterator) else source for source in _as_list(sources)]
    survey = RowIndex(kept, format, [], bytearray(), array("q"), array("i"), (), [], {})
    groups: list[bytes] = []
    files: dict[str, int] = {}
    for item in read_all(kept, format, survey.formats, group_by, stratify_by, keep_reasoning=keep_reasoning):
        if isinstance(item, Problem):
            survey.problems.append(item)
            continue
        if digests:
            key, digest = key_and_digest(item)
            survey.digests.extend(digest)
        else:
            key = key_mark(item)
        survey.keys.append(key)
        survey.marks.append(row_mark(item))
        keys = row_keys(item)
        survey.near.extend(keys.near)
        survey.prompts.extend(keys.prompt)
        survey.openings.extend(keys.openings)
        survey.exchanges.extend(keys.exchanges)
        survey.exchange_ends.append(len(survey.exchanges))
        survey.heads.append(keys.head)
        survey.tails.append(keys.tail)
        survey.is_trained.append(why_untrained(item, train_on) is None)
        # Categories are few, so that each is kept once.
        survey.categories.append(None if item.category is None else sys.intern(item.category))
        if item.group is not None:
            groups.append(item.group.encode("utf-8", "surrogatepass"))
        survey.lines.append(item.origin.line)
        survey.file_numbers.append(files.setdefault(item.origin.file, len(files)))
        if inspect:
            inspect(item)
    _raise_for(survey.problems, on_bad)
    return replace(
        survey,
        files=tuple(files),
        groups=groups if group_by is not None else None,
        keep_reasoning=keep_reasoning,
    )


def _rows_of(index: RowIndex) -> Iterator[Row]:
    items = read_all(index.sources, index.format, {}, keep_reasoning=index.keep_reasoning)
    return (item for item in items if isinstance(item, Row))


def read_all(
    sources: Sequence[Source],
    format: str,
    formats: dict[str, str],
    group_by: str | None = None,
    stratify_by: str | None = None,
    *,
    keep_reasoning: bool = False,
    seen: Callable[[Any], object] | None = None,
) -> Iterator[Row | Problem]:
    """The rows and problems of all sources; their schemata go into `formats`.

    Args:
        seen: called with each record before the row that it becomes.
    """
    for source in sources:
        schemata: dict[str, str] = {}
        for shape, opened in _open_source(source, format, 1.0):
            shape.group_by, shape.stratify_by = group_by, stratify_by
            shape.keep_reasoning = keep_reasoning
            formats[shape.name] = shape.schema.name
            schemata.setdefault(shape.schema.name, shape.name)
            yield from to_rows(shape, _shown(opened.records, seen) if seen else opened.records)
            yield from opened.problems
            yield from shape.problems()
        if len(schemata) > 1 and "text" in schemata:
            found = ", ".join(f"`{schema}` ({file})" for schema, file in schemata.items())
            message = f"Files of one source have different schemata: {found}; all of a `text` is trained"
            yield Problem("mixed_files", "warning", message, (Origin(schemata["text"], 1),))


def _shown(records: Iterable[Record], seen: Callable[[Any], object]) -> Iterator[Record]:
    for line, record in records:
        seen(record)
        yield line, record


def _raise_for(problems: Sequence[Problem], on_bad: Literal["raise", "collect"]) -> None:
    errors = [problem for problem in problems if problem.severity == "error"]
    if on_bad == "raise" and errors:
        raise _error(errors)


def _error(problems: Sequence[Problem]) -> DataError:
    first = problems[0]
    more = f" ({len(problems) - 1} more rows cannot be used either)" if len(problems) > 1 else ""
    return DataError(
        f"{first.message}{more}",
        where=str(first.origins[0]) if first.origins else "",
        fix="correct the rows; `phlora data check FILE` lists all of them",
    )


def _as_list(sources: Source | Sequence[Source]) -> list[Source]:
    """One source, or several; a list of dicts is one source."""
    if isinstance(sources, list | tuple) and not (sources and isinstance(sources[0], Mapping)):
        if not sources:
            raise DataError("No data was given", expected="at least one file or one row")
        return list(sources)
    return [sources]  # type: ignore[list-item]


def _open_source(source: Source, format: str, weight: float) -> Iterator[tuple[Shape, Opened]]:
    """Open the files of a source and find their schemata, reading as few rows as that takes."""
    file = source if isinstance(source, DataFile) else None
    source = source.path if isinstance(source, DataFile) else source
    format = (file.format if file else None) or format
    weight = file.weight if file else weight
    if file:
        _require_different(file)
    if not (isinstance(weight, int | float) and math.isfinite(weight) and weight > 0):
        raise ConfigError(f"The weight {weight!r} of {source} is no positive number")
    is_path = isinstance(source, str | Path)
    opened = (
        open_path(str(source), split=file.split if file else None, encoding=file.encoding if file else None)
        if isinstance(source, str | Path)
        else iter([_open_object(source)])
    )
    names, num_found = [], 0
    for item in opened:
        records = checked(item.records, file.columns if file else {}, is_sound=item.is_sound)
        if file and file.limit:
            records = itertools.islice(records, min(file.limit, sys.maxsize))
        first = list(itertools.islice(records, NUM_ROWS_FOR_DETECTION))
        names.append(item.name)
        if first:
            num_found += 1
            columns = file.columns if file else {}
            schema, example_line = detect(first, format, item.name, columns)
            found = itertools.chain(first, records)
            shape = Shape(item.name, weight, schema, example_line, columns=columns)
            shape.fills_nulls = not item.name.lower().endswith(_WRITTEN) if is_path else _is_table(source)
            yield shape, replace(item, records=found)
    if not num_found:
        raise DataError("The file is empty" if is_path else "No rows", where=names[0] if names else "")


def _require_different(file: DataFile) -> None:
    """Refuse a column that is given two names: the second would be a copy of the first."""
    for new, name in file.columns.items():
        others = [other for other, named in file.columns.items() if named == name and other != new]
        if others:
            raise ConfigError(
                f"`{new}` and `{others[0]}` are both read from the column `{name}`",
                where="columns",
                expected="a column of its own for each",
            )


def _is_table(source: Any) -> bool:
    """Whether rows in memory come from columns, in which every row has every key."""
    if isinstance(source, Mapping):
        return any(map(_is_table, source.values()))
    return hasattr(source, "features") or frame_records(source) is not None


def _open_object(source: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> Opened:
    """A data frame, a DatasetDict, a Dataset or any other iterable of dicts."""
    name = "rows"
    rows: Any = frame_records(source)
    if rows is None and isinstance(source, Mapping):
        name = pick_split(source.keys(), None, where="the data set")
        rows = source[name]
    elif rows is None:
        is_sequence = hasattr(source, "__getitem__") and hasattr(source, "__len__")
        if not isinstance(source, Iterable) and not is_sequence:
            is_lazy = callable(getattr(source, "collect", None))
            raise DataError(
                f"Rows cannot be taken from a {type(source).__name__}",
                expected="a path, a list of dictionaries, a data set, a data frame or an Arrow table",
                fix="give what its `.collect()` returns" if is_lazy else "",
            )
        rows = source
    return Opened(name, iter(enumerate(rows, 1)))
