"""Everything wrong with a data file, in one pass, with line numbers.

Without a tokenizer the structure is checked: rows that cannot be read, roles, turn order, empty turns,
duplicates, held-out rows that also stand in the training data. With one, the rows are tokenised as training
would do it, and what is dropped, cut or not learned is listed too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, get_args

from phlora.config import TooLong, TrainOn
from phlora.data.cells import check_cell, preview_cell
from phlora.data.chat_template import Tokenizer
from phlora.data.dataset import Source
from phlora.data.inspection import InspectedData, SplitSettings, inspect_data
from phlora.data.leaks import num_leaks
from phlora.data.lengths import Bin, histogram, limits_text, percentiles, percentiles_text, whole_at
from phlora.data.problems import merge_problems, problems_json, render_problem, shown_formats
from phlora.data.row_tokenizer import MISTAKES
from phlora.data.rows import Origin, Problem, Row, each_row, sentence
from phlora.data.tokenize import (
    IGNORED,
    Skipped,
    TokenizedRow,
    TokenizedSet,
    tokenize_row,
    tokenize_rows,
)
from phlora.display import printable
from phlora.errors import EXIT_DONE, EXIT_FINDING, EXIT_INPUT, InputError
from phlora.parameters import require_choice, require_count
from phlora.plots import plot_lengths

# Of training, where nothing else is said.
DEFAULT_MAX_LENGTH = 2048
# Byte-level tokens can straddle characters, so that several in a row end within one.
MAX_TOKENS_A_PIECE = 16


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What `check` found.

    Attributes:
        problems: merged by kind and message, errors first; `origins` names all rows concerned.
        formats: the schema of each source.
        num_rows: rows in the sources, readable or not.
        num_usable_rows: rows that training would use (without a tokenizer: rows without an error).
        num_tokens, num_trained_tokens: over the usable rows; None without a tokenizer.
        num_duplicates: rows that repeat an earlier one.
        num_conversations: what the split keeps whole; 0 where held-out rows are given or cannot be split off.
        leaks: held-out rows of which training sees too much, by kind.
        num_leaked_eval_rows: held-out rows that also stand in the training data.
        lengths: histogram of the usable rows' lengths in tokens; empty without a tokenizer.
        max_length: the limit that they were checked with.
        percentiles: the length in tokens that so many percent of all rows do not exceed, before anything is cut.
        whole_at: the share of rows that are whole at a limit in tokens, for the limit and some near it.
    """

    problems: tuple[Problem, ...]
    formats: dict[str, str]
    num_rows: int
    num_usable_rows: int
    num_tokens: int | None
    num_trained_tokens: int | None
    num_duplicates: int
    num_conversations: int
    leaks: dict[str, int]
    num_leaked_eval_rows: int
    lengths: tuple[Bin, ...]
    max_length: int | None = None
    percentiles: dict[int, int] = field(default_factory=dict)
    whole_at: dict[int, float] = field(default_factory=dict)

    def exit_code(self, *, strict: bool = False) -> int:
        """0; 1 for warnings when `strict`; 2 when there is an error or no usable row."""
        severities = {problem.severity for problem in self.problems}
        if "error" in severities or not self.num_usable_rows:
            return EXIT_INPUT
        return EXIT_FINDING if strict and "warning" in severities else EXIT_DONE

    def to_json(self) -> dict[str, Any]:
        """The report as plain values; origins as `file:line`."""
        values = asdict(self)
        values["problems"] = problems_json(self.problems)
        return values

    def render(self) -> str:
        """The report as plain text."""
        return "\n".join([*self._head(), *self._histogram(), *map(render_problem, self.problems)])

    def _repr_html_(self) -> str:
        """What a notebook shows: findings, errors first, and how long rows are."""
        limits = self._limits() if self.lengths else []
        return check_cell(self._head(), limits, self.lengths, self.problems)

    def plot_lengths(self, ax: Any = None) -> Any:
        """How many rows have how many tokens, as a plot of matplotlib; returns its `Axes`.

        Args:
            ax: where to draw; None makes a figure.

        Raises:
            InputError: the rows were checked without a tokenizer.
            MissingExtraError: matplotlib is not installed.
        """
        if not self.lengths:
            raise InputError(
                "There are no lengths to plot",
                expected="a check of some rows with a tokenizer: check(rows, tokenizer)",
            )
        bins = [(item.low, item.high, item.count) for item in self.lengths]
        return plot_lengths(bins, max_length=self.max_length, ax=ax)

    def _head(self) -> list[str]:
        lines = shown_formats(self.formats)
        lines.append(f"{self.num_usable_rows} of {self.num_rows} rows usable" + self._conversations())
        if self.num_tokens is not None and self.num_trained_tokens is not None:
            share = self.num_trained_tokens / max(self.num_tokens, 1)
            lines.append(f"{self.num_trained_tokens} of {self.num_tokens} tokens trained ({share:.1%})")
        return lines

    def _conversations(self) -> str:
        if not self.num_conversations:
            return ""
        return f", in {self.num_conversations} conversations, each of which stays on one side of the split"

    def _limits(self) -> list[str]:
        """Percentiles, and what the limit and others keep."""
        lines = [percentiles_text(self.percentiles)]
        return [*lines, limits_text(self.whole_at)] if self.whole_at else lines

    def _histogram(self) -> list[str]:
        if not self.lengths:
            return []
        most = max(item.count for item in self.lengths)
        width = len(str(self.lengths[-1].high))
        lines = [*self._limits(), "tokens per row:"]
        for item in self.lengths:
            bar = "█" * round(40 * item.count / most)
            lines.append(f"  {item.low:>{width}} - {item.high:>{width}}  {item.count:>7}  {bar}")
        return lines


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """A row token by token: the text of each piece, whether it is trained, and its loss weight.

    A piece is one token, or several that only together spell a character.
    """

    origin: Origin
    tokens: list[tuple[str, bool, float]]
    skipped: str | None = None


