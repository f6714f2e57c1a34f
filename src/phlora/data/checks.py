"""Everything wrong with a data file, in one pass, with line numbers.

Without a tokenizer the structure is checked: rows that cannot be read, roles, turn order, empty turns,
duplicates, held-out rows that also stand in the training data. With one, the rows are tokenised as training
would do it, and what is dropped, cut or not learned is listed too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from phlora.config import TooLong, TrainOn
from phlora.data.chat_template import Tokenizer
from phlora.data.dataset import RowIndex, Source, index_rows
from phlora.data.rows import Message, Origin, Problem, Row
from phlora.data.tokenize import (
    IGNORED,
    MISTAKES,
    Skipped,
    TokenizedRow,
    TokenizedSet,
    tokenize_row,
    tokenize_rows,
)
from phlora.errors import EXIT_DONE, EXIT_FINDING, EXIT_INPUT

NUM_BINS = 12
NUM_SHOWN_ORIGINS = 8
# Byte-level tokens can straddle characters, so that several in a row end within one.
MAX_TOKENS_A_PIECE = 16
_SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows of `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


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
        num_leaked_eval_rows: held-out rows that also stand in the training data.
        lengths: histogram of the usable rows' lengths in tokens; empty without a tokenizer.
    """

    problems: tuple[Problem, ...]
    formats: dict[str, str]
    num_rows: int
    num_usable_rows: int
    num_tokens: int | None
    num_trained_tokens: int | None
    num_duplicates: int
    num_leaked_eval_rows: int
    lengths: tuple[Bin, ...]

    def exit_code(self, *, strict: bool = False) -> int:
        """0; 1 for warnings when `strict`; 2 when there is an error or no usable row."""
        severities = {problem.severity for problem in self.problems}
        if "error" in severities or not self.num_usable_rows:
            return EXIT_INPUT
        return EXIT_FINDING if strict and "warning" in severities else EXIT_DONE

    def to_json(self) -> dict[str, Any]:
        """The report as plain values; origins as `file:line`."""
        values = asdict(self)
        values["problems"] = [
            {
                "kind": problem.kind,
                "severity": problem.severity,
                "message": problem.message,
                "count": problem.count,
                "origins": [str(origin) for origin in problem.origins],
            }
            for problem in self.problems
        ]
        return values

    def render(self) -> str:
        """The report as plain text."""
        return "\n".join([*self._head(), *self._histogram(), *map(render_problem, self.problems)])

    def _head(self) -> list[str]:
        lines = [f"{name}: {schema}" for name, schema in self.formats.items()]
        lines.append(f"{self.num_usable_rows} of {self.num_rows} rows usable")
        if self.num_tokens is not None and self.num_trained_tokens is not None:
            share = self.num_trained_tokens / max(self.num_tokens, 1)
            lines.append(f"{self.num_trained_tokens} of {self.num_tokens} tokens trained ({share:.1%})")
        return lines

    def _histogram(self) -> list[str]:
        if not self.lengths:
            return []
        most = max(item.count for item in self.lengths)
        width = len(str(self.lengths[-1].high))
        lines = ["tokens per row:"]
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


