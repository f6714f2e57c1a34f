"""Which tokens of a row are trained, and with what weight: decided here, once.

Trained are the contents of the assistant turns and the token that ends each turn, unless a message says otherwise
for itself. Where a template is known with generation markers, they decide what belongs to a turn.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from phlora.config import TrainOn
from phlora.data.chat_template import ChatTemplate, Tokenizer, chat_template
from phlora.data.encoding import Encoder
from phlora.data.rendering import Frame, Rendering, Span
from phlora.data.rows import Message, Row, is_trained, last_assistant
from phlora.data.turn_positions import TurnPositions, find_marks, find_turn_positions


@dataclass
class Labeller:
    """Places the labels of rendered chats.

    Args:
        encoder: made the tokens.
        train_on: `assistant` turns, the `last` assistant turn, or `all` tokens.
        training_template: a variant of the chat template with generation markers.
    """

    encoder: Encoder
    train_on: TrainOn
    training_template: str | None = None
    positions: dict[Frame, TurnPositions | None] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.encoder.tokenizer

    @cached_property
    def template(self) -> ChatTemplate:
        return chat_template(self.tokenizer, self.training_template)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        decoder = self.tokenizer.added_tokens_decoder
        return frozenset(token for token, item in decoder.items() if item.special)

    def positions_of(self, rendering: Rendering) -> TurnPositions | None:
        """None also where offsets are needed for more: for swallowed white space."""
        frame = rendering.frame
        if frame is None:
            return None
        if any(m["role"] == "assistant" and m["content"][:1].isspace() for m in rendering.messages):
            return None
        try:
            return self.positions[frame]
        except KeyError:
            return self.positions.setdefault(frame, self._find_positions(frame))

    def _find_positions(self, frame: Frame) -> TurnPositions | None:
        """With generation markers that are heeded: where a chat of this shape shows what they enclose."""
        positions = find_turn_positions(frame, self.template, self.encoder)
        if positions is None or not self._heeds_markers:
            return positions
        probe = frame.fill([{"role": role, "content": "x" if says else ""} for role, says in frame.shape])
        (ids,) = self.encoder.ids([probe.text])
        mask, ranges = self._generation_mask(probe.messages, ids.tolist()), positions.ranges(ids)
        if mask is None or ranges is None:
            return positions if ranges else None
        marks = find_marks(positions, ids, ranges, mask)
        roles = [frame.shape[index][0] for index in frame.order]
        if marks is None or any(m and r != "assistant" for m, r in zip(marks.contents, roles, strict=True)):
            return None
        return replace(positions, marks=marks)

    def place(
        self, rendering: Rendering, ids: list[int], offsets: list[Span], row: Row, *, stripped: bool
    ) -> tuple[bytearray, list[float] | None]:
        """Which tokens of a chat are trained, and their weights; `stripped`: as without white space before answers."""
        # The control token that swallowed it would pass for the first token of the answer.
        messages = [_stripped(m) for m in rendering.messages] if stripped else rendering.messages
        mask = self._generation_mask(messages, ids, rendering.tools) if self._heeds_markers else None

        def tokens_of(index: int) -> Span:
            is_marked = mask is not None and rendering.messages[index]["role"] == "assistant"
            return self._tokens_of(rendering, index, ids, offsets, is_marked=is_marked)

        return self._mark(rendering, ids, tokens_of, mask, row)

    def place_between(
        self, rendering: Rendering, ids: Sequence[int], positions: TurnPositions, ranges: list[Span], row: Row
    ) -> tuple[bytearray, list[float] | None]:
        """As `place`, with the tokens of each turn known."""
        mask = None
        if positions.marks:
            mask = positions.marks.mask([ranges[index][0] for index in positions.order], len(ids))
            owned = positions.owned(ranges, len(ids))
            # The markers are those of the answers; another turn that is trained has its content and end.
            ranges = [
                owned[index] if message["role"] == "assistant" else ranges[index]
                for index, message in enumerate(rendering.messages)
            ]
        return self._mark(rendering, ids, ranges.__getitem__, mask, row)

    def _mark(
        self,
        rendering: Rendering,
        ids: Sequence[int],
        tokens_of: Callable[[int], Span],
        mask: Sequence[int] | None,
        row: Row,
    ) -> tuple[bytearray, list[float] | None]:
        if not row.weight:
            return bytearray(len(ids)), None
        trains_all = self.train_on == "all"
        trained = bytearray(b"\x01" * len(ids) if trains_all else len(ids))
        has_weights = row.weight != 1 or any("weight" in message for message in rendering.messages)
        weights = [float(row.weight)] * len(ids) if has_weights else []
        last = last_assistant(rendering.messages)
        for index, message in enumerate(rendering.messages):
            trains = is_trained(message, self.train_on, is_last=index == last)
            if trains == trains_all and "weight" not in message:
                continue
            first, end = tokens_of(index)
            if not trains:
                trained[first:end] = bytes(end - first)
            else:
                heeds = mask is not None and message["role"] == "assistant"
                trained[first:end] = bytes(mask[first:end]) if mask and heeds else b"\x01" * (end - first)
            if has_weights:
                weights[first:end] = [row.weight * message.get("weight", 1.0)] * (end - first)
        if not has_weights:
            return trained, None
        return trained, [weight if trains else 0.0 for trains, weight in zip(trained, weights, strict=True)]

    def _tokens_of(
        self, rendering: Rendering, index: int, ids: list[int], offsets: list[Span], *, is_marked: bool
    ) -> tuple[int, int]:
        """The tokens of a message and its end; all up to the next message where the template marks them."""
        span = rendering.spans[index]
        if span is None:
            return 0, 0
        if not is_marked:
            return token_range(offsets, (span[0], rendering.ends[index]), ids, self.control_ids)
        before = rendering.ends[index - 1] if index else 0
        following = next((span for span in rendering.spans[index + 1 :] if span), None)
        owned = (before, following[0] if following else len(rendering.text))
        return token_range(offsets, owned, ids, self.control_ids)

    @cached_property
    def _heeds_markers(self) -> bool:
        return self.training_template is not None and self.train_on != "all"

    def _generation_mask(
        self, messages: Sequence[Message], ids: list[int], tools: list[Any] | None = None
    ) -> list[int] | None:
        """The training template's own mask, where it marks anything and speaks of the same tokens."""
        with self.encoder.lock:
            marked, mask = self.template.generation_mask(messages, tools)
        return mask if marked == ids and any(mask) else None

    def loses_whitespace(self, rendering: Rendering, ids: list[int], offsets: list[Span]) -> bool:
        """Whether a control token swallows the white space that an answer begins with."""
        for message, span in zip(rendering.messages, rendering.spans, strict=True):
            if span and message["role"] == "assistant" and message["content"][:1].isspace():
                first = bisect_left(offsets, (span[0],))
                if first > 0 and offsets[first - 1][1] > span[0] and ids[first - 1] in self.control_ids:
                    return True
        return False


def token_range(
    offsets: Sequence[Span], span: Span, ids: Sequence[int], control_ids: frozenset[int]
) -> tuple[int, int]:
    """The tokens that touch the characters of a span.

    A token that a BPE merge carried over the border counts, a control token that swallowed the white space
    after it does not: at inference the one is written by the model, the other by the template.
    """
    first = bisect_left(offsets, (span[0],))
    while first > 0 and offsets[first - 1][1] > span[0] and ids[first - 1] not in control_ids:
        first -= 1
    return first, max(first, bisect_left(offsets, (span[1],)))


def _stripped(message: Message) -> Message:
    """An answer without the white space before it."""
    return {**message, "content": message["content"].lstrip()} if message["role"] == "assistant" else message