class Preview(list[PreviewRow]):
    """Rows token by token; in a notebook trained tokens are marked."""

    def _repr_html_(self) -> str:
        return preview_cell([(str(row.origin), row.tokens, row.skipped) for row in self])


def check(
    sources: Source | Sequence[Source],
    tokenizer: Tokenizer | None = None,
    *,
    eval_sources: Source | Sequence[Source] | None = None,
    format: str = "auto",
    train_on: TrainOn = "assistant",
    max_length: int | None = DEFAULT_MAX_LENGTH,
    too_long: TooLong = "truncate_history",
    training_template: str | None = None,
    split: SplitSettings | None = None,
    keep_reasoning: bool = False,
    reading: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Read all rows and report everything that is wrong with them.

    Args:
        tokenizer: adds the checks on tokens when given.
        eval_sources: held-out rows, checked for reappearing in the training data.
        split: how rows are held out where there are no `eval_sources`.
        keep_reasoning: whether what was thought before answers is kept as text.
        reading: called with the number of rows read since.
        progress: called with the number of rows tokenised since.

    The other arguments are those of `load_rows` and `tokenize_rows`.

    Raises:
        DataError: a source that cannot be read at all or is empty.
    """
    require_choice(train_on, get_args(TrainOn), where="train_on")
    require_choice(too_long, get_args(TooLong), where="too_long")
    data = inspect_data(
        sources,
        eval_sources,
        format=format,
        train_on=train_on,
        split=split,
        keep_reasoning=keep_reasoning,
        on_bad="collect",
        reading=reading,
        digests=False,
    )
    found, problems = data.index, list(data.problems)
    tokenized = None
    if tokenizer is not None and len(found):
        # A row over max_length is a finding here, whatever training would do about it.
        tokenized = tokenize_rows(
            found.all(),
            tokenizer,
            train_on=train_on,
            max_length=max_length,
            too_long="drop" if too_long == "error" else too_long,
            training_template=training_template,
            on_bad="collect",
            progress=progress,
        )
        said = {origin for each in problems if each.kind == "weight_zero" for origin in each.origins}
        problems += _token_problems(tokenized, is_error=too_long == "error", said=said)
    return _report(data, tokenized, merge_problems(problems), max_length)


def preview(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    n: int,
    *,
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    too_long: TooLong = "truncate_history",
    training_template: str | None = None,
) -> Preview:
    """The first `n` rows token by token; the other arguments, and errors, are those of `tokenize_rows`."""
    require_count(n, where="n", least=0)
    shown = Preview()
    for row, _ in zip(each_row(rows), range(n), strict=False):
        result = tokenize_row(
            row,
            tokenizer,
            train_on=train_on,
            max_length=max_length,
            too_long=too_long,
            training_template=training_template,
        )
        if isinstance(result, Skipped):
            shown.append(PreviewRow(row.origin, [], result.reason))
        else:
            shown.append(PreviewRow(row.origin, pieces_of(result, tokenizer)))
    return shown


# ------------------------------------------------------------------------------------------------ tokens


def warnings_of(tokenized: TokenizedSet) -> list[Problem]:
    """What `check` says of rows that were tokenised."""
    return _token_problems(tokenized, is_error=False)


def _token_problems(
    tokenized: TokenizedSet, *, is_error: bool, said: Collection[Origin] = ()
) -> list[Problem]:
    """Args: said: the rows that say themselves that they are not trained."""
    problems = list(tokenized.notes)
    for skip in tokenized.skipped:
        if skip.kind in ("no_answer", "weight_zero") or (
            skip.kind == "no_trained_token" and skip.origin in said
        ):
            continue  # reported by the structural check
        is_mistake = skip.kind in MISTAKES or (is_error and skip.kind == "too_long")
        severity = "error" if is_mistake else "warning"
        message = {
            "too_long": "The row is longer than max_length and is left out",
            "no_trained_token": "None of the row's tokens is trained; it is left out",
        }.get(skip.kind, sentence(skip.reason))
        problems.append(Problem(skip.kind, severity, message, (skip.origin,)))  # type: ignore[arg-type]
    if tokenized.cut:
        message = "The oldest turns are left out so that the row fits into max_length"
        problems.append(Problem("history_cut", "warning", message, tuple(tokenized.cut), len(tokenized.cut)))
    return problems


def _report(
    data: InspectedData,
    tokenized: TokenizedSet | None,
    problems: tuple[Problem, ...],
    max_length: int | None,
) -> CheckReport:
    survey = data.index
    unreadable = {
        origin for problem in survey.problems if problem.severity == "error" for origin in problem.origins
    }
    unanswered = {
        origin
        for problem in problems
        if problem.kind in ("no_answer", "weight_zero")
        for origin in problem.origins
    }
    num_usable = sum(origin not in unanswered for origin in survey.all().origins())
    leaks = num_leaks(problems)
    return CheckReport(
        problems=problems,
        formats=survey.formats,
        num_rows=len(survey) + len(unreadable),
        num_usable_rows=len(tokenized.rows) if tokenized else num_usable,
        num_tokens=tokenized.num_tokens if tokenized else None,
        num_trained_tokens=tokenized.num_trained_tokens if tokenized else None,
        num_duplicates=sum(problem.count for problem in problems if problem.kind == "duplicate"),
        num_conversations=data.num_conversations,
        leaks=leaks,
        num_leaked_eval_rows=leaks["leaked_eval_row"],
        lengths=histogram(tokenized.rows.lengths.tolist()) if tokenized else (),
        max_length=max_length if tokenized else None,
        percentiles=percentiles(tokenized.full_lengths) if tokenized else {},
        whole_at=whole_at(tokenized.full_lengths, max_length) if tokenized and max_length else {},
    )


# ------------------------------------------------------------------------------------------------ preview


def preview_text(row: PreviewRow, *, colour: bool = False, plain: bool = False) -> str:
    """A row's tokens, between bars unless plain, stretches of trained ones in green or in brackets."""
    if row.skipped:
        return printable(f"── {row.origin}\nleft out: {row.skipped}")
    text = ""
    for (trained, weight), group in groupby(row.tokens, key=lambda token: token[1:]):
        pieces = ("" if plain else "│").join(printable(piece) for piece, _, _ in group)
        factor = "" if weight in (0.0, 1.0) else f"×{weight:g} "
        if not trained:
            text += f"\x1b[2m{pieces}\x1b[0m" if colour else pieces
        else:
            text += f"\x1b[1;32m{factor}{pieces}\x1b[0m" if colour else f"⟦{factor}{pieces}⟧"
    return f"── {printable(str(row.origin))}\n{text}"


def pieces_of(row: TokenizedRow, tokenizer: Tokenizer) -> list[tuple[str, bool, float]]:
    """Decode token by token, keeping tokens together that only together spell a character."""
    pieces: list[tuple[str, bool, float]] = []
    start = 0
    context: list[int] = []
    for end in range(1, len(row.input_ids) + 1):
        group = row.input_ids[start:end]
        # Decoded behind the tokens before it: decoders strip the space of a first token.
        text = _decode(tokenizer, [*context, *group])[len(_decode(tokenizer, context)) :]
        if text.endswith("\ufffd") and end < len(row.input_ids) and len(group) < MAX_TOKENS_A_PIECE:
            continue
        is_trained = any(label != IGNORED for label in row.labels[start:end])
        weight = max(row.weights[start:end]) if row.weights else float(is_trained)
        pieces.append((text, is_trained, weight))
        start, context = end, group
    return pieces


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
