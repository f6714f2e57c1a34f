"""Data files as streams of bytes: compressed or not, inside a zip archive, in a folder, or under a pattern.

What unpacks to far more than any data set does is refused while it is unpacked, not after.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import itertools
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from phlora.data.split_names import TRAIN, other_splits, same_split, split_of_path
from phlora.errors import DataError, did_you_mean, nearest

TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
BINARY_KINDS = (".parquet", ".arrow", ".feather", ".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
# Text compresses by 3 to 20 times, repetitive records by a few hundred.
MAX_RATIO = 400
MAX_UNPACKED_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 20
_IS_ENCRYPTED = 0x1  # of a zip member's flags
_IS_PATTERN = re.compile(r"[*?\[]")
_ABOUT_AS_TEXT = frozenset("readme license licence notice requirements changelog".split())
_BESIDE_CHATS = (
    *("user", "users", "user_settings", "shared_conversations", "message_feedback", "model_comparisons"),
    *("group_chats", "shopping", "projects", "memories", "export_manifest"),
)
_ABOUT_AS_JSON = frozenset("dataset_info dataset_infos dataset-metadata package".split())


@dataclass(frozen=True)
class StoredFile:
    """One data file: the name to show, its kind (`.jsonl`, `.csv`, …), and how its unpacked bytes are read."""

    name: str
    kind: str
    num_bytes: int
    open_raw: Callable[[], IO[bytes]]
    path: Path | None = None  # of a file that is neither compressed nor a part of an archive

    def open(self) -> IO[bytes]:
        """A buffered stream of the unpacked bytes."""
        return io.BufferedReader(_Bounded(self.open_raw(), self.name, self.num_bytes), _BUFFER_BYTES)

    def read(self) -> bytes:
        """All unpacked bytes."""
        with self.open() as stream:
            return stream.read()


class _Bounded(io.RawIOBase):
    """Passes bytes on until there are too many of them for a file of this size."""

    def __init__(self, stream: IO[bytes], name: str, num_bytes: int) -> None:
        self.stream, self.name = stream, name
        self.left = max(MAX_UNPACKED_BYTES, MAX_RATIO * num_bytes)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        self.left -= len(data)
        if self.left < 0:
            raise DataError(
                f"The file unpacks to more than {MAX_RATIO} times its size",
                where=self.name,
                fix="if it is sound, unpack it first",
            )
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
        super().close()


def kind_and_compression(name: str) -> tuple[str, str]:
    """`chats.jsonl.gz` -> (`.jsonl`, `.gz`); what is unknown is empty."""
    path = Path(name.lower())
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    kind = Path(path.stem).suffix if compression else path.suffix
    return (kind if kind in (*TEXT_KINDS, *BINARY_KINDS) else "", compression)


def require_file(path: Path) -> None:
    """Refuse what is no regular file: data are read twice, and a pipe that nobody writes to is waited for forever.

    Raises:
        DataError: it is a pipe, a device or a socket.
    """
    if not path.is_file():
        raise DataError(
            "Standard input is not read" if str(path) in ("-", "/dev/stdin") else "This is no regular file",
            where=str(path),
            expected="a file: data are read more than once",
            fix="write the rows into a file, such as rows.jsonl, and name that",
        )


def is_data_name(name: str) -> bool:
    """Whether a file of this name is read."""
    return bool(kind_and_compression(name)[0]) or name.lower().endswith(".zip")


def files_of(path: Path, name: str) -> tuple[list[StoredFile], list[str]]:
    """The data file at a path, or those in a zip archive; and the names of those in it that only speak of data.

    Raises:
        DataError: no known kind of file, or an archive without data files.
    """
    if path.suffix.lower() == ".zip":
        return _members(path, name)
    kind, compression = kind_and_compression(path.name)
    if not kind:
        raise DataError(
            f"`{path.suffix or path.name}` is no known kind of data file",
            where=name,
            expected=f"one of {', '.join(TEXT_KINDS)}, .parquet, .arrow, .xlsx, .ods, .zip, "
            f"also with {', '.join(COMPRESSIONS)}",
        )
    as_it_is = None if compression else path
    return [StoredFile(name, kind, path.stat().st_size, lambda: _unpacking(path, compression), as_it_is)], []


def _unpacking(path: Path, compression: str) -> IO[bytes]:
    if compression == ".zst":
        import pyarrow

        stream: IO[bytes] = pyarrow.CompressedInputStream(str(path), "zstd")
        return stream
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opened: IO[bytes] = openers[compression](path, "rb") if compression else path.open("rb")
    return opened


def _members(path: Path, name: str) -> tuple[list[StoredFile], list[str]]:
    with guarded(name), _archive(path, name) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir() and not _is_hidden(info.filename)]
    names = {Path(info.filename).name for info in infos}
    readable = sorted(
        (info for info in infos if kind_and_compression(info.filename)[0]), key=lambda info: info.filename
    )
    about = [info.filename for info in readable if is_about_data(Path(info.filename).name, names)]
    about += sorted(info.filename for info in infos if info.filename.lower().endswith(".zip"))
    known = [info for info in readable if info.filename not in about]
    if not known:
        raise DataError(
            "The archive holds no data file",
            where=name,
            expected=f"files such as {', '.join(TEXT_KINDS)}",
            fix=f"it holds {', '.join(info.filename for info in infos[:8])}" if infos else "check the file",
        )
    return [_member(path, name, info) for info in known], about


def _member(path: Path, name: str, info: zipfile.ZipInfo) -> StoredFile:
    name = f"{name}/{info.filename}"
    kind, compression = kind_and_compression(info.filename)
    if compression:
        raise DataError("An archive holds a compressed file", where=name, fix="unpack the archive")

    def opened() -> IO[bytes]:
        if info.flag_bits & _IS_ENCRYPTED:
            raise DataError("The archive is encrypted", where=name, fix="unpack it first")
        # `zipfile` says this in other words in each version of Python, or nothing.
        if info.header_offset + info.compress_size > path.stat().st_size:
            raise DataError("The file cannot be read: it ends too early", where=name)
        # Closing the archive leaves the member readable: zipfile counts who still reads.
        with _archive(path, name) as archive:
            return archive.open(info)

    return StoredFile(name, kind, max(info.compress_size, 1), opened)


@contextmanager
def _archive(path: Path, name: str) -> Iterator[zipfile.ZipFile]:
    """A zip archive, and as an error of ours what the `zipfile` module does not know of the format.

    That is a compression such as deflate64, a later version, or (UnicodeDecodeError) a name that is no UTF-8.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (NotImplementedError, UnicodeDecodeError) as error:
        raise DataError(
            f"The archive cannot be unpacked: {error}", where=name, fix="unpack it first"
        ) from None


