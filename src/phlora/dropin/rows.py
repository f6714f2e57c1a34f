"""The rows of a script, looked at as they will be trained: after TRL has prepared them, before it cuts or packs them.

What is found is said in the words of `phlora data check`. Rows that would be trained as something else than what they
say are refused: turns that the chat template leaves out, rows of which nothing is left, prompts that train although
masked training was asked for. Everything else is counted and shown, with the first row token by token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray

from phlora.config import TrainOn
from phlora.data.chat_template import ChatTemplate, Tokenizer
from phlora.data.checks import PreviewRow, pieces_of, preview_text
from phlora.data.inspection import oddities
from phlora.data.messages import messages_of, tools_of
from phlora.data.problems import merge_problems, render_problem
from phlora.data.rendering import TemplateRefusal
from phlora.data.rows import BadRow, Origin, Problem, Row, sentence
from phlora.data.table import IGNORED, TokenizedRow
from phlora.data.template_messages import without_loss_keys
from phlora.data.tokenize_notes import NOTES
from phlora.dropin.columns import KNOWN_ROLES, LOOKED_AT, Rows
from phlora.dropin.tell import tell, warn
from phlora.errors import DataError

RowProblems = Literal["refuse", "warn"]
_SHOWN_TOKENS = 300
# What a chat template of TRL's own rendering does with what Phlora would have written otherwise.
_LEFT_OUT = {
    "system_folded": "The chat template leaves out the system message",
    "tools_as_text": "The chat template has no place for tools: tools, calls and results are left out",
}
_FIXES = {
    "swallowed": "write roles that the chat template knows, or train texts: name their column in dataset_text_field",
    "only_control_tokens": "look at the columns that are trained",
    "prompts_trained": "answers alone train with `prompt` and `completion`, or `messages` and assistant_only_loss=True",
    "no_trained_token": "look at labels, masks and max_length",
}


@dataclass(frozen=True)
class Wanted:
    """What was asked for.

    Attributes:
        tokenizer: made the tokens.
        template: rendered the chats; None where there is no chat template.
        is_masked: whether answers alone should train.
        max_length: what is over it is lost; None: nothing is.
        keeps_end: the end of a row is kept, and its beginning lost.
        is_packed: rows become packs; otherwise those without a trained token are left out.
        stop_ids: tokens that end an answer.
        heeds_turns: turns that say that they are not trained are not; TRL itself trains them.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    is_masked: bool
    max_length: int | None
    stop_ids: Collection[int]
    keeps_end: bool = False
    is_packed: bool = False
    heeds_turns: bool = False


@dataclass
class Look:
    """What was seen of a data set.

    Attributes:
        name: of the data set: train, eval, or the key under which it was given.
        num_rows, num_tokens, num_trained_tokens: as far as they were looked at, before anything is cut.
        num_kept: trained tokens that are still there when rows have been cut.
        longest: tokens of the longest row.
        is_whole: whether all rows were looked at; of a stream the first ones are.
        first: the first row.
    """

    name: str
    is_whole: bool = True
    num_rows: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_kept: int = 0
    longest: int = 0
    first: TokenizedRow | None = None
    problems: list[Problem] = field(default_factory=list)

    def render(self) -> str:
        """One line about the rows as they are trained."""
        share = self.num_trained_tokens / max(1, self.num_tokens)
        first = "" if self.is_whole else "the first "
        return (
            f"{self.name}: {first}{self.num_rows:,} rows, {self.num_tokens:,} tokens, "
            f"{self.num_trained_tokens:,} of them trained ({share:.1%})"
        )


def look(rows: Rows, wanted: Wanted, *, name: str) -> Look:
    """Look at rows with `input_ids` and `labels`, and at the chats or texts beside them.

    Raises:
        DataError: `max_length` leaves nothing of what is trained; labels are not as long as their tokens.
    """
    found = Look(name, is_whole=isinstance(rows, Dataset))
    _look_at_tokens(rows, wanted, found)
    _require_kept(found, wanted)
    _look_at_chats(rows, wanted, found)
    found.problems = list(merge_problems(found.problems))
    return found


