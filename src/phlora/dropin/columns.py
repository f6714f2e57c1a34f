"""Which columns of a script's data set are trained: those that the script means, where TRL would take others.

TRL decides by the names of the columns, whatever the script has prepared: a leftover `conversations` hides `text`, and
a leftover `prompt` ends in a KeyError. Roles that the chat template does not know are called as it knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError

from phlora.data.chat_template import ChatTemplate
from phlora.data.messages import ROLES
from phlora.data.rendering import TemplateRefusal
from phlora.data.rows import names_of
from phlora.dropin.tell import warn
from phlora.errors import DataError

Rows: TypeAlias = Dataset | IterableDataset

# What TRL makes rows of, besides the column of texts, and in this order.
CHATS = ("messages", "conversations")
PAIR = ("prompt", "completion")
# What TRL makes of rows while it prepares them, and takes for its own where a row brings it.
_LABELS = ("labels", "completion_mask", "assistant_masks")
LOOKED_AT = 100
# What code raises that meets values of another shape than it was written for: rows where it wants a batch, or labels
# that it wants to make itself. Anything else that a script's own function raises is for its author to see.
OTHERWISE_SHAPED = (TypeError, ValueError, LookupError, AttributeError, AssertionError, TemplateError)
KNOWN_ROLES = frozenset(ROLES.values())


def columns_of(rows: Rows) -> list[str]:
    return list(rows.column_names) if rows.column_names is not None else list(next(iter(rows)))


def as_meant(rows: Rows, *, name: str, text_field: str, is_text_named: bool) -> Rows:
    """The rows without the columns that TRL would take in the place of those that are meant.

    Rows that are tokenised already stay as they are.

    Args:
        name: of the data set, for messages.
        text_field: `dataset_text_field`.
        is_text_named: whether the script has said so, rather than TRL's default.

    Raises:
        DataError: TRL can make nothing of these columns, or a column of labels holds none.
    """
    rows = without_others_tokens(rows, name=name, text_field=text_field)
    there = columns_of(rows)
    if "input_ids" in there:
        return rows
    _require_lists(rows, name, [column for column in CHATS if column in there and column != text_field])
    chats, has_pair = [column for column in CHATS if column in there], set(PAIR) <= set(there)
    if text_field in there and is_text_named:
        kept, others = [text_field], [*chats, *(column for column in PAIR if column in there)]
    elif has_pair:
        kept, others = list(PAIR), chats
    elif chats:
        kept, others = chats[:1], [*chats[1:], *(column for column in PAIR if column in there)]
    elif text_field in there:
        kept, others = [text_field], [column for column in PAIR if column in there]
    else:
        raise _nothing_to_train(rows, name, text_field, there)
    if others:
        warn(f"{name}: {are(kept)} trained, and {are(others)} left out: leftover columns would take over")
        rows = rows.remove_columns(others)
    return rows


def without_others_tokens(rows: Rows, *, name: str, text_field: str) -> Rows:
    """The rows without numbers of a script that are named as TRL names tokens and labels: a class in `labels`.

    Raises:
        DataError: rows that are tokenised already have single values in a column of labels, or in `input_ids`.
    """
    there = columns_of(rows)
    reserved = [column for column in ("input_ids", *_LABELS) if column in there]
    if not reserved:
        return rows
    first: Mapping[str, Any] = next(iter(rows), {})
    single = [column for column in reserved if column in first and not _is_list(first[column])]
    has_text = bool({*CHATS, *PAIR, text_field} & set(there))
    is_tokenised = "input_ids" in reserved and "input_ids" not in single
    if single and (is_tokenised or not has_text):
        column = single[0]
        raise DataError(
            f"`{column}` holds {type(first[column]).__name__}",
            where=name,
            expected="a list of numbers in each row, one for each token",
            fix=f'dataset.remove_columns("{column}"), or dataset.rename_column("{column}", "class")',
        )
    if is_tokenised or not has_text:
        return rows
    warn(
        f"{name}: {are(reserved)} left out: the tokens and labels of these rows are made from their texts, "
        "and such columns would stand for them"
    )
    return rows.remove_columns(reserved)


def _is_list(value: Any) -> bool:
    """Whether it is a list of any kind, a tensor with a dimension too."""
    if isinstance(value, str | bytes | Mapping):
        return False
    try:
        len(value)
    except TypeError:
        return False
    return True


def tell_unused_text(rows: Rows, *, name: str, text_field: str) -> None:
    """A column of texts beside a chat is not trained, as in TRL."""
    there = columns_of(rows)
    trained = [column for column in (*CHATS, *PAIR) if column in there]
    if text_field in there and trained:
        warn(
            f"{name}: {are(trained)} trained, and {text_field} is not used; "
            f'SFTConfig(dataset_text_field="{text_field}") trains that'
        )


def formatted(rows: Rows, format_row: Callable[..., Any], *, text_field: str, name: str) -> Rows:
    """The texts that `formatting_func` makes, and no other column.

    In earlier versions of TRL it was called with a batch, columns of values, and returned a list of texts.

    Raises:
        DataError: it returns neither a text nor such a list.
    """
    first = next(iter(rows))
    everything = columns_of(rows)
    try:
        made: Any = format_row(dict(first))
    except OTHERWISE_SHAPED as error:
        why_not = _why_no_batches(format_row, first)
        if why_not:
            error.add_note(f"Given a batch, as in earlier versions of TRL, formatting_func {why_not}")
            raise
    else:
        if isinstance(made, str):
            return rows.map(lambda row: {text_field: format_row(row)}, remove_columns=everything)
        why_not = _why_no_batches(format_row, first)
        if why_not:
            raise DataError(
                f"formatting_func returned {type(made).__name__}, and given a batch it {why_not}",
                where=name,
                expected="a text for a row, or a list of texts for a batch of rows",
            )
    warn(
        "formatting_func returns lists, as in earlier versions of TRL: it is called with batches, and not with rows"
    )
    return rows.map(lambda batch: {text_field: format_row(batch)}, batched=True, remove_columns=everything)


def with_known_roles(rows: Rows, template: ChatTemplate, *, name: str) -> Rows:
    """Chats in which `human` is a user and `gpt` an assistant, where the chat template leaves such turns out."""
    there = columns_of(rows)
    chats = [column for column in (*CHATS, *PAIR) if column in there]
    renamed: dict[str, str] = {}
    for column in chats:
        for role in _roles(rows, column):
            if role in ROLES and role not in KNOWN_ROLES and not _is_rendered(template, role):
                renamed[role] = ROLES[role]
    if not renamed:
        return rows
    told = ", ".join(f"{role} is {new}" for role, new in sorted(renamed.items()))
    warn(f"{name}: the chat template leaves out turns of roles that it does not know: {told}")
    return rows.map(lambda row: {column: _renamed(row[column], renamed) for column in chats})


def _renamed(turns: Any, renamed: Mapping[str, str]) -> Any:
    if not isinstance(turns, list):
        return turns
    return [
        {key: renamed.get(value, value) if key in ("role", "from") else value for key, value in turn.items()}
        for turn in turns
    ]


def _roles(rows: Rows, column: str) -> set[str]:
    """The roles in a column of chats, of all rows; of the first ones of a stream."""
    if isinstance(rows, IterableDataset):
        turns = [turn for row in islice(iter(rows), LOOKED_AT) for turn in _turns(row[column])]
        return {str(turn.get("role") or turn.get("from")) for turn in turns}
    found: set[str] = set()
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        chunk = table[column].combine_chunks()
        if not (pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)):
            return set()
        turns = pc.list_flatten(chunk)
        if not pa.types.is_struct(turns.type):
            return set()
        for key in ("role", "from"):
            if turns.type.get_field_index(key) >= 0:
                found |= {str(role) for role in pc.unique(pc.struct_field(turns, key)).to_pylist() if role}
    return found


def _turns(value: Any) -> list[Mapping[str, Any]]:
    return [turn for turn in value if isinstance(turn, Mapping)] if isinstance(value, list) else []


def _is_rendered(template: ChatTemplate, role: str) -> bool:
    """Whether a turn of this role has a place in what the template renders."""
    try:
        rendering = template.render([{"role": "user", "content": "x"}, {"role": role, "content": "probed"}])
    except TemplateRefusal:
        return False
    return "probed" in rendering.text


def _why_no_batches(format_row: Callable[..., Any], first: Mapping[str, Any]) -> str:
    """Why it does not make as many texts as a batch has rows, as a sentence's rest; empty where it does."""
    try:
        made = format_row({column: [value, value] for column, value in first.items()})
    except OTHERWISE_SHAPED as error:
        return f"raised {type(error).__name__}: {error}"
    if not isinstance(made, list):
        return f"returned {type(made).__name__}"
    texts = sum(isinstance(text, str) for text in made)
    return "" if texts == len(made) == 2 else f"returned {texts} texts for 2 rows"


