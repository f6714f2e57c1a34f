"""Tables: CSV and TSV in the dialect that the file is really in, workbooks, Parquet and Arrow files, data frames."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from phlora.data.readers.files import StoredFile
from phlora.data.readers.text import Line
from phlora.data.rows import BadRow, Origin, Problem, Record, sentence
from phlora.errors import DataError, did_you_mean
from phlora.extras import require

NUM_RECORDS_LOOKED_AT = 50
WORKBOOK_KINDS = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
# For `extras.require`.
WORKBOOKS = {"python_calamine": "reading workbooks (.xlsx, .ods)"}
_DELIMITERS = ("\t", ",", ";", "|")
_NO_DELIMITER = "\x1f"
_WELL_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_INDEX_NAMES = ("", "Unnamed: 0", "__index_level_0__")


def needed_by_tables(paths: Iterable[str]) -> dict[str, str]:
    """The optional packages that reading these files takes, known by their names; for `extras.require`."""
    return dict(WORKBOOKS) if any(path.lower().endswith(WORKBOOK_KINDS) for path in paths) else {}


@dataclass(frozen=True)
class Dialect:
    """How the cells of a text table are told apart."""

    delimiter: str
    quoting: bool = True

    def options(self) -> dict[str, Any]:
        """The arguments of `csv.reader`."""
        quoting = csv.QUOTE_MINIMAL if self.quoting else csv.QUOTE_NONE
        return {"delimiter": self.delimiter, "quoting": quoting, "strict": True}


def read_csv(
    file: StoredFile, lines: Callable[[], Iterator[Line]], problems: list[Problem]
) -> Iterator[Record]:
    """The rows of a CSV or TSV file, each with the line that it begins in.

    Args:
        lines: opens the file's lines anew; they are looked at before they are read.
    """
    csv.field_size_limit(1 << 30)
    dialect = _dialect(file, lines)
    source = _Lines(file, lines())
    reader = csv.reader(source, **dialect.options())
    columns: list[str] | None = None
    while True:
        start = source.line + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield start, _broken(error, source.line, start)
            return
        if cells is None:
            return
        if columns is None:
            if cells and not _is_excel_hint(cells):
                columns = _header(cells, f"{file.name}:{start}")
            continue
        if not any(cells):
            continue
        if source.line > start:
            _look_for_swallowed_rows(source.recent, cells, dialect, file, start, problems)
        yield start, _record(columns, cells)


class _Lines:
    """Hands lines to `csv.reader` and remembers where it is."""

    def __init__(self, file: StoredFile, lines: Iterator[Line]) -> None:
        self.file, self.lines, self.line = file, lines, 0
        self.recent: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.line, text = next(self.lines)
        if isinstance(text, BadRow):
            raise DataError(
                sentence(text.message),
                where=f"{self.file.name}:{self.line}",
                fix=f"{text.expected}; or name it with `--encoding`",
            )
        self.recent = [*self.recent[-7:], text]
        return text


def _dialect(file: StoredFile, lines: Callable[[], Iterator[Line]]) -> Dialect:
    head = [text for _, text in itertools.islice(lines(), 4 * NUM_RECORDS_LOOKED_AT) if isinstance(text, str)]
    if head and head[0].lower().startswith("sep=") and head[0][4:5] in _DELIMITERS:
        return Dialect(head[0][4:5])
    delimiter = max(_DELIMITERS, key=lambda mark: _fit(head, mark))
    if _fit(head, delimiter) == (0.0, 0):
        return Dialect(_NO_DELIMITER)
    if delimiter == "\t":
        return Dialect(delimiter, quoting=not _has_literal_quotes(lines))
    return Dialect(delimiter)


def _fit(head: Sequence[str], delimiter: str) -> tuple[float, int]:
    """The share of rows that have the header's number of cells, and that number; nothing for one cell."""
    try:
        rows = [row for row in csv.reader(head, delimiter=delimiter) if row][: NUM_RECORDS_LOOKED_AT + 1]
    except csv.Error:
        return 0.0, 0
    if not rows or len(rows[0]) < 2:
        return 0.0, 0
    same = sum(len(row) == len(rows[0]) for row in rows)
    # The last of the lines looked at may be half a row.
    return round(min(1.0, (same + 1) / len(rows)), 2), len(rows[0])


