"""Old names in dictionaries of which it cannot be read where they go, and old values of fields: left with a comment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import libcst as cst

from phlora.migrate.code import Code
from phlora.migrate.edits import Edits
from phlora.migrate.given import Given, arguments_of, written_entries
from phlora.names import VALUES, Old


def leave_old_names(edits: Edits, configs: Iterable[cst.Call], table: Mapping[str, Old]) -> None:
    """Comment on old names in the dictionaries of a module, some configuration of which gets what cannot be read.

    Args:
        configs: the calls that make configurations.
        table: old name -> what became of it.
    """
    code = edits.code
    unread = [call for call in configs if not arguments_of(code, call).are_all_known]
    if not unread:
        return
    spread = [call for call in code.all(cst.Call) if any(argument.star == "**" for argument in call.args)]
    read = {
        (entry.holder, entry.index) for call in spread for entry in arguments_of(code, call).given.values()
    }
    into = code.text(unread[0].func)
    for entry in _in_dictionaries(code):
        old = table.get(entry.name)
        if old is not None and old.fate != "moved" and (entry.holder, entry.index) not in read:
            what = f"is {old.new} now" if old.fate == "renamed" else "is gone"
            edits.leave(entry.value, f"{entry.name} {what}, if this reaches {into}")


def leave_old_value(edits: Edits, name: str, statement: cst.CSTNode) -> None:
    """Comment on the default of a field that has another name now: `optim: str = field(default="adamw_hf")`."""
    value = getattr(statement, "value", None)
    if isinstance(value, cst.Call):
        defaults = [each.value for each in value.args if each.keyword and each.keyword.value == "default"]
        value = defaults[0] if defaults else None
    given = edits.code.literal(value) if value is not None else None
    if isinstance(given, str) and given in VALUES.get(name, {}):
        new = VALUES[name][given]
        edits.leave(statement, f"{name}: {given!r} is {'gone' if new is None else f'{new!r} now'}")


def _in_dictionaries(code: Code) -> Iterable[Given]:
    for holder in code.all(cst.Dict, cst.Call):
        yield from written_entries(code, holder)