def check(
    sources: Source | Sequence[Source],
    tokenizer: Tokenizer | None = None,
    *,
    eval_sources: Source | Sequence[Source] | None = None,
    format: str = "auto",
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    too_long: TooLong = "truncate_history",
    training_template: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Read all rows and report everything that is wrong with them.

    Args:
        tokenizer: adds the checks on tokens when given.
        eval_sources: held-out rows, checked for reappearing in the training data.

    The other arguments are those of `load_rows` and `tokenize_rows`.

    Raises:
        DataError: a source that cannot be read at all or is empty.
    """
    structural: list[Problem] = []

    def survey(sources: Source | Sequence[Source]) -> RowIndex:
        return index_rows(
            sources,
            format=format,
            on_bad="collect",
            inspect=lambda row: structural.extend(_structure(row, train_on)),
        )

    found = survey(sources)
    held_out = survey(eval_sources) if eval_sources is not None else None
    problems = [*found.problems, *(held_out.problems if held_out else ()), *structural]
    duplicates = _duplicates(found)
    leaked = _leaked(found, held_out) if held_out else []
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
        problems += _token_problems(tokenized, is_error=too_long == "error")
    merged = _merge([*problems, *duplicates, *leaked])
    return _report(found, tokenized, merged, num_duplicates=len(duplicates), num_leaked=len(leaked))


def preview(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    n: int,
    *,
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    too_long: TooLong = "truncate_history",
    training_template: str | None = None,
) -> list[PreviewRow]:
    """The first `n` rows token by token; the other arguments are those of `tokenize_rows`."""
    shown = []
    for row, _ in zip(rows, range(n), strict=False):
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
            shown.append(PreviewRow(row.origin, _pieces(result, tokenizer)))
    return shown


def render_problem(problem: Problem) -> str:
    """One problem as plain text, with the rows concerned."""
    origins = [str(origin) for origin in problem.origins]
    shown = ", ".join(origins[:NUM_SHOWN_ORIGINS])
    more = f" and {len(origins) - NUM_SHOWN_ORIGINS} more" if len(origins) > NUM_SHOWN_ORIGINS else ""
    times = f" ({problem.count} rows)" if problem.count > 1 else ""
    return f"{problem.severity}: {problem.message}{times}" + (f"\n    {shown}{more}" if origins else "")


# ------------------------------------------------------------------------------------------------ structure


def _structure(row: Row, train_on: TrainOn) -> list[Problem]:
    """What is odd about one row, whatever the model."""
    if row.messages is None:
        blank = row.completion is not None and not row.completion.strip()
        return [_warning("empty_answer", "The completion is empty", row)] if blank else []
    roles = [message["role"] for message in row.messages]
    found = []
    if "assistant" not in roles and train_on != "all":
        found.append(
            Problem("no_answer", "error", "The chat has no assistant turn to train on", (row.origin,))
        )
    order = _order_problem(roles)
    if order:
        found.append(_warning("turn_order", order, row))
    return found + [_warning(*kind, row) for kind in _empty_turns(row.messages)]


def _order_problem(roles: Sequence[str]) -> str | None:
    turns = [role for role in roles if role != "system"]
    if "system" in roles[1:]:
        return "A system message does not stand first"
    if turns[:1] == ["assistant"]:
        return "The chat begins with an assistant turn"
    if turns[:1] == ["tool"] or ("user", "tool") in pairwise(turns):
        return "A tool turn does not follow an assistant turn"
    for role in ("user", "assistant"):
        if (role, role) in pairwise(turns):
            return f"Two {role} turns follow each other"
    if "assistant" in turns and turns[-1] != "assistant":
        return f"The chat ends with a {turns[-1]} turn"
    return None


def _empty_turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    blank = {
        message["role"]
        for message in messages
        if not message["content"].strip() and "tool_calls" not in message
    }
    return [
        ("empty_answer" if role == "assistant" else "empty_turn", f"The content of a {role} turn is empty")
        for role in sorted(blank)
    ]


def _warning(kind: str, message: str, row: Row) -> Problem:
    return Problem(kind, "warning", message, (row.origin,))


def _duplicates(survey: RowIndex) -> list[Problem]:
    seen: set[bytes] = set()
    found = []
    for number, key in enumerate(survey.keys):
        if key in seen:
            origins = (survey.origin(number),)
            found.append(Problem("duplicate", "warning", "The row repeats an earlier one", origins))
        seen.add(key)
    return found


def _leaked(train: RowIndex, held_out: RowIndex) -> list[Problem]:
    keys = set(train.keys)
    message = "The held-out row also stands in the training data"
    return [
        Problem("leaked_eval_row", "warning", message, (held_out.origin(number),))
        for number, key in enumerate(held_out.keys)
        if key in keys
    ]


# ------------------------------------------------------------------------------------------------ tokens


def _token_problems(tokenized: TokenizedSet, *, is_error: bool) -> list[Problem]:
    problems = list(tokenized.notes)
    for skip in tokenized.skipped:
        if skip.kind == "no_answer":
            continue  # reported by the structural check
        severity = "error" if skip.kind in MISTAKES or (is_error and skip.kind == "too_long") else "warning"
        message = {
            "too_long": "The row is longer than max_length and is left out",
            "no_trained_token": "None of the row's tokens is trained; it is left out",
        }.get(skip.kind, skip.reason[:1].upper() + skip.reason[1:])
        problems.append(Problem(skip.kind, severity, message, (skip.origin,)))  # type: ignore[arg-type]
    if tokenized.cut:
        message = "The oldest turns are left out so that the row fits into max_length"
        problems.append(Problem("history_cut", "warning", message, tuple(tokenized.cut), len(tokenized.cut)))
    return problems


def _merge(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """One problem for each kind and message, errors first."""
    groups: dict[tuple[str, str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[problem.severity, problem.kind, problem.message].append(problem)
    merged = [
        Problem(
            kind,
            group[0].severity,
            message,
            tuple(origin for problem in group for origin in problem.origins),
            sum(problem.count for problem in group),
        )
        for (_, kind, message), group in groups.items()
    ]
    return tuple(sorted(merged, key=lambda problem: _SEVERITIES.index(problem.severity)))


def _report(
    survey: RowIndex,
    tokenized: TokenizedSet | None,
    problems: tuple[Problem, ...],
    *,
    num_duplicates: int,
    num_leaked: int,
) -> CheckReport:
    unreadable = {
        origin for problem in survey.problems if problem.severity == "error" for origin in problem.origins
    }
    unanswered = {origin for problem in problems if problem.kind == "no_answer" for origin in problem.origins}
    num_usable = sum(origin not in unanswered for origin in survey.all().origins())
    return CheckReport(
        problems=problems,
        formats=survey.formats,
        num_rows=len(survey) + len(unreadable),
        num_usable_rows=len(tokenized.rows) if tokenized else num_usable,
        num_tokens=tokenized.num_tokens if tokenized else None,
        num_trained_tokens=tokenized.num_trained_tokens if tokenized else None,
        num_duplicates=num_duplicates,
        num_leaked_eval_rows=num_leaked,
        lengths=histogram(tokenized.rows.lengths.tolist()) if tokenized else (),
    )


def histogram(lengths: Sequence[int], *, num_bins: int = NUM_BINS) -> tuple[Bin, ...]:
    """Lengths in tokens counted in at most `num_bins` bins of equal width."""
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // num_bins)
    counts = [0] * (-(-(high - low + 1) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    return tuple(
        Bin(low + index * width, low + (index + 1) * width - 1, count) for index, count in enumerate(counts)
    )


# ------------------------------------------------------------------------------------------------ preview


def _pieces(row: TokenizedRow, tokenizer: Tokenizer) -> list[tuple[str, bool, float]]:
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
