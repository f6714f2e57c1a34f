"""Opens data sources and yields their records: the line each one came from, and its parsed value.

Files are read here rather than by the `datasets` library, because line numbers and encodings get lost there: a
latin-1 file fails without a name or a line. A record that cannot be parsed is yielded as a `BadRow`, so that one
pass over a file finds all of them.

    files.py      compressed files, archives, folders and patterns -> streams of bytes
    encodings.py  which encoding a text is in
    text.py       bytes -> numbered lines
    records.py    JSON and JSONL -> records
    tables.py     CSV, TSV, workbooks, Parquet, Arrow, data frames -> records
    hub.py        data sets that the `datasets` library reads
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from phlora.data.readers.files import (
    BINARY_KINDS,
    StoredFile,
    files_in_folder,
    files_of,
    guarded,
    is_data_name,
    is_pattern,
    matching,
    missing_file,
    require_file,
    shown_names,
)
from phlora.data.readers.hub import is_saved_folder, pick_split, read_hub, read_saved_folder
from phlora.data.readers.records import read_json, read_texts
from phlora.data.readers.tables import frame_records, read_arrow, read_csv, read_workbook
from phlora.data.readers.text import text_lines
from phlora.data.rows import Problem, Record
from phlora.data.split_names import other_splits

__all__ = ["Opened", "frame_records", "open_path", "pick_split"]

_JSON = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Opened:
    """A source that is being read: its name, its records, and what was found out about it so far.

    `is_sound`: whether the reader has looked at every value already; see `values.sound`.
    """

    name: str
    records: Iterator[Record]
    problems: list[Problem] = field(default_factory=list)
    is_sound: bool = False


def open_path(source: str, *, split: str | None = None, encoding: str | None = None) -> Iterator[Opened]:
    """The files that a name stands for, one after another.

    Args:
        source: a file, a zip archive, a folder, a pattern (`chats/*.jsonl`) or a data set on the hub, with an
            optional `:split` (of a folder or data set) or `:sheet` (of a workbook).
        split: in place of `:split`.
        encoding: of text files; see `text_lines`.

    Raises:
        DataError: nothing of this name can be read.
        NetworkError: the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if source == "-":
        require_file(path)
    if _exists(path):
        yield from _open_existing(path, source, split, encoding)
        return
    name, _, part = source.rpartition(":")
    if name and _exists(Path(name).expanduser()):
        yield from _open_existing(Path(name).expanduser(), name, split or part, encoding)
    elif is_pattern(source):
        kept, others = matching(source, split)
        told = _told(source, [], list(map(str, others)), split)
        yield from _open_each(kept, told, split, encoding)
    elif _looks_local(source):
        raise missing_file(path)
    else:
        name, _, part = source.partition(":")
        yield Opened(source, read_hub(name, split or part or None))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _open_existing(path: Path, name: str, split: str | None, encoding: str | None) -> Iterator[Opened]:
    if path.is_dir():
        yield from _open_folder(path, name, split, encoding)
        return
    require_file(path)
    files, about = files_of(path, name)
    names = {file.name: file.name[len(name) + 1 :] for file in files}
    elsewhere = other_splits(list(names.values()), split) if len(files) > 1 else set()
    told = _told(name, about, sorted(elsewhere), split)
    for stored in files:
        if names[stored.name] in elsewhere:
            continue
        problems, told = told, []
        records = _guarded(stored.name, lambda s=stored, p=problems: _records(s, split, encoding, p))  # type: ignore[misc]
        yield Opened(stored.name, records, problems, is_sound=stored.kind in _JSON)


def _open_folder(path: Path, name: str, split: str | None, encoding: str | None) -> Iterator[Opened]:
    if is_saved_folder(path):
        yield Opened(name if split is None else f"{name}:{split}", read_saved_folder(path, split))
        return
    kept, others, about = files_in_folder(path, split)
    names = {file: str(file.relative_to(path)) for file in (*others, *about)}
    told = _told(name, [names[file] for file in about], [names[file] for file in others], split)
    yield from _open_each(kept, told, None, encoding)


def _open_each(
    files: Sequence[Path], told: Sequence[Problem], split: str | None, encoding: str | None
) -> Iterator[Opened]:
    """Several files one after another; what is told of all of them stands with the first."""
    for file in files:
        for opened in _open_existing(file, str(file), split, encoding):
            opened.problems.extend(told)
            told = []
            yield opened


def _told(name: str, about: Sequence[str], others: Sequence[str], split: str | None) -> list[Problem]:
    """The notes about files of a source that are not read."""
    told = []
    if about:
        message = f"{name}: {shown_names(about)} left out, since such files hold no rows, or are archives within one"
        told.append(Problem("left_out_files", "note", message))
    if others:
        message = f"{name}: only files of the split `{split or 'train'}` are read, not {shown_names(others)}"
        told.append(Problem("split", "note", message))
    return told


def _guarded(name: str, read: Callable[[], Iterator[Record]]) -> Iterator[Record]:
    with guarded(name):
        yield from read()


def _records(
    file: StoredFile, split: str | None, encoding: str | None, problems: list[Problem]
) -> Iterator[Record]:
    if file.kind in (".parquet", ".arrow", ".feather"):
        return read_arrow(file)
    if file.kind in BINARY_KINDS:
        return read_workbook(file, split)
    if file.kind in (".csv", ".tsv"):
        return read_csv(file, lambda: text_lines(file, encoding, problems), problems)
    opened = text_lines(file, encoding, problems)
    return read_texts(opened) if file.kind == ".txt" else read_json(file, opened)


def _looks_local(source: str) -> bool:
    """Whether a name that does not exist was meant as a path, so that no hub is asked for it."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source):
        return True
    is_in_a_folder_here = "/" in source and Path(source).parent.is_dir()
    return is_in_a_folder_here or is_data_name(source) or source.lower().endswith(".gz")
