"""The arguments of a call, wherever they are written: in the call, or in a dictionary that it spreads with `**`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import libcst as cst

from phlora.migrate.code import NOT_LITERAL, Code, plain
from phlora.migrate.edits import Edits, Entries
from phlora.names import DATASET_KWARGS, SETTINGS, VALUES, Old


@dataclass(frozen=True)
class Given:
    """One argument: its name, its value, and the call or dictionary where it is the `index`-th entry."""

    name: str
    value: cst.BaseExpression
    holder: Entries
    index: int


@dataclass(frozen=True)
class Arguments:
    """The named arguments of a call.

    Attributes:
        given: name -> the argument; of a name that is given twice the last.
        are_all_known: whether nothing is spread into the call that cannot be read here.
    """

    given: Mapping[str, Given]
    are_all_known: bool


def arguments_of(code: Code, call: cst.Call) -> Arguments:
    """The named arguments of a call, those of a spread dictionary included."""
    found: list[Given] = []
    known = True
    for index, argument in enumerate(call.args):
        if argument.keyword is not None:
            found.append(Given(argument.keyword.value, argument.value, call, index))
        elif argument.star == "**":
            entries, are_all = _spread(code, argument.value, frozenset())
            known = known and are_all
            found += entries
        elif argument.star == "*":
            known = False
    return Arguments({entry.name: entry for entry in found}, known)


def _spread(code: Code, value: cst.BaseExpression, seen: frozenset[cst.CSTNode]) -> tuple[list[Given], bool]:
    """The entries behind `**value`, and whether they are all that there are."""
    holder = code.resolved(value)
    if holder in seen:
        return [], False
    entries, are_all = _entries(code, holder, seen | {holder})
    if isinstance(value, cst.Name):
        for use in code.uses(value):
            added, are_read = _added_later(code, use, seen | {holder})
            entries, are_all = entries + added, are_all and are_read
    return entries, are_all


def entries_of(code: Code, holder: cst.CSTNode) -> list[Given] | None:
    """The entries of a dictionary display or of `dict(...)`; None where they cannot all be read."""
    entries, are_all = _entries(code, holder, frozenset({holder}))
    return entries if are_all else None


def written_entries(code: Code, holder: Entries) -> list[Given]:
    """The entries that are written in a dictionary display or in `dict(...)` itself; none of any other call."""
    if isinstance(holder, cst.Dict):
        return [
            Given(str(code.literal(element.key)), element.value, holder, index)
            for index, element in enumerate(holder.elements)
            if isinstance(element, cst.DictElement) and isinstance(element.key, cst.SimpleString)
        ]
    if not (isinstance(holder.func, cst.Name) and holder.func.value == "dict"):
        return []
    named = [(index, argument) for index, argument in enumerate(holder.args) if argument.keyword is not None]
    return [
        Given(argument.keyword.value, argument.value, holder, index)
        for index, argument in named
        if argument.keyword
    ]


def _entries(code: Code, holder: cst.CSTNode, seen: frozenset[cst.CSTNode]) -> tuple[list[Given], bool]:
    found: list[Given] = []
    if isinstance(holder, cst.Dict):
        are_all = True
        for index, element in enumerate(holder.elements):
            if isinstance(element, cst.StarredDictElement):
                inner, are_read = _spread(code, element.value, seen)
                found, are_all = found + inner, are_all and are_read
                continue
            assert isinstance(element, cst.DictElement)
            if isinstance(element.key, cst.SimpleString):
                found.append(Given(str(code.literal(element.key)), element.value, holder, index))
            else:
                are_all = False
        return found, are_all
    if isinstance(holder, cst.Call) and isinstance(holder.func, cst.Name) and holder.func.value == "dict":
        return _named(code, holder, seen)
    return [], False


def _named(code: Code, call: cst.Call, seen: frozenset[cst.CSTNode]) -> tuple[list[Given], bool]:
    """The arguments of `dict(...)` or `update(...)`: what they put into a dictionary."""
    found: list[Given] = []
    are_all = True
    for index, argument in enumerate(call.args):
        if argument.keyword is not None:
            found.append(Given(argument.keyword.value, argument.value, call, index))
            continue
        inner, are_read = ([], False) if argument.star == "*" else _spread(code, argument.value, seen)
        found, are_all = found + inner, are_all and are_read
    return found, are_all


def _added_later(code: Code, use: cst.Name, seen: frozenset[cst.CSTNode]) -> tuple[list[Given], bool]:
    """What `name.update(...)` adds; nothing where a use adds nothing."""
    attribute = code.parent(use)
    if (
        not isinstance(attribute, cst.Attribute)
        or attribute.value is not use
        or attribute.attr.value != "update"
    ):
        return [], True
    call = code.parent(attribute)
    if not isinstance(call, cst.Call) or call.func is not attribute:
        return [], True
    return _named(code, call, seen)


def item_keys(code: Code, value: cst.BaseExpression) -> list[tuple[str, cst.SimpleString]]:
    """The literal keys in `name["key"]`, of a dictionary that is spread as `**name`."""
    if not isinstance(value, cst.Name):
        return []
    found = []
    for use in code.uses(value):
        subscript = code.parent(use)
        if (
            not isinstance(subscript, cst.Subscript)
            or subscript.value is not use
            or len(subscript.slice) != 1
        ):
            continue
        inner = subscript.slice[0].slice
        if isinstance(inner, cst.Index) and isinstance(inner.value, cst.SimpleString):
            found.append((str(inner.value.evaluated_value), inner.value))
    return found


# ---------------------------------------------------------------------------------------------- today's names


def update_arguments(
    edits: Edits, call: cst.Call, table: Mapping[str, Old], *, only: frozenset[str] | None = None
) -> Arguments:
    """Give the arguments of a call their names of today; what is `moved` is left to the caller.

    Args:
        table: old name -> what became of it.
        only: the old names that count; all by default.

    Returns:
        The arguments as they were.
    """
    code = edits.code
    arguments = arguments_of(code, call)
    for entry in arguments.given.values():
        old = table.get(entry.name)
        if old is None:
            _update_value(edits, entry)
        elif only is None or old.name in only:
            update(edits, entry, old, arguments)
    for argument in call.args:
        if argument.star == "**":
            _update_keys(edits, argument.value, table)
    return arguments


def update(edits: Edits, entry: Given, old: Old, arguments: Arguments) -> None:
    """What becomes of one argument of an old name."""
    place = entry.value
    if old.fate == "idle":
        remove(edits, entry, f"{old.name} is left out: {old.says}")
    elif old.fate == "gone":
        value = edits.code.literal(entry.value)
        if value is not NOT_LITERAL and _is_in(value, old.values):
            remove(edits, entry, f"{old.name} is left out: it asked for nothing")
        else:
            edits.leave(place, f"{old.name} is gone: {old.says}")
    elif old.fate == "renamed":
        _rename(edits, entry, old, arguments)


def asks_for_nothing(code: Code, entry: Given, old: Old) -> bool:
    """Whether an argument of an old name has a value that meant the default."""
    value = code.literal(entry.value)
    return value is not NOT_LITERAL and _is_in(value, old.values) and old.value(value) is None


def _rename(edits: Edits, entry: Given, old: Old, arguments: Arguments) -> None:
    code = edits.code
    value = code.literal(entry.value)
    other = arguments.given.get(old.new)
    if other is not None:
        if not _gives_way(edits, entry, old, other):
            return
        edits.of(other.holder).removed.add(other.index)
    new_values = [new for new in old.values.values() if new is not None]
    if value is NOT_LITERAL and new_values:
        edits.leave(
            entry.value,
            f"{old.name} is now {old.new}, with other values ({_pairs(old)}): say which",
        )
        return
    if old.is_share and isinstance(value, int | float) and value >= 1:
        edits.leave(entry.value, f"{old.name} is now {old.new}, where numbers from 1 on count steps")
        return
    is_translated = value is not NOT_LITERAL and _is_in(value, old.values)
    if asks_for_nothing(code, entry, old):
        remove(edits, entry, f"{old.name} is left out: {code.text(entry.value)} asks for nothing")
        return
    edits.of(entry.holder).renamed[entry.index] = old.new
    if is_translated:
        edits.of(entry.holder).values[entry.index] = plain(old.value(value))
        edits.say(entry.value, f"{old.name}={code.text(entry.value)} is {old.new}={old.value(value)!r}")
    else:
        edits.say(entry.value, f"{old.name} is {old.new}")


def _gives_way(edits: Edits, entry: Given, old: Old, other: Given) -> bool:
    """Of an argument that is given by both names: whether the new one goes, since it asks for nothing."""
    text, value = edits.code.text(entry.value), edits.code.literal(other.value)
    if edits.code.text(other.value) == text or (old.weaker and value is not NOT_LITERAL and value):
        remove(edits, entry, f"{old.name} is left out: {old.new} is given as well")
        return False
    if value is NOT_LITERAL or value:
        edits.leave(entry.value, f"{old.name} is now {old.new}, which is given as well: keep one of them")
        return False
    return True


def _pairs(old: Old) -> str:
    return ", ".join(f"{given} is {new!r}" for given, new in old.values.items() if new is not None)


def _is_in(value: Any, values: Mapping[Any, Any]) -> bool:
    try:
        return value in values
    except TypeError:
        return False


def _update_value(edits: Edits, entry: Given) -> None:
    """A setting that kept its name, and whose value is another one."""
    code = edits.code
    if entry.name == "dataset_kwargs":
        _update_dataset_kwargs(edits, entry)
        return
    value = code.literal(entry.value)
    table = VALUES.get(entry.name, {})
    if value is NOT_LITERAL or not _is_in(value, table) or isinstance(entry.value, cst.Name):
        return
    new = table[value]
    if new is None:
        remove(edits, entry, f"{entry.name} is left out: {value!r} is gone")
        return
    edits.of(entry.holder).values[entry.index] = plain(new)
    edits.say(entry.value, f"{entry.name}: {value!r} is {new!r}")


def _update_dataset_kwargs(edits: Edits, entry: Given) -> None:
    inner = entries_of(edits.code, edits.code.resolved(entry.value))
    idle = [part for part in inner or () if part.name in DATASET_KWARGS]
    for part in idle:
        remove(edits, part, f"dataset_kwargs: {part.name} is left out: {DATASET_KWARGS[part.name]}")
    if inner and len(idle) == len(inner) and inner[0].holder is entry.value:
        edits.of(entry.holder).removed.add(entry.index)


def _update_keys(edits: Edits, value: cst.BaseExpression, table: Mapping[str, Old]) -> None:
    """`config["old"]` of a dictionary that is spread into the call."""
    for key, node in item_keys(edits.code, value):
        old = table.get(key)
        if old is None or edits.is_touched(node):
            continue
        if old.fate == "renamed" and not any(new is not None for new in old.values.values()):
            quote = node.quote
            edits.replace(node, node.with_changes(value=f"{quote}{old.new}{quote}"))
            edits.say(node, f"{key} is {old.new}")
        else:
            what = f"is now {old.spelled}" if old.new else "is gone"
            edits.leave(node, f"{key} {what}" + (f": {old.says}" if old.says else ""))


def remove(edits: Edits, entry: Given, why: str) -> None:
    edits.of(entry.holder).removed.add(entry.index)
    edits.say(entry.value, why)


def update_attributes(edits: Edits, name: cst.Name, table: Mapping[str, Old]) -> None:
    """`args.old` of an object whose arguments were renamed."""
    code = edits.code
    for use in code.uses(name):
        attribute = code.parent(use)
        if not isinstance(attribute, cst.Attribute) or attribute.value is not use:
            continue
        old = table.get(attribute.attr.value)
        if old is None or edits.is_touched(attribute.attr):
            continue
        if old.fate == "renamed" and not any(new is not None for new in old.values.values()):
            edits.replace(attribute.attr, cst.Name(old.new))
            edits.say(attribute, f"{code.text(attribute)} is {use.value}.{old.new}")
        elif not old.new or old.to not in ("", SETTINGS):
            edits.leave(attribute, f"{code.text(attribute)} is gone" + (f": {old.says}" if old.says else ""))