def _has_literal_quotes(lines: Callable[[], Iterator[Line]]) -> bool:
    """Whether quotes in a tab separated file are part of the texts, as most writers of TSV leave them.

    So it is when every line has as many cells as the header, and some cell holds a quote where a writer that
    quotes would have written it otherwise. A few lines may be torn where the quotes make no sense as such either.
    """
    found, num_lines, num_torn, num_cells = False, 0, 0, 0
    for _, text in lines():
        if isinstance(text, BadRow) or text.isspace():
            continue
        cells = text.rstrip("\r\n").split("\t")
        num_cells = num_cells or len(cells)
        num_lines += 1
        num_torn += len(cells) != num_cells
        found = found or any('"' in cell and not _WELL_QUOTED.fullmatch(cell) for cell in cells)
    if not found or num_torn > 0.1 * num_lines:
        return False
    return not num_torn or not _is_quoted_table(lines(), num_cells)


def _is_quoted_table(lines: Iterator[Line], num_cells: int) -> bool:
    texts = (text for _, text in lines if isinstance(text, str))
    try:
        return all(len(row) in (0, num_cells) for row in csv.reader(texts, delimiter="\t", strict=True))
    except csv.Error:
        return False


def _is_excel_hint(cells: Sequence[str]) -> bool:
    return len(cells) <= 2 and cells[0].lower().startswith("sep=")


def _header(cells: Sequence[str], where: str) -> list[str]:
    columns = [cell.strip().lstrip("\ufeff") for cell in cells]
    names = [name for name in columns if name]
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f"The header names the column `{name}` twice",
                where=where,
                fix="rename one of them, or remove it",
            )
    if not names:
        raise DataError("The header is empty", where=where, expected="the names of the columns")
    return columns


def _record(columns: Sequence[str], cells: Sequence[str]) -> Any:
    if len(cells) > len(columns) and any(cells[len(columns) :]):
        return BadRow(
            "broken_csv", f"the line has more cells than the header ({len(columns)})", "quotes around commas"
        )
    record: dict[str, Any] = {}
    for index, (name, cell) in enumerate(itertools.zip_longest(columns, cells[: len(columns)])):
        if name in _INDEX_NAMES and index == 0:
            continue  # pandas writes the index of its rows first
        if not name:
            if cell:
                return BadRow("broken_csv", f"the cell `{cell[:40]}` stands in a column without a name")
            continue
        record[name] = cell
    return record


def _broken(error: csv.Error, line: int, start: int) -> BadRow:
    message = str(error)
    if "unexpected end of data" in message:
        return BadRow(
            "broken_csv",
            f"a quote opened in this row is not closed before the end, line {line}",
            'a closing quote, or the quote doubled: ""',
        )
    where = f" (in line {line})" if line != start else ""
    return BadRow("broken_csv", f"broken CSV: {message}{where}", 'quotes inside a quoted cell doubled: ""')


def _look_for_swallowed_rows(
    recent: Sequence[str],
    cells: Sequence[str],
    dialect: Dialect,
    file: StoredFile,
    start: int,
    problems: list[Problem],
) -> None:
    """A quote too many at the head of a cell joins rows; where each line is a row by itself, that is likely."""
    lines = [line for line in recent[-(sum(cell.count("\n") for cell in cells) + 1) :] if line.strip()]
    if len(cells) > 1 and all(line.count(dialect.delimiter) == len(cells) - 1 for line in lines):
        problems.append(
            Problem(
                "swallowed_rows",
                "warning",
                "A cell goes on over several lines, each of which looks like a row: a quote may be missing",
                (Origin(file.name, start),),
            )
        )


# ------------------------------------------------------------------------------------------------ workbooks