def _nothing_to_train(rows: Rows, name: str, text_field: str, there: Sequence[str]) -> DataError:
    return DataError(
        f"Nothing to train in the columns {names_of(there)}",
        where=name,
        expected=f"`messages`, `prompt` and `completion`, or a text in `{text_field}` (dataset_text_field)",
        fix=_advice(rows, there),
    )


def _advice(rows: Rows, there: Sequence[str]) -> str:
    if "prompt" in there:
        answers = [column for column in ("response", "answer", "output", "chosen") if column in there]
        if answers:
            return f'dataset.rename_column("{answers[0]}", "completion")'
    return "rename the column, name it in dataset_text_field, or write texts with formatting_func"


def _require_lists(rows: Rows, name: str, columns: Sequence[str]) -> None:
    """TRL asks the first row what a data set is."""
    first: Mapping[str, Any] = next(iter(rows), {})
    for column in columns:
        turns = first.get(column)
        if isinstance(turns, list) and not turns:
            raise DataError(
                f"The first chat in `{column}` is empty", where=name, fix="leave out chats without turns"
            )
        if isinstance(turns, str):
            raise DataError(
                f"`{column}` holds texts",
                where=name,
                expected="lists of messages",
                fix=f'dataset.map(lambda row: {{"{column}": json.loads(row["{column}"])}}) where they are JSON, '
                f'or SFTConfig(dataset_text_field="{column}")',
            )


def are(columns: Sequence[str]) -> str:
    """Their names with a verb: `prompt and completion are`."""
    return f"{' and '.join(columns)} {'is' if len(columns) == 1 else 'are'}"
