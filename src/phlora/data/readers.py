"""Opens a data source and yields its records: the line each one came from, and its parsed value.

Files are read here rather than by the `datasets` library, because line numbers and encodings get lost
there: a latin-1 file fails without a name or a line. A record that cannot be parsed is yielded as a
`BadRow`, so that one pass over a file finds all of them.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from phlora.data.rows import BadRow, Record
from phlora.errors import DataError, NetworkError, did_you_mean, nearest

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".ndjson.gz")


def open_path(source: str) -> tuple[str, Iterator[Record]]:
    """A file, a folder saved by `datasets`, or a hub name, with an optional `:split` after the last two."""
    path = Path(source).expanduser()
    if path.is_dir():
        return source, _read_folder(path, None)
    if path.is_file():
        return source, _guarded(path, _reader_for(path))
    name, _, split = source.rpartition(":")
    if name and Path(name).is_dir():
        return source, _read_folder(Path(name), split)
    if _looks_local(source):
        raise _missing_file(path)
    name, _, split = source.partition(":")
    return source, _read_hub(name, split or None)


def _looks_local(source: str) -> bool:
    """Whether a name that does not exist was meant as a path, so that no hub is asked for it."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source):
        return True
    is_in_a_folder_here = "/" in source and Path(source).parent.is_dir()
    return is_in_a_folder_here or source.lower().endswith((*SUFFIXES, ".txt", ".gz"))


def _missing_file(path: Path) -> DataError:
    if not path.parent.is_dir():
        return DataError("The folder of the data file does not exist", where=str(path), fix="check the path")
    siblings = [entry.name for entry in path.parent.iterdir()]
    match = nearest(path.name, siblings)
    known = [name for name in siblings if name.lower().endswith(SUFFIXES)]
    hint = (
        f"did you mean `{match}`?" if match else did_you_mean(path.name, known) if known else "check the path"
    )
    return DataError("The file does not exist", where=str(path), fix=hint)


def _reader_for(path: Path) -> Callable[[Path], Iterator[Record]]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")):
        return _read_jsonl
    if name.endswith(".json"):
        return _read_json
    if name.endswith((".csv", ".tsv")):
        return _read_csv
    if name.endswith(".parquet"):
        return _read_parquet
    raise DataError(
        f"`{path.suffix or path.name}` is no known kind of data file",
        where=str(path),
        expected=f"one of {', '.join(SUFFIXES)}",
    )


def _guarded(path: Path, read: Callable[[Path], Iterator[Record]]) -> Iterator[Record]:
    """What the system says about a file that cannot be opened or unpacked, as an error of ours."""
    try:
        yield from read(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"The file cannot be read: {error}", where=str(path)) from None


def _read_jsonl(path: Path) -> Iterator[Record]:
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    num_bytes = 0
    with opened as lines:
        for line, raw in enumerate(lines, 1):
            if line == 1:
                _refuse_utf16(raw, path)
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.isspace():
                yield line, _parse_line(raw, num_bytes, path)
            num_bytes += len(raw)


def _parse_line(raw: bytes, num_bytes_before: int, path: Path) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = num_bytes_before + error.start
        message = f"the line is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {byte} of the file)"
        return BadRow("encoding", message, _how_to_convert(path))
    except json.JSONDecodeError as error:
        return BadRow(
            "broken_json", f"broken JSON at column {error.colno}: {error.msg}", "one JSON object a line"
        )
    except RecursionError:
        return BadRow("broken_json", "the JSON is nested too deeply")


def _refuse_utf16(raw: bytes, path: Path) -> None:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError("The file is UTF-16, not UTF-8", where=str(path), fix=_how_to_convert(path, "UTF-16"))


def _how_to_convert(path: Path, encoding: str = "ENCODING") -> str:
    return f"convert it, for example: iconv -f {encoding} -t UTF-8 {path.name} > converted{path.suffix}" + (
        " (WINDOWS-1252 for most Western files)" if encoding == "ENCODING" else ""
    )


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    _refuse_utf16(raw, path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"The file is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {error.start} of the file)",
            where=f"{path}:{line}",
            fix=_how_to_convert(path),
        ) from None


def _read_json(path: Path) -> Iterator[Record]:
    """A list of rows, an object that holds one such list, or JSONL under the wrong name."""
    text = _read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if _is_jsonl(text):
            return _read_jsonl(path)
        if not text.strip():
            return iter(())
        raise DataError(
            f"Broken JSON at column {error.colno}: {error.msg}",
            where=f"{path}:{error.lineno}",
            expected="a JSON list of rows",
            fix="correct the file, or name it .jsonl if it holds one object a line",
        ) from None
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 and not _is_chat(lists[0]) else [value]
    if not isinstance(value, list):
        raise DataError(f"The file holds {kind_of(value)}", where=str(path), expected="a JSON list of rows")
    return iter(enumerate(value, 1))