def show(found: Look, tokenizer: Tokenizer, *, row_problems: RowProblems, with_preview: bool) -> None:
    """Tell what was seen.

    Raises:
        DataError: rows would be trained as something else than what they say, unless `row_problems` is `warn`.
    """
    errors = [problem for problem in found.problems if problem.severity == "error"]
    trains_nothing = found.is_whole and found.num_rows > 0 and found.num_trained_tokens == 0
    if errors and (row_problems == "refuse" or trains_nothing):
        fixes = list(dict.fromkeys(_FIXES[problem.kind] for problem in errors))
        if not trains_nothing:
            fixes.append('or row_problems="warn" to train them all the same')
        raise DataError(
            "The rows would not be trained as what they say:\n" + "\n".join(map(render_problem, errors)),
            where=found.name,
            fix="; ".join(fixes),
        )
    tell(found.render())
    for problem in found.problems:
        (tell if problem.severity == "note" else warn)(f"{found.name}: {render_problem(problem)}")
    if with_preview and found.first is not None:
        tell("The first row as it is trained, trained tokens in ⟦ ⟧:\n" + _preview(found.first, tokenizer))


def _preview(row: TokenizedRow, tokenizer: Tokenizer) -> str:
    pieces = pieces_of(row, tokenizer)
    left_out = len(pieces) - _SHOWN_TOKENS
    if left_out > 0:
        half = _SHOWN_TOKENS // 2
        pieces = [*pieces[:half], (f" … {left_out} more … ", False, 0.0), *pieces[-half:]]
    return preview_text(PreviewRow(row.origin, pieces))


# ------------------------------------------------------------------------------------------------ tokens


def _require_kept(found: Look, wanted: Wanted) -> None:
    """A data set of which nothing trains any more has no loss: 0 at every step, or no rows at all."""
    is_cut = wanted.max_length is not None and found.longest > wanted.max_length
    if not is_cut or not found.num_trained_tokens or found.num_kept:
        return
    first = "" if found.is_whole else "the first "
    ways = [f"a larger max_length (the longest row has {found.longest:,} tokens)"]
    if wanted.is_packed:
        ways.append('packing_strategy="bfd_split", which cuts nothing off')
    elif not wanted.keeps_end:
        ways.append('truncation_mode="keep_end"')
    raise DataError(
        f"max_length ({wanted.max_length}) cuts off every trained token: none of {first}{found.num_rows:,} rows "
        f"keeps one of its {found.num_trained_tokens:,}",
        where=found.name,
        expected="a row of which something trained stands within max_length",
        fix=", or ".join(ways),
    )


def _look_at_tokens(rows: Rows, wanted: Wanted, found: Look) -> None:
    tokenizer = wanted.tokenizer
    control = {token for token, item in tokenizer.added_tokens_decoder.items() if item.special}
    control |= set(tokenizer.all_special_ids)
    whole = num_full = num_empty = num_untrained = 0
    for ids, labels, offsets in _token_batches(rows, found.name):
        if found.first is None and len(offsets) > 1:
            first, end = offsets[:2]
            found.first = TokenizedRow(
                ids[first:end].tolist(), labels[first:end].tolist(), None, Origin(found.name, 1)
            )
        trained = labels != IGNORED
        lengths = np.diff(offsets)
        counts, at = _in_rows(trained, offsets), found.num_rows
        said = _in_rows(~np.isin(ids, list(control)), offsets)
        ends = _in_rows(trained & np.isin(labels, list(wanted.stop_ids)), offsets)

        def report(kind: str, message: str, concerned: NDArray[np.bool_], start: int = at) -> None:
            origins = tuple(Origin(found.name, start + 1 + int(n)) for n in np.flatnonzero(concerned))
            if origins:
                found.problems.append(Problem(kind, "warning", message, origins, len(origins)))

        report("only_control_tokens", "Nothing of the row is left but control tokens", said == 0)
        report("no_trained_token", "None of the row's tokens is trained", counts == 0)
        report(
            "missing_end_token",
            "No token that ends an answer is trained: the model would not learn to stop",
            (ends == 0) & (counts > 0),
        )
        report("doubled_bos", _DOUBLED, _begin_twice(ids, offsets, tokenizer.bos_token_id))
        if wanted.max_length is not None:
            lost = "beginning" if wanted.keeps_end else "end"
            report(
                "too_long",
                f"The row is longer than max_length ({wanted.max_length}): its {lost} is cut off",
                lengths > wanted.max_length,
            )
            begins, ends_at = _kept(offsets, wanted)
            left_out = "trains nothing" if wanted.is_packed else "is left out"
            report(
                "nothing_left",
                f"Nothing that is trained stands within max_length: the row {left_out}",
                (_between(trained, begins, ends_at) == 0) & (counts > 0),
            )
            # The first token of a row is never predicted.
            found.num_kept += int(_between(trained, np.minimum(begins + 1, ends_at), ends_at).sum())
        else:
            found.num_kept += int(trained.sum())
        num_empty += int((said == 0).sum())
        num_untrained += int((counts == 0).sum())
        num_full += int(((counts == lengths) & (lengths > 0)).sum())
        whole += len(lengths)
        found.num_rows += len(lengths)
        found.num_tokens += len(ids)
        found.longest = max(found.longest, int(lengths.max(initial=0)))
        found.num_trained_tokens += int(trained.sum())
    if wanted.is_masked and whole and num_full == whole:
        found.problems.append(Problem("prompts_trained", "error", _PROMPTS_TRAINED))
    # A few empty rows are an oversight; when all are, something else was meant.
    everywhere = {"only_control_tokens": num_empty, "no_trained_token": num_untrained}
    found.problems = [
        Problem(p.kind, "error", p.message, p.origins, p.count)
        if whole and everywhere.get(p.kind) == whole
        else p
        for p in found.problems
    ]


