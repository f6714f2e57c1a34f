"""Scripts and notebooks as files: how they are encoded, where their lines end, and how they are written again."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import shutil
import tokenize
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from phlora.display import printable
from phlora.errors import InputError, shown
from phlora.files import replaced_file
from phlora.migrate.cells import Cells, join
from phlora.migrate.notebook_text import with_code

SUFFIXES = (".py", ".ipynb")
# Scripts that a line of IPython runs.
_FILE = re.compile(r"\b[\w./-]+\.(?:py|ipynb)\b")
# Folders that hold what others wrote.
_NOT_OURS = frozenset({"__pycache__", "node_modules", "site-packages", "build", "dist", "venv", "env"})


class Source(Protocol):
    """A file with Python in it.

    Attributes:
        path: where it is.
        text: the Python in it, as one module.
        notes: what is left unread, by cell.
    """

    path: Path
    text: str
    notes: tuple[str, ...]

    def where(self, line: int) -> str:
        """A line of the text, as the file's reader counts it."""

    def pieces(self, text: str) -> list[tuple[str, str, str]]:
        """What differs in a changed text: name, old and new text of each piece."""

    def content(self, text: str) -> bytes:
        """The file with a changed text in it."""


@dataclass(frozen=True)
class Script:
    """A Python file."""

    path: Path
    text: str
    encoding: str
    has_mark: bool
    is_mac: bool = False
    notes: tuple[str, ...] = ()

    def where(self, line: int) -> str:
        return f"line {line}"

    def pieces(self, text: str) -> list[tuple[str, str, str]]:
        return [(str(self.path), self.text, text)] if text != self.text else []

    def content(self, text: str) -> bytes:
        text = text.replace("\n", "\r") if self.is_mac else text
        return (codecs.BOM_UTF8 if self.has_mark else b"") + text.encode(self.encoding)


@dataclass(frozen=True)
class Notebook:
    """A Jupyter notebook; outputs, markdown and metadata stay as they are."""

    path: Path
    cells: Cells
    json: str
    has_mark: bool
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.cells.text

    def where(self, line: int) -> str:
        cell, within = self.cells.place(line)
        return f"cell {cell + 1}, line {within}"

    def pieces(self, text: str) -> list[tuple[str, str, str]]:
        old, new = self.cells.split(self.text), self.cells.split(text)
        return [
            (f"{self.path}, cell {number + 1}", f"{old[number]}\n", f"{new[number]}\n")
            for number in old
            if old[number] != new[number]
        ]

    def content(self, text: str) -> bytes:
        old, new = self.cells.split(self.text), self.cells.split(text)
        changed = {number: code for number, code in new.items() if code != old[number]}
        return (codecs.BOM_UTF8 if self.has_mark else b"") + with_code(self.json, changed).encode()


