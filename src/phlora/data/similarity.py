"""Digests by which rows are recognised as the same conversation, the same prompt or nearly the same row.

Texts are compared in a loose form: Unicode's compatibility form, case folded (the Turkish dotless i as i), digits
and quotation marks of any script as ASCII has them, Arabic yeh and kaf in one form, no vowel marks, no characters
that are not seen (direction marks, joiners), one space where there is white space, no quotation marks around words
and no punctuation at their ends. So "Paris" and "paris." are near-equal, "-1" and "1" or "2 + 3" and "2 - 3" are not.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from phlora.data.rows import Row, single_spaced

KEY_BYTES = 8
# How many questions tell conversations apart that open with the same words.
NUM_OPENINGS = 3
# An exchange that stands in more rows is small talk, such as thanks: no sign that they are of one chat.
SMALL_TALK_ROWS = 10
_OPENING = "\"'`“‘«„(¿¡"
# What ends a clause in other scripts: commas, semicolons, full stops, question and exclamation marks.
_MARKS = (
    "\u055c\u055d\u055e\u0589\u060c\u061b\u06d4\u0700\u0701\u0702\u0703\u0704\u0705\u0706\u0707\u0708\u0709\u07f8\u07f9\u0965"
    "\u1361\u1362\u1363\u1364\u1365\u1366\u1367\u166e\u1801\u1802\u1803\u1804\u1808\u1809\u1944\u1945\u2e32\u2e34\u2e35\u2e41"
    "\u104a\u104b\u17d4\u17d5\ua4fe\ua4ff\ua60d\ua60e\ua60f\ua6f3\ua6f4\ua6f5\ua6f6\ua6f7\ua8ce\ua8cf\uaa5d\uaa5e\uaa5f"
)
_CLOSING = _MARKS + "\"'`”’»),.:;!?…。、，！？؟।"
# A run of either at the beginning or the end of a word, found by a scan for its first character.
_BEFORE_WORDS = re.compile(rf"[{re.escape(_OPENING)}](?<!\S.)[{re.escape(_OPENING)}]*+", re.DOTALL)
_BEHIND_WORDS = re.compile(
    rf"[{re.escape(_CLOSING)}](?<![{re.escape(_CLOSING)}].)[{re.escape(_CLOSING)}]*+(?!\S)"
)

_ASKS = frozenset(("user", "human", "customer", "question", "q"))
# Who speaks in a chat that is written out.
_SPEAKER = re.compile(
    r"^(user|human|customer|question|q|assistant|bot|ai|gpt|agent|answer|a):", re.IGNORECASE | re.MULTILINE
)


@lru_cache(maxsize=1)
def _one_form() -> tuple[dict[str, str], re.Pattern[str], re.Pattern[str]]:
    """What a folded character is compared as, where it is not itself, and two patterns that find all that may be so.

    One knows the characters of the basic plane, where a class is a table; the other takes all beyond it.
    """
    characters = map(chr, range(128, sys.maxunicode + 1))
    form = {}
    for character in characters:
        category = unicodedata.category(character)
        if category == "Cf":
            form[character] = ""
        elif category == "Nd":
            form[character] = str(unicodedata.digit(character))
    # A dot above stays behind of a folded İ.
    form |= {"\u0131": "i", "\u0307": ""}
    form |= dict.fromkeys("\u2010\u2011\u2212", "-")
    form |= dict.fromkeys(map(chr, range(0xFE00, 0xFE10)), "")  # how an emoji is drawn
    form |= {"\u064a": "\u06cc", "\u0649": "\u06cc", "\u0643": "\u06a9", "\u0640": ""}
    form |= dict.fromkeys(map(chr, range(0x64B, 0x653)), "")
    form |= dict.fromkeys("‘’‚‛ʼ", "'") | dict.fromkeys("“”„‟«»", '"')
    basic = "".join(character for character in form if character <= "\uffff")
    return form, re.compile(f"[{re.escape(basic)}]"), re.compile("[\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class RowKeys:
    """Digests of one row, `KEY_BYTES` each.

    Attributes:
        near: equal for rows that say nearly the same.
        prompt: of all before the last answer.
        openings: of all up to the first, second and third question, one after the other; the last question
            counts for those that are missing. Rows for each turn of one chat, or with other answers to the same
            question, have the same first opening.
        exchanges: of each question with its answer alone, in their order; comparable within one process only.
        head, tail: of the answer that a row begins with before anything is asked, as a window of a chat does, and of
            its last one; 0 where there is none. Comparable as `exchanges` are.
    """

    near: bytes
    prompt: bytes
    openings: bytes
    exchanges: Sequence[int] = ()
    head: int = 0
    tail: int = 0


def row_keys(row: Row) -> RowKeys:
    """The digests of a row."""
    if row.messages is None:
        return _plain_keys(row)
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    roles = [message["role"] for message in row.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant") if "assistant" in roles else -1
    openings: list[bytes] = []
    exchanges: list[int] = []
    prompt, asked = b"", ""
    asks = False
    head = tail = 0
    for number, message in enumerate(row.messages):
        if number == last and asks:
            prompt = digest.digest()
        text = (_loose_again if message["role"] == "system" else loose)(message["content"])
        digest.update(f"{message['role']}\0{text}\0".encode("utf-8", "surrogatepass"))
        if "tool_calls" in message:
            digest.update(json.dumps(message["tool_calls"], sort_keys=True, default=str).encode())
        if message["role"] == "assistant" and text:
            tail = hash(text)
            if asked:
                exchanges.append(hash((asked, text)))
            elif not asks:
                head = head or tail
        elif message["role"] == "user" and text:
            asked = text
            if _SPEAKER.match(message["content"]):
                told = _told(message["content"])
                exchanges.extend(told.exchanges)
                head, asked = head or (0 if asks else told.head), told.asked or text
            asks = True
            if len(openings) < NUM_OPENINGS:
                openings.append(digest.digest())
    near = digest.digest()
    # A chat that asks nothing is told apart by all that it says.
    openings = openings or [near]
    openings += openings[-1:] * (NUM_OPENINGS - len(openings))
    return RowKeys(near, prompt or near, b"".join(openings), exchanges, head, tail)


@dataclass(frozen=True, slots=True)
class _Told:
    """A chat that stands as text in a question: its exchanges, what it begins with, and what it asks last.

    Where it holds exchanges it is out of the middle of a chat, and `head` says so also where no answer comes first.
    """

    exchanges: list[int]
    head: int
    asked: str


def _told(text: str) -> _Told:
    parts = _SPEAKER.split(text)[1:]
    exchanges: list[int] = []
    head, asked = 0, ""
    for speaker, said in zip(parts[::2], map(loose, parts[1::2]), strict=True):
        if speaker.lower() in _ASKS:
            asked = said
        elif asked and said:
            exchanges.append(hash((asked, said)))
            asked = ""
        elif said and not exchanges:
            head = hash(said)
    return _Told(exchanges, head or (hash(text) if exchanges else 0), asked)


def _plain_keys(row: Row) -> RowKeys:
    asked, said = loose(row.prompt or ""), loose(row.completion or row.text or "")
    near = _digest(f"{asked}\0{said}")
    prompt = _digest(f"{asked}\0") if asked else near
    return RowKeys(near, prompt, prompt * NUM_OPENINGS, (hash((asked, said)),) if asked and said else ())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def _folded(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    form, *patterns = _one_form()
    # Few characters of a text have another form; `translate` would look up each of all.
    for character in {found for pattern in patterns for found in pattern.findall(folded)}:
        folded = folded.replace(character, form.get(character, character))
    return folded


def loose(text: str) -> str:
    """A text as it is compared; see the module."""
    folded = text.lower() if text.isascii() else _folded(text)
    bare = _BEHIND_WORDS.sub("", _BEFORE_WORDS.sub("", folded))
    return single_spaced(bare) or folded.strip()


# A system prompt is the same in many rows.
_loose_again = lru_cache(maxsize=256)(loose)
