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
from typing import Any, Literal

from phlora.config import TooLong, TrainOn
from phlora.data.chat_template import Tokenizer
from phlora.data.dataset import RowIndex, RowSubset, Source, index_rows
from phlora.data.leaks import find_leaks, num_leaks
from phlora.data.rows import Message, Origin, Problem, Row
from phlora.data.split import split_rows
from phlora.data.tokenize import (
    IGNORED,
    MISTAKES,
    Skipped,
    TokenizedRow,
    TokenizedSet,
    tokenize_row,
    tokenize_rows,
)
from phlora.errors import EXIT_DONE, EXIT_FINDING, EXIT_INPUT, DataError

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
        num_conversations: what the split keeps whole; 0 where held-out rows are given or cannot be split off.
        leaks: held-out rows of which training sees too much, by kind.
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
    num_conversations: int
    leaks: dict[str, int]
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
        lines.append(f"{self.num_usable_rows} of {self.num_rows} rows usable" + self._conversations())
        if self.num_tokens is not None and self.num_trained_tokens is not None:
            share = self.num_trained_tokens / max(self.num_tokens, 1)
            lines.append(f"{self.num_trained_tokens} of {self.num_tokens} tokens trained ({share:.1%})")
        return lines

    def _conversations(self) -> str:
        if not self.num_conversations:
            return ""
        return f", in {self.num_conversations} conversations, each of which stays on one side of the split"

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


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How rows are held out: fields of the `data` section, and the seed."""

    eval_size: float | int = 0.1
    seed: int = 42
    group_by: str | None = None
    stratify_by: str | None = None


@dataclass(frozen=True)
class InspectedData:
    """Both sides of the data, and all that is known about them without a tokenizer.

    Attributes:
        index: of the training sources; without held-out sources some of its rows are held out.
        train, held_out: the rows on both sides.
        problems: unmerged, in the order of their discovery.
        num_conversations: what the split keeps whole.
    """

    index: RowIndex
    train: RowSubset
    held_out: RowSubset
    problems: list[Problem]
    num_conversations: int


def inspect_data(
    sources: Source | Sequence[Source],
    eval_sources: Source | Sequence[Source] | None = None,
    *,
    format: str = "auto",
    train_on: TrainOn = "assistant",
    split: SplitSettings | None = None,
    on_bad: Literal["raise", "collect"] = "raise",
) -> InspectedData:
    """Read both sides once, split where that is asked for, and find what is odd: the same for `check` and for training.

    Raises:
        DataError: a source that cannot be read, rows that cannot be used, or (`on_bad="raise"`) a split that cannot
            be made.
    """
    is_asked = split is not None
    split = split or SplitSettings()
    structural: list[Problem] = []

    def read(sources: Source | Sequence[Source], **columns: str | None) -> RowIndex:
        return index_rows(
            sources,
            format=format,
            on_bad=on_bad,
            inspect=lambda row: structural.extend(_structure(row, train_on)),
            **columns,
        )

    found = read(sources, group_by=split.group_by, stratify_by=split.stratify_by)
    train, held_out, num_conversations = found.all(), RowSubset(found, ()), 0
    problems = list(found.problems)
    if eval_sources is not None:
        held_out = read(eval_sources).all()
        problems += held_out.survey.problems
    elif len(found):
        try:
            sides = split_rows(
                found, eval_size=split.eval_size, seed=split.seed, stratify_by=split.stratify_by
            )
        except DataError as error:
            if on_bad == "raise":
                raise
            # A file that is checked may be too small to be split because it is the held-out one.
            if is_asked:
                problems.append(Problem("no_split", "warning", error.found))
        else:
            train, held_out = RowSubset(found, sides.train), RowSubset(found, sides.held_out)
            num_conversations = sides.num_conversations
            problems += [Problem("split", "warning", text) for text in sides.warnings]
            problems += [Problem("split", "note", text) for text in sides.notes]
    problems += [*structural, *_duplicates(found), *find_leaks(train, held_out)]
    return InspectedData(found, train, held_out, problems, num_conversations)


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
    split: SplitSettings | None = None,
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Read all rows and report everything that is wrong with them.

    Args:
        tokenizer: adds the checks on tokens when given.
        eval_sources: held-out rows, checked for reappearing in the training data.
        split: how rows are held out where there are no `eval_sources`.

    The other arguments are those of `load_rows` and `tokenize_rows`.

    Raises:
        DataError: a source that cannot be read at all or is empty.
    """
    data = inspect_data(
        sources, eval_sources, format=format, train_on=train_on, split=split, on_bad="collect"
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
        problems += _token_problems(tokenized, is_error=too_long == "error")
    return _report(data, tokenized, merge_problems(problems))


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


def merge_problems(problems: Iterable[Problem]) -> tuple[Problem, ...]:
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
    data: InspectedData, tokenized: TokenizedSet | None, problems: tuple[Problem, ...]
) -> CheckReport:
    survey = data.index
    unreadable = {
        origin for problem in survey.problems if problem.severity == "error" for origin in problem.origins
    }
    unanswered = {origin for problem in problems if problem.kind == "no_answer" for origin in problem.origins}
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
