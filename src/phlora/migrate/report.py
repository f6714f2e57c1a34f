"""Files migrated one by one, and what is said about them: a diff, what was changed, and what is left to the user."""

from __future__ import annotations

import ast
import difflib
import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phlora.display import Display, counted
from phlora.errors import InputError
from phlora.extras import require
from phlora.migrate.sources import Notebook, Script, files_of, read_source, write_changed

# A file that mentions none of these has nothing to migrate.
_MENTIONED = re.compile(
    rb"\b(trl|peft|transformers|loralib|unsloth|datasets|phlora|SFTTrainer|TrainingArguments)\b"
)
# Lines from which on reading takes longer than a person waits without a word.
_LONG = 3000


@dataclass(frozen=True)
class Line:
    """What was done, or is left, at a place of the original file."""

    where: str
    text: str


@dataclass(frozen=True)
class FileReport:
    """What a migration makes of one file.

    Attributes:
        path: the file.
        diffs: unified diffs, of each cell for a notebook.
        changes: what was changed.
        left: what cannot be decided; each has a comment in the file.
        notes: parts that were not read.
        original: where the original is kept, if the file was written.
        problem: why it could not be read.
    """

    path: Path
    diffs: tuple[str, ...] = ()
    changes: tuple[Line, ...] = ()
    left: tuple[Line, ...] = ()
    notes: tuple[str, ...] = ()
    original: Path | None = None
    problem: str = ""

    @property
    def is_changed(self) -> bool:
        return bool(self.diffs)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "changed": self.is_changed,
            "written": self.original is not None,
            "original": None if self.original is None else str(self.original),
            "changes": [{"where": line.where, "text": line.text} for line in self.changes],
            "left": [{"where": line.where, "text": line.text} for line in self.left],
            "notes": list(self.notes),
            "problem": self.problem or None,
            "diff": "".join(self.diffs),
        }


def migrate_files(
    paths: Sequence[Path | str], *, write: bool = False, display: Display | None = None
) -> list[FileReport]:
    """Migrate scripts and notebooks, and those in folders, to Phlora and today's names; nothing in them is run.

    Args:
        paths: files and folders.
        write: put the changed files in place; each original is kept as NAME.orig.
        display: where to say how far it is, and which file takes long; nowhere by default.

    Returns:
        A report on every file, on one that cannot be read as well; of a folder on those that mention a library.

    Raises:
        InputError: a path that is not there, or a single file that cannot be read.
        MissingExtraError: libcst is not installed.
    """
    require({"libcst": "reading Python with its layout"}, where="phlora migrate")
    files = list(files_of([Path(path) for path in paths]))
    is_one = len(paths) == 1 and files == [Path(paths[0])]
    display = display or Display(quiet=True)
    reports = []
    with display.counting("Migrating", unit="files") as advance:
        for file in files:
            try:
                report = migrate_file(file, write=write, display=display)
            except InputError as error:
                if is_one:
                    raise
                report = FileReport(file, problem=" ".join(str(error).split("\n")))
            reports.append(report)
            advance(1)
    return reports


def _require_characters(text: str, path: Path) -> None:
    """JSON can say half of a character, which no file of text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The code holds half of a character ({error.object[error.start : error.end]!r})",
            where=str(path),
            fix="remove it from the cell, or write the whole character",
        ) from None


def migrate_file(path: Path, *, write: bool = False, display: Display | None = None) -> FileReport:
    """Migrate one script or notebook.

    Raises:
        InputError: it cannot be read or written, or holds no Python of today.
    """
    import libcst

    from phlora.migrate.migration import NoPythonError, migrate_text

    source = read_source(path)
    _require_characters(source.text, path)
    if not _MENTIONED.search(source.text.encode()):
        return FileReport(path, notes=source.notes)
    lines = source.text.count("\n")
    if display is not None and lines >= _LONG:
        display.note(f"{path}: {lines:,} lines are read, which takes a while")
    try:
        migrated = migrate_text(source.text)
    except libcst.ParserSyntaxError as error:
        raise _no_python(source, error) from None
    except NoPythonError as error:
        raise InputError(
            f"The code cannot be rewritten: it would be no Python any more ({error})",
            where=str(path),
            fix="change it by hand, by the page on migration, and report this: it is a mistake of phlora migrate",
        ) from None
    except RecursionError:
        raise InputError("The code is nested too deeply to be read", where=str(path)) from None
    pieces = source.pieces(migrated.text)
    remarks = {
        is_left: tuple(
            Line(source.where(remark.line), remark.text)
            for remark in migrated.remarks
            if remark.is_left is is_left
        )
        for is_left in (False, True)
    }
    original = _write(path, source.content(migrated.text)) if write and pieces else None
    return FileReport(
        path,
        diffs=tuple(_diff(*piece) for piece in pieces),
        changes=remarks[False],
        left=remarks[True],
        notes=source.notes,
        original=original,
    )


def _write(path: Path, content: bytes) -> Path:
    try:
        return write_changed(path, content)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise  # No other file can be written either.
        raise InputError(
            f"The file cannot be written ({error.strerror}), and is as it was", where=str(path)
        ) from None


def _no_python(source: Script | Notebook, error: Any) -> InputError:
    line = str(error.context or "").split("\n")[0].strip()
    number = error.raw_line
    try:
        # Python's own parser says where the mistake is, and libcst how far it came.
        ast.parse(source.text)
    except SyntaxError as own:
        if own.lineno is not None:
            number, line = own.lineno, source.text.split("\n")[own.lineno - 1].strip()
    except ValueError:
        pass  # A null byte.
    place = source.where(number)
    return InputError(
        f"{place[0].upper()}{place[1:]} is no Python 3" + (f": `{line}`" if line else ""),
        where=str(source.path),
        expected="code that Python reads",
        fix="mend the line; code for Python 2 is converted by: 2to3 -w FILE",
    )


def _diff(name: str, old: str, new: str) -> str:
    """As `diff -u` shows it; the ends of lines are not shown, and stay as they are."""
    before, after = (text.replace("\r\n", "\n").split("\n") for text in (old, new))
    lines = difflib.unified_diff(before, after, name, f"{name} (migrated)", lineterm="")
    return "".join(f"{line}\n" for line in lines)


def summary(reports: Sequence[FileReport], *, is_written: bool) -> str:
    """What was changed and what is left, for a person."""
    parts: list[str] = []
    for report in reports:
        if report.problem:
            parts.append(f"{report.path}: not read. {report.problem}")
            continue
        if not (report.is_changed or report.left or report.notes):
            continue
        parts.append(
            f"{report.path}: {counted(len(report.changes), 'change')}, {len(report.left)} left to you"
        )
        parts += [f"  {line.where}: {line.text}" for line in report.changes]
        if report.left:
            parts.append("  Left to you, with a comment `# phlora: ...` above each:")
            parts += [f"  {line.where}: {line.text}" for line in report.left]
        parts += [f"  {note}" for note in report.notes]
        if report.original is not None:
            parts.append(f"  written; the original is {report.original.name}")
    changed = sum(report.is_changed for report in reports)
    if not changed:
        parts.append("Nothing to migrate.")
    elif not is_written:
        parts.append(f"{counted(changed, 'file')} to migrate. Nothing was written: --write does it.")
    return "\n".join(parts)