_DOUBLED = "The row begins with the first token twice: the text has one, and the tokenizer adds another"
_PROMPTS_TRAINED = "Answers alone should train, and every token of every row does, prompts too"


def _token_batches(rows: Rows, name: str) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Ids and labels of many rows behind one another, and where each row begins."""
    if isinstance(rows, IterableDataset):
        several = list(islice(iter(rows), LOOKED_AT))
        ids, labels = ([row[column] for row in several] for column in ("input_ids", "labels"))
        _require_pairs(_lengths(ids), _lengths(labels), 0, name)
        yield _flat(ids, labels)
        return
    number = 0
    for table in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=1000):
        ids, labels = (_list_array(table[name]) for name in ("input_ids", "labels"))
        offsets = ids.offsets.to_numpy()
        begin, end = int(offsets[0]), int(offsets[-1])
        others = labels.offsets.to_numpy()
        _require_pairs(np.diff(offsets), np.diff(others), number, name)
        number += len(ids)
        yield (
            ids.values.to_numpy(zero_copy_only=False)[begin:end],
            labels.values.to_numpy(zero_copy_only=False)[int(others[0]) : int(others[-1])],
            offsets - begin,
        )


def _lengths(values: list[Any]) -> NDArray[np.int64]:
    return np.array([len(value) for value in values], np.int64)


def _require_pairs(ids: NDArray[Any], labels: NDArray[Any], number: int, name: str) -> None:
    """Each row has a label for each token."""
    unlike = np.flatnonzero(ids != labels)
    if len(unlike):
        row = int(unlike[0])
        raise DataError(
            f"`labels` has {labels[row]} values for {ids[row]} tokens",
            where=str(Origin(name, number + row + 1)),
            expected="a label for each token of `input_ids`, -100 where it is not trained",
            fix="mend the column, or leave it out: dataset.remove_columns('labels')",
        )


def _list_array(column: Any) -> Any:
    chunk = column.combine_chunks()
    if isinstance(chunk, pa.ChunkedArray):
        chunk = chunk.chunk(0)
    return chunk if pa.types.is_list(chunk.type) else chunk.cast(pa.list_(chunk.type.value_type))


def _flat(ids: list[Any], labels: list[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    flat = [
        np.concatenate([np.asarray(row, np.int64) for row in part] or [np.empty(0, np.int64)])
        for part in (ids, labels)
    ]
    return flat[0], flat[1], offsets


def _in_rows(flags: NDArray[np.bool_], offsets: NDArray[Any]) -> NDArray[np.int64]:
    """How many are set in each row."""
    return _between(flags, offsets[:-1], offsets[1:])


def _between(flags: NDArray[np.bool_], begins: NDArray[Any], ends: NDArray[Any]) -> NDArray[np.int64]:
    sums = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    counted: NDArray[np.int64] = sums[ends] - sums[begins]
    return counted


def _kept(offsets: NDArray[Any], wanted: Wanted) -> tuple[NDArray[Any], NDArray[Any]]:
    """Where what is kept of each row begins and ends."""
    begins, ends, most = offsets[:-1], offsets[1:], wanted.max_length or 0
    if wanted.keeps_end:
        return np.maximum(begins, ends - most), ends
    return begins, np.minimum(ends, begins + most)


def _begin_twice(ids: NDArray[Any], offsets: NDArray[Any], bos: int | None) -> NDArray[np.bool_]:
    twice = np.zeros(len(offsets) - 1, dtype=bool)
    long = np.flatnonzero(np.diff(offsets) >= 2)
    if bos is not None:
        twice[long] = (ids[offsets[long]] == bos) & (ids[offsets[long] + 1] == bos)
    return twice


# ------------------------------------------------------------------------------------------------ chats and texts


def _look_at_chats(rows: Rows, wanted: Wanted, found: Look) -> None:
    columns = [
        name
        for name in ("messages", "prompt", "completion", "tools", "chat_template_kwargs")
        if name in (rows.column_names or list(next(iter(rows))))
    ]
    if not {"messages", "prompt"} & set(columns) or "chat_template_kwargs" in columns:
        return
    several: Any = (
        rows.select_columns(columns) if isinstance(rows, Dataset) else islice(iter(rows), LOOKED_AT)
    )
    train_on: TrainOn = "assistant" if wanted.is_masked else "all"
    for number, record in enumerate(several, 1):
        found.problems += _of_record(record, wanted, train_on, Origin(found.name, number))


def _of_record(record: Mapping[str, Any], wanted: Wanted, train_on: TrainOn, origin: Origin) -> list[Problem]:
    turns = record.get("messages")
    if turns is None:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str):
            return oddities(Row(None, prompt, completion, None, None, origin), train_on)
        turns = [*prompt, *completion]
    if wanted.template is None or not isinstance(turns, list):
        return []
    try:
        messages, tools = messages_of(turns, "messages"), tools_of(record.get("tools"))
    except BadRow as bad:
        return [
            Problem(bad.kind, "warning", sentence(bad.message), (origin,)),
            *_missing(turns, wanted.template, origin),
        ]
    if not wanted.heeds_turns:
        messages = without_loss_keys(messages)
    if any(turn.get("role") not in KNOWN_ROLES for turn in turns):
        return _missing(turns, wanted.template, origin)
    problems = [
        # TRL itself stops for a chat without an answer where answers alone train.
        problem
        for problem in oddities(Row(tuple(messages), None, None, None, tools, origin), train_on)
        if problem.severity != "error"
    ]
    try:
        notes = wanted.template.render(messages, tools).notes
    except TemplateRefusal as refusal:
        return [*problems, Problem("swallowed", "error", sentence(str(refusal)), (origin,))]
    if any(not isinstance(turn.get("content"), str | None) for turn in turns):
        # Parts and objects, which Phlora reads and templates mostly do not.
        problems += _missing(
            [{**turn, "said": message["content"]} for turn, message in zip(turns, messages, strict=False)],
            wanted.template,
            origin,
        )
    for kind in sorted(notes):
        if kind in _LEFT_OUT:
            problems.append(Problem("swallowed", "error", _LEFT_OUT[kind], (origin,)))
        # What is trained of the end is told by the tokens.
        elif kind != "missing_end_token":
            severity, message = NOTES[kind]
            problems.append(Problem(kind, severity, sentence(message), (origin,)))
    return problems


def _missing(turns: list[Any], template: ChatTemplate, origin: Origin) -> list[Problem]:
    """The turns of which nothing stands in what the tokenizer's own template renders."""
    text = str(template.tokenizer.apply_chat_template(turns, chat_template=template.template, tokenize=False))
    return [
        Problem(
            "swallowed", "error", f"The chat template leaves out turn {n} ({turn.get('role')})", (origin,)
        )
        for n, turn in enumerate(turns, 1)
        for said in [turn.get("said", turn.get("content"))]
        if isinstance(said, str) and said.strip() not in text
    ]
