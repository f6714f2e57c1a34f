"""What is asked of a model: a chat up to its next answer, as tokens, made exactly as training rows are made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phlora.data.chat_template import Tokenizer, chat_template
from phlora.data.encoding import Encoder
from phlora.data.json_text import parse_json
from phlora.data.messages import tools_of
from phlora.data.rendering import TemplateRefusal
from phlora.data.rows import BadRow, Message, Origin, Row, last_assistant, sentence
from phlora.data.tools_text import read_calls, tools_as_text
from phlora.errors import DataError


@dataclass(frozen=True, slots=True)
class PromptItem:
    """A row as a question: everything before its last answer, ready for generation."""

    prompt_ids: list[int]
    reference: str
    messages: tuple[Message, ...] | None
    tools: list[Any] | None
    origin: Origin


def encode_prompt(row: Row, tokenizer: Tokenizer) -> PromptItem | None:
    """The row's prompt as tokens and its last answer as text; None for a row without an answer.

    Raises:
        DataError: the chat template cannot render the prompt.
    """
    if row.completion is not None and row.prompt is not None:
        ids = Encoder(tokenizer).plain(row.prompt)[0]
        return PromptItem(ids, row.completion, None, None, row.origin)
    last = last_assistant(row.messages or ())
    if row.messages is None or last < 1:
        return None
    messages = row.messages[:last]
    try:
        ids = encode_chat(messages, tokenizer, tools=row.tools)
    except TemplateRefusal as refusal:
        raise DataError(sentence(str(refusal)), where=str(row.origin)) from None
    return PromptItem(ids, _reference(row, last, tokenizer), messages, row.tools, row.origin)


def _reference(row: Row, last: int, tokenizer: Tokenizer) -> str:
    """What the model is to answer, as the training row has it."""
    messages = (row.messages or ())[: last + 1]
    if chat_template(tokenizer).writes_tools_as_text(messages, row.tools):
        return str(tools_as_text(messages, row.tools)[-1]["content"])
    answer = messages[last]
    return answer["content"] or json.dumps(answer.get("tool_calls", ""), ensure_ascii=False)


def encode_chat(
    messages: Sequence[Message], tokenizer: Tokenizer, *, tools: list[Any] | None = None
) -> list[int]:
    """The ids that ask for the next assistant turn, made exactly as the training rows are made.

    Raises:
        TemplateRefusal: the chat template cannot render the chat.
    """
    encoder = Encoder(tokenizer)
    rendering = chat_template(tokenizer).render(messages, tools, generation=True)
    return encoder.rendering(rendering, chat_template(tokenizer), generation=True)[1]


def answer_of(text: str, tools: list[Any] | None, tokenizer: Tokenizer) -> Message:
    """What a model has said as a message of the chat, its calls as calls where it was offered tools."""
    if not tools:
        return {"role": "assistant", "content": text}
    content, calls = read_calls(text)
    if calls:
        return {"role": "assistant", "content": content, "tool_calls": calls}
    is_text = chat_template(tokenizer).writes_tools_as_text([{"role": "user", "content": ""}], tools)
    return {"role": "assistant", "content": content if is_text else text}


def read_tools(path: Path) -> list[Any]:
    """The descriptions of tools in a JSON file, as a training row has them in `tools`.

    Raises:
        DataError: it cannot be read, or holds none.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The tools cannot be read: {error}", where=str(path)) from None
    try:
        if isinstance(value, BadRow):
            raise value
        tools = tools_of(value)
    except BadRow as bad:
        raise DataError(sentence(bad.message), where=str(path), expected=bad.expected) from None
    if not tools:
        raise DataError("The file holds no tools", where=str(path), expected="a list of tool descriptions")
    return tools
