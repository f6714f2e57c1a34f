"""Chats out of exports that leave a choice to the user: message logs of several people, and trees of answers.

A log (WhatsApp, Telegram, Slack) becomes chats once it is known whose messages are the assistant's: messages of one
side that follow each other are one turn, and a pause begins a new chat. Of a tree (OpenAssistant) every path through
the best answers is a chat.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from phlora.data.dialects import OASST_ROWS, OASST_TREE, SLACK, TELEGRAM, WHATSAPP, Export, foreign_export
from phlora.data.rows import BadRow, Message, Record
from phlora.errors import DataError, did_you_mean

DEFAULT_GAP_HOURS = 8.0
# Direction marks stand anywhere in dates of scripts from right to left; `\d` is a digit of any script.
_M = "[\u200e\u200f\u202a-\u202e\u2066-\u2069]*"
_AFTERNOON = ("p", "م", "ب", "下午", "中午", "晚上", "午後", "오후")
_HALF_BEFORE = "上午|凌晨|早上|中午|下午|晚上|午前|午後|오전|오후"
_HALF_BEHIND = r"[AaPp]\.?\s?[Mm]\.?|[صم](?!\w)|[قب]\.?ظ\.?"
_LINE = re.compile(
    rf"^{_M}\[?{_M}(?P<date>\d{{1,4}}{_M}[./-]\s?{_M}\d{{1,2}}{_M}[./-]\s?{_M}\d{{1,4}}){_M}\.?[,،，]?{_M}\s+"
    rf"{_M}(?P<before>{_HALF_BEFORE})?\s?{_M}(?P<time>\d{{1,2}}[:.٫]\d{{2}}(?:[:.٫]\d{{2}})?){_M}\s*"
    rf"(?P<behind>{_HALF_BEHIND})?{_M}\]?(?:\s+[-–])?\s+(?P<rest>.*)$"
)
_MARKS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u202f"
_ATTACHMENT = re.compile(r"^<[^<>]*>$|<attached: [^>]*>")

_PLACEHOLDER = re.compile(
    r"(null|.{0,40}(omitted|weggelassen|ausgeschlossen|omitid[oa]|omesso|omis(e)?)|"
    r"(this message was|you) deleted( this message)?|diese nachricht wurde gelöscht|du hast diese nachricht gelöscht|"
    r"missed (voice|video) call|verpasster (sprach|video)anruf)\.?$",
    re.IGNORECASE,
)
_EDITED = re.compile(r"\s*[\u200e\u200f]?<[^<>]*(edited|bearbeitet|editad|modifi)[^<>]*>$", re.IGNORECASE)
_SLACK_LINK = re.compile(r"<([^<>|]*)(?:\|([^<>]*))?>")


@dataclass(frozen=True)
class Said:
    """One message of a log."""

    line: int
    speaker: str
    seconds: float
    text: str  # empty: something that is no text, such as a picture
    is_forwarded: bool = False  # somebody else's words
    chat: str = ""  # which of several chats or threads of the file


@dataclass(frozen=True)
class Chat:
    """A chat and the line that it begins in."""

    line: int
    messages: list[Message]


def export_of(records: Sequence[Record]) -> Export | None:
    """What export the first records come from, if from one."""
    lines = [
        record["text"] for _, record in records if isinstance(record, Mapping) and set(record) == {"text"}
    ]
    if lines and len(lines) == len(records):
        stamped = sum(bool(_LINE.match(line)) for line in lines if isinstance(line, str))
        return WHATSAPP if stamped >= max(2, len(lines) / 4) else None
    return next((export for _, record in records if (export := foreign_export(record))), None)


def chats_of(
    export: Export,
    records: Iterable[Record],
    *,
    assistant: str | None,
    where: str,
    gap_hours: float = DEFAULT_GAP_HOURS,
    names: Mapping[str, str] | None = None,
) -> Iterator[Chat]:
    """The chats in an export.

    Args:
        assistant: the name or number of the one whose messages are learned; needed for logs.
        where: the file, for errors.
        gap_hours: a pause of more hours begins a new chat.
        names: of people by their ids, where another file has them.

    Raises:
        DataError: nobody of this name wrote anything, or none was given.
    """
    if export in (OASST_TREE, OASST_ROWS):
        try:
            yield from _oasst_trees(records) if export is OASST_TREE else _oasst_rows(records)
        except BadRow as bad:
            raise DataError(
                f"The export cannot be read: {bad.message}", where=where, expected=bad.expected
            ) from None
        return
    read = {TELEGRAM: _telegram, SLACK: _slack, WHATSAPP: _whatsapp}[export]
    chats: dict[str, list[Said]] = defaultdict(list)
    names = names or {}
    for message in read(records):
        named = replace(message, speaker=names.get(message.speaker, message.speaker)) if names else message
        chats[named.chat].append(named)
    speakers = sorted({m.speaker for said in chats.values() for m in said if m.text.strip()})
    if assistant is None or assistant not in speakers:
        raise DataError(
            f"Nobody here is called `{assistant}`" if assistant else f"This is {export.kind}",
            where=where,
            expected=f"one of those who wrote: {', '.join(speakers[:12])}",
            fix=did_you_mean(assistant, speakers) if assistant else "add --assistant NAME",
        )
    for said in chats.values():
        yield from _chats_in(said, assistant, gap_hours * 3600)


def _chats_in(said: Iterable[Said], assistant: str, gap_seconds: float) -> Iterator[Chat]:
    """Cut a log where it pauses; chats without a question before the answer are left out.

    A picture that was sent to the assistant ends a chat: what is said about it cannot be learned from text.
    """
    chat: list[Message] = []
    line, last = 0, 0.0
    for message in said:
        is_asked = message.speaker != assistant
        if message.is_forwarded and not is_asked:
            continue  # not the assistant's own words
        is_picture = not message.text.strip()
        if chat and (is_asked if is_picture else abs(message.seconds - last) > gap_seconds):
            yield from _whole(line, chat)
            chat = []
        if is_picture:
            continue
        last = message.seconds
        role = "user" if is_asked else "assistant"
        if not chat and role == "assistant":
            continue
        if chat and chat[-1]["role"] == role:
            chat[-1]["content"] += f"\n{message.text}"
            continue
        line = message.line if not chat else line
        chat.append({"role": role, "content": message.text})
    yield from _whole(line, chat)


def _whole(line: int, chat: list[Message]) -> Iterator[Chat]:
    """A chat up to its last answer."""
    end = len(chat) - 1 if chat and chat[-1]["role"] == "user" else len(chat)
    if end > 1:
        yield Chat(line, chat[:end])


# ------------------------------------------------------------------------------------------------ logs


def _whatsapp(records: Iterable[Record]) -> Iterator[Said]:
    """Lines with date, time and name; others go on with the message before them."""
    current: Said | None = None
    day_first = True
    stamped: list[tuple[int, re.Match[str] | None, str]] = []
    for line, record in records:
        text = str(record.get("text", "")) if isinstance(record, Mapping) else ""
        found = _LINE.match(text)
        stamped.append((line, found, text))
        if found:
            first, second, *_ = map(int, re.findall(r"\d+", found["date"]))
            day_first = day_first and not (second > 12 >= first)
    for line, found, text in stamped:
        if not found:
            if current:
                current = Said(current.line, current.speaker, current.seconds, f"{current.text}\n{text}")
            continue
        if current:
            yield current
        name, colon, said = found["rest"].partition(": ")
        # WhatsApp's own words begin with a mark on iOS; on Android they are known ones.
        is_placeholder = said.startswith("\u200e") or bool(_PLACEHOLDER.match(said.strip(_MARKS + " ")))
        said = said.strip(_MARKS + " ")
        is_placeholder = is_placeholder or bool(_ATTACHMENT.search(said) and not _EDITED.search(said))
        # Without a name it is a notice of WhatsApp's own; in angle brackets, a file that was left out.
        current = None
        if colon and '"' not in name and "“" not in name:
            said = "" if is_placeholder else _EDITED.sub("", said)
            current = Said(line, name.strip(_MARKS + " ~"), _seconds(found, day_first), said)
    if current:
        yield current


def _seconds(found: re.Match[str], day_first: bool) -> float:
    numbers = [int(number) for number in re.findall(r"\d+", found["date"])]
    if numbers[0] > 31:
        year, month, day = numbers
    else:
        first, second, year = numbers
        day, month = (first, second) if day_first else (second, first)
    hour, minute = (int(part) for part in re.findall(r"\d+", found["time"])[:2])
    half = (found["before"] or found["behind"] or "").lower()
    hour = hour % 12 + (12 if half.startswith(_AFTERNOON) else 0) if half else hour
    if 1300 <= year < 1600:
        return _iranian_seconds(year, month, day, hour, minute)
    year -= 543 if year > 2400 else 0  # of the Buddhist era
    try:
        moment = datetime(year + 2000 if year < 100 else year, month, day, hour, minute, tzinfo=UTC)
    except ValueError:
        return 0.0
    return moment.timestamp()


def _iranian_seconds(year: int, month: int, day: int, hour: int, minute: int) -> float:
    """Seconds of the Iranian calendar, of which only differences count: six months of 31 days, then of 30."""
    cycles, rest = divmod(year + 1595, 33)  # of 33 years, 8 of them of 366 days
    days = 365 * year + 8 * cycles + (rest + 3) // 4 + 30 * (month - 1) + min(month - 1, 6) + day
    return float(((days * 24 + hour) * 60 + minute) * 60)


def _telegram(records: Iterable[Record]) -> Iterator[Said]:
    """Telegram's result.json: one chat, all chats, or messages a row each."""
    for line, record in records:
        if not isinstance(record, Mapping):
            continue
        everything = record.get("chats")
        chats = everything.get("list") if isinstance(everything, Mapping) else [record]
        several = isinstance(everything, Mapping)
        for number, chat in enumerate(chats if isinstance(chats, list) else ()):
            messages = chat.get("messages") if isinstance(chat, Mapping) else None
            for message in messages if isinstance(messages, list) else [chat]:
                if isinstance(message, Mapping) and message.get("type", "message") == "message":
                    speaker = message.get("from") or message.get("from_id") or "?"
                    seconds = _number(message.get("date_unixtime"))
                    yield Said(
                        line,
                        str(speaker),
                        seconds,
                        _telegram_text(message.get("text")),
                        chat=str(number) if several else "",
                        is_forwarded=bool(message.get("forwarded_from")),
                    )