def _is_chat(value: list[Any]) -> bool:
    return any(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)


def _is_jsonl(text: str) -> bool:
    first = text.lstrip().partition("\n")[0]
    try:
        return isinstance(json.loads(first), dict)
    except json.JSONDecodeError:
        return False


def _read_csv(path: Path) -> Iterator[Record]:
    text = _read_text(path)
    header = text.partition("\n")[0]
    delimiter = "\t" if "\t" in header else ";" if ";" in header and "," not in header else ","
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", strict=True)
    line = 2
    while True:
        try:
            record: Any = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, BadRow("broken_csv", f"broken CSV: {error}")
            return
        if "" in record:
            record = BadRow(
                "broken_csv", f"the line has more cells than the header ({len(reader.fieldnames or ())})"
            )
        yield line, _parse_cells(record)
        line = reader.line_num + 1


def _parse_cells(record: Any) -> Any:
    """A CSV cell can hold a list of messages only as JSON, so such cells are parsed."""
    if isinstance(record, BadRow):
        return record
    for column in ("messages", "conversations", "tools"):
        cell = record.get(column)
        if cell and cell.lstrip().startswith(("[", "{")):
            try:
                record[column] = json.loads(cell)
            except json.JSONDecodeError as error:
                return BadRow("broken_json", f"broken JSON in the cell `{column}`: {error.msg}")
    return record


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(1024))
            yield from enumerate(itertools.chain.from_iterable(batches), 1)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"The file is no readable Parquet: {error}", where=str(path)) from None


def _read_folder(path: Path, split: str | None) -> Iterator[Record]:
    """A folder written by `datasets`' `save_to_disk`."""
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = [entry.name for entry in path.iterdir() if entry.name.lower().endswith(SUFFIXES)]
        raise DataError(
            "The path is a folder that the `datasets` library did not save",
            where=str(path),
            expected="a data file, or a folder written by `save_to_disk`",
            fix=f"name one of its files: {', '.join(sorted(files)[:8])}" if files else "check the path",
        )
    from datasets import load_from_disk

    data: Any = load_from_disk(str(path))
    if isinstance(data, Mapping):
        data = data[pick_split(data.keys(), split, where=str(path))]
    return iter(enumerate(data, 1))


def pick_split(splits: Iterable[str], split: str | None, *, where: str) -> str:
    names = list(splits)
    wanted = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    if wanted in names:
        return str(wanted)
    hint = (
        did_you_mean(wanted, names)
        if wanted
        else f"name one: {', '.join(f'{where}:{name}' for name in names)}"
    )
    raise DataError(f"No split `{wanted or 'train'}`", where=where, fix=hint)


def _read_hub(name: str, split: str | None) -> Iterator[Record]:
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    if not config.HF_HUB_OFFLINE:
        _probe_hub(name)
    try:
        data: Any = load_dataset(name)
    except DatasetNotFoundError:
        raise _unknown_data_set(name) from None
    except (ConnectionError, TimeoutError) as error:
        if config.HF_HUB_OFFLINE:
            raise NetworkError(
                "There is no such file, and offline mode forbids asking the hub for a data set of this name",
                where=name,
                fix="check the path, or download the data set first with HF_HUB_OFFLINE unset",
            ) from None
        raise _unreachable(name, error) from None
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"The data set cannot be loaded: {error}", where=name) from None
    return iter(enumerate(data[pick_split(data.keys(), split, where=name)], 1))


def _probe_hub(name: str) -> None:
    """Ask for the data set once, because `load_dataset` tries an unreachable hub for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    # The hub library's own HTTP client: which package that is depends on its version.
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        HfApi().dataset_info(name, timeout=5)
    except GatedRepoError:
        raise DataError(
            "The data set is gated", where=name, fix="accept its terms on the hub and run `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise _unknown_data_set(name) from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise _unreachable(name, error) from None


def _unknown_data_set(name: str) -> DataError:
    return DataError(
        "There is neither such a file nor such a data set on the hub",
        where=name,
        fix="check the spelling; a private data set needs `hf auth login`",
    )


def _unreachable(name: str, error: Exception) -> NetworkError:
    return NetworkError(
        f"There is no such file, and the hub cannot be reached ({type(error).__name__})",
        where=name,
        fix="check the path or the network; HF_HUB_OFFLINE=1 uses a data set downloaded before",
    )


def kind_of(value: Any) -> str:
    kinds = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    if value is None:
        return "nothing (null)"
    shown = f" ({value!r})" if isinstance(value, int | float) else ""
    return kinds.get(type(value), f"a {type(value).__name__}") + shown