def read_workbook(file: StoredFile, sheet: str | None) -> Iterator[Record]:
    """The rows of a sheet, by their numbers in it; all cells as text, as the sheet shows them.

    Raises:
        DataError: the workbook cannot be read, has no such sheet, or several and none was named.
        MissingExtraError: python-calamine is not installed.
    """
    require(WORKBOOKS, instead="save the sheet as CSV")
    from python_calamine import CalamineError, CalamineWorkbook

    try:
        workbook = CalamineWorkbook.from_filelike(io.BytesIO(file.read()))
        name = _sheet(workbook, sheet, file.name)
        rows = workbook.get_sheet_by_name(name).to_python(skip_empty_area=False)
    except CalamineError as error:
        raise DataError(f"The workbook cannot be read: {error}", where=file.name) from None
    columns: list[str] | None = None
    for number, row in enumerate(rows, 1):
        cells = [_cell_text(cell) for cell in row]
        if not any(cells):
            continue
        if columns is None:
            columns = _header(cells, f"{file.name}:{number}")
        else:
            yield number, _record(columns, cells)


def _sheet(workbook: Any, wanted: str | None, where: str) -> str:
    names = list(workbook.sheet_names)
    if wanted:
        if wanted not in names:
            raise DataError(f"No sheet `{wanted}`", where=where, fix=did_you_mean(wanted, names))
        return wanted
    filled = [name for name in names if workbook.get_sheet_by_name(name).height > 1]
    if len(filled) > 1:
        raise DataError(
            f"The workbook has {len(filled)} sheets with rows: {', '.join(filled[:8])}",
            where=where,
            fix=f"name one: {where}:{filled[0]}",
        )
    return str((filled or names)[0])


def _cell_text(cell: Any) -> str:
    if isinstance(cell, bool):
        return "TRUE" if cell else "FALSE"
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 1e15:
        return str(int(cell))
    return str(cell) if cell is not None else ""


# ------------------------------------------------------------------------------------------------ Arrow


def read_arrow(file: StoredFile) -> Iterator[Record]:
    """The rows of a Parquet, Arrow or Feather file.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow

    try:
        yield from enumerate(plain(_batches(file)), 1)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError, ValueError) as error:
        kind = "Parquet" if file.kind == ".parquet" else "Arrow file"
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"The file is no readable {kind}: {reason}", where=file.name) from None


def _batches(file: StoredFile) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    if file.kind == ".parquet":
        # Parquet reads at the places that its footer names; a stream has none.
        source = file.path or pyarrow.BufferReader(file.read())
        with pyarrow.parquet.ParquetFile(source) as table:
            _require_unique(table.schema_arrow.names, file.name)
            for batch in table.iter_batches(1024):
                yield from batch.to_pylist()
        return
    data = file.read()
    if data.startswith((b"ARROW1", b"FEA1")):
        table = pyarrow.feather.read_table(pyarrow.BufferReader(data))
    else:
        table = pyarrow.ipc.open_stream(pyarrow.BufferReader(data)).read_all()
    _require_unique(table.column_names, file.name)
    for batch in table.to_batches(1024):
        yield from batch.to_pylist()


def _require_unique(names: Sequence[str], where: str) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise DataError(f"The column `{name}` stands twice", where=where, fix="rename one of them")


def plain(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of a table without what tables add: an index column, and NaN where a value is missing."""
    for record in records:
        record.pop("__index_level_0__", None)
        yield {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in record.items()
        }


def frame_records(source: Any) -> Iterator[dict[str, Any]] | None:
    """The rows of a pandas or polars data frame or an Arrow table; None for anything else."""
    library = type(source).__module__.partition(".")[0]
    if library == "pandas" and hasattr(source, "columns"):
        _require_unique([str(name) for name in source.columns], "the data frame")
        return plain(
            {str(name): _missing(value) for name, value in row.items()} for row in _pandas_rows(source)
        )
    if library == "polars" and hasattr(source, "iter_rows"):
        return plain(source.iter_rows(named=True))
    if library == "pyarrow" and hasattr(source, "to_batches"):
        batches = (batch.to_pylist() for batch in source.to_batches(1024))
        return plain(itertools.chain.from_iterable(batches))
    return None


def _pandas_rows(frame: Any) -> Iterator[dict[Any, Any]]:
    for start in range(0, len(frame), 1024):
        yield from frame.iloc[start : start + 1024].to_dict("records")


def _missing(value: Any) -> Any:
    """None for pandas' other marks of a missing value."""
    return None if type(value).__name__ in ("NAType", "NaTType") else value
