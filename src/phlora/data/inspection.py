"""Both sides of the data and what is odd about them, without a tokenizer: the same for `check` and for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from phlora.config import TrainOn
from phlora.data.dataset import RowIndex, RowSubset, Source, index_rows
from phlora.data.leaks import find_leaks
from phlora.data.rows import Message, Problem, Row, sentence, why_untrained
from phlora.data.split import split_rows
from phlora.errors import DataError


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
    keep_reasoning: bool = False,
    on_bad: Literal["raise", "collect"] = "raise",
    reading: Callable[[int], None] | None = None,
    digests: bool = True,
) -> InspectedData:
    """Read both sides once, split where that is asked for, and find what is odd: the same for `check` and for training.

    Raises:
        DataError: a source that cannot be read, rows that cannot be used, or (`on_bad="raise"`) a split that cannot
            be made.
    """
    is_asked = split is not None
    split = split or SplitSettings()
    structural: list[Problem] = []

    def inspect(row: Row) -> None:
        structural.extend(oddities(row, train_on))
        if reading:
            reading(1)

    def read(sources: Source | Sequence[Source], **columns: str | None) -> RowIndex:
        return index_rows(
            sources,
            format=format,
            on_bad=on_bad,
            inspect=inspect,
            keep_reasoning=keep_reasoning,
            digests=digests,
            train_on=train_on,
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


# ------------------------------------------------------------------------------------------------ structure


def oddities(row: Row, train_on: TrainOn) -> list[Problem]:
    """What is odd about one row, whatever the model."""
    untrained = why_untrained(row, train_on)
    if untrained is not None:
        return [Problem("weight_zero", "note", f"{sentence(untrained)}: it is left out", (row.origin,))]
    if row.messages is None:
        blank = row.completion is not None and not row.completion.strip()
        return [_warning("empty_answer", "The completion is empty", row)] if blank else []
    roles = tuple([message["role"] for message in row.messages])
    found = []
    if "assistant" not in roles and train_on != "all":
        found.append(
            Problem("no_answer", "error", "The chat has no assistant turn to train on", (row.origin,))
        )
    order = _order_problem(roles)
    if order:
        found.append(_warning("turn_order", order, row))
    return found + [_warning(*kind, row) for kind in _empty_turns(row.messages)]


# Few orders make up nearly all chats.
@lru_cache(maxsize=1024)
def _order_problem(roles: tuple[str, ...]) -> str | None:
    turns = tuple(role for role in roles if role != "system")
    if "system" in roles[1:]:
        return "A system message does not stand first"
    if turns[:1] == ("assistant",):
        return "The chat begins with an assistant turn"
    if turns[:1] == ("tool",) or ("user", "tool") in pairwise(turns):
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
        # No text that begins with a letter is blank, and most are not copied to find that out.
        if not message["content"][:1].isalnum()
        and not message["content"].strip()
        and "tool_calls" not in message
    }
    if not blank:
        return []
    return [
        ("empty_answer" if role == "assistant" else "empty_turn", f"The content of {_A[role]} turn is empty")
        for role in sorted(blank)
    ]


_A = {"assistant": "an assistant", "user": "a user", "system": "a system", "tool": "a tool"}


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