def _telegram_text(value: Any) -> str:
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def _slack(records: Iterable[Record]) -> Iterator[Said]:
    for line, record in records:
        if isinstance(record, Mapping) and isinstance(record.get("text"), str) and "subtype" not in record:
            profile = record.get("user_profile")
            name = profile.get("real_name") if isinstance(profile, Mapping) else None
            speaker = str(name or record.get("user") or record.get("bot_id") or "?")
            thread = str(record.get("thread_ts") or "")
            yield Said(line, speaker, _number(record.get("ts")), _slack_text(record["text"]), chat=thread)


def _slack_text(text: str) -> str:
    """What Slack shows: names of links, and the characters that it escapes."""
    shown = _SLACK_LINK.sub(lambda found: found[2] or found[1], text)
    return shown.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0


def slack_names(records: Iterable[Record]) -> dict[str, str]:
    """The names by ids in Slack's `users.json`; none where the records are no such list."""
    names = {}
    for _, record in records:
        if not (isinstance(record, Mapping) and isinstance(record.get("id"), str) and "profile" in record):
            return {}
        profile = record["profile"] if isinstance(record["profile"], Mapping) else {}
        name = profile.get("real_name") or record.get("real_name") or record.get("name")
        names[record["id"]] = str(name or record["id"])
    return names


