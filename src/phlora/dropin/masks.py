"""`assistant_only_loss` for chat templates without generation markers, which TRL refuses: Phi-3's own among them.

Which tokens an answer has is known without markers, from where its text stands in the rendered chat (`data.labels`).
Rows get `input_ids` and `labels` here, and pass through TRL as rows that are prepared already.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import is_conversational, maybe_convert_to_chatml

from phlora.data.messages import messages_of, tools_of
from phlora.data.row_tokenizer import Options, RowTokenizer, Skipped
from phlora.data.rows import BadRow, Message, Origin, Row, sentence
from phlora.data.table import IGNORED
from phlora.dropin.columns import Rows
from phlora.errors import DataError


def lacks_markers(tokenizer: Any) -> bool:
    """Whether TRL has no generation markers for this chat template."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.chat_template:
        return False
    if has_generation_markers(tokenizer.chat_template):
        return False
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        return True
    return False


def with_answers_marked(rows: Rows, tokenizer: Any, *, name: str) -> Rows:
    """Chats with the tokens of their answers as `labels`, and all other tokens -100.

    Raises:
        DataError: rows that are no chats, or have no answer.
    """
    if not is_conversational(maybe_convert_to_chatml(dict(next(iter(rows))))):
        raise DataError(
            "assistant_only_loss trains the answers of chats, and these rows are none",
            where=name,
            expected="`messages`, or `prompt` and `completion` as lists of messages",
        )
    mark: Any = functools.partial(_mark, tokenizer=tokenizer, name=name)
    return rows.map(mark, batched=True, with_indices=True)


def _mark(
    batch: Mapping[str, list[Any]], numbers: list[int], *, tokenizer: Any, name: str
) -> dict[str, list[Any]]:
    columns = list(batch)
    rows = []
    for values, number in zip(zip(*batch.values(), strict=True), numbers, strict=True):
        origin = Origin(name, number + 1)
        try:
            rows.append(_row(dict(zip(columns, values, strict=True)), origin))
        except BadRow as bad:
            raise DataError(sentence(bad.message), where=str(origin), expected=bad.expected) from None
    made: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    # TRL cuts what is too long afterwards, and says so.
    for row, found in zip(
        rows, RowTokenizer(tokenizer, Options("assistant", None, "error", None)).run(rows), strict=True
    ):
        if isinstance(found, Skipped):
            raise DataError(sentence(found.reason), where=str(row.origin), fix="leave the row out")
        ids = list(found.input_ids)
        made["input_ids"].append(ids)
        made["labels"].append(
            [token if trained else IGNORED for token, trained in zip(ids, found.trained, strict=True)]
        )
    return made


def _row(record: Mapping[str, Any], origin: Origin) -> Row:
    """A record as a chat, of whose prompt nothing trains."""
    if record.get("prompt") is not None:
        prompt = [{**message, "train": False} for message in messages_of(record["prompt"], "prompt")]
        messages = [*prompt, *messages_of(record["completion"], "completion")]
    else:
        column = "messages" if record.get("messages") is not None else "conversations"
        messages = messages_of(record[column], column)
    messages = [_trains_answers_alone(message) for message in messages]
    return Row(tuple(messages), None, None, None, tools_of(record.get("tools")), origin)


def _trains_answers_alone(message: Message) -> Message:
    """A turn that says that it is trained is so where it is an answer: `assistant_only_loss` trains no others."""
    is_other = message["role"] != "assistant" and message.get("train")
    return {**message, "train": False} if is_other else message
