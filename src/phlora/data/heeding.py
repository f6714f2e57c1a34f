"""Reads rows by the table of `known_keys`: what is known is used, converted, told or refused.

A key that says what may be trained is never dropped in silence. Empty values (null, an empty text or list) say nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from phlora.data.contexts import context_of
from phlora.data.json_text import parse_json
from phlora.data.known_keys import (
    ANSWERS_TO_TEXT,
    COLUMNS,
    CONTEXTS,
    EXCLUDED,
    IS_HELD_OUT,
    KEEPING_OUT,
    LABELS,
    MEDIA,
    MESSAGE_KEYS,
    NOT_ACCEPTED,
    QUIET,
    RATINGS,
    ROW_WEIGHTS,
    SPLITS,
    STATUSES,
    SYSTEMS,
    THOUGHTS,
    TRAINED,
    UNTRAINED,
    WEIGHTS,
    Treatment,
)
from phlora.data.messages import pair_of, same_tools
from phlora.data.preferences import kto_mark
from phlora.data.problems import Noted
from phlora.data.rows import BadRow, Origin, Problem, Severity, kind_of
from phlora.data.spelling import is_empty, with_known_message_keys
from phlora.data.split_names import is_held_out

_COLUMN = {name: known for known in COLUMNS for name in known.names}
_MESSAGE_KEY = {name: known for known in MESSAGE_KEYS for name in known.names}
# Keys that need no look.
_PLAIN = frozenset(
    ("role", "content", "from", "value", "tool_calls", "function_call", "name", "tool_call_id")
)
_PLAIN |= {*THOUGHTS, "id"}
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_SPEAKER = frozenset(("role", "from"))
_CHATS = (
    *("messages", "conversations", "conversation", "prompt", "completion", "chosen", "chat", "turns"),
    *("dialog", "dialogue", "contents"),
)
_CONTEXTS = frozenset(CONTEXTS)
_ALSO_CALLED = {**dict.fromkeys(SYSTEMS, "system"), "functions": "tools"}


@dataclass
class Findings:
    """What rows of one source said that is not done, by kind and message."""

    found: dict[tuple[str, Severity, str], Noted] = field(default_factory=dict)
    unknown_keys: set[str] = field(default_factory=set)

    def add(self, kind: str, severity: Severity, message: str, origin: Origin) -> None:
        self.found.setdefault((kind, severity, message), Noted()).add(origin)

    def problems(self, file: Origin) -> Iterator[Problem]:
        """All of it; what is said of a whole file stands at `file`."""
        for (kind, severity, message), noted in self.found.items():
            yield Problem(kind, severity, message, tuple(noted.origins), noted.count)
        if self.unknown_keys:
            keys = ", ".join(f"`{key}`" for key in sorted(self.unknown_keys)[:12])
            message = f"Messages have keys that nothing but a chat template could read: {keys}"
            yield Problem("unknown_message_keys", "note", message, (file,))


class Heeded(NamedTuple):
    """A record whose known keys are in Phlora's own terms.

    Attributes:
        record: without what was converted.
        weight: of the row's trained tokens.
        known: columns that are spoken for, so that nobody calls them ignored.
        untrained_by: the column that made the weight 0.
    """

    record: Mapping[str, Any]
    weight: float = 1.0
    known: AbstractSet[str] = frozenset()
    untrained_by: str = ""


def heed(record: Mapping[str, Any], schema: str, findings: Findings, origin: Origin) -> Heeded:
    """Do with a record's known keys what the table says.

    Args:
        schema: the name of the file's schema.

    Raises:
        BadRow: a key that forbids training the row as it stands, or whose value cannot be understood.
    """
    known: set[str] = set()
    weight, untrained_by = 1.0, ""
    changed: dict[str, Any] | None = None
    noticed, choices = _looked_at(tuple(record))
    for name in noticed:
        value = record[name]
        if isinstance(value, str) and name in ("messages", "conversations"):
            value = _parsed(value)
        if isinstance(value, list) and name in _CHATS:
            turns = _turns(value, findings, origin)
            if turns is not None:
                changed = {**(changed or record), name: turns}
            continue
        if is_empty(value):
            known.add(name)
            continue
        before = weight
        if name in ROW_WEIGHTS and not isinstance(value, bool):
            weight *= _weight(value, f"`{name}`")
        elif name in TRAINED:
            weight *= _flag(value, f"`{name}`")
        elif name in UNTRAINED:
            weight *= not _flag(value, f"`{name}`")
        elif name in EXCLUDED and (excluded := _as_flag(value)) is not None:
            weight *= not excluded
        elif name in _ALSO_CALLED:
            changed = _under_one_name(name, changed or record, record)
        elif not _say(name, value, schema, record, findings, origin):
            continue
        known.add(name)
        if before and not weight:
            untrained_by = name
    if choices:
        known |= _choices(choices, schema, findings, origin)
    heeded: Mapping[str, Any] = changed or record
    if schema in ("qa", "alpaca"):
        heeded = _with_context(heeded, schema, known) or heeded
    return Heeded(heeded, weight, known, untrained_by)


def _under_one_name(name: str, record: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a column under the name that Phlora has for it.

    Raises:
        BadRow: another column of the same meaning says something else.
    """
    wanted = _ALSO_CALLED[name]
    rest = {key: value for key, value in record.items() if key != name}
    mine, there = record[name], record.get(wanted)
    if is_empty(there):
        return {**rest, wanted: mine}
    if mine != there and not (wanted == "tools" and same_tools(mine, there)):
        other = (
            wanted
            if not is_empty(original.get(wanted))
            else next(key for key in original if _ALSO_CALLED.get(key) == wanted and key != name)
        )
        raise BadRow("two_columns", f"the row has `{other}` and `{name}`, which differ", "one of them")
    return rest