# ------------------------------------------------------------------------------------------------ trees


def _oasst_trees(records: Iterable[Record]) -> Iterator[Chat]:
    for line, record in records:
        if isinstance(record, Mapping) and isinstance(record.get("prompt"), Mapping):
            yield from _paths(line, record["prompt"])


def _paths(line: int, root: Any) -> Iterator[Chat]:
    """For each question of the tree the best answer, and what came of it."""
    stack: list[tuple[Any, list[Message]]] = [(root, [])]
    while stack:
        node, before = stack.pop()
        text, role = _oasst_message(node)
        chat = [*before, {"role": role, "content": text}]
        replies = [reply for reply in node.get("replies") or [] if isinstance(reply, Mapping)]
        replies = [reply for reply in replies if not reply.get("deleted")]
        if role == "user":
            replies = sorted(replies, key=_rank)[:1]
        if replies:
            stack += [(reply, chat) for reply in reversed(replies)]
        yield from _whole(line, chat) if _ends(role, replies) else ()


def _ends(role: str, replies: list[Any]) -> bool:
    """Whether a path ends here; a question without an answer ends with the answer before it."""
    return not replies and role == "assistant" or (role == "user" and not replies)


def _oasst_message(node: Any) -> tuple[str, str]:
    role = {"prompter": "user", "assistant": "assistant"}.get(str(node.get("role")))
    if role is None or not isinstance(node.get("text"), str):
        raise BadRow(
            "wrong_type", "a message of the tree has no text or no known role", "prompter or assistant"
        )
    return node["text"], role


def _rank(node: Mapping[str, Any]) -> float:
    rank = node.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")


def _oasst_rows(records: Iterable[Record]) -> Iterator[Chat]:
    """Messages that name their parents, put together to trees."""
    nodes: dict[str, dict[str, Any]] = {}
    children: dict[Any, list[str]] = defaultdict(list)
    lines: dict[str, int] = {}
    for line, record in records:
        if isinstance(record, Mapping) and isinstance(record.get("message_id"), str):
            name = record["message_id"]
            nodes[name], lines[name] = {**record}, line
            children[record.get("parent_id")].append(name)
    for name, node in nodes.items():
        node["replies"] = [nodes[child] for child in children.get(name, []) if child != name]
    for name in children[None]:
        yield from _paths(lines[name], nodes[name])
