"""What a model is asked, as whoever asks has it at hand: questions, chats or plain texts -> token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phlora.data.encoding import Encoder
from phlora.data.messages import messages_of, tools_of
from phlora.data.prompts import encode_chat
from phlora.data.rendering import TemplateRefusal
from phlora.data.rows import BadRow, kind_of, sentence
from phlora.errors import InputError, ModelError
from phlora.models.tokenizer import LoadedTokenizer

_WHERE = "prompts"
_FORMS = "a question, or a list of messages such as {'role': 'user', 'content': ...}"


@dataclass(frozen=True)
class Asked:
    """What was handed over, one by one.

    Attributes:
        items: questions, and chats as lists of messages.
        is_one: whether one was handed over by itself, and no list.
    """

    items: list[Any]
    is_one: bool

    def where(self, number: int) -> str:
        return _WHERE if self.is_one else f"{_WHERE}[{number}]"


def asked(prompts: Any) -> Asked:
    """Tell one question or chat from several of them.

    Raises:
        InputError: it is neither.
    """
    if isinstance(prompts, str):
        return Asked([prompts], True)
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise InputError(
            f"{kind_of(prompts)} was given", where=_WHERE, expected=f"{_FORMS}, or several in a list"
        )
    items = list(prompts)
    if items and all(_is_message(item) for item in items):
        return Asked([items], True)
    return Asked(items, False)


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and ("role" in item or "from" in item)


def texts_as_ids(asked: Asked, tokenizer: LoadedTokenizer) -> list[list[int]]:
    """Plain texts as tokens, as training rows of prompt and completion have them.

    Raises:
        InputError: one is no text, or empty.
    """
    encoder = Encoder(tokenizer.tokenizer)
    found = []
    for number, item in enumerate(asked.items):
        if not isinstance(item, str):
            raise InputError(
                f"{kind_of(item)} was given", where=asked.where(number), expected="with raw=True a text"
            )
        ids = encoder.plain(item)[0]
        if not ids:
            raise InputError("The text is empty", where=asked.where(number), expected="text to continue")
        found.append(ids)
    return found


def chats_as_ids(
    asked: Asked, tokenizer: LoadedTokenizer, *, system: str | None, tools: Any = None
) -> list[list[int]]:
    """Questions and chats as tokens up to the next answer.

    Args:
        system: the system prompt of what has none of its own; None for none.
        tools: descriptions of the tools that may be called.

    Raises:
        InputError: one is neither a question nor a chat that waits for an answer, or the template refuses it.
        ModelError: the model has no chat template.
    """
    require_template(tokenizer, fix="raw=True continues a text as it is")
    offered = _tools(tools)
    found = []
    for number, item in enumerate(asked.items):
        where = asked.where(number)
        messages = _with_system(_messages(item, where), system)
        found.append(chat_as_ids(messages, tokenizer, tools=offered, where=where))
    return found


def chat_as_ids(
    messages: Sequence[dict[str, Any]],
    tokenizer: LoadedTokenizer,
    *,
    tools: list[Any] | None = None,
    where: str = "",
) -> list[int]:
    """A chat as tokens up to the next answer.

    Raises:
        InputError: the chat template refuses it.
    """
    try:
        return encode_chat(messages, tokenizer.tokenizer, tools=tools)
    except TemplateRefusal as refusal:
        raise InputError(f"The model's chat template refuses the chat: {refusal}", where=where) from None


def require_template(tokenizer: LoadedTokenizer, *, fix: str = "") -> None:
    """
    Raises:
        ModelError: the model has no chat template.
    """
    if not tokenizer.tokenizer.chat_template:
        raise ModelError(
            "The model's tokenizer has no chat template",
            expected="a model that was made for chats, such as an -instruct variant",
            fix=fix,
        )


def require_room(
    prompt_ids: Sequence[int], most: int | None, *, whose: str, where: str = "", fix: str
) -> None:
    """
    Raises:
        InputError: the prompt fills the context of the model, so that no answer fits.
    """
    if most is not None and len(prompt_ids) >= most:
        raise InputError(
            f"{whose} has {len(prompt_ids)} tokens, the model holds {most}", where=where, fix=fix
        )


def _messages(item: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(item, str):
        if not item.strip():
            raise InputError("The question is empty", where=where, expected=_FORMS)
        return [{"role": "user", "content": item}]
    if isinstance(item, Mapping) or not isinstance(item, Sequence):
        raise InputError(f"{kind_of(item)} was given", where=where, expected=_FORMS)
    try:
        messages = messages_of(item, "messages")
    except BadRow as bad:
        raise InputError(sentence(bad.message), where=where, expected=bad.expected) from None
    if messages[-1]["role"] not in ("user", "tool"):
        raise InputError(
            f"The last message is of the role {messages[-1]['role']}",
            where=where,
            expected="a chat that ends with what is to be answered",
            fix="leave the answer out",
        )
    return messages


def _with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _tools(tools: Any) -> list[Any] | None:
    try:
        return tools_of(tools)
    except BadRow as bad:
        raise InputError(sentence(bad.message), where="tools", expected=bad.expected) from None
