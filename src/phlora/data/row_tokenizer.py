"""Tokenises one batch of rows after the other: renders, encodes, places the labels, shortens what is too long.

Trained are the contents of the assistant turns and the token that ends each turn. Which tokens these are is
read from the character spans of `chat_template.py` through the tokenizer's offsets; it never depends on how many
tokens a prefix of the chat would have alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, get_args

from phlora.config import TooLong, TrainOn
from phlora.data.chat_template import ChatTemplate, Tokenizer
from phlora.data.encoding import Encoded, Encoder
from phlora.data.labels import Labeller, token_range
from phlora.data.problems import Noted
from phlora.data.reasoning import has_reasoning, with_reasoning_as_text, without_reasoning
from phlora.data.rendering import Rendering, Span, TemplateRefusal
from phlora.data.rows import Message, Origin, Problem, Row, last_assistant, says_untrained, sentence
from phlora.data.table import TableBuilder
from phlora.data.tokenize_notes import NOTES
from phlora.data.turn_positions import TurnPositions
from phlora.errors import DataError
from phlora.parameters import require_choice, require_count

BATCH_ROWS = 512

# A row of more characters is left out before it is encoded, which takes some 240 bytes a character. No text has
# so long tokens on average.
MAX_CHARACTERS = 1_000_000
MAX_CHARACTERS_A_TOKEN = 64
SkipKind = Literal["no_answer", "not_rendered", "too_long", "no_trained_token", "weight_zero"]
# Rows that no setting can make trainable: a mistake in the data rather than a choice.
MISTAKES = ("no_answer", "not_rendered")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that is not trained on, and why."""

    origin: Origin
    reason: str
    kind: SkipKind


def _num_characters(row: Row) -> int:
    if row.messages is not None:
        return sum(len(message["content"]) for message in row.messages)
    return sum(len(part) for part in (row.prompt, row.completion, row.text) if part is not None)