def read_source(path: Path) -> Script | Notebook:
    """Open a script or a notebook.

    Raises:
        InputError: it cannot be read, is not encoded as it says, or is no notebook of Python.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"The file cannot be read ({error.strerror})", where=str(path)) from None
    return _notebook(path, raw) if path.suffix == ".ipynb" else _script(path, raw)


def _script(path: Path, raw: bytes) -> Script:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw.replace(b"\r", b"\n")).readline)
        text = raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        raise InputError(
            f"The file is not encoded as Python reads it ({error})",
            where=str(path),
            fix="save it in UTF-8, or name its encoding in the first line: # -*- coding: latin-1 -*-",
        ) from None
    has_mark = encoding == "utf-8-sig"
    # Lines that end as on an old Mac are lines for Python, and one long comment for others.
    is_mac = "\r" in text and "\n" not in text
    text = text.replace("\r", "\n") if is_mac else text
    return Script(path, text, "utf-8" if has_mark else encoding, has_mark, is_mac)


def _notebook(path: Path, raw: bytes) -> Notebook:
    try:
        text = raw.decode("utf-8-sig")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"The notebook is no valid JSON ({error})", where=str(path)) from None
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise InputError(
            "The file is no notebook of format 4",
            where=str(path),
            expected="a list of `cells`",
            fix="an older notebook is converted by: jupyter nbconvert --to notebook --inplace FILE",
        )
    language = _language(content)
    if language not in ("", "python", "ipython", "python3"):
        raise InputError(f"The notebook is written in {shown(language)}", where=str(path), expected="Python")
    joined = join(
        [(number, _text_of(cell)) for number, cell in enumerate(cells) if cell.get("cell_type") == "code"]
    )
    notes = [note for number, cell in enumerate(cells) for note in _unread(number, cell, joined)]
    return Notebook(path, joined, text, raw.startswith(codecs.BOM_UTF8), tuple(notes))


def _unread(number: int, cell: Mapping[str, Any], cells: Cells) -> Iterator[str]:
    """What of a cell is not read, and what to do about it."""
    name = f"cell {number + 1}"
    kind = cell.get("cell_type")
    if kind not in ("code", "markdown"):
        if _text_of(cell).strip():
            yield f"{name} ({printable(str(kind))}) is not read"
    elif number in cells.skipped:
        yield f"{name} (%%{cells.skipped[number]}) is not read" + (
            "; migrate the file that it writes" if cells.skipped[number] == "writefile" else ""
        )
    lines = [line for line in cells.hidden if line.cell == number and line.name]
    if lines:
        *most, last = (f"{line.number} ({line.name})" for line in lines)
        which, are, they = ("lines", "are", "they name") if most else ("line", "is", "it names")
        named = dict.fromkeys(file for line in lines for file in _FILE.findall(line.text))
        yield f"{name}, {which} {' and '.join(filter(None, (', '.join(most), last)))} {are} not read" + (
            f"; migrate {', '.join(named)}, which {they}" if named else ""
        )


def _language(content: Mapping[str, Any]) -> str:
    metadata = content.get("metadata")
    if not isinstance(metadata, dict):
        return ""
    for key, name in (("language_info", "name"), ("kernelspec", "language")):
        part = metadata.get(key)
        if isinstance(part, dict) and isinstance(part.get(name), str):
            return str(part[name]).lower()
    return ""


def _text_of(cell: Mapping[str, Any]) -> str:
    source = cell.get("source")
    lines = source if isinstance(source, list) else [source]
    return "".join(line for line in lines if isinstance(line, str))


# ------------------------------------------------------------------------------------------------ which, and where


def files_of(paths: list[Path]) -> Iterator[Path]:
    """The scripts and notebooks that are named, and those in folders that are named.

    Hidden folders, environments and checkpoints of Jupyter are passed over, and links are not followed.

    Raises:
        InputError: no such file, or one of another kind.
    """
    seen: set[Path] = set()
    for path in paths:
        if path.is_dir():
            found = [file for file in _in_folder(path)]
        elif path.suffix in SUFFIXES and path.is_file():
            found = [path]
        elif not path.exists():
            raise InputError("There is no such file or folder", where=str(path))
        else:
            raise InputError(
                "The file is no script and no notebook",
                where=str(path),
                expected="a .py or .ipynb file, or a folder",
            )
        for file in found:
            real = file.resolve()
            if real not in seen:
                seen.add(real)
                yield file


def _in_folder(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in _NOT_OURS
            and not (Path(root) / name / "pyvenv.cfg").exists()
        )
        for name in sorted(names):
            file = Path(root) / name
            if (
                file.suffix in SUFFIXES
                and not name.startswith(".")
                and file.is_file()
                and not file.is_symlink()
            ):
                yield file


def write_changed(path: Path, content: bytes) -> Path:
    """Put a file's new content in its place, whole or not at all; returns where its original is kept.

    The original is beside it as NAME.orig, or NAME.orig.2 and so on: what stands there is never overwritten.
    """
    target = path.resolve()
    kept = _keep(target)
    with replaced_file(target) as part:
        part.write_bytes(content)
        shutil.copymode(target, part)
    return kept


def _keep(path: Path) -> Path:
    before = path.read_bytes()
    number = 1
    while True:
        kept = path.with_name(f"{path.name}.orig" + (f".{number}" if number > 1 else ""))
        try:
            with open(kept, "xb") as file:
                file.write(before)
        except FileExistsError:
            if kept.is_file() and kept.read_bytes() == before:
                return kept
            number += 1
            continue
        except OSError:
            with suppress(OSError):
                kept.unlink()
            raise
        shutil.copystat(path, kept)
        return kept
