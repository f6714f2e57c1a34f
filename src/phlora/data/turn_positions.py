"""Where the turns of a chat stand among its tokens, found without character offsets."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from phlora.data.chat_template import ChatTemplate
from phlora.data.encoding import Encoder
from phlora.data.rendering import Frame, Span
from phlora.data.table import Array


@dataclass(frozen=True)
class TurnPositions:
    """Where the turns of a frame stand among the tokens, counted from its control tokens.

    No token reaches over a control token, so a content lies between the tokens of its header and the control
    token that follows it. That needs no offsets, and holds for all contents without control tokens of their own.

    Attributes:
        order: the messages that have a place, of `num_messages`.
        headers: per place the control tokens up to its content, and the ids between the last of them and it.
        ends: per place the control tokens up to the end of its turn; None: it ends with the row.
        num_controls: of the whole frame.
        marks: what the template's generation markers enclose; None where there are none to be heeded.
    """

    control_ids: frozenset[int]
    num_messages: int
    order: tuple[int, ...]
    headers: tuple[tuple[int, array[int]], ...]
    ends: tuple[int | None, ...]
    num_controls: int
    marks: GenerationMarks | None = None

    def ranges(self, ids: array[int]) -> list[Span] | None:
        """The tokens of each turn, content and end; None where a header is merged with its content."""
        are_control = np.take(_truths(self.control_ids), np.frombuffer(ids, np.int32), mode="clip")
        places = are_control.nonzero()[0].tolist()
        if len(places) != self.num_controls:
            return None
        found = [(0, 0)] * self.num_messages
        for index, (num_before, header), end in zip(self.order, self.headers, self.ends, strict=True):
            start = places[num_before - 1] + 1
            stop = start + len(header)
            if ids[start:stop] != header:
                return None
            found[index] = (stop, len(ids) if end is None else places[end - 1] + 1)
        return found

    def owned(self, ranges: Sequence[Span], num_tokens: int) -> list[Span]:
        """The tokens of each turn from the end of the one before it up to the next content."""
        owned = [(0, 0)] * self.num_messages
        following = num_tokens
        for index in reversed(self.order):
            owned[index] = (ranges[index - 1][1] if index else 0, following)
            following = ranges[index][0]
        return owned


@lru_cache(maxsize=16)
def _truths(ids: frozenset[int]) -> Array:
    """Whether each token up to one beyond the last of these is one of them."""
    truths: Array = np.zeros(max(ids, default=0) + 2, dtype=bool)
    truths[list(ids)] = True
    return truths


@dataclass(frozen=True)
class GenerationMarks:
    """Which tokens of a frame stand between generation markers.

    Attributes:
        literals: a byte for each token of each literal.
        contents: whether they are enclosed.
    """

    literals: tuple[bytes, ...]
    contents: tuple[bool, ...]

    def mask(self, starts: Sequence[int], num_tokens: int) -> bytes:
        """A byte for each token of a row in which the contents begin at `starts`."""
        parts = [self.literals[0]]
        following = [*starts[1:], num_tokens]
        for start, stop, literal, is_marked in zip(
            starts, following, self.literals[1:], self.contents, strict=True
        ):
            parts += [bytes([is_marked]) * (stop - len(literal) - start), literal]
        return b"".join(parts)


def find_marks(
    positions: TurnPositions, ids: Sequence[int], ranges: Sequence[Span], mask: Sequence[int]
) -> GenerationMarks | None:
    """What a mask encloses, from a row with contents of a token or so; None where contents alone decide a border.

    That is where markers end with a content: its last character may be of several tokens.
    """
    literals, contents, last = [], [], 0
    for index in positions.order:
        start = ranges[index][0]
        stop = next(place for place in range(start, len(ids)) if ids[place] in positions.control_ids)
        is_marked = any(mask[start:stop])
        if is_marked and not all(mask[start : stop + 1]):
            return None
        literals.append(bytes(mask[last:start]))
        contents.append(is_marked)
        last = stop
    return GenerationMarks((*literals, bytes(mask[last:])), tuple(contents))


def find_turn_positions(frame: Frame, template: ChatTemplate, encoder: Encoder) -> TurnPositions | None:
    """The positions of a frame; None where control tokens do not stand all around its contents."""
    tokenizer = encoder.tokenizer
    control_ids = {tokenizer.convert_tokens_to_ids(token): token for token in template.control_tokens}
    added = [
        token for token in tokenizer.added_tokens_decoder.values() if token.content in template.control_tokens
    ]
    if any(
        token.lstrip or token.single_word or token.normalized or (token.rstrip and not token.special)
        for token in added
    ):
        return None
    headers, ends, num_controls = [], [], 0
    for number, literal in enumerate(frame.literals):
        matches = list(template.control_pattern.finditer(literal))
        if number:
            tail = frame.tails[number - 1]
            stops = [match.end() for match in matches]
            if not matches or matches[0].start() or (tail != len(literal) and tail not in stops):
                return None
            is_whole = number == len(frame.tails) and tail == len(literal)
            ends.append(None if is_whole else num_controls + stops.index(tail) + 1)
        num_controls += len(matches)
        if number < len(frame.tails):
            if not matches:
                return None
            header = encoder.texts([literal[matches[-1].start() :]])[0][0]
            if header[0] not in control_ids or tokenizer.unk_token_id in header:
                return None
            headers.append((num_controls, array("i", header[1:])))
    return TurnPositions(
        frozenset(control_ids), len(frame.shape), frame.order, tuple(headers), tuple(ends), num_controls
    )
