"""Turns rows into token rows: `input_ids`, `labels`, loss weights, and a count of what was cut or dropped.

`labels` follow transformers' convention: aligned with `input_ids`, -100 where nothing is learned.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from phlora.config import TooLong, TrainOn
from phlora.data.chat_template import Tokenizer
from phlora.data.row_tokenizer import MISTAKES, Options, RowTokenizer, Skipped
from phlora.data.rows import Origin, Problem, Row, each_row, sentence
from phlora.data.table import IGNORED, TableBuilder, TokenizedRow, TokenTable
from phlora.errors import DataError
from phlora.parameters import require_choice

__all__ = [
    "IGNORED",
    "Skipped",
    "TokenizedRow",
    "TokenizedSet",
    "tokenize_row",
    "tokenize_rows",
]


@dataclass(frozen=True)
class TokenizedSet:
    """All token rows, and what happened on the way.

    Attributes:
        rows: in the order of the rows.
        skipped: the rows left out.
        cut: origins of the rows that lost their oldest messages.
        notes: what a person should know, one entry a kind, with the rows concerned.
        full_lengths: of all rows in tokens, before any was cut or left out; not kept in the cache.
    """

    rows: TokenTable
    skipped: list[Skipped]
    cut: list[Origin]
    notes: list[Problem]
    full_lengths: array[int] = field(default_factory=lambda: array("q"))

    @classmethod
    def empty(cls) -> TokenizedSet:
        return cls(TableBuilder().table(), [], [], [])

    @property
    def num_tokens(self) -> int:
        return len(self.rows.input_ids)

    @property
    def num_trained_tokens(self) -> int:
        return self.rows.num_trained_tokens


def tokenize_row(
    row: Row,
    tokenizer: Tokenizer,
    *,
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    too_long: TooLong = "truncate_history",
    training_template: str | None = None,
) -> TokenizedRow | Skipped:
    """Tokenise one row; the arguments are those of `tokenize_rows`."""
    options = Options(train_on, max_length, too_long, training_template)
    (result,) = RowTokenizer(tokenizer, options).run([row])
    if isinstance(result, Skipped):
        return result
    table = TableBuilder()
    result.add_to(table)
    return table.table()[0]


def tokenize_rows(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    too_long: TooLong = "truncate_history",
    training_template: str | None = None,
    on_bad: Literal["raise", "collect"] = "raise",
    progress: Callable[[int], None] | None = None,
) -> TokenizedSet:
    """Tokenise rows with the tokenizer's own chat template.

    Args:
        rows: as `load_rows` reads them.
        train_on: `assistant` turns, the `last` assistant turn, or `all` tokens. A message's own `train` wins.
        max_length: longest row in tokens.
        too_long: for longer rows: `truncate_history` leaves out the oldest exchanges (never the system
            prompt, never a part of the last exchange), `drop` the row, `error` raises.
        training_template: a variant of the chat template with `{% generation %}` markers; they then decide
            what belongs to an assistant turn.
        on_bad: `raise` when a row cannot be trained at all (no answer, a message that the template leaves
            out), or when no row is left; `collect` lists them in `skipped` only.
        progress: called with the number of rows done since the last call.

    Raises:
        DataError: see `too_long` and `on_bad`; or what was given are no rows.
        ConfigError: a word that there is not, or a `max_length` below 1.
        ModelError: the tokenizer has no chat template or is not a fast one, or is none.
    """
    require_choice(on_bad, ("raise", "collect"), where="on_bad")
    worker = RowTokenizer(tokenizer, Options(train_on, max_length, too_long, training_template))
    table = TableBuilder()
    skipped: list[Skipped] = []
    cut: list[Origin] = []
    for results in worker.run_batches(each_row(rows)):
        for result in results:
            if isinstance(result, Skipped):
                skipped.append(result)
                continue
            result.add_to(table)
            if result.num_cut_messages:
                cut.append(result.origin)
        if progress:
            progress(len(results))
    done = table.table()
    if on_bad == "raise":
        _raise_for(len(done), skipped)
    return TokenizedSet(done, skipped, cut, worker.problems(), worker.full_lengths)


def _raise_for(num_done: int, skipped: Sequence[Skipped]) -> None:
    mistakes = [skip for skip in skipped if skip.kind in MISTAKES]
    if mistakes:
        more = f" ({len(mistakes) - 1} more rows cannot be used either)" if len(mistakes) > 1 else ""
        raise DataError(
            f"{sentence(mistakes[0].reason)}{more}",
            where=str(mistakes[0].origin),
            fix="correct or remove the rows; `phlora data check FILE` lists all of them",
        )
    if not num_done:
        reasons = Counter(skip.kind for skip in skipped)
        counted = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in reasons.most_common())
        first = f"; the first: {skipped[0].origin}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"No row is left to train on ({counted or 'there were none'}){first}")
