"""The tensors of a safetensors checkpoint, of one file or many, read one at a time into memory of their own.

Nothing is mapped: a mapped page counts as the process's memory for as long as the map lives, and a file that is
replaced under a map takes its weights with it.
"""

from __future__ import annotations

import json
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from phlora.errors import ModelError, nearest
from phlora.models.locate import Location, shards_of

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model, and where each tensor lies in them."""

    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]

    @property
    def numbers(self) -> Counter[torch.dtype]:
        """How many numbers it has in each floating dtype."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype.is_floating_point:
                sizes[tensor.dtype] += tensor.num_bytes // tensor.dtype.itemsize
        return sizes

    def read(self, name: str) -> Tensor:
        """The tensor, in the dtype that it is stored in.

        Raises:
            ModelError: the file ends before the tensor does.
        """
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        if not stored.num_bytes:
            return tensor
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(stored.offset)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise ModelError(
                        f"The file ends inside of the tensor {name}",
                        where=str(stored.file),
                        fix="copy or download it again",
                    )
                view = view[count:]
        return tensor

    def read_each(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Several tensors, in the order in which they lie in the files, the next one read while one is in use."""
        order = sorted(names, key=lambda name: (self.tensors[name].file, self.tensors[name].offset))
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.read, order[0]) if order else None
            for name, following in zip(order, [*order[1:], None], strict=True):
                assert ahead is not None
                tensor = ahead.result()
                ahead = None if following is None else reader.submit(self.read, following)
                yield name, tensor
                del tensor


def open_checkpoint(location: Location) -> Checkpoint | None:
    """The safetensors checkpoint at a location, downloaded if need be; None where there is none of the usual layout.

    Raises:
        ModelError: the index and the files contradict each other.
        SafetensorError, OSError: a file cannot be read, or is not whole.
    """
    if sys.byteorder != "little" or "gguf_file" in location.kwargs:
        return None
    one = _find(location, _ONE_FILE)
    if one is not None:
        entries = _entries(one)
        return None if entries is None else Checkpoint((one,), entries)
    index = _find(location, _INDEX)
    return None if index is None else _open_shards(location, index)


def is_here(location: Location) -> bool:
    """Whether all weights of a model are on this machine; nothing is downloaded.

    Raises:
        ModelError: an index maps nothing.
    """
    if "gguf_file" in location.kwargs:
        return True
    here = replace(location, kwargs={**location.kwargs, "local_files_only": True})
    for one, index in ((_ONE_FILE, _INDEX), (_PICKLE, _PICKLE_INDEX)):
        if _find(here, one) is not None:
            return True
        found = _find(here, index)
        if found is not None:
            return all(_find(here, shard) is not None for shard in set(shards_of(found).values()))
    return False


def pickled_numbers(location: Location) -> Counter[torch.dtype]:
    """As `Checkpoint.numbers`, of weights in torch's own files, by their heads; empty where these do not tell.

    Raises:
        ModelError: the index maps nothing.
        OSError, RuntimeError, UnpicklingError: a file cannot be read.
    """
    sizes: Counter[torch.dtype] = Counter()
    for file in _pickles(location):
        if file is None or not zipfile.is_zipfile(file):
            return Counter()
        # Mapped, and on a device without memory: what is between the tensors' descriptions stays on the disk.
        state = torch.load(file, map_location="meta", mmap=True, weights_only=True)
        for tensor in state.values() if isinstance(state, dict) else ():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                sizes[tensor.dtype] += tensor.numel()
    return sizes


def _pickles(location: Location) -> list[Path | None]:
    if "gguf_file" in location.kwargs:
        return []
    one = _find(location, _PICKLE)
    if one is not None:
        return [one]
    index = _find(location, _PICKLE_INDEX)
    return (
        [] if index is None else [_find(location, shard) for shard in sorted(set(shards_of(index).values()))]
    )


def _find(location: Location, name: str) -> Path | None:
    found = cached_file(
        location.path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **location.kwargs,
    )
    return None if found is None else Path(found)


def _open_shards(location: Location, index: Path) -> Checkpoint | None:
    weight_map = shards_of(index)
    tensors: dict[str, StoredTensor] = {}
    files: list[Path] = []
    for shard in sorted(set(weight_map.values())):
        file = _find(location, shard)
        if file is None:
            raise ModelError(f"The folder lacks {shard}", where=str(index), fix="copy or download it again")
        entries = _entries(file)
        if entries is None:
            return None
        files.append(file)
        for name in entries:
            if name in tensors:
                raise ModelError(
                    f"The tensor {name} stands in {tensors[name].file.name} and in {shard}",
                    where=str(index),
                    fix="remove the file that does not belong to the model",
                )
        tensors |= entries
        for name in (name for name, wanted in weight_map.items() if wanted == shard and name not in entries):
            near = nearest(name, entries)
            raise ModelError(
                f"The index names {name} in {shard}, which does not hold it",
                where=str(index),
                expected=f"a file with this tensor{f', not with {near}' if near else ''}",
                fix="copy or download the model again: index and files are not of one version",
            )
    return Checkpoint(tuple(files), tensors)


def _entries(file: Path) -> dict[str, StoredTensor] | None:
    """Where the tensors of a file lie; None where one has a dtype that torch computes nothing with."""
    # Refuses a file that is not whole, and one whose tensors overlap.
    with safe_open(file, framework="pt"):
        pass
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    entries = {}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        if facts["dtype"] not in _DTYPES:
            return None
        start, stop = facts["data_offsets"]
        entries[name] = StoredTensor(
            file, _DTYPES[facts["dtype"]], tuple(facts["shape"]), 8 + length + start, stop - start
        )
    return entries
