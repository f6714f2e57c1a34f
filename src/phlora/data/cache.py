"""Keeps token rows between runs, so that rows that were tokenised once are not tokenised again.

An entry is one safetensors file: the arrays of a `TokenTable`, and in its metadata what was left out, cut and
noted, and a checksum of it all. Its name is a digest of everything that decides the tokens: the rows and where
they stand, the chat template, the tokenizer, the settings and the code that puts them together. Entries are
mapped into memory, appear by one rename, and whatever cannot be read as one is taken for absent. When the folder
grows too large the entries that were not used for longest go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from phlora.data.chat_template import Tokenizer
from phlora.data.dataset import RowSubset
from phlora.data.rows import Origin, Problem
from phlora.data.table import Array, TokenTable
from phlora.data.template_analysis import CLOCK
from phlora.data.tokenize import Skipped, TokenizedSet
from phlora.files import replaced_file

MAX_BYTES = 2_000_000_000
_SUFFIX = ".safetensors"
_ARRAYS = ("input_ids", "trained", "starts", "weights", "weighted", "lines", "file_numbers", "cuts")
_KINDS = {"I32": np.int32, "I64": np.int64, "U8": np.uint8, "F32": np.float32}
# Whatever may have a part in the tokens has one in their name: all code that turns data into tokens.
_CODE = tuple(sorted(Path(__file__).parent.rglob("*.py")))
_LIBRARIES = ("tokenizers", "transformers", "jinja2")


@dataclass(frozen=True)
class TokenCache:
    """A folder of entries; reading and writing never fail, at worst nothing is found or kept.

    Args:
        folder: made when the first entry is written.
        max_bytes: of all entries together.
    """

    folder: Path
    max_bytes: int = MAX_BYTES

    def load(self, key: str) -> TokenizedSet | None:
        """The entry with this key, its arrays mapped from the file; None where there is no sound one."""
        path = self.folder / f"{key}{_SUFFIX}"
        try:
            found = _read(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: `save` removes what was not
        return found

    def save(self, key: str, tokenized: TokenizedSet) -> None:
        """Write an entry, whole or not at all, and remove old ones where there are too many."""
        arrays = {name: getattr(tokenized.rows, name) for name in _ARRAYS}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        if sum(array.nbytes for array in arrays.values()) > self.max_bytes:
            return
        facts = _facts(tokenized)
        metadata = {"facts": facts, "checksum": _checksum(facts, arrays)}
        # A folder that cannot be written, or has no room, only means that the next run tokenises again.
        with contextlib.suppress(OSError, SafetensorError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced_file(self.folder / f"{key}{_SUFFIX}") as part:
                save_file(arrays, part, metadata=metadata)
            self._make_room()

    def _make_room(self) -> None:
        entries = [(file.stat(), file) for file in self.folder.glob(f"*{_SUFFIX}")]
        total = 0
        for facts, file in sorted(entries, key=lambda entry: -entry[0].st_mtime_ns):
            total += facts.st_size
            if total > self.max_bytes:
                file.unlink(missing_ok=True)


def token_key(rows: RowSubset, tokenizer_digest: bytes, settings: Mapping[str, Any]) -> str:
    """The name of an entry: equal exactly where rows, tokenizer, template and settings are.

    Args:
        tokenizer_digest: see `digest_tokenizer`.
        settings: the arguments of `tokenize_rows` that decide the tokens, as plain values.
    """
    digest = hashlib.sha256()
    survey = rows.survey
    for part in (*rows.digests(), tokenizer_digest, json.dumps(survey.files).encode()):
        digest.update(part)
    numbers = np.asarray(rows.numbers, dtype=np.int64)
    for places in (survey.lines, survey.file_numbers):
        digest.update(np.asarray(places)[numbers].tobytes() if len(numbers) else b"")
    for file in _CODE:
        digest.update(file.read_bytes())
    libraries = [version(name) for name in _LIBRARIES]
    digest.update(json.dumps([libraries, dict(settings)], sort_keys=True).encode())
    return digest.hexdigest()[:32]


def digest_tokenizer(tokenizer: Tokenizer) -> bytes:
    """A digest of all that a fast tokenizer is made of, its chat template included."""
    state = tokenizer.backend_tokenizer.to_str()
    # What stands before the tokens is changed by encoding: truncation and padding, which rows are encoded without.
    _, _, state = state.partition('"added_tokens"')
    template = tokenizer.chat_template
    named = [type(tokenizer).__name__, template, tokenizer.bos_token_id, tokenizer.eos_token_id]
    if CLOCK in str(template):
        named.append(str(date.today()))  # the template may write it into every chat
    return hashlib.sha256((json.dumps(named) + state).encode("utf-8", "surrogatepass")).digest()


# ------------------------------------------------------------------------------------------------ one entry


def _facts(tokenized: TokenizedSet) -> str:
    return json.dumps(
        {
            "files": tokenized.rows.files,
            "skipped": [asdict(skip) for skip in tokenized.skipped],
            "cut": [asdict(origin) for origin in tokenized.cut],
            "notes": [asdict(note) for note in tokenized.notes],
        }
    )


def _read(path: Path) -> TokenizedSet:
    """Map an entry; what does not have its form fails in one way or another."""
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    (length,) = struct.unpack("<Q", view[:8])
    header = json.loads(view[8 : 8 + length])
    metadata = header.pop("__metadata__")
    arrays: dict[str, Any] = {
        name: np.frombuffer(
            view, _KINDS[item["dtype"]], item["shape"][0], 8 + length + item["data_offsets"][0]
        )
        for name, item in header.items()
    }
    if metadata["checksum"] != _checksum(metadata["facts"], arrays):
        raise ValueError("the checksum is another one")
    facts = json.loads(metadata["facts"])
    return TokenizedSet(
        TokenTable(**{"weights": None, **arrays}, files=tuple(facts["files"])),
        [Skipped(Origin(**skip.pop("origin")), **skip) for skip in facts["skipped"]],
        _origins(facts["cut"]),
        [Problem(**{**note, "origins": tuple(_origins(note["origins"]))}) for note in facts["notes"]],
    )


def _origins(values: Iterable[Mapping[str, Any]]) -> list[Origin]:
    return [Origin(**value) for value in values]


def _checksum(facts: str, arrays: Mapping[str, Array]) -> str:
    digest = hashlib.blake2b(facts.encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].size}".encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()
