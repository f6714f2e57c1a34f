"""Token rows held as a few flat arrays instead of lists of numbers: 5 bytes a token rather than some 70.

A row's labels are its ids or -100, so one bit of truth a token says them; weights are kept only where some row
has them. The arrays may lie in memory or be mapped from a file; a row is made into lists when it is asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from phlora.data.rows import Origin

IGNORED = -100

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One row as tokens.

    Attributes:
        input_ids: (T,)
        labels: (T,), the same ids, -100 where nothing is learned. Not shifted.
        weights: (T,) loss weight of each token, 0 where nothing is learned; None means 1 for all trained
            tokens.
        num_cut_messages: how many of the oldest messages were left out so that the row fits.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None
    origin: Origin
    num_cut_messages: int = 0

    @property
    def num_trained_tokens(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True, eq=False)
class TokenTable(Sequence[TokenizedRow]):
    """Token rows as arrays; N tokens in M rows.

    Attributes:
        input_ids: (N,) int32.
        trained: (N,) uint8, 1 where the label is the token itself.
        starts: (M + 1,) int64; row i is `starts[i]:starts[i + 1]`.
        weights: (N,) float32 loss weights; None when no row has any.
        weighted: (M,) uint8, 1 for rows with weights of their own.
        lines, file_numbers, cuts: (M,) int32; each row's origin and its `num_cut_messages`.
        files: the names that `file_numbers` count.
    """

    input_ids: Array
    trained: Array
    starts: Array
    weights: Array | None
    weighted: Array
    lines: Array
    file_numbers: Array
    cuts: Array
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedRow]: ...
    def __getitem__(self, index: int | slice) -> TokenizedRow | list[TokenizedRow]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start, stop = self.starts[number : number + 2].tolist()
        ids = self.input_ids[start:stop]
        weights = self.weights[start:stop].tolist() if self.weights is not None else None
        return TokenizedRow(
            input_ids=ids.tolist(),
            labels=np.where(self.trained[start:stop], ids, IGNORED).tolist(),
            weights=weights if self.weighted[number] else None,
            origin=self.origin(number),
            num_cut_messages=int(self.cuts[number]),
        )

    def origin(self, number: int) -> Origin:
        """Where a row stands in its file."""
        return Origin(self.files[self.file_numbers[number]], int(self.lines[number]))

    @property
    def lengths(self) -> Array:
        """(M,) tokens of each row."""
        lengths: Array = np.diff(self.starts)
        return lengths

    @property
    def num_trained_tokens(self) -> int:
        return int(np.count_nonzero(self.trained))


class TableBuilder:
    """Takes token rows one by one and keeps no object of them."""

    def __init__(self) -> None:
        self.input_ids, self.trained, self.starts = array("i"), bytearray(), array("q", [0])
        self.weights: array[float] | None = None
        self.weighted, self.lines = bytearray(), array("i")
        self.file_numbers, self.cuts = array("i"), array("i")
        self.files: dict[str, int] = {}

    def add(
        self,
        input_ids: Sequence[int],
        trained: bytes | bytearray,
        weights: Iterable[float] | None,
        origin: Origin,
        num_cut_messages: int = 0,
    ) -> None:
        """Append one row; the arguments are those of `TokenizedRow`, with a byte of truth for each label."""
        if weights is not None and self.weights is None:
            self.weights = array("f", map(float, self.trained))
        self.input_ids.extend(input_ids)
        self.trained += trained
        self.starts.append(len(self.input_ids))
        if self.weights is not None:
            self.weights.extend(map(float, trained) if weights is None else weights)
        self.weighted.append(weights is not None)
        self.lines.append(origin.line)
        self.file_numbers.append(self.files.setdefault(origin.file, len(self.files)))
        self.cuts.append(num_cut_messages)

    def table(self) -> TokenTable:
        """The rows so far; add nothing afterwards."""
        return TokenTable(
            input_ids=_view(self.input_ids, np.int32),
            trained=_view(self.trained, np.uint8),
            starts=_view(self.starts, np.int64),
            weights=None if self.weights is None else _view(self.weights, np.float32),
            weighted=_view(self.weighted, np.uint8),
            lines=_view(self.lines, np.int32),
            file_numbers=_view(self.file_numbers, np.int32),
            cuts=_view(self.cuts, np.int32),
            files=tuple(self.files),
        )


def _view(values: array[Any] | bytearray, kind: type[Any]) -> Array:
    view: Array = np.frombuffer(values, dtype=kind) if len(values) else np.zeros(0, dtype=kind)
    return view