def is_about_data(name: str, siblings: Collection[str] = ()) -> bool:
    """Whether a file among data speaks of it, and holds none.

    Args:
        siblings: the names of the files beside it; `conversations.json` tells an export of ChatGPT's or Claude's.
    """
    stem, _, ending = name.lower().partition(".")
    if stem in _ABOUT_AS_TEXT and ending == "txt":
        return True
    known = (*_ABOUT_AS_JSON, *(_BESIDE_CHATS if "conversations.json" in siblings else ()))
    return ending == "json" and stem in known


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) and part != ".." for part in Path(name).parts)


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """What the system says about a file that cannot be opened or unpacked, as an error of ours."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        reason = str(error) or "it ends too early"  # about which `zipfile` says nothing
        raise DataError(f"The file cannot be read: {reason}", where=name) from None


# ------------------------------------------------------------------------------------------------ several files


def is_pattern(source: str) -> bool:
    """Whether a name of which there is no file is a pattern such as `chats/*.jsonl`."""
    return bool(_IS_PATTERN.search(source))


def matching(pattern: str, split: str | None = None) -> tuple[list[Path], list[Path]]:
    """The data files that a pattern matches, by name, and those left out because they belong to another split.

    Raises:
        DataError: none does.
    """
    found = sorted(Path(name) for name in glob.glob(str(Path(pattern).expanduser()), recursive=True))
    files = [path for path in found if path.is_file() and is_data_name(path.name)]
    if not files:
        others = ", ".join(str(path) for path in found[:8])
        raise DataError(
            "No data file matches the pattern",
            where=pattern,
            fix=f"it matches {others}, which is no known kind" if found else "check the path",
        )
    # What the pattern spells out was asked for.
    above = Path(
        *itertools.takewhile(lambda part: not _IS_PATTERN.search(part), Path(pattern).expanduser().parts)
    )
    return _by_split(files, above, split)


def files_in_folder(folder: Path, split: str | None) -> tuple[list[Path], list[Path], list[Path]]:
    """The data files in a folder and below, those left out because they belong to another split or only speak of data.

    A name such as `train-00000.parquet` or `test/part.jsonl` says its split; files without one always count.

    Raises:
        DataError: there are none, or none of the split.
    """
    readable = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and is_data_name(path.name) and not _is_hidden(str(path.relative_to(folder)))
    )
    siblings = {path.name for path in readable}
    about = [path for path in readable if is_about_data(path.name, siblings)]
    found = [path for path in readable if not is_about_data(path.name, siblings)]
    if not found:
        raise DataError(
            "The folder holds no data file",
            where=str(folder),
            expected="data files, or a folder written by `save_to_disk` of the `datasets` library",
        )
    splits = {split_of_path(str(path.relative_to(folder))) for path in found}
    names = sorted(name for name in splits if name)
    if split and same_split(split) not in names:
        raise DataError(f"No split `{split}`", where=str(folder), fix=did_you_mean(split, names))
    if not split and splits.isdisjoint((TRAIN, None)):
        raise DataError(
            f"The folder holds files of {', '.join(names)}, and none to train on",
            where=str(folder),
            fix=f"name one: {', '.join(f'{folder}:{name}' for name in names)}, or name the files",
        )
    kept, others = _by_split(found, folder, split)
    return kept, others, about


def _by_split(files: Sequence[Path], above: Path, split: str | None) -> tuple[list[Path], list[Path]]:
    """Files below a folder that are read, and those that their names there keep out."""
    names = {path: str(path.relative_to(above)) for path in files}
    elsewhere = other_splits(list(names.values()), split)
    kept = [path for path in files if names[path] not in elsewhere]
    return kept, [path for path in files if names[path] in elsewhere]


def missing_file(path: Path) -> DataError:
    """The error for a path that is not there, with the nearest name that is."""
    with guarded(str(path)):  # the system may not show the folder, or know of no names as long
        if not path.parent.is_dir():
            return DataError(
                "The folder of the data file does not exist", where=str(path), fix="check the path"
            )
        siblings = [entry.name for entry in path.parent.iterdir()]
    match = nearest(path.name, siblings)
    known = [name for name in siblings if is_data_name(name)]
    hint = (
        f"did you mean `{match}`?" if match else did_you_mean(path.name, known) if known else "check the path"
    )
    return DataError("The file does not exist", where=str(path), fix=hint)


def shown_names(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
