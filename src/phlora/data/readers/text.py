"""The lines of a text file, with their numbers, whatever encoding and line ends it has."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from typing import IO, TypeAlias

from phlora.data.readers.encodings import guess_encoding, lookup, sample_of
from phlora.data.readers.files import StoredFile
from phlora.data.rows import BadRow, Origin, Problem
from phlora.errors import DataError

Line: TypeAlias = tuple[int, "str | BadRow"]
MAX_LINE_BYTES = 256 << 20
_HEAD_BYTES = 1 << 16
# How far a file is searched for lines that show its encoding, and how much of them is looked at.
_SEARCHED_BYTES = 64 << 20
_SAMPLE_BYTES = 1 << 16
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_MAGIC = (
    (b"PK\x03\x04", "a zip archive or an Excel workbook", ".zip or .xlsx"),
    (b"\x1f\x8b", "packed with gzip", ".gz"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", ".zst"),
    (b"BZh", "packed with bzip2", ".bz2"),
    (b"\xfd7zXZ", "packed with xz", ".xz"),
    (b"PAR1", "a Parquet file", ".parquet"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", ".xls"),
)


def text_lines(file: StoredFile, encoding: str | None, problems: list[Problem]) -> Iterator[Line]:
    """Each line with its end, and its number from 1; a line that cannot be decoded is a `BadRow`.

    Args:
        encoding: taken for granted; by default a byte order mark decides, then UTF-8, then a guess.
        problems: what was found out about the encoding is added here.

    Raises:
        DataError: the file is no text, or its encoding is not certain.
    """
    with file.open() as stream:
        head = stream.read(_HEAD_BYTES)
    known = lookup(encoding) if encoding else _evident(head, file.name)
    if known and known.startswith(("utf-16", "utf-32")):
        _tell(problems, "note", file, known, sample_of(head.decode(known, "ignore")))
    if known and not _is_ascii_based(known):
        yield from _decoded_stream(file, known)
    elif b"\r" in head and b"\n" not in head:
        yield from _decoded_stream(file, known or _utf8_or_guess(file, head, problems))
    else:
        with file.open() as stream:
            yield from _decoded_lines(stream, file, known, problems)


def _evident(head: bytes, name: str) -> str | None:
    """The encoding that the first bytes leave no doubt about."""
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return encoding
    for magic, kind, suffix in _MAGIC:
        if head.startswith(magic):
            raise DataError(f"The file is {kind}", where=name, fix=f"name it {suffix}")
    if b"\0" in head[:1024]:
        even, odd = head[:1024:2].count(0), head[1:1024:2].count(0)
        if odd > 4 * even:
            return "utf-16-le"
        if even > 4 * odd:
            return "utf-16-be"
        raise DataError("The file is no text (it holds zero bytes)", where=name)
    return None


def _is_ascii_based(encoding: str) -> bool:
    """Whether line ends are the bytes that they are in ASCII."""
    return "\n{".encode(encoding).endswith(b"\n{")


def _decoded_stream(file: StoredFile, encoding: str) -> Iterator[Line]:
    line = 0
    with file.open() as stream:
        try:
            for line, text in enumerate(io.TextIOWrapper(stream, encoding, newline=""), 1):
                yield line, text
        except UnicodeError as error:
            raise DataError(
                f"The file is no {encoding} text: {error}",
                where=f"{file.name}:{line + 1}",
                fix="check its encoding, or convert it to UTF-8",
            ) from None


def _decoded_lines(
    stream: IO[bytes], file: StoredFile, encoding: str | None, problems: list[Problem]
) -> Iterator[Line]:
    num_bytes, offset = 0, 0
    for line, raw in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), b""), 1):
        if line == 1 and raw.startswith(codecs.BOM_UTF8):
            raw, offset = raw[3:], 3
        if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            _skip_line(stream)
            yield line, BadRow("too_large", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
            continue
        try:
            yield line, raw.decode(encoding or "utf-8")
        except UnicodeDecodeError as error:
            if encoding is None and not _is_utf8_elsewhere(file):
                # The lines before this one are ASCII, which every one of these encodings agrees about.
                encoding = _guess(file, problems)
                yield line, raw.decode(encoding, "replace")
            else:
                encoding = encoding or "utf-8"
                yield line, _undecodable(raw, error, num_bytes + offset, encoding)
        num_bytes, offset = num_bytes + len(raw) + offset, 0


def _skip_line(stream: IO[bytes]) -> None:
    while True:
        raw = stream.readline(MAX_LINE_BYTES)
        if not raw or raw.endswith(b"\n"):
            return


def _undecodable(raw: bytes, error: UnicodeDecodeError, num_bytes_before: int, encoding: str) -> BadRow:
    byte = f"byte 0x{raw[error.start]:02x} at offset {num_bytes_before + error.start} of the file"
    name = "UTF-8" if encoding.startswith("utf-8") else encoding
    return BadRow("encoding", f"the line is not {name} text ({byte})", "one encoding in the whole file")


def _strange_lines(file: StoredFile) -> Iterator[bytes]:
    """The first lines that hold more than ASCII."""
    searched = found = 0
    with file.open() as stream:
        while searched < _SEARCHED_BYTES and found < _SAMPLE_BYTES:
            raw = stream.readline(_SAMPLE_BYTES)
            if not raw:
                return
            searched += len(raw)
            if not raw.isascii():
                found += len(raw)
                yield raw


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_utf8_elsewhere(file: StoredFile) -> bool:
    """Whether most lines beyond ASCII are UTF-8, so that others are damaged."""
    sound = [_is_utf8(raw) for raw in _strange_lines(file)]
    return sum(sound) > len(sound) / 2


def _guess(file: StoredFile, problems: list[Problem]) -> str:
    guess = guess_encoding(b"".join(_strange_lines(file)), where=file.name)
    _tell(problems, "warning", file, guess.encoding, guess.sample)
    return guess.encoding


def _utf8_or_guess(file: StoredFile, head: bytes, problems: list[Problem]) -> str:
    return "utf-8" if _is_utf8(head[: head.rfind(b"\r")]) else _guess(file, problems)


def _tell(problems: list[Problem], severity: str, file: StoredFile, encoding: str, sample: str) -> None:
    if severity == "note":
        problem = Problem("encoding", "note", f"{file.name} is {encoding.upper()}: {sample}")
    else:
        problem = Problem(
            "encoding",
            "warning",
            f"The file is not UTF-8; read as {encoding}, for example {sample}. If that is wrong, name the encoding "
            "(`--encoding`, or `encoding:` beside its `path:`)",
            (Origin(file.name, 1),),
        )
    if problem not in problems:  # a table is looked at before it is read
        problems.append(problem)