@lru_cache(maxsize=1024)
def _looked_at(names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns that need a look at their values, and those that hold one choice each."""
    return _noticed(names), _choice_columns(names)


def _noticed(names: tuple[str, ...]) -> tuple[str, ...]:
    asked = {*MEDIA, *LABELS, *ROW_WEIGHTS, *_CHATS, *TRAINED, *UNTRAINED, *EXCLUDED, *_ALSO_CALLED}
    asked |= (_names_of("warned") | _names_of("refused")) - QUIET
    return tuple(name for name in names if name in asked)


_CHOICE = re.compile(r"(option|choice|opt|op|ending)[ _]?([a-h]|\d)", re.IGNORECASE)


def _choice_columns(names: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that hold one choice each."""
    lettered = tuple(name for name in names if len(str(name)) == 1 and str(name) in "abcdefghABCDEFGH")
    if len(lettered) > 2 and not {"q", "Q"}.intersection(names):
        return lettered
    found = tuple(name for name in names if _CHOICE.fullmatch(str(name)))
    return found if len(found) > 1 else ()


def _choices(found: tuple[str, ...], schema: str, findings: Findings, origin: Origin) -> set[str]:
    """Warn of choices in columns of their own; which they are."""
    if schema in ("preference_chosen", "classification"):
        return set()
    known = _COLUMN["choices"]
    named = ", ".join(f"`{name}`" for name in found)
    findings.add("unused_column", "warning", f"{named} are not used: {known.what}; {known.fix}", origin)
    return set(found)


def _names_of(treatment: Treatment) -> set[str]:
    return {name for known in COLUMNS if known.treatment == treatment for name in known.names}


def _parsed(text: str) -> Any:
    """A list that a table holds as JSON; what is wrong with it is said where it is read."""
    found = parse_json(text) if text.lstrip().startswith("[") else text
    return text if isinstance(found, BadRow) else found


def _say(
    name: str, value: Any, schema: str, record: Mapping[str, Any], findings: Findings, origin: Origin
) -> bool:
    """Refuse a column, or warn of it; False where it means nothing in this schema."""
    known = _COLUMN.get(name)
    if known is None or known.treatment == "used":
        return False
    if schema in ("preference_chosen", "classification"):
        return False  # what was asked for reads them itself
    if name in KEEPING_OUT:
        if not _keeps_out(name, value):
            return True
        findings.add(
            "held_out_split",
            "warning",
            f"The row says `{name}: {value}`, and is trained on all the same; {known.fix}",
            origin,
        )
        return True
    if name in LABELS:
        is_kto = name == "label" and schema != "text" and kto_mark(record) is not None
        if schema != "text" and not is_kto:
            findings.add("unused_column", "warning", f"`{name}` is not used", origin)
            return True
        if is_kto:
            raise BadRow("preference", "`label` marks answers as good or bad (KTO)", known.fix)
        raise BadRow(
            "labels",
            f"the row is a text with a label (`{name}`), and training on the text would drop it",
            "`--format classification` to answer with the label, or `text` alone",
        )
    if name == "mask":
        if _as_flag(value) is None and not isinstance(value, list):
            return False  # a text with a gap, or the like
        raise BadRow("ambiguous", f"the row has `mask: {value}`: {known.what}", known.fix)
    if name in ANSWERS_TO_TEXT:
        if schema != "text":
            return False
        fix = f"--columns question=text,answer={name}"
        message = f"`{name}` is not used: {known.what}; name it as the answer: `{fix}`"
        findings.add("unused_column", "warning", message, origin)
        return True
    if name in ("role", "parent_id", "message_id", "message_tree_id", "ts", "thread_ts"):
        if schema != "text":
            return False
        raise BadRow(
            "single_message",
            f"the row has `{name}`: {known.what.partition(': ')[2]}, as of {known.seen}",
            known.fix,
        )
    if known.treatment == "refused":
        raise BadRow(
            "preference" if name not in MEDIA else "media", f"the row has `{name}`: {known.what}", known.fix
        )
    fix = f"; {known.fix}" if known.fix else ""
    findings.add("unused_column", "warning", f"`{name}` is not used: {known.what}{fix}", origin)
    return True


def _keeps_out(name: str, value: Any) -> bool:
    """Whether a column says that its row is none to train on."""
    if name in SPLITS:
        return is_held_out(value)
    if name in STATUSES:
        return isinstance(value, str) and value.strip().casefold() in NOT_ACCEPTED
    return _as_flag(value) is (name in IS_HELD_OUT)


def _with_context(record: Mapping[str, Any], schema: str, known: set[str]) -> Mapping[str, Any] | None:
    """The passage that a question asks about, as text before it; of an instruction as its `context`."""
    if _CONTEXTS.isdisjoint(record) or (found := context_of(record)) is None:
        return None
    column, text = found
    known.add(column)
    if schema == "alpaca":
        return {**{key: value for key, value in record.items() if key != column}, "context": text}
    pair = pair_of(record)
    question = pair[0] if pair else None
    if question is None or not isinstance(record[question], str):
        return None
    return {**record, question: f"{text}\n\n{record[question]}"}


# ------------------------------------------------------------------------------------------------ messages


def _turns(turns: Sequence[Any], findings: Findings, origin: Origin) -> list[Any] | None:
    """Messages whose keys are in Phlora's terms; None where they are already."""
    for turn in turns:
        if not (type(turn) is dict or isinstance(turn, Mapping)):
            break
        if not _PLAIN.issuperset(turn) or isinstance(turn.get("content"), list):
            break
    else:
        return None
    return [
        _turn(turn, number, findings, origin) if isinstance(turn, Mapping) else turn
        for number, turn in enumerate(turns, 1)
    ]


def _turn(turn: Mapping[str, Any], number: int, findings: Findings, origin: Origin) -> dict[str, Any]:
    trained: list[bool] = []
    weight, has_weight = 1.0, False
    rest: dict[str, Any] = {}
    turn = with_known_message_keys(turn, f"turn {number}")
    for key, value in turn.items():
        where = f"turn {number} has `{key}`"
        if key in ("content", "value") and isinstance(value, list):
            rest[key] = [_part(part, where) for part in value]
        elif value is None or key in _PLAIN:
            rest[key] = value
        elif key == "loss" and isinstance(value, float) and value not in (0.0, 1.0):
            weight, has_weight = weight * _weight(value, where), True
        elif key in TRAINED:
            trained.append(_flag(value, where))
        elif key in UNTRAINED:
            trained.append(not _flag(value, where))
        elif key in EXCLUDED and (excluded := _as_flag(value)) is not None:
            trained.append(not excluded)
        elif key in WEIGHTS:
            weight, has_weight = weight * _weight(value, where), True
        elif key == "train_detail":
            trained.append(_whole_turn(value, where))
        elif key in ("mask", "rejected"):
            raise BadRow("ambiguous", f"{where}: {_MESSAGE_KEY[key].what}", _MESSAGE_KEY[key].fix)
        elif key in _MESSAGE_KEY and is_empty(value):
            continue
        elif key in _MESSAGE_KEY and _MESSAGE_KEY[key].treatment == "refused":
            raise BadRow("media", f"{where}: {_MESSAGE_KEY[key].what}", _MESSAGE_KEY[key].fix)
        elif key in RATINGS:
            known = _MESSAGE_KEY[key]
            message = f"`{key}` of messages is not used: {known.what}; {known.fix}"
            findings.add("unused_key", "warning", message, origin)
            rest[key] = value
        else:
            if key not in _MESSAGE_KEY and _SPEAKER.intersection(turn):
                findings.unknown_keys.add(str(key)[:40])
            rest[key] = value
    if trained:
        rest["train"] = all(trained)
    if has_weight:
        rest["weight"] = weight
    return rest


def _part(part: Any, where: str) -> Any:
    """A part of a content with its flags as `train`; whether parts agree is asked where they are joined."""
    names = {*TRAINED, *UNTRAINED, *WEIGHTS}
    if isinstance(part, Mapping):
        part = with_known_message_keys(part, where)
    if not isinstance(part, Mapping) or not names.intersection(part):
        return part
    flags = []
    for name in names.intersection(part):
        if part[name] is None:
            continue
        flag = _flag(part[name], f"{where}, a part of it `{name}`")
        flags.append(not flag if name in UNTRAINED else flag)
    rest = {key: value for key, value in part.items() if key not in names}
    return {**rest, "train": all(flags)} if flags else rest


def _whole_turn(value: Any, where: str) -> bool:
    """Axolotl's offsets, where they say the same of all of a turn."""
    spans = value if isinstance(value, list) else []
    flags = {span.get("train") for span in spans if isinstance(span, Mapping)}
    if len(flags) != 1 or not isinstance(flag := flags.pop(), bool):
        raise BadRow(
            "partly_trained", f"{where}: a part of a turn cannot be trained", _MESSAGE_KEY["train_detail"].fix
        )
    return flag


def _as_flag(value: Any) -> bool | None:
    """True or false, also as a number or a text; None for anything else."""
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    return _FLAGS.get(value.strip().lower()) if isinstance(value, str) else None


def _flag(value: Any, where: str) -> bool:
    flag = _as_flag(value)
    if flag is not None:
        return flag
    by_turn = "; for turns one by one, `train` in each message" if isinstance(value, list) else ""
    raise BadRow("wrong_type", f"{where}: {kind_of(value)[:60]}", f"true or false{by_turn}")


def _weight(value: Any, where: str) -> float:
    if isinstance(value, str):
        try:
            value = float(value.replace("_", "?"))  # Python's own mark between digits is nobody else's
        except ValueError:
            raise BadRow("wrong_type", f"{where}: a text that is no number", "a number, at least 0") from None
    try:
        weight = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        weight = math.inf
    if not 0 <= weight < math.inf:
        raise BadRow("wrong_type", f"{where}: {kind_of(value)[:60]}", "a number, at least 0")
    return weight
