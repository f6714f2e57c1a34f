"""A Modelfile for Ollama: the model, its template in Go's language, where replies end, the system prompt.

Ollama reads no Jinja. The template is found out: what the chat template writes around a message of each role is read
off renderings, put together in Go, and taken only if it renders other chats to the same text. Where that fails, the
Modelfile has no TEMPLATE, and Ollama chooses one of its own by the template in the GGUF file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phlora.data.rendering import TEMPLATE_ERRORS
from phlora.errors import ModelError, shown
from phlora.models.tokenizer import LoadedTokenizer

_S, _U, _A = "phlora-system-text", "phlora-user-text", "phlora-answer-text"
_ROLES = ("system", "user", "assistant")
_CHATS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """What stands around the text of each role, before a chat without a system prompt, and before an answer."""

    around: Mapping[str, tuple[str, str]]
    header: str
    answer: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        begin = "" if messages[0]["role"] == "system" else self.header
        body = "".join(
            "{}{}{}".format(self.around[m["role"]][0], m["content"], self.around[m["role"]][1])
            for m in messages
        )
        return begin + body + self.answer


def modelfile(
    file: str, loaded: LoadedTokenizer, *, system: str | None, context: int
) -> tuple[str, tuple[str, ...]]:
    """The text of a Modelfile, and what the user should hear about it.

    Raises:
        ModelError: a name, a stop token or the system prompt cannot be told from the lines of a Modelfile.
    """
    lines = [f"FROM ./{_of_one_line(file, where='the name of the file')}"]
    notes: tuple[str, ...] = ()
    pieces = _pieces(loaded)
    if pieces is None or not _holds(_in_go(pieces)):
        notes = (
            "The chat template has no equal in Go, so Ollama chooses one by the template in the GGUF file",
        )
    else:
        lines.append(f"TEMPLATE {_quoted(_in_go(pieces))}")
    if system:
        if not _holds(system):
            raise ModelError(
                'A line of it ends with """, which ends a text in a Modelfile',
                where="the system prompt",
                expected="other quotes at the end of a line",
                fix="take --for gguf, and give the system prompt with each chat",
            )
        lines.append(f"SYSTEM {_quoted(system)}")
    lines += [
        f'PARAMETER stop "{_of_one_line(token, where="a stop token")}"'
        for token in loaded.tokenizer.convert_ids_to_tokens(list(loaded.stop_token_ids))
    ]
    lines += [f"PARAMETER num_ctx {context}", "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n", notes


def _holds(text: str) -> bool:
    """Whether a quoted text goes on to its end: Ollama ends it at the first line that ends with the quotes."""
    first, *rest = re.split(r"[\r\n]", text)
    if not rest:
        return True
    # The three that begin the text do not end it.
    ends = len(f'"""{first}'.rstrip()) >= 6 and f'"""{first}'.rstrip().endswith('"""')
    return not ends and not any(line.rstrip().endswith('"""') for line in rest[:-1])


def _of_one_line(text: str, *, where: str) -> str:
    if any(not letter.isprintable() for letter in text):
        raise ModelError(f"A Modelfile cannot hold {shown(repr(text))}", where=where, expected="one line")
    return text


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def _in_go(pieces: _Pieces) -> str:
    header = (
        f'{{{{ if ne (index .Messages 0).Role "system" }}}}{pieces.header}{{{{ end }}}}'
        if pieces.header
        else ""
    )
    cases = [
        f'{{{{ {"if" if place == 0 else "else if"} eq .Role "{role}" }}}}'
        f"{pieces.around[role][0]}{{{{ .Content }}}}{pieces.around[role][1]}"
        for place, role in enumerate(_ROLES)
    ]
    return f"{header}{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{pieces.answer}"


def _pieces(loaded: LoadedTokenizer) -> _Pieces | None:
    """None where the template is no sequence of such pieces."""
    tokenizer: Any = loaded.tokenizer
    markers = {str(token) for token in tokenizer.added_tokens_decoder.values()}

    def rendered(messages: Sequence[Mapping[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    def split(between: str) -> tuple[str, str]:
        """The end of one message and the beginning of the next, which is at its last marker."""
        place = max((between.rfind(marker) for marker in markers if marker in between), default=len(between))
        return between[:place], between[place:]

    try:
        text = rendered(_chat(("system", "user", "assistant", "user")))
        bare = rendered(_chat(("user",)))
        start, after_s = text.split(_S, 1)
        between_su, after_u = after_s.split(_U, 1)
        between_ua, after_a = after_u.split(_A, 1)
        between_au, last = after_a.split(_U, 1)
    except TEMPLATE_ERRORS:
        return None
    except ValueError:  # a text that was to be shown is not there
        return None
    system_end, user_begin = split(between_su)
    user_end, answer_begin = split(between_ua)
    answer_end, _ = split(between_au)
    last_end, answer = split(last)
    before = bare.partition(_U)[0]
    if not before.endswith(user_begin) or last_end != user_end:
        return None
    pieces = _Pieces(
        around={
            "system": (start, system_end),
            "user": (user_begin, user_end),
            "assistant": (answer_begin, answer_end),
        },
        header=before.removesuffix(user_begin),
        answer=answer,
    )
    written = (pieces.header, pieces.answer, *(text for around in pieces.around.values() for text in around))
    if any("{{" in text or "}}" in text for text in written):
        # Go would take it for an action.
        return None
    same = all(pieces.render(_chat(roles)) == rendered(_chat(roles)) for roles in _CHATS)
    return pieces if same else None


def _chat(roles: Sequence[str]) -> list[dict[str, str]]:
    texts = {"system": _S, "user": _U, "assistant": _A}
    return [{"role": role, "content": texts[role]} for role in roles]