@dataclass(frozen=True, slots=True)
class Options:
    """
    Raises:
        ConfigError: a word that there is not, or a `max_length` below 1.
    """

    train_on: TrainOn
    max_length: int | None
    too_long: TooLong
    training_template: str | None

    def __post_init__(self) -> None:
        require_choice(self.train_on, get_args(TrainOn), where="train_on")
        require_choice(self.too_long, get_args(TooLong), where="too_long")
        if self.max_length is not None:
            require_count(self.max_length, where="max_length")


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row as tokens, with a byte for each that says whether it is trained."""

    input_ids: Sequence[int]
    trained: bytearray
    weights: list[float] | None
    origin: Origin
    num_cut_messages: int = 0

    def add_to(self, table: TableBuilder) -> None:
        table.add(self.input_ids, self.trained, self.weights, self.origin, self.num_cut_messages)


@dataclass(slots=True)
class _Draft:
    """A row on its way: what will be encoded, and for a chat where its messages stand in it.

    Simple is what holds no control tokens but the template's own, so that it can be encoded with others. Where
    the positions of its turns are known it is encoded without offsets.
    """

    row: Row
    text: str
    rendering: Rendering | None = None
    num_cut_messages: int = 0
    is_simple: bool = True
    positions: TurnPositions | None = None


@dataclass
class RowTokenizer:
    tokenizer: Tokenizer
    options: Options
    notes: dict[str, Noted] = field(default_factory=dict)
    full_lengths: array[int] = field(default_factory=lambda: array("q"))

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.tokenizer)
        self.labels = Labeller(self.encoder, self.options.train_on, self.options.training_template)

    @property
    def template(self) -> ChatTemplate:
        return self.labels.template

    def run(self, rows: Sequence[Row]) -> list[TokenRow | Skipped]:
        """Render all rows, encode them in one call, then place the labels."""
        drafts = [self._draft(row) for row in rows]
        return self._finish_all(drafts, self._encode(drafts))

    def run_batches(self, rows: Iterable[Row]) -> Iterator[list[TokenRow | Skipped]]:
        """As `run`, batch after batch; one is rendered while the Rust tokenizer encodes the one before it."""
        remaining = iter(rows)
        waiting: tuple[list[_Draft | Skipped], Future[Iterator[Encoded | array[int]]]] | None = None
        with ThreadPoolExecutor(1) as pool:
            while batch := list(islice(remaining, BATCH_ROWS)):
                drafts = [self._draft(row) for row in batch]
                ready, waiting = waiting, (drafts, pool.submit(self._encode, drafts))
                if ready:
                    yield self._finish_all(ready[0], ready[1].result())
            if waiting:
                yield self._finish_all(waiting[0], waiting[1].result())

    def _most_characters(self) -> int:
        """What no tokenizer gets into the tokens allowed; encoding more takes hundreds of bytes a character."""
        limit = self.options.max_length
        return max(MAX_CHARACTERS, limit * MAX_CHARACTERS_A_TOKEN) if limit else MAX_CHARACTERS

    def _encode(self, drafts: Sequence[_Draft | Skipped]) -> Iterator[Encoded | array[int]]:
        """Ids and offsets of the simple drafts, in their order; ids alone where positions do."""
        simple = [draft for draft in drafts if isinstance(draft, _Draft) and draft.is_simple]
        ids = iter(self.encoder.ids([draft.text for draft in simple if draft.positions]))
        full = iter(self.encoder.texts([draft.text for draft in simple if not draft.positions]))
        return iter([next(ids) if draft.positions else next(full) for draft in simple])

    def _finish_all(
        self, drafts: Sequence[_Draft | Skipped], encoded: Iterator[Encoded | array[int]]
    ) -> list[TokenRow | Skipped]:
        return [
            draft
            if isinstance(draft, Skipped)
            else self._finish(draft, next(encoded) if draft.is_simple else None)
            for draft in drafts
        ]

    def problems(self) -> list[Problem]:
        """The notes so far, one entry a kind."""
        return [
            Problem(kind, NOTES[kind][0], self._note_text(kind), tuple(noted.origins), noted.count)
            for kind, noted in self.notes.items()
        ]

    def _note_text(self, kind: str) -> str:
        text = sentence(NOTES[kind][1])
        return f"{text}: {self.template.default_system!r}" if kind == "default_system" else text

    def _note(self, kinds: Iterable[str], origin: Origin) -> None:
        for kind in sorted(kinds):
            self.notes.setdefault(kind, Noted()).add(origin)

    def _draft(self, row: Row) -> _Draft | Skipped:
        if row.weight == 0:
            return Skipped(row.origin, says_untrained(row), "weight_zero")
        num_characters = _num_characters(row)
        if num_characters > self._most_characters():
            limit = self.options.max_length
            told = f" for max_length={limit}" if limit else ""
            reason = f"the row has {num_characters:,} characters, too many to be encoded{told}"
            if self.options.too_long == "error":
                raise DataError(sentence(reason), where=str(row.origin), fix="shorten the row")
            return Skipped(row.origin, reason, "too_long")
        if row.messages is None:
            return _Draft(row, row.text if row.text is not None else f"{row.prompt}{row.completion}")
        if self.options.train_on != "all" and last_assistant(row.messages) < 0:
            if not any(message.get("train") for message in row.messages):
                return Skipped(row.origin, "the chat has no assistant turn to train on", "no_answer")
        messages = self._thought(row) if has_reasoning(row.messages) else row.messages
        try:
            rendering = self.template.render(messages, row.tools)
        except TemplateRefusal as refusal:
            return Skipped(row.origin, str(refusal), "not_rendered")
        simple = not any(self.template.has_control(message["content"]) for message in rendering.messages)
        positions = self.labels.positions_of(rendering) if simple and rendering.frame else None
        return _Draft(row, rendering.text, rendering, is_simple=simple, positions=positions)

    def _thought(self, row: Row) -> Sequence[Message]:
        """The messages with what was thought where the template writes it, so that it is trained; else without."""
        messages = row.messages or ()
        if self.template.writes_reasoning:
            return with_reasoning_as_text(messages)
        self._note(["reasoning_dropped"], row.origin)
        return without_reasoning(messages)

    def _finish(self, draft: _Draft, encoded: Encoded | array[int] | None) -> TokenRow | Skipped:
        result = self._tokens(draft, encoded)
        self.full_lengths.append(len(result.input_ids))
        limit = self.options.max_length
        if limit is not None and len(result.input_ids) > limit:
            return self._shorten(draft.row, len(result.input_ids), limit)
        return _unless_untrained(result)

    def _tokens(self, draft: _Draft, encoded: Encoded | array[int] | None = None) -> TokenRow:
        """The draft as a token row, whatever its length; encoded here when it was not in the batch."""
        if isinstance(encoded, array):
            ranges = draft.positions.ranges(encoded) if draft.positions else None
            if ranges is not None and draft.rendering and draft.positions:
                return self._chat_between(draft, draft.rendering, encoded, draft.positions, ranges)
            encoded = None
        if draft.rendering is None:
            return self._plain(draft, encoded or self.encoder.texts([draft.text])[0])
        if encoded:
            return self._chat(draft, draft.rendering, *encoded)
        return self._chat(draft, *self.encoder.rendering(draft.rendering, self.template))

    # ---------------------------------------------------------------------------------------- plain rows

    def _plain(self, draft: _Draft, encoded: Encoded) -> TokenRow:
        """Train the completion (or the whole text) and the end token after it."""
        row = draft.row
        ids, offsets = self.encoder.with_bos(encoded)
        ids, offsets = list(ids), list(offsets)
        ending = self._pre_rendered_end(draft)
        eos = self.tokenizer.eos_token_id
        if eos is not None and not ending and ids[-1:] != [eos]:
            ids.append(eos)
            offsets.append((len(draft.text), len(draft.text) + 1))
        span = (len(row.prompt or ""), len(draft.text))
        first, _ = token_range(offsets, span, ids, self.labels.control_ids)
        trained = bytearray(first) + bytes([row.weight != 0]) * (len(ids) - first)
        weights = None if row.weight == 1 else [0.0] * first + [float(row.weight)] * (len(ids) - first)
        return TokenRow(ids, trained, weights, row.origin)

    def _pre_rendered_end(self, draft: _Draft) -> bool:
        """Note a text that is a rendered chat already; whether it brings its own end token."""
        if not self.tokenizer.chat_template:
            return False
        if not any(marker in draft.text for marker in self.template.markers):
            return False
        self._note(["pre_rendered"], draft.row.origin)
        end = self.template.turn_end.strip()
        return bool(end) and draft.text.rstrip().endswith(end)

    # ---------------------------------------------------------------------------------------- chats

    def _chat(self, draft: _Draft, rendering: Rendering, ids: list[int], offsets: list[Span]) -> TokenRow:
        """Train the answers and the tokens that end them."""
        loses_whitespace = self.labels.loses_whitespace(rendering, ids, offsets)
        trained, weights = self.labels.place(rendering, ids, offsets, draft.row, stripped=loses_whitespace)
        notes = set(rendering.notes)
        if loses_whitespace:
            notes.add("leading_whitespace")
        self._note(notes, draft.row.origin)
        return TokenRow(ids, trained, weights, draft.row.origin, draft.num_cut_messages)

    def _chat_between(
        self,
        draft: _Draft,
        rendering: Rendering,
        ids: array[int],
        positions: TurnPositions,
        ranges: list[Span],
    ) -> TokenRow:
        """As `_chat`, with the tokens of each turn known."""
        trained, weights = self.labels.place_between(rendering, ids, positions, ranges, draft.row)
        self._note(rendering.notes, draft.row.origin)
        return TokenRow(ids, trained, weights, draft.row.origin, draft.num_cut_messages)

    # ---------------------------------------------------------------------------------------- long rows

    def _shorten(self, row: Row, num_tokens: int, limit: int) -> TokenRow | Skipped:
        reason = f"the row has {num_tokens} tokens, more than max_length={limit}"
        if self.options.too_long == "error":
            raise DataError(
                sentence(reason),
                where=str(row.origin),
                fix="raise max_length, shorten the row, or set too_long to truncate_history or drop",
            )
        if self.options.too_long == "drop" or row.messages is None:
            return Skipped(row.origin, reason, "too_long")
        shorter = self._without_history(row, limit)
        if shorter is None:
            return Skipped(row.origin, f"{reason}, even with its last exchange alone", "too_long")
        return shorter if isinstance(shorter, Skipped) else _unless_untrained(shorter)

    def _without_history(self, row: Row, limit: int) -> TokenRow | Skipped | None:
        """The row without just as many of its oldest exchanges as make it fit; None when none does."""
        messages = row.messages or ()
        starts = _exchange_starts(messages)
        best: TokenRow | Skipped | None = None
        low, high = 1, len(starts) - 1
        while low <= high:
            middle = (low + high) // 2
            result = self._from_exchange(row, starts[middle], starts[0])
            if isinstance(result, TokenRow) and len(result.input_ids) > limit:
                low = middle + 1
            else:
                best, high = result, middle - 1
        return best

    def _from_exchange(self, row: Row, start: int, head: int) -> TokenRow | Skipped:
        messages = row.messages or ()
        shorter = replace(row, messages=(*messages[:head], *messages[start:]))
        draft = self._draft(shorter)
        if isinstance(draft, Skipped):
            return draft
        draft.num_cut_messages = start - head
        return self._tokens(draft)


def _unless_untrained(row: TokenRow) -> TokenRow | Skipped:
    if row.trained.count(0) < len(row.trained):
        return row
    return Skipped(row.origin, "none of the row's tokens is trained", "no_trained_token")


def _exchange_starts(messages: Sequence[Message]) -> list[int]:
    """Where each exchange begins, from the end of the system prompt to the one with the last answer."""
    head = 0
    while head < len(messages) and messages[head]["role"] == "system":
        head += 1
    last = last_assistant(messages)
    return [head] + [
        index
        for index in range(head + 1, last + 1)
        if messages[index]["role"] == "user" and messages[index - 1]["role"] != "user"
    ]
