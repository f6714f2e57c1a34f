"""Import statements as they are written: what becomes of one, laid out as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import libcst as cst

from phlora.migrate.code import dotted


@dataclass
class ImportLine:
    """What becomes of one import statement: aliases by their place -> their new full name, or None: nobody needs it."""

    moved: dict[int, str | None] = field(default_factory=dict)
    aliased: dict[int, str] = field(default_factory=dict)
    added: list[tuple[str, str, str]] = field(default_factory=list)


def with_lines_above(lines: Sequence[cst.EmptyLine], updated: Any) -> Any:
    if isinstance(updated, cst.FlattenSentinel):
        first, *rest = updated
        return cst.FlattenSentinel([with_lines_above(lines, first), *rest])
    if not hasattr(updated, "leading_lines"):
        return updated
    return updated.with_changes(leading_lines=[*lines, *updated.leading_lines])


def with_statements_above(new: Sequence[cst.BaseStatement], updated: Any) -> Any:
    """Statements above another one, and below what is written above it, if that is for the whole module."""
    first, *rest = list(updated) if isinstance(updated, cst.FlattenSentinel) else [updated]
    if first is cst.RemoveFromParent():
        return cst.FlattenSentinel(list(new))
    is_import = isinstance(first, cst.SimpleStatementLine) and isinstance(
        first.body[0], cst.Import | cst.ImportFrom
    )
    lines = list(getattr(first, "leading_lines", ()))
    if not is_import and (not lines or lines[0].comment is not None):
        first = with_lines_above([cst.EmptyLine(indent=False)], first)
    return cst.FlattenSentinel([*new, first, *rest])


def is_preface(statement: cst.CSTNode) -> bool:
    """A module's docstring, imports from the future, and the stand-ins of a notebook."""
    if not isinstance(statement, cst.SimpleStatementLine):
        return False
    first = statement.body[0]
    if isinstance(first, cst.ImportFrom):
        return dotted(first.module) == "__future__"
    if not isinstance(first, cst.Expr):
        return False
    value = first.value
    is_stand_in = isinstance(value, cst.Name) and value.value.startswith("_phlora_")
    return is_stand_in or isinstance(value, cst.SimpleString | cst.ConcatenatedString)


def from_module(name: str) -> Callable[[Any], Any]:
    return lambda old: old.with_changes(module=_module(name))


def rewritten(statement: Any, line: ImportLine) -> list[Any]:
    """The import statements that stand in the place of one."""
    is_from = isinstance(statement, cst.ImportFrom)
    groups: dict[str, list[cst.ImportAlias]] = {}
    kept = []
    aliases = [] if isinstance(statement.names, cst.ImportStar) else statement.names
    for index, alias in enumerate(aliases):
        if index not in line.moved:
            kept.append(alias)
            continue
        new = line.moved[index]
        if new is None:
            continue
        module, _, name = new.rpartition(".")
        if is_from:
            as_part = cst.AsName(cst.Name(line.aliased[index])) if index in line.aliased else alias.asname
            groups.setdefault(module, []).append(alias.with_changes(name=cst.Name(name), asname=as_part))
        else:
            local = dotted(alias.asname.name) if alias.asname is not None else line.aliased.get(index)
            groups.setdefault("", []).append(_import_alias(new, local))
    for module, name, local in line.added:
        as_name = None if local == name else local
        groups.setdefault(module, []).append(_import_alias(name, as_name))
    whole = groups.pop("", [])
    if is_from and not kept and aliases and not whole and len(groups) == 1:
        # Everything moved to one place: the statement keeps its layout.
        ((module, entries),) = groups.items()
        return [statement.with_changes(module=_module(module), names=_laid_out(aliases, entries))]
    result: list[Any] = []
    if isinstance(statement.names, cst.ImportStar):
        result.append(statement)
    elif kept:
        own = groups.pop(dotted(statement.module), []) if is_from else []
        result.append(statement.with_changes(names=_laid_out(aliases, [*kept, *own])))
    result += [cst.Import(_laid_out([], [alias])) for alias in _unique(whole)]
    result += [
        cst.ImportFrom(module=_module(module), names=_laid_out([], entries))
        for module, entries in groups.items()
    ]
    return result


def _laid_out(old: Sequence[cst.ImportAlias], new: list[cst.ImportAlias]) -> list[cst.ImportAlias]:
    """Aliases as a list, with what stood between the old ones between them, and behind the last what stood there.

    Without old ones they stand on one line, whatever stood behind them where they come from.
    """
    new = _unique(new)
    if not any(alias in old for alias in new):
        new.sort(key=lambda alias: (not dotted(alias.name)[:1].isupper(), dotted(alias.name)))
    commas = [alias.comma for alias in old if isinstance(alias.comma, cst.Comma)]
    is_closed = bool(old) and isinstance(old[-1].comma, cst.Comma)
    if len(commas) > is_closed:
        between = commas[0].with_changes(whitespace_after=_bare(commas[0].whitespace_after))
    else:
        between = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    *rest, last = new
    listed = [
        alias
        if old and isinstance(alias.comma, cst.Comma) and alias is not _last(old)
        else alias.with_changes(comma=between)
        for alias in rest
    ]
    ending = old[-1].comma if old else cst.MaybeSentinel.DEFAULT
    return [*listed, last if last is _last(old) else last.with_changes(comma=ending)]


def _last(old: Sequence[cst.ImportAlias]) -> cst.ImportAlias | None:
    return old[-1] if old else None


def _bare(space: Any) -> Any:
    """White space without the comments in it."""
    if not isinstance(space, cst.ParenthesizedWhitespace):
        return space
    return space.with_changes(first_line=cst.TrailingWhitespace(), empty_lines=[])


def _unique(aliases: list[cst.ImportAlias]) -> list[cst.ImportAlias]:
    seen: dict[tuple[str, str], cst.ImportAlias] = {}
    for alias in aliases:
        seen.setdefault((dotted(alias.name), local_name(alias, is_from=True)), alias)
    return list(seen.values())


def _import_alias(name: str, as_name: str | None) -> cst.ImportAlias:
    as_part = cst.AsName(cst.Name(as_name)) if as_name else None
    return cst.ImportAlias(name=_module(name), asname=as_part)


def _module(name: str) -> Any:
    return cst.parse_expression(name)


def alias_at(statement: cst.Import | cst.ImportFrom, index: int) -> cst.ImportAlias:
    assert not isinstance(statement.names, cst.ImportStar)
    return statement.names[index]


def local_name(alias: cst.ImportAlias, *, is_from: bool) -> str:
    if alias.asname is not None:
        return dotted(alias.asname.name)
    name = dotted(alias.name)
    return name if is_from else name.partition(".")[0]
